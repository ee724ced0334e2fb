"""Compiles the train step for a TPU topology on a host without a TPU.

    report = compile_step(config, "v5e:4x4")
    for line in describe(report):
        print(line)

The compiler is the TPU's own (libtpu), and the step is the one that `train` runs, on a
batch of full-length texts. Memory and collectives are exact. Times are lower bounds
from the chip's data sheet, not measurements.
"""

import contextlib
import dataclasses
import fcntl
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


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs of a compiled step; bytes, FLOPs and seconds are those of one chip."""

    topology: str  # of one slice, such as "v5e:4x4"
    num_slices: int
    num_devices: int
    mesh: dict[str, int]  # axis -> size
    settings: dict[str, Any]  # config keys that `search` varies
    batch_size: int  # global examples
    hbm_bytes: float  # memory of the chip
    argument_bytes: int  # train state and batch
    temporary_bytes: int
    peak_bytes: int  # arguments, temporaries, new results and the program
    flops: float  # all matrix products, recomputation included
    model_flops: float  # without recomputation
    memory_bytes: float  # memory traffic
    collectives: dict[str, dict[str, int]]  # kind -> "count" and "bytes" per step
    in_microbatch_loop: int  # collectives that every microbatch waits for
    compute_seconds: float  # FLOPs at the chip's peak rate
    memory_seconds: float  # memory traffic at full bandwidth
    link_seconds: float  # collectives at the bandwidth inside a slice; DCN is slower
    roofline_seconds: float  # shortest step, if everything overlaps
    spare_share: float  # free share of the memory; negative if the step does not fit
    model_flops_utilisation: float  # MFU at the roofline
    compile_seconds: float


def parse_topology(name: str) -> str:
    """Returns a topology such as "v5e:4x4", also for a cloud name (v5litepod-16).

    Raises ValueError for an unknown name; lists the known ones.
    """
    kind, _, sizes = name.partition(":")
    if sizes in TOPOLOGIES.get(kind, ()):
        return name
    if cloud := re.fullmatch(r"(\w+)-(\d+)", name):
        kind = cloud[1].replace("v5litepod", "v5e")
        # Names of v5p and v4 count the two cores of each chip.
        num_chips = int(cloud[2]) // (2 if kind in ("v5p", "v4") else 1)
        for sizes in TOPOLOGIES.get(kind, ()):
            if math.prod(map(int, sizes.split("x"))) == num_chips:
                return f"{kind}:{sizes}"
    known = [f"{kind}:{{{','.join(sizes)}}}" for kind, sizes in TOPOLOGIES.items()]
    raise ValueError(
        f"--topology={name}: unknown topology; use {'; '.join(known)}, or a cloud name "
        "of one of these, such as v5litepod-16 or v5p-128"
    )


@contextlib.contextmanager
def topology_devices(topology: str, num_slices: int = 1) -> Iterator[Sequence[Any]]:
    """Yields the devices of a topology: a program can be compiled, not run, for them.

    Only one process at a time can load libtpu, so this waits for other processes.
    Slices are connected by DCN. Raises ValueError if libtpu does not start.
    """
    topology = parse_topology(topology)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]  (extra)
    except ImportError as error:
        raise ImportError(
            'libtpu is not installed, which compiles for TPUs; pip install "gecko-jax'
            '[tpu]"'
        ) from error
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

        # JAX sees the two cores of a v4 chip as one device.
        is_v4 = topology.startswith("v4:")
        options = {"chip_config_name": "megacore"} if is_v4 else {}
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

    `topology` is that of one slice (`parse_topology`); slices are connected by DCN.

    Raises:
        ValueError: The topology is unknown, the config or its mesh is wrong, or jaxlib
            cannot read the compiled program.
        MemoryError: The step does not fit the chip's memory.
        ImportError: libtpu is missing; names the extra.
    """
    gecko_jax.config.check(config)
    topology = parse_topology(topology)
    with topology_devices(topology, num_slices) as devices:
        mesh = sharding.build_mesh(**train_step.mesh_sizes(config), devices=devices)
        num_segments = train_step.batch_shape(config).num_segments
        step = train_step.build(config, mesh, num_segments=num_segments, num_tasks=1)
        batch = train_step.abstract_batch(config, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        began = time.monotonic()
        traced = step.run.trace(step.shapes, batch, key)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
            need = f"{used[1]} of {used[2]}" if used else "more than the available"
            raise MemoryError(
                f"{topology}: the step needs {need} memory; lower "
                "train.microbatch_size, set model.remat=full, raise mesh.fsdp or "
                "mesh.tensor, or use --search"
            ) from error
    memory: Any = compiled.memory_analysis()
    parts = ("argument", "temp", "output", "generated_code")
    sizes = [getattr(memory, f"{part}_size_in_bytes") for part in parts]
    peak_bytes = sum(sizes) - memory.alias_size_in_bytes  # Donated arrays count once.
    try:
        program = hlo.Program(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError as error:
        # jaxlib parses the program itself, and may not know a newer libtpu's format.
        raise ValueError(
            f"{topology}: the step compiles ({peak_bytes / 2**30:.2f} GiB peak "
            "memory), but this jaxlib cannot read libtpu's program, so traffic and "
            f"collectives are unknown; try other versions ({error})"
        ) from error
    collectives: dict[str, dict[str, int]] = {}
    in_microbatch_loop = 0
    for collective in program.collectives():
        totals = collectives.setdefault(collective.kind, {"count": 0, "bytes": 0})
        totals["count"] += collective.times
        totals["bytes"] += collective.times * collective.num_bytes
        is_inside = any(map(_is_microbatch_loop, collective.loops))
        in_microbatch_loop += collective.times * is_inside
    chip = chips.CHIPS[topology.partition(":")[0]]
    flops = count_flops(traced.jaxpr) / mesh.size
    memory_bytes = program.memory_bytes()
    link_bytes = sum(totals["bytes"] for totals in collectives.values())
    seconds = {
        "compute_seconds": flops / chip.flops_per_second,
        "memory_seconds": memory_bytes / chip.hbm_bytes_per_second,
        "link_seconds": link_bytes / chip.link_bytes_per_second,
    }
    roofline_seconds = max(seconds.values())
    model_flops = train_step.model_flops(config) / mesh.size
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
        model_flops=model_flops,
        memory_bytes=memory_bytes,
        collectives=collectives,
        in_microbatch_loop=in_microbatch_loop,
        **seconds,
        roofline_seconds=roofline_seconds,
        spare_share=1 - peak_bytes / chip.hbm_bytes,
        model_flops_utilisation=model_flops / chip.flops_per_second / roofline_seconds,
        compile_seconds=time.monotonic() - began,
    )


def describe(report: Report) -> list[str]:
    """Returns the report as lines of text."""
    gib = 2**30
    shape = " x ".join(f"{name} {size}" for name, size in report.mesh.items())
    settings = ", ".join(f"{key}={value}" for key, value in report.settings.items())
    slices = f"{report.num_slices} x " if report.num_slices > 1 else ""
    return [
        f"{slices}{report.topology}: {report.num_devices} devices, mesh {shape}, "
        f"batch {report.batch_size:,}, {settings}",
        f"memory per device: {report.argument_bytes / gib:.2f} GiB arguments, "
        f"{report.temporary_bytes / gib:.2f} temporaries, "
        f"{report.peak_bytes / gib:.2f} peak of {report.hbm_bytes / gib:.0f}: "
        f"{report.spare_share:.0%} free",
        f"work per device: {report.flops:.3g} FLOPs ({report.model_flops:.3g} model "
        f"FLOPs), {report.memory_bytes / gib:,.1f} GiB memory traffic",
        *(
            f"  {kind}: {totals['count']}, {totals['bytes'] / gib:.3f} GiB"
            for kind, totals in sorted(report.collectives.items())
        ),
        f"collectives in the microbatch loop: {report.in_microbatch_loop}",
        f"roofline: {report.roofline_seconds:.3f} s per step (compute "
        f"{report.compute_seconds:.3f}, memory {report.memory_seconds:.3f}, links "
        f"{report.link_seconds:.3f}), "
        f"{report.batch_size / report.roofline_seconds:,.0f} examples/s, "
        f"{report.model_flops_utilisation:.0%} model FLOPs utilisation",
        f"compiled in {report.compile_seconds:.0f} s; nothing was run",
    ]


def count_flops(jaxpr: Any) -> float:
    """Counts the FLOPs of a program's matrix products, over all devices.

    XLA's `cost_analysis` would count the body of a scan once.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        params, times = equation.params, 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
        elif equation.primitive.name == "scan":
            times = params["length"]
        elif equation.primitive.name == "shard_map":
            times = math.prod(
                params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
            )
        total += times * sum(map(count_flops, _inner(params)))
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the programs in an equation's parameters."""
    for value in params.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            if hasattr(entry, "eqns") or hasattr(entry, "jaxpr"):
                yield entry


def _is_microbatch_loop(path: str) -> bool:
    return bool(re.search(rf"{gradients.MICROBATCHES}\)*/while$", path))
