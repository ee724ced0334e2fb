"""A Gecko as the legacy checkpoint that t5x and t5x_retrieval restore.

    checkpoint_<step>/checkpoint                               one msgpack map
    checkpoint_<step>/target.encoder.encoder_norm.scale/       one zarr array each
    gecko/gecko.json  gecko/vocabulary.model                   what t5x has no place for

Version 3 of the format, without an optimizer. Every parameter is a zarr array, named
in the map by a tensorstore spec with a path relative to it, as t5x writes them. One
of them is in memory at a time.
"""

import math
import pathlib
from typing import Any

import numpy as np

from gecko_jax.formats import model_folder, parameters, tensors
from gecko_jax.io import writing

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

    _check_replaceable(path)
    flat = {
        name: tensors.as_tensor(leaf)
        for name, leaf in parameters.flatten(model_files.params).items()
    }
    with writing.write_folder(path) as folder:
        checkpoint = folder / f"checkpoint_{model_files.step}"
        checkpoint.mkdir()
        specs: dict[str, Any] = dict.fromkeys(flat)
        for name, leaf in sorted(flat.items(), key=lambda item: item[1].source):
            place = f"target.{name.replace('/', '.')}"
            specs[name] = _write_array(checkpoint, place, leaf)
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


def _check_replaceable(path: pathlib.Path) -> None:
    """Refuses all but an export: t5x may have trained on in its `model_dir`."""
    settings = f"{SETTINGS}/{model_folder.MODEL_JSON}"
    own = [f"{SETTINGS}/{model_folder.VOCABULARY}"]
    if (path / settings).exists():
        step = model_folder.load_settings(path / SETTINGS).step
        own += [f"checkpoint_{step}/{name}" for name in ("checkpoint", "target.*")]
    writing.check_replaceable(path, [settings], own)


def _write_array(
    folder: pathlib.Path, name: str, tensor: tensors.Tensor
) -> dict[str, Any]:
    """Writes one zarr array; returns the spec that stands for it in the map."""
    import tensorstore

    metadata = {
        "shape": list(tensor.shape),
        "chunks": choose_chunks(tensor.shape),
        "compressor": _COMPRESSOR,
    }
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder.resolve() / name)},
            "metadata": metadata
            | {"dtype": "<f4", "fill_value": None, "dimension_separator": "."},
        },
        create=True,
    ).result()
    store.write(tensor.read()).result()
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
