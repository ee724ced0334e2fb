"""Meshes and shardings: where each array of a run lives.

Parameters carry T5X's *logical axis* names; rules map them to *mesh axes*. The mesh has
three axes: `data` splits the examples, `fsdp` splits the examples and every parameter,
and `tensor` splits heads, MLP and vocabulary. On one device all three have size 1.

The chips of a slice are connected by ICI. Several slices are connected by the slower
data-center network (DCN), so only `data` and `fsdp` may span slices.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
# Both axes that hold examples split the rows of a batch.
BATCH_AXES = ("data", "fsdp")

# As in T5X, the rules of a logical axis are tried in order, and the first applies whose
# mesh axes no earlier dimension of the array uses.
Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]
RULES: Rules = (
    ("vocab", "tensor"),
    ("embed", "fsdp"),
    ("joined_kv", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("affinity", None),
    ("relpos_buckets", None),
    ("layers", None),
    ("kv", None),
)


def build_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn_data: int = -1,
    dcn_fsdp: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Builds the mesh over all devices of all processes.

    Raises ValueError if the sizes do not multiply to the number of devices.

    Args:
        data: Devices per slice along `data`. One of `data`, `fsdp` and `tensor` may be
            -1, which takes the remaining devices.
        fsdp: Devices per slice along `fsdp`.
        tensor: Devices per slice along `tensor`.
        dcn_data: Slices along `data`. One of the two may be -1, as above.
        dcn_fsdp: Slices along `fsdp`.
        devices: Devices to use; all devices of the run by default.
    """
    devices = jax.devices() if devices is None else devices
    num_slices = len({_slice_of(device) for device in devices})
    within = _fill_sizes(
        {"data": data, "fsdp": fsdp, "tensor": tensor},
        len(devices) // num_slices,
        "devices" if num_slices == 1 else f"devices of each of {num_slices} slices",
    )
    across = _fill_sizes(
        {"dcn_data": dcn_data, "dcn_fsdp": dcn_fsdp}, num_slices, "slices"
    )
    options = {"allow_split_physical_axes": True}
    if num_slices == 1:
        array = mesh_utils.create_device_mesh(within, devices, **options)
    else:
        slices = (*across, 1)
        array = mesh_utils.create_hybrid_device_mesh(within, slices, devices, **options)
    return Mesh(array, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def _slice_of(device: Any) -> int:
    # CPU devices never form slices.
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0


def _fill_sizes(sizes: dict[str, int], number: int, unit: str) -> tuple[int, ...]:
    """Replaces a -1 and checks the product."""
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = [number // known if size == -1 else size for size in sizes.values()]
    if list(sizes.values()).count(-1) > 1 or math.prod(filled) != number:
        listed = " ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {listed}: the product must be the number of {unit}, {number}; set "
            f"one of them to -1 and the others to divisors of {number}"
        )
    return tuple(filled)


def param_shardings(
    shapes: Any, logical_axes: Any, mesh: Mesh, rules: Rules = RULES
) -> Any:
    """Returns the sharding of each parameter.

    A dimension that does not divide by its mesh axes stays whole, so every preset fits
    every mesh. Raises ValueError if a logical axis has no rule, or a rule names an
    unknown mesh axis.
    """
    for logical, axes in rules:
        for name in axis_names(axes):
            if name not in MESH_AXES:
                raise ValueError(
                    f"mesh.rules ({logical!r}, {axes!r}): {name!r} is not a mesh axis; "
                    f"use {', '.join(MESH_AXES)}, or None for no split"
                )

    def place(shape: jax.ShapeDtypeStruct, logical_axes: Any) -> NamedSharding:
        spec = []
        used: set[str] = set()
        for size, logical in zip(shape.shape, logical_axes, strict=True):
            candidates = [axes for name, axes in rules if name == logical]
            if not candidates:
                raise ValueError(
                    f"mesh.rules: no rule for the logical axis {logical!r}; add "
                    f"({logical!r}, None) to leave it whole"
                )
            free = (axes for axes in candidates if not used & set(axis_names(axes)))
            axes = next(free, None)
            if size % math.prod(mesh.shape[name] for name in axis_names(axes)):
                axes = None
            used |= set(axis_names(axes))
            spec.append(axes)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, shapes, logical_axes)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings of an optimizer state.

    A leaf with a parameter's path and shape (a moment of AdamW) is sharded like the
    parameter. A leaf without one of its dimensions (Adafactor's row and column means)
    is sharded like the remaining dimensions. Every other leaf (steps, and Adafactor's
    placeholders) is on every device.
    """
    by_path = {
        _path(path): (shape.shape, sharding.spec)
        for (path, shape), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _path(path)
        suffixes = (names[start:] for start in range(len(names)))
        matching = next((name for name in suffixes if name in by_path), None)
        if matching is None:
            return replicated(mesh)
        shape, spec = by_path[matching]
        if leaf.shape == shape:
            return NamedSharding(mesh, spec)
        # For a square matrix both dimensions fit. Optax's `v_row` lacks the last
        # dimension, `v_col` the first.
        dims = range(len(shape))
        for missing in dims if "v_col" in names else reversed(dims):
            left = [dim for dim in dims if dim != missing]
            if leaf.shape == tuple(shape[dim] for dim in left):
                return NamedSharding(mesh, PartitionSpec(*(spec[dim] for dim in left)))
        return replicated(mesh)

    return jax.tree.map_with_path(place, state)


def batch_axes_spec(sharding: NamedSharding) -> PartitionSpec:
    """Returns the spec without `tensor`, for a `shard_map` over the batch axes."""
    return PartitionSpec(
        *(
            tuple(name for name in axis_names(axes) if name in BATCH_AXES) or None
            for axes in sharding.spec
        )
    )


def describe(shapes: Any, shardings: Any, count: int = 6) -> list[str]:
    """Returns a table of the largest parameters and their memory per chip.

    Parameters that differ only in their layer's number share a line.
    """
    groups: dict[tuple[str, Any, Any], int] = collections.Counter()
    for (path, leaf), sharding in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        name = re.sub(r"layers_\d+", "layers_*", "/".join(_path(path)))
        groups[name, leaf, sharding] += 1
    rows = []
    for (name, leaf, sharding), copies in groups.items():
        total = copies * leaf.size * leaf.dtype.itemsize / 2**20
        per_chip = total * math.prod(sharding.shard_shape(leaf.shape)) / leaf.size
        shape = "x".join(map(str, leaf.shape)) + (f" x{copies}" if copies > 1 else "")
        axes = ", ".join("+".join(axis_names(axes)) or "-" for axes in sharding.spec)
        rows.append((total, per_chip, f"{shape:>16}  ({axes})", name))
    total, per_chip = (sum(row[column] for row in rows) for column in (0, 1))
    rows = sorted(rows, reverse=True)[:count]
    width = max(len(row[3]) for row in rows)
    return [
        f"{name:<{width}}  {layout}  {per_chip:,.1f} of {total:,.1f} MiB per chip"
        for total, per_chip, layout, name in rows
    ] + [f"all parameters: {per_chip:,.1f} of {total:,.1f} MiB per chip"]


def batch_specs(batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Returns specs that split the rows and examples of model features.

    The indices of texts stay whole, because any device may hold any text.
    """
    return {
        name: PartitionSpec() if name.endswith("_index") else PartitionSpec(BATCH_AXES)
        for name in batch
    }


def check_batch(batch_size: int, microbatch_size: int, mesh: Mesh) -> None:
    """Raises ValueError if a batch or its microbatches do not divide over the mesh."""
    shards = num_batch_shards(mesh)
    sizes = {"data.batch_size": batch_size, "train.microbatch_size": microbatch_size}
    for key, size in sizes.items():
        if size % shards:
            raise ValueError(
                f"{key}={size}: must be a multiple of the {shards} devices that split "
                f"a batch (data x fsdp); set it to {-(-size // shards) * shards}"
            )


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the shardings of model features; see `batch_specs`."""
    return {
        name: NamedSharding(mesh, spec) for name, spec in batch_specs(batch).items()
    }


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a global batch, which every process has, onto the mesh."""
    return {
        name: jax.make_array_from_callback(
            batch[name].shape, sharding, batch[name].__getitem__
        )
        for name, sharding in batch_shardings(batch, mesh).items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def axis_names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a partition spec or a rule."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _path(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
