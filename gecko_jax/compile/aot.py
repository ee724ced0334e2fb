"""Proof without a pod: the train step compiled for a TPU topology on a CPU host.

    report = compile.compile_step(config, "v5e:4x4")
    for line in compile.describe(report):
        print(line)

The compiler is the TPU's own (libtpu), and the step the one that `train` runs; only the
batch is made up: every text has its full length. What it says of memory and of
collectives is exact; a time is what the chip's data sheet allows, not a measurement.
"""

import collections
import contextlib
import dataclasses
import fcntl
import itertools
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

import gecko_jax.config
from gecko_jax.compile import hlo
from gecko_jax.parallel import chips, platforms, sharding
from gecko_jax.training import gradients, train_step

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "v4": _CUBES}

# Google Cloud's names count chips, or for these kinds cores, of which a chip has two.
_CLOUD_KINDS = {
    "v5litepod": "v5e",
    "v5e": "v5e",
    "v6e": "v6e",
    "v5p": "v5p",
    "v4": "v4",
}
_COUNTED_BY_CORES = ("v5p", "v4")

# What must be left of a chip's memory for `search` to recommend a setting.
SPARE_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of a step; bytes and FLOPs are those of one chip.

    Attributes:
        topology: Of a slice, such as "v5e:4x4".
        num_slices: Slices of the pod.
        num_devices: JAX devices, one a chip.
        mesh: Size of each mesh axis.
        settings: The keys of the config that `search` varies.
        batch_size: Global examples.
        hbm_bytes: Memory of a device.
        argument_bytes: Train state and batch.
        temporary_bytes: What the step needs besides.
        peak_bytes: Arguments, temporaries, results in new memory and the program.
        flops: Of all matrix products, what is computed again included.
        model_flops: Of the model alone.
        memory_bytes: Read from and written to memory.
        collectives: Bytes by kind, and how many run in a step.
        in_microbatch_loop: Collectives that every microbatch waits for.
        compute_seconds: Of the FLOPs at the chip's peak.
        memory_seconds: Of the bytes at the memory's peak.
        link_seconds: Of the collectives at the peak of the links inside a slice; those
            between slices are slower.
        compile_seconds: What the compiler took.
    """

    topology: str
    num_slices: int
    num_devices: int
    mesh: dict[str, int]
    settings: dict[str, Any]
    batch_size: int
    hbm_bytes: float
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    flops: float
    model_flops: float
    memory_bytes: float
    collectives: dict[str, dict[str, int]]
    in_microbatch_loop: int
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    compile_seconds: float

    @property
    def spare_share(self) -> float:
        """Share of the memory that is left; negative where it does not fit."""
        return 1 - self.peak_bytes / self.hbm_bytes

    @property
    def roofline_seconds(self) -> float:
        """The least a step can take, if compute, memory and links overlap."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def model_flops_utilisation(self) -> float:
        """The utilisation that the roofline allows."""
        peak_seconds = self.compute_seconds * self.model_flops / self.flops
        return peak_seconds / self.roofline_seconds

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return dataclasses.asdict(self) | {
            "spare_share": self.spare_share,
            "roofline_seconds": self.roofline_seconds,
            "model_flops_utilisation": self.model_flops_utilisation,
        }


def parse_topology(name: str) -> str:
    """Returns `KIND:SIZES` of a topology or of a cloud's accelerator type.

    Raises:
        ValueError: The name is not known; lists those that are.
    """
    kind, _, sizes = name.partition(":")
    if sizes in TOPOLOGIES.get(kind, ()):
        return name
    cloud = re.fullmatch(r"(\w+)-(\d+)", name)
    if cloud and cloud[1] in _CLOUD_KINDS:
        kind = _CLOUD_KINDS[cloud[1]]
        chips_wanted = int(cloud[2]) // (2 if kind in _COUNTED_BY_CORES else 1)
        for sizes in TOPOLOGIES[kind]:
            if math.prod(map(int, sizes.split("x"))) == chips_wanted:
                return f"{kind}:{sizes}"
    known = [f"{kind}:{{{','.join(sizes)}}}" for kind, sizes in TOPOLOGIES.items()]
    raise ValueError(
        f"--topology={name}: unknown; known are {'; '.join(known)}; and the cloud's "
        "names of these, such as v5litepod-16 or v5p-128"
    )


@contextlib.contextmanager
def topology_devices(topology: str, num_slices: int = 1) -> Iterator[Sequence[Any]]:
    """Gives the devices of a topology, to compile for and not to run on.

    Only one process at a time may load libtpu: another one is waited for.

    Args:
        topology: Of a slice, see `parse_topology`.
        num_slices: Slices of the pod, joined by the data-centre network.

    Raises:
        ValueError: The topology is unknown.
        ImportError: libtpu is missing; names the extra.
    """
    topology = parse_topology(topology)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]  (extra)
    except ImportError as error:
        raise ImportError(
            'compiling for TPUs needs libtpu: pip install "gecko-jax[tpu]"'
        ) from error
    # Without these it asks a cloud's metadata server which machine it is on.
    for name, value in platforms.NO_METADATA.items():
        os.environ.setdefault(name, value)
    path = pathlib.Path(tempfile.gettempdir()) / "gecko_jax_libtpu.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("waiting for another process that compiles for TPUs")
            fcntl.flock(file, fcntl.LOCK_EX)
        from jax.experimental import topologies

        # The two cores of a v4 are one device, as they are on the machine.
        options = {}
        if topology.startswith("v4:"):
            options["chip_config_name"] = "megacore"
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, num_slices=num_slices, **options
            )
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"--topology={topology}: libtpu does not start; end any other process "
                f"that uses it ({error})"
            ) from error
        yield described.devices


def compile_step(
    config: ml_collections.ConfigDict, topology: str, num_slices: int = 1
) -> Report:
    """Compiles the train step of a config for a topology.

    Args:
        config: The training config; its mesh must fit the topology.
        topology: Of a slice, see `parse_topology`.
        num_slices: Slices of the pod.

    Raises:
        ValueError: The topology is unknown, the config or its mesh has faults, or
            jaxlib cannot read what was compiled.
        MemoryError: The compiler says that the step does not fit.
        ImportError: libtpu is missing; names the extra.
    """
    gecko_jax.config.check(config)
    topology = parse_topology(topology)
    kind = topology.partition(":")[0]
    with topology_devices(topology, num_slices) as devices:
        mesh = sharding.build_mesh(**train_step.mesh_sizes(config), devices=devices)
        step = train_step.build(
            config,
            mesh,
            num_segments=train_step.batch_shape(config, mesh).num_segments,
            num_tasks=1,
        )
        batch = train_step.abstract_batch(config, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        began = time.monotonic()
        traced = step.run.trace(step.shapes, batch, key)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(_why_too_large(str(error), topology)) from error
    memory: Any = compiled.memory_analysis()
    peak_bytes = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    try:
        program = hlo.Program(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        # jaxlib parses the text, and may not know all that a newer libtpu writes.
        raise ValueError(
            f"{topology}: the step compiles, and needs {peak_bytes / 2**30:.2f} GiB at "
            "the peak, but this jaxlib cannot read what libtpu compiled, so that its "
            f"collectives and traffic are not known; try other versions ({error})"
        ) from error
    found = program.collectives()
    by_kind: dict[str, dict[str, int]] = collections.defaultdict(
        lambda: {"count": 0, "bytes": 0}
    )
    for one in found:
        by_kind[one.kind]["count"] += one.times
        by_kind[one.kind]["bytes"] += one.num_bytes * one.times
    chip = chips.CHIPS[kind]
    flops = count_flops(traced.jaxpr) / mesh.size
    memory_bytes = program.memory_bytes()
    linked_bytes = sum(kind["bytes"] for kind in by_kind.values())
    return Report(
        topology=topology,
        num_slices=num_slices,
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        settings={
            "train.microbatch_size": config.train.microbatch_size,
            "model.remat": config.model.remat,
        },
        batch_size=config.data.batch_size,
        hbm_bytes=chip.hbm_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak_bytes,
        flops=flops,
        model_flops=train_step.model_flops(config) / mesh.size,
        memory_bytes=memory_bytes,
        collectives={kind: dict(value) for kind, value in by_kind.items()},
        in_microbatch_loop=sum(
            one.times for one in found if any(map(_is_microbatch_loop, one.loops))
        ),
        compute_seconds=flops / chip.flops_per_second,
        memory_seconds=memory_bytes / chip.hbm_bytes_per_second,
        link_seconds=linked_bytes / chip.link_bytes_per_second,
        compile_seconds=time.monotonic() - began,
    )


def search(config: ml_collections.ConfigDict, topology: str) -> Iterator[Report]:
    """Compiles the step with several microbatches, remat policies and meshes.

    A compilation takes minutes, so that what cannot be faster is not tried: larger
    microbatches of a step that compute already bounds, for they save memory traffic
    alone; and a split over `tensor`, which makes every microbatch wait for other
    devices, where the step fits without.

    Args:
        config: The training config; what is varied is set on copies.
        topology: See `parse_topology`.

    Yields:
        A report for each that the compiler accepts, in the order tried.
    """
    with topology_devices(topology) as devices:
        num_devices = len(devices)
    # From the least memory up: what is too large ends its series.
    fits_without_tensor = False
    for tensor, remat in itertools.product((1, 2), ("full", "dots", "none")):
        if tensor > 1 and fits_without_tensor:
            return
        shards = num_devices // tensor
        for rows in (1, 2, 4, 8, 16, 32):
            if rows * shards > config.data.batch_size:
                break
            varied = config.copy_and_resolve_references()
            with varied.unlocked():
                varied.mesh.data, varied.mesh.fsdp = 1, shards
                varied.mesh.tensor = tensor
                varied.model.remat = remat
                varied.train.microbatch_size = rows * shards
            try:
                report = compile_step(varied, topology)
            except MemoryError as error:
                logging.info("%d rows a device, remat %s: %s", rows, remat, error)
                break
            yield report
            if report.spare_share < SPARE_SHARE:
                break
            fits_without_tensor |= tensor == 1
            if report.roofline_seconds == report.compute_seconds:
                break


def recommend(reports: Sequence[Report]) -> Report | None:
    """Returns the fastest that leaves `SPARE_SHARE` of the memory, or None."""
    fitting = [report for report in reports if report.spare_share >= SPARE_SHARE]
    return min(fitting, key=lambda report: report.roofline_seconds, default=None)


def describe(report: Report) -> list[str]:
    """Returns lines for people."""
    gib = 2**30
    shape = " x ".join(f"{name} {size}" for name, size in report.mesh.items())
    settings = ", ".join(f"{key}={value}" for key, value in report.settings.items())
    slices = f"{report.num_slices} x " if report.num_slices > 1 else ""
    lines = [
        f"{slices}{report.topology}: {report.num_devices} devices, mesh {shape}, "
        f"batch {report.batch_size:,}, {settings}",
        f"memory of a device: {report.argument_bytes / gib:.2f} GiB arguments, "
        f"{report.temporary_bytes / gib:.2f} temporaries, "
        f"{report.peak_bytes / gib:.2f} at the peak, of "
        f"{report.hbm_bytes / gib:.0f}: {report.spare_share:.0%} spare",
        f"work of a device: {report.flops:.3g} FLOPs ({report.model_flops:.3g} of the "
        f"model), {report.memory_bytes / gib:,.1f} GiB to and from memory",
    ]
    for kind, found in sorted(report.collectives.items()):
        lines.append(f"  {kind}: {found['count']}, {found['bytes'] / gib:.3f} GiB")
    lines += [
        f"collectives in the microbatch loop: {report.in_microbatch_loop}",
        f"roofline: {report.roofline_seconds:.3f} s a step (compute "
        f"{report.compute_seconds:.3f}, memory {report.memory_seconds:.3f}, links "
        f"{report.link_seconds:.3f}), "
        f"{report.batch_size / report.roofline_seconds:,.0f} examples/s; "
        f"allows {report.model_flops_utilisation:.0%} model FLOPs utilisation",
        f"compiled in {report.compile_seconds:.0f} s; nothing was run",
    ]
    return lines


def count_flops(jaxpr: Any) -> float:
    """Counts the FLOPs of the matrix products of a program, on all devices together."""
    total = 0.0
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
            continue
        times = 1
        if equation.primitive.name == "scan":
            times = equation.params["length"]
        elif equation.primitive.name == "shard_map":
            mesh = equation.params["mesh"]
            axes = equation.params["newly_manual_axes"]
            times = math.prod(mesh.shape[axis] for axis in axes)
        for inner in _inner(equation.params):
            total += times * count_flops(inner)
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield one


def _is_microbatch_loop(path: str) -> bool:
    return bool(re.search(rf"{gradients.MICROBATCHES}\)*/while$", path))


def _why_too_large(message: str, topology: str) -> str:
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    what = f"needs {found[1]} of {found[2]}" if found else "needs more than there is"
    return (
        f"{topology}: the step {what} of memory; lower train.microbatch_size, set "
        "model.remat=full, raise mesh.fsdp or mesh.tensor, or let --search find it"
    )
