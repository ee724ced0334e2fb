"""A Gecko as the legacy checkpoint that t5x and t5x_retrieval restore.

    checkpoint_<step>/checkpoint                               one msgpack map
    checkpoint_<step>/target.encoder.encoder_norm.scale/       one zarr array each
    gecko/gecko.json  gecko/vocabulary.model                   what t5x has no place for

Version 3 of the format, without an optimizer. Every parameter is a zarr array, named
in the map by a tensorstore spec with a path relative to it, as t5x writes them.
"""

import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from gecko_jax import files, model_folder, parameters

FORMAT_VERSION = 3
SETTINGS = "gecko"

# Of an array on disk, as in t5x.
_CHUNK_BYTES = 64 * 2**20
_COMPRESSOR = {"id": "gzip", "level": 1}


def save(path: pathlib.Path, model_files: model_folder.ModelFiles) -> None:
    """Writes the checkpoint, whole or not at all; an export that is there is replaced.

    Raises:
        ValueError: The folder holds something else.
    """
    from flax import serialization

    files.check_replaceable(path, f"{SETTINGS}/{model_folder.MODEL_JSON}")
    with files.write_folder(path) as folder:
        checkpoint = folder / f"checkpoint_{model_files.step}"
        checkpoint.mkdir()
        specs = {
            name: _write_array(checkpoint, f"target.{name.replace('/', '.')}", leaf)
            for name, leaf in parameters.flatten(model_files.params).items()
        }
        contents = {
            "version": FORMAT_VERSION,
            "optimizer": {
                "state": {"step": np.int32(model_files.step)},
                "target": parameters.unflatten(specs),
            },
        }
        (checkpoint / "checkpoint").write_bytes(
            serialization.msgpack_serialize(contents)
        )
        (folder / SETTINGS).mkdir()
        model_folder.write_model_json(folder / SETTINGS, model_files)


def _write_array(folder: pathlib.Path, name: str, leaf: Any) -> dict[str, Any]:
    """Writes one zarr array; returns the spec that stands for it in the map."""
    import tensorstore

    array = np.asarray(leaf, np.float32)
    metadata = {
        "shape": list(array.shape),
        "chunks": choose_chunks(array),
        "compressor": _COMPRESSOR,
    }
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder / name)},
            "metadata": metadata
            | {"dtype": "<f4", "fill_value": None, "dimension_separator": "."},
        },
        create=True,
    ).result()
    store.write(array).result()
    return {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": metadata,
    }


def choose_chunks(array: Float[np.ndarray, "..."]) -> list[int]:
    """Returns a shape of at most 64 MiB that divides the array's evenly."""
    chunks = list(array.shape)
    while math.prod(chunks) * array.itemsize > _CHUNK_BYTES:
        longest = chunks.index(max(chunks))
        size = chunks[longest]
        factor = next(f for f in range(2, size + 1) if size % f == 0)
        chunks[longest] = size // factor
    return chunks
