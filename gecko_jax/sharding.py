"""Meshes and shardings: where each array of a run lives.

Parameters carry T5X's *logical axis* names; `RULES` maps them to *mesh axes*. The mesh
has three: `data` (examples), `fsdp` (examples, and a slice of every parameter) and
`tensor` (heads, MLP and vocabulary). On a laptop all three are 1 and nothing changes.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
# The rows of a batch are split over both axes that hold examples.
BATCH_AXES = ("data", "fsdp")

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "joined_kv": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "affinity": None,
    "relpos_buckets": None,
    "layers": None,
    "kv": None,
}


def build_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Builds the mesh over all devices of all processes.

    Args:
        data: Devices along `data`; at most one of the three is -1, for the rest.
        fsdp: Devices along `fsdp`.
        tensor: Devices along `tensor`.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    num_devices = jax.device_count()
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    if free and num_devices % known == 0:
        sizes[free[0]] = num_devices // known
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor}: the product must be the "
            f"number of devices, {num_devices}; set one of them to -1"
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )


def param_shardings(shapes: Any, logical_axes: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each parameter by `RULES`.

    A dimension that its mesh axis does not divide stays whole, so that every preset
    fits every mesh.
    """

    def place(shape: jax.ShapeDtypeStruct, axes: PartitionSpec) -> NamedSharding:
        spec = [RULES[axis] for axis in axes]
        fits = [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(shape.shape, spec, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*fits))

    return jax.tree.map(place, shapes, logical_axes)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns shardings for a tree in which trees like `params` may occur.

    A leaf under a parameter's path and of its shape (a moment of AdamW) lies where the
    parameter lies; everything else (steps, Adafactor's factored moments, which are a
    row and a column of a matrix) is on every device.
    """
    by_path = {
        _path(path): (shape.shape, sharding)
        for (path, shape), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _path(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree.map_with_path(place, state)


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns shardings of model features: token rows split, ids on every device."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    split = ("_tokens", "_segment_ids")
    return {name: rows if name.endswith(split) else replicated(mesh) for name in batch}


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch, the same on every process, onto the mesh."""
    shardings = batch_shardings(batch, mesh)
    return {
        name: jax.make_array_from_callback(
            value.shape, shardings[name], lambda index, value=value: value[index]
        )
        for name, value in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _path(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
