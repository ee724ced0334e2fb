"""Scores of mteb's tasks in tables, next to published scores.

Scores are in percent. MTEB(eng, v1) and MTEB(eng, v2) are different scales, so each
suite has its own table, with the published scores of that suite only. A mean over part
of a suite shows how many of its tasks it covers: it is not a score of the suite.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.evaluation import tables
from gecko_jax.io import wording, writing

MTEB_V1, MTEB_V2 = "MTEB(eng, v1)", "MTEB(eng, v2)"
NANOBEIR, MIRACL = "NanoBEIR", "MIRACL"

MEAN = "all tasks"
_MEAN_OF_TYPES = "the types"


@dataclasses.dataclass(frozen=True)
class Published:
    """Scores in percent from a paper, by task type or `MEAN`."""

    suite: str
    system: str
    dim: int | None
    scores: Mapping[str, float]


# Lee et al. 2024, section 4; the 278M model is from the EmbeddingGemma paper
# (Vera et al. 2025, table 5).
PUBLISHED = (
    Published(MTEB_V1, "Gecko 1.2B", 768, {MEAN: 66.31, "Retrieval": 55.70}),
    Published(MTEB_V1, "Gecko 1.2B", 256, {MEAN: 64.37, "Retrieval": 52.44}),
    Published(MTEB_V1, "Gecko, FRet alone", None, {MEAN: 62.64, "Retrieval": 53.16}),
    Published(MTEB_V1, "GTR-XL", None, {MEAN: 58.42}),
    Published(MTEB_V2, "Gecko 278M", None, {MEAN: 66.38}),
    Published(MIRACL, "Gecko, multilingual", None, {MEAN: 56.2}),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of a suite with the model's main scores."""

    name: str  # mteb's name of the task
    kind: str  # mteb's type of the task
    metric: str  # mteb's main metric
    scores: Mapping[int, float]  # dim -> score in [0, 1]; empty if the task did not run


@dataclasses.dataclass(frozen=True)
class Board:
    """Scores by suite, the settings that reproduce them, and the failures."""

    about: Mapping[str, Any]  # model, settings and versions
    dims: tuple[int, ...]  # dims of the run, ascending
    suites: Mapping[str, Sequence[Task]]  # name of a suite -> its tasks
    failures: Mapping[str, str]  # name of a task -> reason why it did not run

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        suites = {
            name: {
                "tasks": [dataclasses.asdict(task) for task in tasks],
                "means": [
                    {"dim": dim, **{k: v for k, (v, _) in means(tasks, dim).items()}}
                    for dim in self.dims
                ],
                "num_scored": sum(bool(task.scores) for task in tasks),
                "published": [
                    dataclasses.asdict(row) for row in PUBLISHED if row.suite == name
                ],
            }
            for name, tasks in self.suites.items()
        }
        about, failures = dict(self.about), dict(self.failures)
        return {"about": about, "suites": suites, "failures": failures}


def means(tasks: Sequence[Task], dim: int) -> dict[str, tuple[float | None, int]]:
    """Returns {row: (mean in percent, number of tasks with a score)}.

    The rows are the task types, then all tasks, then the mean of the types' means.
    """
    kinds: dict[str, list[float]] = {task.kind: [] for task in tasks}
    for task in tasks:
        if dim in task.scores:
            kinds[task.kind].append(100 * task.scores[dim])
    groups = dict(sorted(kinds.items()))
    groups[MEAN] = [score for scores in kinds.values() for score in scores]
    columns = {name: (_mean(scores), len(scores)) for name, scores in groups.items()}
    of_types = [float(np.mean(scores)) for scores in kinds.values() if scores]
    columns[_MEAN_OF_TYPES] = (_mean(of_types), len(groups[MEAN]))
    return columns


def _mean(scores: Sequence[float]) -> float | None:
    return float(np.mean(scores)) if scores else None


def format_board(board: Board) -> str:
    """Returns a table for every suite, and the tasks that did not run."""
    known = (MTEB_V1, MTEB_V2, NANOBEIR, MIRACL)
    built = [
        (_build_suite if name in known else _build_tasks)(board, name, tasks)
        for name, tasks in board.suites.items()
    ]
    text = tables.render(built, width=300)
    if board.failures:
        text += f"\ndid not run ({len(board.failures)}):"
    for name, reason in board.failures.items():
        text += f"\n  {wording.printable(name)}: {wording.message(reason)}"
    return text.strip()


def _build_suite(board: Board, name: str, tasks: Sequence[Task]) -> Any:
    """Returns a table of means, with published scores."""
    kinds = [task.kind for task in tasks]
    sizes = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    sizes[MEAN] = len(tasks)
    if len(set(kinds)) > 1:
        sizes[_MEAN_OF_TYPES] = len(tasks)
    is_partial = any(len(task.scores) < len(board.dims) for task in tasks)
    built = tables.new_table(name, "a/b: over a of its b tasks" if is_partial else "")
    built.add_column("mean over", no_wrap=True)
    built.add_column("tasks", justify="right")
    number = {"justify": "right", "no_wrap": True}
    for dim in board.dims:
        built.add_column(f"this model\n{dim} dims", style="bold", **number)
    published = [row for row in PUBLISHED if row.suite == name]
    for row in published:
        dims = f"\n{row.dim} dims" if row.dim else ""
        built.add_column(f"{row.system}{dims}\npublished", **number)
    own = [means(tasks, dim) for dim in board.dims]
    for mean, size in sizes.items():
        cells = []
        for value, count in (by_mean[mean] for by_mean in own):
            part = f" {count}/{size}" if count < size else ""
            cells.append("" if value is None else f"{value:.2f}{part}")
        for row in published:
            cells.append(f"{row.scores[mean]:.2f}" if mean in row.scores else "")
        built.add_row(mean, str(size), *cells)
    return built


def _build_tasks(board: Board, name: str, tasks: Sequence[Task]) -> Any:
    """Returns a table with a row for each task."""
    built = tables.new_table(name)
    for heading in ("task", "type", "metric"):
        built.add_column(heading)
    for dim in board.dims:
        built.add_column(f"{dim} dims", justify="right")
    for task in tasks:
        scores = [task.scores.get(dim) for dim in board.dims]
        built.add_row(
            *map(wording.printable, (task.name, task.kind, task.metric)),
            *("" if score is None else f"{100 * score:.2f}" for score in scores),
        )
    return built


def save(board: Board, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes results.json and table.txt; returns their paths."""
    paths = [pathlib.Path(folder) / name for name in ("results.json", "table.txt")]
    contents = (json.dumps(board.to_dict(), indent=2), format_board(board))
    for path, content in zip(paths, contents, strict=True):
        with writing.write_file(path) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
    return paths
