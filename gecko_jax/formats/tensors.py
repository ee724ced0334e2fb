"""Tensors that lie on disk: read one at a time, written one at a time.

A `Tensor` has a shape now and its numbers when they are asked for, so a checkpoint of
many gigabytes goes from one format to another with one tensor in memory.

What is written is safetensors, in shards as Hugging Face names them:

    model.safetensors                                    all in one file, or
    model-00001-of-00002.safetensors, ...                several, and
    model.safetensors.index.json                         which tensor lies in which
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import safetensors
from jaxtyping import Float

from gecko_jax.io import inputs, reading, writing

# Of a file; a larger tensor gets a file of its own.
SHARD_BYTES = 2 * 2**30

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"

# What becomes float32 without a change of value; also what T5's formats hold.
_FLOATS = ("F32", "BF16", "F16")

# What can be written: name -> safetensors' name, and numpy's with its byte order.
_WRITTEN = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2")}
DTYPES = tuple(_WRITTEN)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A float32 tensor that is read when it is needed.

    Attributes:
        shape: Its shape, known without reading it.
        read: Returns the numbers, in float32.
        source: Where they lie. Tensors cut out of one array share it, and are best
            read one after another.
    """

    shape: tuple[int, ...]
    read: Callable[[], Float[np.ndarray, "..."]]
    source: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers in memory."""
        return 4 * num_values(self.shape)

    def round(self, dtype: str) -> "Tensor":
        """Returns the tensor with numbers that `dtype`, one of `DTYPES`, can hold.

        Raises:
            ValueError: A number is too large for it; raised when the tensor is read.
        """

        def read() -> np.ndarray:
            array = self.read()
            with np.errstate(over="ignore"):
                rounded = array.astype(dtype).astype(np.float32)
            if not np.array_equal(np.isfinite(rounded), np.isfinite(array)):
                raise ValueError(
                    f"the largest weight, {np.abs(array).max():g}, is beyond what "
                    f"{dtype} holds; write float32"
                )
            return rounded

        return dataclasses.replace(self, read=read)

    def transpose(self) -> "Tensor":
        """Returns the matrix with its two axes swapped."""
        return Tensor(self.shape[::-1], lambda: self.read().T, self.source)

    def require_finite(self, name: str) -> "Tensor":
        """Returns the tensor, whose numbers are checked when they are read.

        Args:
            name: Name of the tensor for the error.

        Raises:
            ValueError: A number is NaN or infinite; raised when the tensor is read.
        """

        def read() -> np.ndarray:
            array = self.read()
            if not is_finite(array):
                raise ValueError(_not_finite(name, array, self.source))
            return array

        return dataclasses.replace(self, read=read)


def is_finite(array: Float[np.ndarray, "..."]) -> bool:
    """Whether no number of an array is NaN or infinite."""
    # The extremes need no memory, where `isfinite` allocates a byte for each number.
    # A NaN passes through both.
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def _not_finite(name: str, array: Float[np.ndarray, "..."], source: str) -> str:
    count = int(np.count_nonzero(~np.isfinite(array)))
    place = f" ({source})" if source else ""
    return (
        f"{name}{place}: {count:,} of {array.size:,} weights are NaN or infinite; the "
        "model is damaged or its training diverged, take an earlier checkpoint or copy "
        "it again"
    )


def num_values(shape: tuple[int, ...]) -> int:
    """Returns how many numbers a tensor of this shape holds."""
    return int(np.prod(shape, dtype=np.int64))


def as_tensor(leaf: Any) -> Tensor:
    """Returns an array, of numpy or JAX, as a `Tensor`; a `Tensor` as it is."""
    if isinstance(leaf, Tensor):
        return leaf
    return Tensor(leaf.shape, lambda: np.asarray(leaf, np.float32))


def read(folder: pathlib.Path, stem: str = "model") -> dict[str, Tensor]:
    """Opens all tensors of a folder, in one file or in shards.

    Raises:
        ValueError: A file is missing, truncated, or not where a shard may lie.
    """
    if (folder / f"{stem}{SUFFIX}").exists():
        return _open_file(writing.member(folder, f"{stem}{SUFFIX}"))
    index = writing.member(folder, f"{stem}{INDEX}")
    places = _read_index(index, stem)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if pathlib.PurePath(name).name != name:
            raise ValueError(
                f"{index}: it names the file {name!r}, outside its folder; do not use "
                "this model"
            )
        held = _open_file(writing.member(folder, name))
        lost = [t for t, file in places.items() if file == name and t not in held]
        if lost:
            raise ValueError(
                f"{folder / name}: {lost[0]!r} should be in this file and is not; copy "
                "the file again"
            )
        tensors |= held
    return tensors


def names(folder: pathlib.Path, stem: str = "model") -> list[str]:
    """Returns the names of the files that `write` wrote."""
    return sorted(path.name for path in folder.glob(f"{stem}*{SUFFIX}*"))


def _read_index(index: pathlib.Path, stem: str) -> dict[str, str]:
    """Returns the file that holds each tensor, by the tensor's name."""
    damaged = "the file is damaged, copy it again"
    try:
        values = reading.parse_json(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{index.parent}: neither {stem}{SUFFIX} nor {index.name} here; copy the "
            "weights"
        ) from None
    except ValueError as error:
        raise ValueError(f"{index}: not JSON ({error}); {damaged}") from None
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"{index}: not an index of safetensors files, which has a weight_map from "
            f"tensor to file; {damaged}"
        )
    for name, file in places.items():
        if not isinstance(file, str):
            raise ValueError(
                f"{index}: weight_map[{name!r}] is {inputs.kind(file)}, not the name "
                f"of a file; {damaged}"
            )
        if not file.isprintable() or not file.endswith(SUFFIX):
            raise ValueError(
                f"{index}: weight_map[{name!r}] is {file!r}, not the name of a "
                f"{SUFFIX} file; {damaged}"
            )
    return places


def has_tensors(folder: pathlib.Path, stem: str = "model") -> bool:
    """Whether `read` would find a file."""
    return any((folder / f"{stem}{suffix}").exists() for suffix in (SUFFIX, INDEX))


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, Tensor],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "float32",
) -> None:
    """Writes all tensors, with one of them in memory at a time.

    Args:
        folder: An empty folder.
        tensors: By the name they get. Written by `source`, not in this order.
        stem: The files' name before the dot.
        shard_bytes: Largest file, but for a tensor that is larger.
        dtype: One of `DTYPES`; `Tensor.round` says what it does to the numbers.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].source):
        nbytes = _written_bytes(tensor, dtype)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    if len(shards) == 1:
        _write_file(folder / f"{stem}{SUFFIX}", shards[0], dtype)
        return
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}{SUFFIX}"
        _write_file(folder / file, shard, dtype)
        places |= dict.fromkeys(shard, file)
    total = sum(_written_bytes(tensor, dtype) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")


def _open_file(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy it from where the rest is") from None
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from None
    for name, kind in kinds.items():
        if kind not in _FLOATS:
            raise ValueError(
                f"{path}: {name} is {kind}; the weights must be one of "
                f"{', '.join(_FLOATS)}, not quantized"
            )

    def open_tensor(name: str) -> Tensor:
        def read_tensor() -> np.ndarray:
            # Opened anew each time: pages of a file that stays open stay in memory.
            with safetensors.safe_open(path, framework="numpy") as file:
                return np.asarray(file.get_tensor(name), np.float32)

        return Tensor(shapes[name], read_tensor, f"{path}:{name}")

    return {name: open_tensor(name) for name in shapes}


def _written_bytes(tensor: Tensor, dtype: str) -> int:
    return num_values(tensor.shape) * np.dtype(dtype).itemsize


def _write_file(path: pathlib.Path, tensors: Mapping[str, Tensor], dtype: str) -> None:
    """Writes the format by hand: the library wants a whole file in memory."""
    kind, form = _WRITTEN[dtype]
    # Older releases of transformers refuse a file that does not say so.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _written_bytes(tensor, dtype)
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            _append(file, tensor, form)


def _append(file: BinaryIO, tensor: Tensor, form: str) -> None:
    # A function of its own: its array is gone before the next is read.
    array = np.ascontiguousarray(tensor.read(), form)
    file.write(array.reshape(-1).view(np.uint8).data)
