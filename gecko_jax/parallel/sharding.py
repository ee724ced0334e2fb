"""Meshes and shardings: where each array of a run lives.

Parameters carry T5X's *logical axis* names; rules map them to *mesh axes*. The mesh has
three: `data` (examples), `fsdp` (examples, and a slice of every parameter) and `tensor`
(heads, MLP and vocabulary). On a laptop all three are 1 and nothing changes.

Chips of one slice are joined by ICI; several slices are joined by the data-centre
network (DCN), which is slow, so that only `data` and `fsdp` may reach across.
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
# The rows of a batch are split over both axes that hold examples.
BATCH_AXES = ("data", "fsdp")

# As in T5X, the first rule of a logical axis whose mesh axes are still free is used.
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

    Args:
        data: Devices of a slice along `data`; at most one of the three is -1, for the
            rest.
        fsdp: Devices of a slice along `fsdp`.
        tensor: Devices of a slice along `tensor`.
        dcn_data: Slices along `data`; one of the two may be -1, for the rest.
        dcn_fsdp: Slices along `fsdp`.
        devices: Other devices than those of this run.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    num_slices = len({_slice_of(device) for device in devices})
    within = _sizes(
        {"data": data, "fsdp": fsdp, "tensor": tensor},
        len(devices) // num_slices,
        "devices" if num_slices == 1 else f"devices of each of {num_slices} slices",
    )
    across = _sizes({"dcn_data": dcn_data, "dcn_fsdp": dcn_fsdp}, num_slices, "slices")
    if num_slices == 1:
        array = mesh_utils.create_device_mesh(
            within, devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            within, (*across, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(array, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def _slice_of(device: Any) -> int:
    # A host's CPUs are no slice.
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0


def _sizes(sizes: dict[str, int], number: int, of_what: str) -> tuple[int, ...]:
    """Fills in the -1, and checks the product."""
    known = math.prod(size for size in sizes.values() if size != -1)
    free = [name for name, size in sizes.items() if size == -1]
    given = " ".join(f"{name}={size}" for name, size in sizes.items())
    if free and number % known == 0:
        sizes[free[0]] = number // known
    if math.prod(sizes.values()) != number:
        what = (
            f"the product of the others, {known}, must divide"
            if free
            else (f"the product, {known}, must be")
        )
        raise ValueError(
            f"mesh {given}: {what} the number of {of_what}, {number}; set one of them "
            "to -1 and the others to what divides it"
        )
    return tuple(sizes.values())


def check_rules(rules: Rules) -> None:
    """Checks the names in `mesh.rules`.

    Raises:
        ValueError: Names every rule with a mesh axis that does not exist.
    """
    for logical, axes in rules:
        for name in axis_names(axes):
            if name not in MESH_AXES:
                raise ValueError(
                    f"mesh.rules ({logical!r}, {axes!r}): {name!r} is no mesh axis; "
                    f"known are {', '.join(MESH_AXES)}, and None for no split"
                )


def param_shardings(
    shapes: Any, logical_axes: Any, mesh: Mesh, rules: Rules = RULES
) -> Any:
    """Returns the sharding of each parameter by the rules.

    A dimension that its mesh axes do not divide stays whole, so that every preset fits
    every mesh.

    Raises:
        ValueError: A logical axis has no rule.
    """

    def place(shape: jax.ShapeDtypeStruct, axes: PartitionSpec) -> NamedSharding:
        spec = []
        used: set[str] = set()
        for size, logical in zip(shape.shape, axes, strict=True):
            if logical not in {name for name, _ in rules}:
                raise ValueError(
                    f"mesh.rules: no rule for the logical axis {logical!r}; add "
                    f"({logical!r}, None) to leave it whole"
                )
            found = None
            for name, wanted in rules:
                parts = math.prod(mesh.shape[axis] for axis in axis_names(wanted))
                if name == logical and not used & set(axis_names(wanted)):
                    found = wanted if size % parts == 0 else None
                    break
            used |= set(axis_names(found))
            spec.append(found)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, shapes, logical_axes)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns shardings for a tree in which trees like `params` may occur.

    A leaf under a parameter's path and of its shape (a moment of AdamW) lies where the
    parameter lies. A leaf of that shape less one dimension (Adafactor's row and column
    means) lies as the dimensions do that it has left. Everything else (steps, and
    Adafactor's stand-ins of one entry) is on every device.
    """
    by_path = {
        _path(path): (shape.shape, sharding.spec)
        for (path, shape), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = _path(path)
        for start in range(len(names)):
            if names[start:] in by_path:
                shape, spec = by_path[names[start:]]
                # Of a square matrix both fit; its columns are the first axis lost.
                order = range(len(shape))
                for lost in order if "v_col" in names else reversed(order):
                    left = [axis for axis in order if axis != lost]
                    if leaf.shape == tuple(shape[axis] for axis in left):
                        kept = [spec[axis] for axis in left]
                        return NamedSharding(mesh, PartitionSpec(*kept))
                if leaf.shape == shape:
                    return NamedSharding(mesh, spec)
        return replicated(mesh)

    return jax.tree.map_with_path(place, state)


def batch_axes_spec(sharding: NamedSharding) -> PartitionSpec:
    """Returns the spec without `tensor`: what a `shard_map` over examples may name."""
    return PartitionSpec(
        *(
            tuple(name for name in axis_names(axes) if name in BATCH_AXES) or None
            for axes in sharding.spec
        )
    )


def describe(shapes: Any, shardings: Any, count: int = 6) -> list[str]:
    """Returns lines for people: the largest parameters, and what a chip holds of them.

    Parameters that differ in their layer's number alone share a line.
    """
    groups: dict[tuple[str, Any, Any], int] = collections.Counter()
    for (path, leaf), sharding in zip(
        jax.tree.leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        name = re.sub(r"layers_\d+", "layers_*", "/".join(_path(path)))
        groups[name, leaf, sharding] += 1

    def num_bytes(shape: Sequence[int], dtype: Any, copies: int) -> int:
        return math.prod(shape) * np.dtype(dtype).itemsize * copies

    rows = []
    for (name, leaf, sharding), copies in groups.items():
        whole = num_bytes(leaf.shape, leaf.dtype, copies)
        held = num_bytes(sharding.shard_shape(leaf.shape), leaf.dtype, copies)
        shape = "x".join(map(str, leaf.shape)) + (f" x{copies}" if copies > 1 else "")
        axes = ", ".join("+".join(axis_names(axes)) or "-" for axes in sharding.spec)
        rows.append((whole, held, name, shape, axes))
    rows.sort(reverse=True)
    width = max(len(row[2]) for row in rows[:count])
    lines = [
        f"{name:<{width}}  {shape:>16}  ({axes})  {held / 2**20:,.1f} MiB a chip of "
        f"{whole / 2**20:,.1f}"
        for whole, held, name, shape, axes in rows[:count]
    ]
    whole, held = (sum(row[part] for row in rows) for part in (0, 1))
    return [
        *lines,
        f"all parameters: {held / 2**20:,.1f} MiB a chip of {whole / 2**20:,.1f}",
    ]


def batch_specs(batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Returns specs of model features: rows and examples split, the rest everywhere.

    Where a text's row is must be known to every device: any may have it.
    """
    return {
        name: PartitionSpec() if name.endswith("_index") else PartitionSpec(BATCH_AXES)
        for name in batch
    }


def check_batch(batch_size: int, microbatch_size: int, mesh: Mesh) -> None:
    """Checks that a batch and its microbatches can be split over the mesh.

    Raises:
        ValueError: Names the size and the next one that fits.
    """
    shards = num_batch_shards(mesh)
    split = f"the {shards} devices of the mesh that split a batch (data x fsdp)"
    if batch_size % shards:
        fitting = -(-batch_size // shards) * shards
        raise ValueError(
            f"data.batch_size={batch_size}: must be a multiple of {split}; set it to "
            f"{fitting}"
        )
    if microbatch_size % shards:
        fitting = -(-microbatch_size // shards) * shards
        raise ValueError(
            f"train.microbatch_size={microbatch_size}: must be a multiple of {split}; "
            f"set it to {fitting}"
        )


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns shardings of model features; see `batch_specs`."""
    return {
        name: NamedSharding(mesh, spec) for name, spec in batch_specs(batch).items()
    }


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


def axis_names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a partition spec or a rule."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def num_batch_shards(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def _path(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
