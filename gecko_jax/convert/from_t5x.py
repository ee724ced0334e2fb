"""T5X checkpoints: the encoder of any of them, by the names it has there.

    checkpoint_1000/checkpoint                              legacy: a msgpack tree whose
    checkpoint_1000/target.encoder.encoder_norm.scale/      leaves are arrays, or name
                                                            a zarr folder beside it
    checkpoint_1000/state/_METADATA                         Orbax (2023 on)

Which leaves lie inline differs by age, so it is decided leaf by leaf. The decoder, the
optimizer and everything else but encoder, embedder and projection are never read.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gecko_jax import model, tensors
from gecko_jax.convert import kvstores, msgpack_arrays, names

_PARTS = ("token_embedder", "encoder", "projection_layer")

# Added under the root by t5x_retrieval's dual encoders when they normalize.
_RETRIEVAL_L2_EPSILON = 1e-6


def open_params(folder: kvstores.Folder) -> dict[str, tensors.Tensor]:
    """Opens the encoder of the checkpoint in a `checkpoint_N` folder.

    Raises:
        ValueError: It is damaged, holds no encoder, or is none of the forms above.
    """
    is_legacy = folder.has("checkpoint")
    params, tops = (_open_legacy if is_legacy else _open_orbax)(folder)
    if "encoder" not in tops and "decoder" in tops:
        raise ValueError(
            f"{folder.path}: a decoder-only model; Gecko needs an encoder, take a T5 "
            "checkpoint that has one"
        )
    if "encoder" not in tops:
        raise ValueError(
            f"{folder.path}: no `encoder` among its parameters "
            f"({', '.join(sorted(tops))}); it is not a T5 checkpoint"
        )
    return _unstack(params)


def infer_config(
    params: Mapping[str, tensors.Tensor], source: str
) -> model.EncoderConfig:
    """Returns the sizes and settings that names and shapes give away.

    Raises:
        ValueError: A parameter that gives a size is missing.
    """
    is_shared = "encoder/relpos_bias/rel_embedding" in params
    owner = "encoder" if is_shared else "encoder/layers_0"
    giving = (
        "token_embedder/embedding",
        f"{owner}/relpos_bias/rel_embedding",
        "encoder/layers_0/attention/query/kernel",
        "encoder/layers_0/mlp/wo/kernel",
    )
    missing = [name for name in giving if name not in params]
    if missing:
        raise ValueError(
            f"{source}: not a T5 encoder, {', '.join(missing)} missing; it has "
            f"{', '.join(sorted(params)[:8])}, ..."
        )
    embedding, bias, query, wo = (params[name].shape for name in giving)
    shapes_fit = all(len(shape) == 2 for shape in (embedding, bias, query, wo))
    if not shapes_fit or query[1] % bias[0]:
        raise ValueError(
            f"{source}: not the shapes of a T5 encoder: "
            + ", ".join(f"{name} {params[name].shape}" for name in giving)
        )
    layers = {int(n) for n in re.findall(r"encoder/layers_(\d+)/", "\n".join(params))}
    is_gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    config = model.EncoderConfig(
        vocab_size=embedding[0],
        model_dim=embedding[1],
        num_layers=max(layers) + 1,
        num_heads=bias[0],
        head_dim=query[1] // bias[0],
        mlp_dim=wo[0],
        # T5 1.0 has one matrix and ReLU; every later T5 has two and GELU.
        mlp_activations=("gelu", "linear") if is_gated else ("relu",),
        shared_relative_bias=is_shared,
        relpos_num_buckets=bias[1],
        embedding_dim=embedding[1],
        projection=False,
    )
    if names.PROJECTION not in params:
        return config
    return dataclasses.replace(
        config,
        embedding_dim=params[names.PROJECTION].shape[-1],
        projection=True,
        l2_epsilon=_RETRIEVAL_L2_EPSILON,
    )


def step_of(folder: kvstores.Folder) -> int:
    """Returns N of `checkpoint_N`, 0 for another name."""
    match = re.fullmatch(r"checkpoint_(\d+)", folder.name)
    return int(match[1]) if match else 0


def newest(children: set[str]) -> str | None:
    """Returns the newest whole checkpoint among the names of a `model_dir`."""
    steps = [int(m[1]) for c in children if (m := re.fullmatch(r"checkpoint_(\d+)", c))]
    return f"checkpoint_{max(steps)}" if steps else None


def _open_legacy(
    folder: kvstores.Folder,
) -> tuple[dict[str, tensors.Tensor], set[str]]:
    """Returns the parameters, and the names of all parts of the model."""
    data: pathlib.Path | bytes | None = folder.local_file("checkpoint")
    data = folder.read("checkpoint") if data is None else data
    assert data is not None  # the caller has seen it
    tree = msgpack_arrays.read(data, _is_wanted)
    if _holds_placeholder(tree):
        raise ValueError(
            f"{folder.path}: written by an early Orbax (PLACEHOLDER:// entries), which "
            "only that Orbax reads; restore and save it again with t5x"
        )
    target = tree.get("optimizer", tree).get("target")
    if not isinstance(target, dict):
        raise ValueError(
            f"{folder.path}/checkpoint: a msgpack tree, but not T5X's: no "
            f"optimizer/target among {', '.join(sorted(tree)) or 'nothing'}"
        )
    parts = {key: value for key, value in target.items() if key in _PARTS}
    leaves = {
        name: _open_leaf(folder, name, leaf)
        for name, leaf in _flatten_specs(parts).items()
    }
    return leaves, set(target)


def _is_wanted(path: tuple[str, ...]) -> bool:
    """What to keep of {"version", "optimizer": {"state", "target"}}."""
    keys = path[1:] if path[0] == "optimizer" else path
    if not keys:
        return True
    # Of all that is passed over the name is kept, for errors.
    if keys[0] != "target":
        return len(path) == 1
    return len(keys) <= 2 or keys[1] in _PARTS


def _holds_placeholder(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_holds_placeholder(value) for value in tree.values())
    return isinstance(tree, str) and tree.startswith("PLACEHOLDER://")


def _flatten_specs(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens to tensors and tensorstore specs, which are maps themselves."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and "kvstore" not in value:
            flat |= _flatten_specs(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _open_leaf(folder: kvstores.Folder, name: str, leaf: Any) -> tensors.Tensor:
    if isinstance(leaf, tensors.Tensor):
        return leaf
    place = leaf.get("kvstore", {}).get("path") if isinstance(leaf, dict) else None
    if not isinstance(place, str):
        raise ValueError(
            f"{folder.path}/checkpoint: {name} is neither an array nor a tensorstore "
            "spec; the file is damaged, copy it again"
        )
    parts = place.strip("/").split("/")
    if place.startswith(("/", "\\")) or ".." in parts or ":" in place:
        raise ValueError(
            f"{folder.path}/checkpoint: {name} lies at {place!r}, outside the "
            "checkpoint; do not use this checkpoint"
        )
    array = folder.open_array(place)
    written = leaf.get("metadata", {}).get("shape", list(array.shape))
    if list(array.shape) != list(written):
        raise ValueError(
            f"{folder.path}: {name} has the shape {array.shape}, and `checkpoint` says "
            f"{tuple(written)}; these files are of two checkpoints, copy it again"
        )
    return array


def _open_orbax(
    folder: kvstores.Folder,
) -> tuple[dict[str, tensors.Tensor], set[str]]:
    """Returns the parameters, and the names of all parts of the model."""
    has_state = folder.has("state/_METADATA")
    state = folder / "state" if has_state else folder
    metadata = kvstores.read_json(state, "_METADATA")
    is_database = state.has("manifest.ocdbt")
    arrays = kvstores.ocdbt(state) if is_database else state
    try:
        keys = [
            tuple(str(part["key"]) for part in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
        ]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{state.path}/_METADATA: not the metadata of an Orbax tree; the file is "
            "damaged, copy it again"
        ) from None
    keys = [key[1:] if key[0] == "optimizer" else key for key in keys]
    keys = [key for key in keys if len(key) > 1 and key[0] == "target"]
    found = {
        "/".join(key[1:]): arrays.open_array(".".join(key))
        for key in keys
        if key[1] in _PARTS
    }
    return found, {key[1] for key in keys}


def _unstack(params: dict[str, tensors.Tensor]) -> dict[str, tensors.Tensor]:
    """Gives every layer parameters of its own, and joins heads with their width.

    The scanned form (scalable_t5, umT5) has the layers of `encoder/encoder/...` on axis
    1, and heads apart from their width.
    """

    @functools.lru_cache(maxsize=1)
    def read_stack(name: str) -> np.ndarray:
        return params[name].read()

    def cut_layer(name: str, layer: int) -> tensors.Tensor:
        stack = params[name]
        shape = (stack.shape[0], *stack.shape[2:])
        # Its layers share chunks: read once for all of them.
        return tensors.Tensor(shape, lambda: read_stack(name)[:, layer], name)

    flat = {}
    for name, stack in params.items():
        tail = name.removeprefix("encoder/encoder/")
        if tail == name:
            flat[name] = _join_heads(name, stack)
            continue
        for layer in range(stack.shape[1] if len(stack.shape) > 1 else 0):
            ours = f"encoder/layers_{layer}/{tail}"
            flat[ours] = _join_heads(ours, cut_layer(name, layer))
    return flat


def _join_heads(name: str, kernel: tensors.Tensor) -> tensors.Tensor:
    """Makes [M, H, K] and [H, K, M] the matrices that the encoder takes."""
    if len(kernel.shape) != 3 or "/attention/" not in name:
        return kernel
    first, middle, last = kernel.shape
    is_out = name.endswith("/out/kernel")
    shape = (first * middle, last) if is_out else (first, middle * last)
    return tensors.Tensor(shape, lambda: kernel.read().reshape(shape), kernel.source)
