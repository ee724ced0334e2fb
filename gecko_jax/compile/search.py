"""Search for the fastest setting of a train step on a TPU slice.

    stored = search.Stored("compiled.jsonl")
    reports = list(search.search(config, "v5e:4x4", stored.compile_step))
    best = search.recommend(reports)

A compilation takes minutes, so `Stored` keeps the result of each in a file, and an
interrupted search that runs again compiles only what the file lacks.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

import gecko_jax.config
from gecko_jax.compile import aot
from gecko_jax.io import reading, writing

# Smallest share of free memory with which `search` recommends a setting.
SPARE_SHARE = 0.2

_REMAT = ("full", "dots", "none")
_TENSOR = (1, 2)
_ROWS = (1, 2, 4, 8, 16, 32)  # per device and microbatch

# Prefixes of the config keys that do not change the compiled step.
_NOT_COMPILED = ("init.", "checkpoint.", "evaluation.", "data.cache_dir", "data.files")


class Stored:
    """Results of compilations, as JSON lines in a file."""

    def __init__(self, path: str | os.PathLike):
        """Reads the results of earlier runs from a file, which may be missing.

        Raises a ValueError that names a line which is not one of these results.
        """
        self._path = pathlib.Path(path)
        self._results = dict(self._read()) if self._path.exists() else {}

    def compile_step(
        self, config: ml_collections.ConfigDict, topology: str, num_slices: int = 1
    ) -> aot.Report:
        """Returns the stored result of `aot.compile_step`, or compiles and stores it.

        Results of other configs, and of other versions of JAX or libtpu, do not count.
        """
        key = _key(config, topology, num_slices)
        if key not in self._results:
            try:
                report = aot.compile_step(config, topology, num_slices)
                result = {"key": key, "report": dataclasses.asdict(report)}
            except MemoryError as error:
                result = {"key": key, "too_large": str(error)}
            self._results[key] = result
            with writing.write_file(self._path) as temporary:
                lines = map(json.dumps, self._results.values())
                temporary.write_text("\n".join(lines) + "\n", "utf-8")
        result = self._results[key]
        if "too_large" in result:
            raise MemoryError(result["too_large"])
        return aot.Report(**result["report"])

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for where, line in reading.read_lines(self._path):
            try:
                result = json.loads(line)
                if "too_large" not in result:
                    aot.Report(**result["report"])
                yield result["key"], result
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{where}: not a result of gecko compile ({error!r}); remove the "
                    "line, or name another file"
                ) from None


def search(
    config: ml_collections.ConfigDict,
    topology: str,
    compile_step: Callable[..., aot.Report] = aot.compile_step,
) -> Iterator[aot.Report]:
    """Compiles the step with several microbatch sizes, remat policies and meshes.

    A compilation takes minutes, so this skips settings that cannot be faster. Larger
    microbatches only save memory traffic, which does not help a step that compute
    bounds. A split over `tensor` makes every microbatch wait for other devices, which
    does not help a step that fits without it.

    Yields a report for each setting that compiles; `compile_step` is that of `aot` or
    of a `Stored`.
    """
    with aot.topology_devices(topology) as devices:
        num_devices = len(devices)
    fits_without_tensor = False
    series = list(itertools.product(_TENSOR, _REMAT))
    for number, (tensor, remat) in enumerate(series, 1):
        if tensor > 1 and fits_without_tensor:
            return
        shards = num_devices // tensor
        # In order of memory, so the first size that does not fit ends the series.
        for rows in _ROWS:
            if rows * shards > config.data.batch_size:
                break
            varied = config.copy_and_resolve_references()
            with varied.unlocked():
                varied.mesh.update(data=1, fsdp=shards, tensor=tensor)
                varied.model.remat = remat
                varied.train.microbatch_size = rows * shards
            setting = f"tensor={tensor}, remat={remat}, {rows} rows per device"
            logging.info("series %d of %d: %s", number, len(series), setting)
            try:
                report = compile_step(varied, topology)
            except MemoryError as error:
                logging.info("%s: %s", setting, error)
                break
            yield report
            if report.spare_share < SPARE_SHARE:
                break
            fits_without_tensor |= tensor == 1
            if report.roofline_seconds == report.compute_seconds:
                break


def recommend(reports: Sequence[aot.Report]) -> aot.Report | None:
    """Returns the fastest report with `SPARE_SHARE` of the memory free, or None."""
    fitting = [report for report in reports if report.spare_share >= SPARE_SHARE]
    return min(fitting, key=lambda report: report.roofline_seconds, default=None)


def _key(config: ml_collections.ConfigDict, topology: str, num_slices: int) -> str:
    """Returns a hash of everything but the package's code that a result depends on."""
    flat = gecko_jax.config.flatten(json.loads(gecko_jax.config.to_json(config)))
    # A key that was added with the value of before does not change the step.
    facts = {
        name: value
        for name, value in flat.items()
        if not name.startswith(_NOT_COMPILED)
        and (name, value) not in gecko_jax.config.ADDED_KEYS.items()
    }
    versions = [jax.__version__, importlib.metadata.version("libtpu")]
    slices = [aot.parse_topology(topology), num_slices]
    encoded = json.dumps([facts, versions, slices], sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]
