"""Safetensors files, read and written one tensor at a time.

Files have the names that Hugging Face uses:

    model.safetensors                                    all tensors in one file, or
    model-00001-of-00002.safetensors, ...                shards, and
    model.safetensors.index.json                         the shard of each tensor
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import safetensors

from gecko_jax.formats import source_files, tensors
from gecko_jax.io import field_rules, writing

# Largest file of several tensors.
SHARD_BYTES = 2 * 2**30

SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_FILE_NAME = field_rules.Kind(
    f"a {SUFFIX} file name",
    lambda v: (
        isinstance(v, str)
        and v.isprintable()
        and v.endswith(SUFFIX)
        and pathlib.PurePath(v).name == v
    ),
)
_INDEX_FIELDS = {"weight_map": field_rules.map_of(_FILE_NAME)}

# Readable dtypes; all of them convert to float32 without loss.
_FLOATS = ("F32", "BF16", "F16")

# Writable dtypes: name -> name in the file, and NumPy dtype with its byte order.
_WRITTEN = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2")}
DTYPES = tuple(_WRITTEN)


def read(folder: pathlib.Path) -> dict[str, tensors.Tensor]:
    """Opens all tensors of a folder, in one file or in shards."""
    if (folder / f"model{SUFFIX}").exists():
        return open_file(writing.member(folder, f"model{SUFFIX}"))
    index = folder / f"model{_INDEX}"
    if not index.exists():
        raise ValueError(
            f"{folder}: neither model{SUFFIX} nor {index.name} here; copy the weights"
        )
    values = source_files.read_json(index)
    field_rules.check(index, values, _INDEX_FIELDS, source_files.DAMAGED)
    shards: dict[str, str] = values["weight_map"]
    if not shards:
        raise source_files.damaged(index, "an empty weight_map")
    weights: dict[str, tensors.Tensor] = {}
    for shard in sorted(set(shards.values())):
        opened = open_file(writing.member(folder, shard))
        lost = [n for n, file in shards.items() if file == shard and n not in opened]
        if lost:
            raise ValueError(
                f"{folder / shard}: {lost[0]!r} should be in this file and is not; "
                "copy the file again"
            )
        weights |= opened
    return weights


def names(folder: pathlib.Path) -> list[str]:
    """Returns the names of the files that `write` wrote."""
    return sorted(path.name for path in folder.glob(f"model*{SUFFIX}*"))


def has_tensors(folder: pathlib.Path) -> bool:
    """Whether a folder has a file that `read` opens."""
    return any((folder / f"model{suffix}").exists() for suffix in (SUFFIX, _INDEX))


def open_file(path: pathlib.Path) -> dict[str, tensors.Tensor]:
    """Opens all tensors of a file, which are read as float32."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy it from the original model") from None
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from None
    for name, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise ValueError(
                f"{path}: {name} is {dtype}; the weights must be one of "
                f"{', '.join(_FLOATS)}, not quantized"
            )

    def open_tensor(name: str) -> tensors.Tensor:
        def read_tensor() -> np.ndarray:
            # Open the file for each tensor: the pages of an open file stay in memory.
            with safetensors.safe_open(path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name), np.float32)

        return tensors.Tensor(shapes[name], read_tensor, f"{path}:{name}")

    return {name: open_tensor(name) for name in shapes}


def write(
    folder: pathlib.Path,
    weights: Mapping[str, tensors.Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "float32",
) -> None:
    """Writes all tensors into an empty folder, with one of them in memory at a time.

    Files have at most `shard_bytes`, unless a single tensor is larger. For a smaller
    dtype than float32, the tensors must have passed `Tensor.round`.
    """
    shards: list[dict[str, tensors.Tensor]] = [{}]
    sizes = [0]
    for name, tensor in tensors.in_reading_order(weights):
        nbytes = tensor.size * np.dtype(dtype).itemsize
        if shards[-1] and sizes[-1] + nbytes > shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += nbytes
    if len(shards) == 1:
        _write_file(folder / f"model{SUFFIX}", shards[0], dtype)
        return
    files = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}{SUFFIX}"
        _write_file(folder / file, shard, dtype)
        files |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": files}
    (folder / f"model{_INDEX}").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: pathlib.Path, weights: Mapping[str, tensors.Tensor], dtype: str
) -> None:
    """Writes the format by hand: the library needs all tensors in memory."""
    name_in_file, numpy_dtype = _WRITTEN[dtype]
    # Older releases of transformers require the entry "format".
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.size * np.dtype(numpy_dtype).itemsize
        entry = {"dtype": name_in_file, "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in weights.values():
            _append(file, tensor, numpy_dtype)


def _append(file: BinaryIO, tensor: tensors.Tensor, numpy_dtype: str) -> None:
    # A separate function, so that the array is freed before the next one is read.
    array = np.ascontiguousarray(tensor.read(), numpy_dtype)
    file.write(array.reshape(-1).view(np.uint8).data)
