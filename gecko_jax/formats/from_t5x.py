"""T5X checkpoints: opens the encoder of every generation of the format.

    checkpoint_1000/checkpoint                              legacy: a msgpack tree whose
    checkpoint_1000/target.encoder.encoder_norm.scale/      leaves are arrays or name a
                                                            zarr folder next to it
    checkpoint_0                                            legacy: such a tree alone
    checkpoint_1000/state/_METADATA                         Orbax (2023 on)

Which leaves are inline depends on the version, so each leaf is examined. Only encoder,
embedder, projection and step are read. A checkpoint is untrusted: its
contents are checked before use.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from gecko_jax.formats import kvstores, msgpack_files, names, source_files, tensors
from gecko_jax.io import reading
from gecko_jax.models import dual_encoder

_PARTS = ("token_embedder", "encoder", "projection_layer")

# T5 XXL has 24.
_MAX_LAYERS = 1_000

# Parameters, names of all parts of the model, and the step if it is stored.
_Opened = tuple[dict[str, tensors.Tensor], set[str], int | None]

# Names of parameters, and of the folders that hold them.
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")

_PLACEHOLDER = "PLACEHOLDER://"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters of an encoder by T5X name, read later, and its number of updates."""

    params: dict[str, tensors.Tensor]
    step: int


def is_checkpoint(folder: kvstores.Folder) -> bool:
    """Whether a folder is a T5X checkpoint; refuses one of TensorFlow."""
    index = folder.read("checkpoint", 1_000)
    if index is not None and index.lstrip().startswith(b"model_checkpoint_path"):
        raise tensorflow_error(folder.path)
    # Early Orbax wrote `state/checkpoint`; `open_checkpoint` refuses it by name.
    files = ("state/_METADATA", "_METADATA", "state/checkpoint")
    return index is not None or any(map(folder.has, files))


def tensorflow_error(path: str) -> ValueError:
    """Returns the error about a TensorFlow checkpoint."""
    return ValueError(
        f"{path}: a TensorFlow checkpoint (Mesh TensorFlow T5); take the same model "
        "from gs://t5-data/pretrained_models/t5x/ or from Hugging Face"
    )


def open_checkpoint(folder: kvstores.Folder, file: str = "checkpoint") -> Checkpoint:
    """Opens the encoder of `checkpoint_N`, or that of a bare file in a folder."""
    is_orbax = folder.has("_METADATA") or not folder.has(file)
    opened = _open_orbax(folder) if is_orbax else _open_legacy(folder, file)
    leaves, parts, step = opened
    if "encoder" not in parts and "decoder" in parts:
        raise ValueError(
            f"{folder.path}: a decoder-only model; Gecko needs an encoder, take a T5 "
            "checkpoint that has one"
        )
    if "encoder" not in parts:
        raise ValueError(
            f"{folder.path}: no `encoder` among its parameters "
            f"({', '.join(sorted(parts))[:200]}); take a T5 checkpoint"
        )
    params = _unstack(folder.path, leaves)
    for name in params:
        ends = [match.start() for match in re.finditer("/", name)]
        if any(name[:end] in params for end in ends):
            raise source_files.damaged(
                folder.path, f"{name} is below a name that is itself an array"
            )
    name = folder.name if file == "checkpoint" else file
    if step is None and (match := re.fullmatch(r"checkpoint_([0-9]{1,18})", name)):
        step = int(match[1])
    return Checkpoint(params, step or 0)


def infer_config(
    params: Mapping[str, tensors.Tensor], source: str
) -> dual_encoder.EncoderConfig:
    """Returns the sizes and settings that follow from names and shapes."""
    is_shared = "encoder/relpos_bias/rel_embedding" in params
    owner = "encoder" if is_shared else "encoder/layers_0"
    required = (
        "token_embedder/embedding",
        f"{owner}/relpos_bias/rel_embedding",
        "encoder/layers_0/attention/query/kernel",
        "encoder/layers_0/mlp/wo/kernel",
    )
    missing = [name for name in required if name not in params]
    if missing:
        raise ValueError(
            f"{source}: not a T5 encoder, {', '.join(missing)} missing; it has "
            f"{', '.join(sorted(params)[:8])}, ..."
        )
    embedding, bias, query, wo = shapes = [params[name].shape for name in required]
    if any(len(shape) != 2 for shape in shapes) or query[1] % bias[0]:
        listed = ", ".join(f"{name} {params[name].shape}" for name in required)
        raise ValueError(f"{source}: not the shapes of a T5 encoder: {listed}")
    numbers = re.findall(r"encoder/layers_([0-9]{1,18})/", "\n".join(params))
    layers = {int(number) for number in numbers}
    num_layers = max(layers) + 1
    _check_layers(source, num_layers)
    absent = set(range(num_layers)) - layers
    if absent:
        raise ValueError(
            f"{source}: encoder/layers_{num_layers - 1} is there, and "
            f"encoder/layers_{min(absent)} is not; a part of the checkpoint is "
            "missing, copy it again"
        )
    is_gated = "encoder/layers_0/mlp/wi_0/kernel" in params
    projection = params.get(names.PROJECTION)
    # t5x_retrieval's dual encoders add 1e-6 under the root when they normalize.
    epsilon = 1e-6 if projection else dual_encoder.EncoderConfig.l2_epsilon
    return dual_encoder.EncoderConfig(
        vocab_size=embedding[0],
        model_dim=embedding[1],
        num_layers=num_layers,
        num_heads=bias[0],
        head_dim=query[1] // bias[0],
        mlp_dim=wo[0],
        # T5 1.0 has one matrix and ReLU; every later T5 has two and GELU.
        mlp_activations=("gelu", "linear") if is_gated else ("relu",),
        shared_relative_bias=is_shared,
        relpos_num_buckets=bias[1],
        embedding_dim=projection.shape[-1] if projection else embedding[1],
        projection=projection is not None,
        l2_epsilon=epsilon,
    )


def newest(children: set[str]) -> str | None:
    """Returns the newest complete checkpoint among the names in a `model_dir`."""
    steps = [int(m[1]) for c in children if (m := re.fullmatch(r"checkpoint_(\d+)", c))]
    return f"checkpoint_{max(steps)}" if steps else None


def _check_layers(source: str, count: int) -> None:
    if count > _MAX_LAYERS:
        raise source_files.damaged(
            source, f"claims {count:,} layers, and at most {_MAX_LAYERS:,} are read"
        )


def _open_legacy(folder: kvstores.Folder, file: str) -> _Opened:
    data: pathlib.Path | bytes | None = folder.local_file(file) or folder.read(file)
    assert data is not None  # `open_checkpoint` has checked it.
    source = f"{folder.path}/{file}"
    tree = msgpack_files.read(data, _is_wanted, source)
    optimizer = tree.get("optimizer", tree)
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    parts = target if isinstance(target, dict) else {}
    parts = {key: value for key, value in parts.items() if key in _PARTS}
    # A TensorStore spec is a dict itself.
    flat = traverse_util.flatten_dict(parts, is_leaf=lambda _, tree: "kvstore" in tree)
    strings = [leaf for leaf in flat.values() if isinstance(leaf, str)]
    has_placeholder = any(leaf.startswith(_PLACEHOLDER) for leaf in strings)
    if not parts:  # Early Orbax wrote trees of several layouts.
        has_placeholder = _PLACEHOLDER.encode() in (folder.read(file, 2**26) or b"")
    if has_placeholder:
        raise _early_orbax(folder)
    if not isinstance(target, dict):
        raise ValueError(
            f"{source}: a msgpack tree, but not T5X's: no optimizer/target among "
            f"{', '.join(sorted(tree))[:200] or 'no keys'}"
        )
    leaves = {}
    for path, leaf in flat.items():
        name = _join_names(source, path)
        leaves[name] = _open_leaf(folder, source, name, leaf)
    return leaves, set(target), _read_step(optimizer)


def _is_wanted(path: tuple[str, ...]) -> bool:
    """Selects from {"version", "optimizer": {"state", "target"}}."""
    keys = path[1:] if path[0] == "optimizer" else path
    if not keys:
        return True
    if keys[0] == "state":
        return len(keys) == 1 or keys[1:] == ("step",)
    # Errors list the top-level names.
    if keys[0] != "target":
        return len(path) == 1
    return len(keys) <= 2 or keys[1] in _PARTS


def _read_step(optimizer: Mapping[str, Any]) -> int | None:
    """Returns the step in a legacy tree, None if it has none."""
    state = optimizer.get("state")
    step = state.get("step") if isinstance(state, dict) else optimizer.get("step")
    if isinstance(step, tensors.Tensor):
        return _as_step(step)
    return step if type(step) is int and 0 <= step < 2**63 else None


def _as_step(array: tensors.Tensor) -> int | None:
    if array.shape not in ((), (1,)) or not np.issubdtype(array.dtype, np.integer):
        return None
    return max(0, int(array.read().reshape(-1)[0]))


def _early_orbax(folder: kvstores.Folder) -> ValueError:
    return ValueError(
        f"{folder.path}: written by an early Orbax ({_PLACEHOLDER} entries), which "
        "only that Orbax reads; restore and save it again with t5x"
    )


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in (".", "..")


def _join_names(source: str, path: Iterable[str]) -> str:
    """Returns the name of the parameter at a path of keys, which it checks."""
    name = ""
    for key in path:
        if not _is_name(key):
            problem = f"{key[:80]!r} under {name or 'target'!r} is not a parameter name"
            raise source_files.damaged(source, problem)
        name += f"/{key}" if name else key
    return name


def _open_leaf(
    folder: kvstores.Folder, source: str, name: str, leaf: Any
) -> tensors.Tensor:
    if isinstance(leaf, tensors.Tensor):
        return leaf.as_weights()
    spec = leaf if isinstance(leaf, dict) else {}
    store, metadata = spec.get("kvstore"), spec.get("metadata") or {}
    place = store.get("path") if isinstance(store, dict) else None
    if not isinstance(place, str) or not isinstance(metadata, dict):
        raise source_files.damaged(
            source, f"{name} is neither an array nor a TensorStore spec"
        )
    if not all(map(_is_name, place.removesuffix("/").split("/"))):
        raise ValueError(
            f"{source}: {name} has the path {place[:80]!r}, which is empty or outside "
            "the checkpoint; do not use this checkpoint"
        )
    array = folder.open_array(place)
    if "shape" in metadata:
        expected = tensors.parse_shape(f"{source}: {name}", metadata["shape"])
        if array.shape != expected:
            raise ValueError(
                f"{folder.path}: {name} has the shape {array.shape}, and `checkpoint` "
                f"says {expected}; these files are from two checkpoints, copy it again"
            )
    return array.as_weights(bits_are_bfloat16=True)


def _open_orbax(folder: kvstores.Folder) -> _Opened:
    has_state = folder.has("state/_METADATA")
    if not has_state and not folder.has("_METADATA"):
        raise _early_orbax(folder)
    state = folder / "state" if has_state else folder
    stored = kvstores.ocdbt(state) if state.has("manifest.ocdbt") else state
    try:
        metadata = reading.parse_json(state.read("_METADATA") or b"")
        paths = [
            tuple(str(part["key"]) for part in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
        ]
    except (ValueError, AttributeError, KeyError, TypeError):
        raise source_files.damaged(
            f"{state.path}/_METADATA", "not the metadata of an Orbax tree"
        ) from None
    # Some trees begin with "optimizer", as in the legacy form.
    placed = {path[1:] if path[:1] == ("optimizer",) else path: path for path in paths}
    params, parts = {}, set()
    for key, path in placed.items():
        if len(key) < 2 or key[0] != "target":
            continue
        parts.add(key[1])
        if key[1] in _PARTS:
            name = _join_names(f"{state.path}/_METADATA", key[1:])
            params[name] = stored.open_array(".".join(path)).as_weights()
    step = None
    for key in (("state", "step"), ("step",)):
        name = ".".join(placed.get(key, ()))
        if name and stored.has(f"{name}/.zarray"):
            step = _as_step(stored.open_array(name))
            break
    return params, parts, step


def _unstack(
    source: str, params: dict[str, tensors.Tensor]
) -> dict[str, tensors.Tensor]:
    """Splits stacked layers, and joins the head axes of attention kernels.

    The scanned form (scalable_t5, umT5) has the layers of `encoder/encoder/...` on axis
    1, and separate axes for heads and their width.
    """

    @functools.lru_cache(maxsize=1)
    def read_stack(name: str) -> np.ndarray:
        return params[name].read()

    def cut_layer(name: str, layer: int) -> tensors.Tensor:
        stack = params[name]
        shape = (stack.shape[0], *stack.shape[2:])
        # Layers share chunks, so the stack is read once for all of them.
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
            layer_name = f"encoder/layers_{layer}/{tail}"
            flat[layer_name] = _join_heads(layer_name, cut_layer(name, layer))
    return flat


def _join_heads(name: str, kernel: tensors.Tensor) -> tensors.Tensor:
    """Reshapes attention kernels [M, H, K] and [H, K, M] to matrices."""
    if len(kernel.shape) != 3 or "/attention/" not in name:
        return kernel
    first, middle, last = kernel.shape
    is_out = name.endswith("/out/kernel")
    shape = (first * middle, last) if is_out else (first, middle * last)
    return dataclasses.replace(
        kernel, shape=shape, read=lambda: kernel.read().reshape(shape)
    )
