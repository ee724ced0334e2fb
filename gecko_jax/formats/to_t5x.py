"""A model as the legacy checkpoint that t5x and t5x_retrieval restore.

    checkpoint_<step>/checkpoint                               one msgpack map
    checkpoint_<step>/target.encoder.encoder_norm.scale/       one zarr array each
    gecko/gecko.json  gecko/vocabulary.model                   settings T5X cannot store

Version 3 of the format, without an optimizer. Every parameter is a zarr array, which
the map names by a TensorStore spec with a relative path, as t5x does. One parameter is
in memory at a time.
"""

import math
import pathlib
from typing import Any

import numpy as np

from gecko_jax.formats import model_folder, parameters, tensors
from gecko_jax.io import writing

SETTINGS = "gecko"  # folder of what T5X does not store
_CHUNK_BYTES = 64 * 2**20  # as in t5x


def save(path: pathlib.Path, model_files: model_folder.ModelFiles) -> None:
    """Writes a complete checkpoint or none; an earlier export is replaced.

    Raises ValueError if the folder contains other files, or the encoder is not a T5.
    """
    from flax import serialization

    family = model_files.encoder_config.family
    if family != "t5":
        raise ValueError(
            f"--to=t5x: t5x has no encoder of the family {family!r}, only T5; export "
            "with --to=sentence-transformers or --to=gecko"
        )

    _check_replaceable(path)
    flat = parameters.flatten_to_tensors(model_files.params)
    with writing.write_folder(path) as folder:
        checkpoint = folder / f"checkpoint_{model_files.step}"
        checkpoint.mkdir()
        specs: dict[str, Any] = dict.fromkeys(flat)
        for name, tensor in tensors.in_reading_order(flat):
            place = f"target.{name.replace('/', '.')}"
            specs[name] = _write_array(checkpoint, place, tensor)
        state = {"step": np.int32(model_files.step)}
        optimizer = {"state": state, "target": parameters.unflatten(specs)}
        contents = {"version": 3, "optimizer": optimizer}
        packed = serialization.msgpack_serialize(contents)
        (checkpoint / "checkpoint").write_bytes(packed)
        (folder / SETTINGS).mkdir()
        model_folder.write_model_json(folder / SETTINGS, model_files)


def _check_replaceable(path: pathlib.Path) -> None:
    """Refuses all but an export: t5x may have added checkpoints to its `model_dir`."""
    settings = f"{SETTINGS}/{model_folder.MODEL_JSON}"
    others = [f"{SETTINGS}/{name}" for name in model_folder.VOCABULARY_FILES]
    if (path / settings).exists():
        step = model_folder.load_settings(path / SETTINGS).step
        others += [f"checkpoint_{step}/{name}" for name in ("checkpoint", "target.*")]
    writing.check_replaceable(path, [settings], others)


def _write_array(
    folder: pathlib.Path, name: str, tensor: tensors.Tensor
) -> dict[str, Any]:
    """Writes one zarr array; returns its spec for the map."""
    import tensorstore

    metadata = {
        "shape": list(tensor.shape),
        "chunks": choose_chunks(tensor.shape),
        "compressor": {"id": "gzip", "level": 1},  # as in t5x
    }
    stored = {"dtype": "<f4", "fill_value": None, "dimension_separator": "."}
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder.resolve() / name)},
        "metadata": metadata | stored,
    }
    tensorstore.open(spec, create=True).result().write(tensor.read()).result()
    return {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": metadata,
    }


def choose_chunks(shape: tuple[int, ...]) -> list[int]:
    """Returns the shape of chunks of at most 64 MiB that divide a float32 array."""
    chunks = list(shape)
    while 4 * math.prod(chunks) > _CHUNK_BYTES:
        longest = chunks.index(max(chunks))
        size = chunks[longest]
        factor = next(f for f in range(2, size + 1) if size % f == 0)
        chunks[longest] = size // factor
    return chunks
