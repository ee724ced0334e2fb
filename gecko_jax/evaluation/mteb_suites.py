"""Runs benchmarks, single tasks and local sets with `mteb`.

    board = mteb_suites.run(embedding.load("runs/finetune"), config, "results", "tiny")
    print(scoreboard.format_board(board))

A task is encoded once and scored at every dim. Results have mteb's own format
(`OUTPUT/results/MODEL/REVISION/TASK.json`, with one MODEL per dim), so an interrupted
run resumes, and mteb's own tools read the folder:

    mteb.ResultCache("results").load_results().to_dataframe()
"""

import contextlib
import dataclasses
import difflib
import json
import logging as standard_logging
import os
import pathlib
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from gecko_jax.evaluation import (
    local_tasks,
    mteb_encoder,
    scoreboard,
    sets,
    vector_store,
    whole_results,
)
from gecko_jax.formats import model_folder
from gecko_jax.inference import embedding
from gecko_jax.io import checksums, wording
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding

# Scoreboard titles of tasks outside of a suite.
TASKS, LOCAL = "single tasks", "local sets"

# Suites without an mteb benchmark of that name -> their tasks.
_ALONE = {scoreboard.MIRACL: ("MIRACLRetrieval",)}

# File that names the model of a folder of results, and the folder inside.
_ABOUT, _RESULTS = "evaluation.json", "results"


def run(
    gecko: embedding.Gecko,
    config: ml_collections.ConfigDict,
    output: str | os.PathLike,
    name: str,
) -> scoreboard.Board:
    """Runs the tasks of a config; resumes an interrupted run.

    A task that cannot run, for example because its data set cannot be downloaded, is
    logged in one line and skipped.

    `config` is that of `configs/evaluate.py`, `output` the folder of the results, and
    `name` the name of the model if the config has none. Raises ValueError if the output
    belongs to another model, or a task, dim or set is wrong.
    """
    try:
        import mteb
    except ImportError as error:
        raise ImportError(
            'MTEB needs mteb 2.x; install it with pip install "gecko-jax[eval]"'
        ) from error
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes: evaluation runs in one process; start "
            "it on one machine"
        )
    dims = tuple(sorted({gecko.check_dim(dim) for dim in config.dims or gecko.dims}))
    gecko = _share(gecko, config.mesh)
    chosen = _choose(mteb, gecko, config)
    sides = ("query_length", "passage_length")
    lengths = {key: config[key] or getattr(gecko.files, key) for key in sides}
    name = config.name or f"gecko-jax/{name}"
    about = {
        "model": name,
        "revision": gecko.revision,
        "step": gecko.files.step,
        "dtype": gecko.files.encoder_config.dtype,
        **lengths,
        "text_format": gecko.files.text_format.to_dict(),
    }
    _claim(pathlib.Path(output), about)
    vectors = vector_store.Store(config.cache.folder, gecko, config.cache.max_gib)
    names = {dim: name if dim == gecko.dims[-1] else f"{name}-{dim}" for dim in dims}
    encoders = [
        mteb_encoder.Encoder(gecko, vectors, dim=dim, name=names[dim], **lengths)
        for dim in dims
    ]
    results = whole_results.build_cache(mteb, output)
    runner = Runner(mteb, encoders, results, vectors)
    suites: dict[str, list[scoreboard.Task]] = {}
    with _quiet():
        for suite, tasks in chosen.items():
            suites[suite] = []
            for number, task in enumerate(tasks, start=1):
                task_name = task.metadata.name
                logging.info("%s, %d of %d: %s", suite, number, len(tasks), task_name)
                suites[suite].append(runner.run(task))
    versions = model_folder.versions() | {"mteb": mteb.__version__}
    about |= {"backend": jax.default_backend(), "versions": versions}
    return scoreboard.Board(about, dims, suites, runner.failures)


@dataclasses.dataclass
class Runner:
    """Runs tasks at every dim, and collects the failures."""

    mteb: Any  # the module
    encoders: Sequence[mteb_encoder.Encoder]  # one per dim
    cache: Any  # mteb's result cache
    vectors: vector_store.Store  # of the encoders
    # Name of a task -> reason why it did not run.
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    _has_checked_hub: bool = False

    def run(self, task: Any) -> scoreboard.Task:
        """Runs the missing parts of a task, and returns its scores."""
        metadata = task.metadata
        name = metadata.name
        scores: dict[int, float] = {}
        begin = time.monotonic()
        try:
            if name not in self.failures:  # A task may be in several suites.
                waiting = [e for e in self.encoders if not self._load(task, e)]
                self._run(task, waiting)
                for encoder in self.encoders:
                    scores[encoder.dim] = float(self._load(task, encoder).get_score())
                shown = " ".join(f"{100 * score:.2f}" for score in scores.values())
                seconds = f"{time.monotonic() - begin:.0f} s"
                note = seconds if waiting else "from an earlier run"
                logging.info("%s: %s (%s)", name, shown, note)
        # An error of any type in one data set must not stop the other tasks.
        except Exception as error:
            self.failures[name] = _explain(task, error)
            logging.warning("%s did not run: %s", name, self.failures[name])
            logging.debug("%s", name, exc_info=True)
        return scoreboard.Task(name, metadata.type, metadata.main_score, scores)

    def _run(self, task: Any, encoders: Sequence[mteb_encoder.Encoder]) -> None:
        if not encoders:
            return
        if task.is_aggregate:  # The parts run first, each at every dim.
            for part in task.metadata.tasks:
                self._run(part, [e for e in encoders if not self._load(part, e)])
        elif not task.data_loaded:
            self._check_hub()
            task.load_data()
            try:
                self._run(task, encoders)
            finally:
                task.unload_data()
            return
        for encoder in encoders:
            self.mteb.evaluate(
                encoder,
                task,
                cache=self.cache,
                overwrite_strategy=self._strategy(task, encoder),
                # `mteb_encoder` joins the batches again.
                encode_kwargs={"batch_size": 1_024, "show_progress_bar": False},
                show_progress_bar=False,
                co2_tracker=False,
                # Otherwise mteb would skip data sets that are not public.
                public_only=False,
            )
        self.vectors.trim()

    def _load(self, task: Any, encoder: mteb_encoder.Encoder) -> Any:
        """Returns the result of the task if it is complete, else None."""
        result = self._read(task, encoder)
        if result is None or result.get_missing_evaluations(task):
            return None
        return result.validate_and_filter_scores(task)

    def _strategy(self, task: Any, encoder: mteb_encoder.Encoder) -> str:
        # After a local file has changed, mteb would otherwise keep the old result.
        name, meta = task.metadata.name, encoder.mteb_model_meta
        path = self.cache.get_task_result_path(name, meta)
        is_outdated = path.exists() and self._read(task, encoder) is None
        return "always" if is_outdated else "only-missing"

    def _read(self, task: Any, encoder: mteb_encoder.Encoder) -> Any:
        """Returns the saved result of the task, None if it is for other data."""
        meta = encoder.mteb_model_meta
        try:
            result = self.cache.load_task_result(task.metadata.name, meta)
        except (ValueError, KeyError) as error:
            path = self.cache.get_task_result_path(task.metadata.name, meta)
            raise ValueError(
                f"{path}: damaged ({wording.first_line(error)}); remove it and run "
                "again"
            ) from error
        if result is None or task.is_aggregate:
            return result
        return result if result.dataset_revision == task.metadata.revision else None

    def _check_hub(self) -> None:
        """Goes offline if the hub is unreachable: each data set would time out."""
        if self._has_checked_hub:
            return
        self._has_checked_hub = True
        import huggingface_hub
        from datasets import config as datasets_config
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=10)
        # The type of the error depends on the HTTP library.
        except Exception as error:
            logging.warning(
                "%s cannot be reached (%s): only downloaded data sets are available",
                constants.ENDPOINT,
                wording.first_line(error),
            )
            constants.HF_HUB_OFFLINE = True
            datasets_config.HF_HUB_OFFLINE = True


def _choose(
    mteb: Any, gecko: embedding.Gecko, config: ml_collections.ConfigDict
) -> dict[str, list[Any]]:
    """Returns the tasks of each suite, sorted by name."""
    chosen: dict[str, list[Any]] = {}
    for suite in config.suites:
        tasks = map(mteb.get_task, _ALONE.get(suite, ()))
        if suite not in _ALONE:
            tasks = mteb.get_benchmark(suite).tasks
        chosen[suite] = sorted(tasks, key=lambda task: task.metadata.name)
    if config.tasks:
        chosen[TASKS] = [_get_task(mteb, name) for name in config.tasks]
    if config.folders:
        local_sets = [dataset for path in config.folders for dataset in sets.load(path)]
        names = [dataset.name for dataset in local_sets]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"folders: two sets have the name {twice[0]!r}; rename one"
            )
        chosen[LOCAL] = [local_tasks.build(gecko, dataset) for dataset in local_sets]
    return chosen


def _get_task(mteb: Any, name: str) -> Any:
    try:
        return mteb.get_task(name)
    except KeyError:
        known = [task.metadata.name for task in mteb.get_tasks()]
        near = difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"tasks: mteb has no task {name!r}{hint}") from None


def _share(gecko: embedding.Gecko, mesh: ml_collections.ConfigDict) -> embedding.Gecko:
    """Shards the parameters over a mesh of all devices."""
    built = sharding.build_mesh(**mesh.to_dict())
    if built.size == 1:
        return gecko
    abstract = dual_encoder.abstract_params(gecko.files.encoder_config)
    shardings = sharding.param_shardings(*abstract, built)
    params = jax.device_put(gecko.files.params, shardings)
    return embedding.Gecko(dataclasses.replace(gecko.files, params=params))


def _claim(folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes `about` into the folder; refuses a folder of another model."""
    path = folder / _ABOUT
    if path.exists():
        before = checksums.read_object(path, {}, remedy="choose another --output")
        # Tuples become lists, as in the file.
        now = json.loads(json.dumps(about))
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            key = "revision" if "revision" in changed else changed[0]
            raise ValueError(
                f"{folder}: holds results with {key} {before.get(key)!r}, and this "
                f"model has {now[key]!r}; choose another --output"
            )
        return
    if (folder / _RESULTS).exists():
        raise ValueError(
            f"{folder}: holds results without an {_ABOUT} that names the model; "
            "choose another --output"
        )
    checksums.write_object(path, about)


def _explain(task: Any, error: Exception) -> str:
    # `datasets` raises this if there is neither a copy nor a network.
    if isinstance(error, ConnectionError):
        path = (task.metadata.dataset or {}).get("path", "")
        subject = (
            "its data sets are" if task.is_aggregate else f"its data set {path} is"
        )
        return f"{subject} not on this machine and cannot be downloaded"
    return wording.first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars, logs and warnings of mteb and `datasets`."""
    import datasets

    notes = [standard_logging.getLogger(name) for name in ("mteb", "datasets")]
    before = [logger.level for logger in notes]
    had_bars = not datasets.are_progress_bars_disabled()
    try:
        for logger in notes:
            logger.setLevel(standard_logging.ERROR)
        datasets.disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(notes, before, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
