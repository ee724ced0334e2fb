"""T5X checkpoints: the encoder of any of them, by the names it has there.

    checkpoint_1000/checkpoint                              legacy: a msgpack tree whose
    checkpoint_1000/target.encoder.encoder_norm.scale/      leaves are arrays, or name
                                                            a zarr folder beside it
    checkpoint_0                                            legacy: such a tree alone
    checkpoint_1000/state/_METADATA                         Orbax (2023 on)

Which leaves lie inline differs by age, so it is decided leaf by leaf. The decoder, the
optimizer and everything else but encoder, embedder, projection and step are never read.
A checkpoint is untrusted: whatever it claims is checked before it is used.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gecko_jax.formats import arrays, kvstores, msgpack_arrays, names, tensors
from gecko_jax.models import dual_encoder

_PARTS = ("token_embedder", "encoder", "projection_layer")

# Added under the root by t5x_retrieval's dual encoders when they normalize.
_RETRIEVAL_L2_EPSILON = 1e-6


# More than any T5 has (XXL: 24).
_MOST_LAYERS = 1_000

# Names of parameters, and of the folders they lie in.
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")

_PLACEHOLDER = "PLACEHOLDER://"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is read of a checkpoint.

    Attributes:
        params: The encoder, by T5X's names; read later.
        step: Optimizer updates behind it, as the checkpoint itself says.
    """

    params: dict[str, tensors.Tensor]
    step: int


def open_checkpoint(folder: kvstores.Folder, file: str = "checkpoint") -> Checkpoint:
    """Opens the encoder of the checkpoint in a folder.

    Args:
        folder: `checkpoint_N`, or the folder of a bare file.
        file: The msgpack tree of the legacy form.

    Raises:
        ValueError: It is damaged, holds no encoder, or is none of the forms above.
    """
    is_orbax = folder.has("_METADATA") or not folder.has(file)
    leaves, tops, step = _open_orbax(folder) if is_orbax else _open_legacy(folder, file)
    if "encoder" not in tops and "decoder" in tops:
        raise ValueError(
            f"{folder.path}: a decoder-only model; Gecko needs an encoder, take a T5 "
            "checkpoint that has one"
        )
    if "encoder" not in tops:
        raise ValueError(
            f"{folder.path}: no `encoder` among its parameters "
            f"({', '.join(sorted(tops))[:200]}); it is not a T5 checkpoint"
        )
    params = _unstack(folder.path, leaves)
    nested = [name for name in params if not _parents(name).isdisjoint(params)]
    if nested:
        raise ValueError(
            f"{folder.path}: {nested[0]} lies under a name that is an array itself; "
            "the checkpoint is damaged, copy it again"
        )
    return Checkpoint(params, _step_of(folder, file) if step is None else step)


def _parents(name: str) -> set[str]:
    parts = name.split("/")
    return {"/".join(parts[:count]) for count in range(1, len(parts))}


def infer_config(
    params: Mapping[str, tensors.Tensor], source: str
) -> dual_encoder.EncoderConfig:
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
    found = re.findall(r"encoder/layers_([0-9]{1,18})/", "\n".join(params))
    layers = {int(number) for number in found}
    _check_layers(source, max(layers) + 1)
    absent = set(range(max(layers) + 1)) - layers
    if absent:
        raise ValueError(
            f"{source}: encoder/layers_{max(layers)} is there, and "
            f"encoder/layers_{min(absent)} is not; a part of the checkpoint is "
            "missing, copy it again"
        )
    is_gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    config = dual_encoder.EncoderConfig(
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


def newest(children: set[str]) -> str | None:
    """Returns the newest whole checkpoint among the names of a `model_dir`."""
    steps = [int(m[1]) for c in children if (m := re.fullmatch(r"checkpoint_(\d+)", c))]
    return f"checkpoint_{max(steps)}" if steps else None


def _check_layers(source: str, count: int) -> None:
    if count > _MOST_LAYERS:
        raise ValueError(
            f"{source}: claims {count:,} layers, and at most {_MOST_LAYERS:,} are "
            "read; the checkpoint is damaged, copy it again"
        )


def _step_of(folder: kvstores.Folder, file: str) -> int:
    """Returns N of `checkpoint_N`, 0 for another name."""
    name = folder.name if file == "checkpoint" else file
    match = re.fullmatch(r"checkpoint_([0-9]{1,18})", name)
    return int(match[1]) if match else 0


def _open_legacy(
    folder: kvstores.Folder, file: str
) -> tuple[dict[str, tensors.Tensor], set[str], int | None]:
    """Returns the parameters, the names of all parts of the model, and the step."""
    data: pathlib.Path | bytes | None = folder.local_file(file)
    data = folder.read(file) if data is None else data
    assert data is not None  # the caller has seen it
    source = f"{folder.path}/{file}"
    tree = msgpack_arrays.read(data, _is_wanted, source)
    optimizer = tree.get("optimizer", tree)
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    parts = target if isinstance(target, dict) else {}
    parts = {key: value for key, value in parts.items() if key in _PARTS}
    if _holds_placeholder(parts) or (not parts and _mentions_placeholder(data)):
        raise _early_orbax(folder)
    if not isinstance(target, dict):
        raise ValueError(
            f"{source}: a msgpack tree, but not T5X's: no optimizer/target among "
            f"{', '.join(sorted(tree))[:200] or 'nothing'}"
        )
    leaves = {
        name: _open_leaf(folder, source, name, leaf)
        for name, leaf in _flatten_specs(source, parts).items()
    }
    return leaves, set(target), _read_step(optimizer)


def _is_wanted(path: tuple[str, ...]) -> bool:
    """What to keep of {"version", "optimizer": {"state", "target"}}."""
    keys = path[1:] if path[0] == "optimizer" else path
    if not keys:
        return True
    if keys[0] == "state":
        return len(keys) == 1 or keys[1:] == ("step",)
    # Only the name is kept of all that is passed over, for errors.
    if keys[0] != "target":
        return len(path) == 1
    return len(keys) <= 2 or keys[1] in _PARTS


def _read_step(optimizer: Mapping[str, Any]) -> int | None:
    """Returns the step that a legacy tree holds, None where it holds none."""
    state = optimizer.get("state")
    step = state.get("step") if isinstance(state, dict) else optimizer.get("step")
    if isinstance(step, arrays.Array):
        return _as_step(step)
    return step if type(step) is int and 0 <= step < 2**63 else None


def _as_step(array: arrays.Array) -> int | None:
    if array.shape not in ((), (1,)) or not np.issubdtype(array.dtype, np.integer):
        return None
    return max(0, int(array.read().reshape(-1)[0]))


def _holds_placeholder(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_holds_placeholder(value) for value in tree.values())
    return isinstance(tree, str) and tree.startswith(_PLACEHOLDER)


def _mentions_placeholder(data: pathlib.Path | bytes) -> bool:
    """Whether a file names arrays as early Orbax does, wherever in its tree."""
    most = 2**26
    if isinstance(data, bytes):
        return _PLACEHOLDER.encode() in data[:most]
    with data.open("rb") as stream:
        return _PLACEHOLDER.encode() in stream.read(most)


def _early_orbax(folder: kvstores.Folder) -> ValueError:
    return ValueError(
        f"{folder.path}: written by an early Orbax ({_PLACEHOLDER} entries), which "
        "only that Orbax reads; restore and save it again with t5x"
    )


def _flatten_specs(
    source: str, tree: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Flattens to arrays and tensorstore specs, which are maps themselves."""
    flat = {}
    for key, value in tree.items():
        _check_name(source, prefix, key)
        if isinstance(value, dict) and "kvstore" not in value:
            flat |= _flatten_specs(source, value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _check_name(source: str, prefix: str, key: str) -> None:
    if not _NAME.fullmatch(key) or key in (".", ".."):
        raise ValueError(
            f"{source}: {key[:80]!r} under {prefix or 'target'!r} is no name of a "
            "parameter; the file is damaged, copy it again"
        )


def _open_leaf(
    folder: kvstores.Folder, source: str, name: str, leaf: Any
) -> tensors.Tensor:
    if isinstance(leaf, arrays.Array):
        return arrays.as_weights(leaf)
    store = leaf.get("kvstore") if isinstance(leaf, dict) else None
    place = store.get("path") if isinstance(store, dict) else None
    metadata = leaf.get("metadata") if isinstance(leaf, dict) else None
    metadata = {} if metadata is None else metadata
    if not isinstance(place, str) or not isinstance(metadata, dict):
        raise ValueError(
            f"{source}: {name} is neither an array nor a tensorstore spec; the file is "
            "damaged, copy it again"
        )
    parts = place.removesuffix("/").split("/")
    if not all(_NAME.fullmatch(part) and part not in (".", "..") for part in parts):
        raise ValueError(
            f"{source}: {name} lies at {place[:80]!r}, outside the checkpoint or "
            "nowhere; do not use this checkpoint"
        )
    array = folder.open_array(place)
    if "shape" in metadata:
        written = arrays.parse_shape(f"{source}: {name}", metadata["shape"])
        if array.shape != written:
            raise ValueError(
                f"{folder.path}: {name} has the shape {array.shape}, and `checkpoint` "
                f"says {written}; these files are of two checkpoints, copy it again"
            )
    return arrays.as_weights(array, bits_are_bfloat16=True)


def _open_orbax(
    folder: kvstores.Folder,
) -> tuple[dict[str, tensors.Tensor], set[str], int | None]:
    """Returns the parameters, the names of all parts of the model, and the step."""
    has_state = folder.has("state/_METADATA")
    if not has_state and not folder.has("_METADATA"):
        raise _early_orbax(folder)
    state = folder / "state" if has_state else folder
    metadata = kvstores.read_json(state, "_METADATA")
    is_database = state.has("manifest.ocdbt")
    stored = kvstores.ocdbt(state) if is_database else state
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
    # Some trees begin with "optimizer", as in the legacy form.
    placed = {key[1:] if key[:1] == ("optimizer",) else key: key for key in keys}
    targets = {key: place for key, place in placed.items() if key[:1] == ("target",)}
    found = {}
    for key, place in targets.items():
        if len(key) < 2 or key[1] not in _PARTS:
            continue
        for part in place:
            _check_name(f"{state.path}/_METADATA", "/".join(key[:-1]), part)
        array = stored.open_array(".".join(place))
        found["/".join(key[1:])] = arrays.as_weights(array)
    tops = {key[1] for key in targets if len(key) > 1}
    return found, tops, _read_orbax_step(stored, placed)


def _read_orbax_step(
    stored: kvstores.Folder, placed: Mapping[tuple[str, ...], tuple[str, ...]]
) -> int | None:
    """Returns the step of an Orbax checkpoint, None where it is no array."""
    for key in (("state", "step"), ("step",)):
        name = ".".join(placed.get(key, ()))
        if name and stored.has(f"{name}/.zarray"):
            return _as_step(stored.open_array(name))
    return None


def _unstack(
    source: str, params: dict[str, tensors.Tensor]
) -> dict[str, tensors.Tensor]:
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
        count = stack.shape[1] if len(stack.shape) > 1 else 0
        _check_layers(source, count)
        for layer in range(count):
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
