"""Scores of systems on evaluation sets: records, text tables and files."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.formats import model_folder
from gecko_jax.inference import quantization
from gecko_jax.io import checksums, field_rules, wording, writing
from gecko_jax.plots import quality

# Task of the rows over all queries, pairs or texts.
ALL = "all"

# Names of the systems.
MODEL, BM25, HYBRID = "model", "BM25", "model and BM25"
UNTRAINED = "untrained model"
BAG, IDF_BAG = "random bag of words", "random bag, IDF weights"
SYSTEMS = (MODEL, HYBRID, BM25, UNTRAINED, BAG, IDF_BAG)

# Note on the rows of BM25 if no query has a result.
NO_HIT = "no query shares a word with a passage"

# Metric -> its column heading, and the unit of its sets.
METRICS: dict[str, tuple[str, str]] = {
    "ndcg_at_10": ("nDCG@10", "queries"),
    "recall_at_100": ("recall@100", "queries"),
    "mrr_at_10": ("MRR@10", "queries"),
    "spearman": ("Spearman", "pairs"),
    "accuracy": ("accuracy", "texts"),
}

_COUNTS = field_rules.optional(field_rules.map_of(field_rules.COUNT))
_ROW = {
    "set": field_rules.TEXT,
    "system": field_rules.TEXT,
    "dim": field_rules.nullable(field_rules.integer(1)),
    "task": field_rules.TEXT,
    "count": field_rules.COUNT,
    "metrics": field_rules.map_of(
        field_rules.number(-1, 1), field_rules.one_of(*METRICS)
    ),
    "precision": field_rules.optional(field_rules.one_of(*quantization.PRECISIONS)),
    "note": field_rules.optional(field_rules.TEXT),
}
# Required fields of results.json; others are allowed.
_FIELDS = {
    "rows": field_rules.list_of(field_rules.object_of(_ROW, only=True)),
    "about": field_rules.object_of(
        {
            "revision": field_rules.optional(field_rules.TEXT),
            "num_passages": _COUNTS,
            "num_own_left_out": _COUNTS,
        }
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of one system at one dim on one task of one set."""

    set: str  # name of the evaluation set
    system: str  # one of `SYSTEMS`, or the name of another model
    dim: int | None  # width of the vectors; None for BM25
    task: str  # of the queries; `ALL` for all queries
    count: int  # of queries, pairs of sentences, or texts to classify
    metrics: dict[str, float]  # some of `METRICS`
    precision: str = quantization.FLOAT32  # of the passages' vectors
    note: str = ""  # remark below the table, such as `NO_HIT`; "" for none

    @property
    def label(self) -> str:
        """The system, with its precision unless that is float32."""
        if self.precision == quantization.FLOAT32:
            return self.system
        return f"{self.system}, {self.precision}"


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores, and the settings that reproduce them."""

    rows: tuple[Row, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON object."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            if not row["note"]:
                del row["note"]
        return {"about": self.about, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Results":
        """Inverse of `to_dict`."""
        rows = []
        for row in values["rows"]:
            metrics = {name: float(value) for name, value in row["metrics"].items()}
            filled = {name: v for name, v in row.items() if v is not None}
            rows.append(Row(**{"dim": None, **filled, "metrics": metrics}))
        return cls(tuple(rows), dict(values["about"]))

    def check_model(self, model_files: model_folder.ModelFiles) -> "Results":
        """Returns itself; raises ValueError if the scores belong to another model."""
        if self.about.get("revision") != model_files.revision:
            raise ValueError(
                f"the results have revision {self.about.get('revision')} and the model "
                f"has {model_files.revision}; evaluate this model, or omit the results"
            )
        return self

    def find(self, system: str, dim: int | None = None, task: str = ALL) -> list[Row]:
        """Returns the rows of a system, one per set."""
        rows = [row for row in self.rows if (row.system, row.task) == (system, task)]
        return [row for row in rows if dim in (None, row.dim)]


def format_table(results: Results, width: int = 100) -> str:
    """Returns one table per set, and a table of means if there are several sets."""
    names = dict.fromkeys(row.set for row in results.rows)
    groups = [[row for row in results.rows if row.set == name] for name in names]
    if means := _means(results):
        groups.append(means)
    return render([_build_table(results, rows) for rows in groups], width)


def new_table(title: str, caption: str = "") -> Any:
    """Returns an empty table of `rich`; the texts may hold any characters."""
    from rich import box, table

    return table.Table(
        title=wording.printable(title),
        title_justify="left",
        caption=wording.lines(caption) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )


def render(tables: Sequence[Any], width: int) -> str:
    """Returns tables of `rich` as plain text."""
    from rich import console

    buffer = io.StringIO()
    # Without markup: names are shown as they are.
    screen = console.Console(file=buffer, width=width, markup=False, emoji=False)
    for table in tables:
        screen.print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip()


def _build_table(results: Results, rows: Sequence[Row]) -> Any:
    """Returns the table of one set."""
    overall = [row for row in rows if row.task == ALL]
    tasks = list(dict.fromkeys(row.task for row in rows if row.task != ALL))
    scored = {metric for row in overall for metric in row.metrics}
    metrics = [metric for metric in METRICS if metric in scored]
    has_codes = any(row.precision != quantization.FLOAT32 for row in overall)
    name, unit = overall[0].set, METRICS[metrics[0]][1]
    title = f"{name}: {overall[0].count:,} {unit}"
    if num_passages := (results.about.get("num_passages") or {}).get(name):
        title += f", {wording.counted(num_passages, 'passage')}"
    captions = ["columns of tasks: nDCG@10 of their queries"] if tasks else []
    captions += [f"{row.label}: {row.note}" for row in overall if row.note]
    if num_own := (results.about.get("num_own_left_out") or {}).get(name):
        left_out = wording.counted(num_own, "passage")
        captions.append(f"left out of rankings: {left_out} with the id of the query")
    table = new_table(title, "\n".join(captions))
    table.add_column("system", no_wrap=True)
    table.add_column("dims", justify="right")
    if has_codes:
        table.add_column("bytes", justify="right")
    for metric in metrics:
        table.add_column(METRICS[metric][0], justify="right", no_wrap=True)
    for task in tasks:
        table.add_column(wording.printable(task), justify="right", style="dim")
    labels = list(dict.fromkeys(row.label for row in overall))
    for row in sorted(overall, key=lambda row: labels.index(row.label)):
        alike = [r for r in rows if (r.label, r.dim) == (row.label, row.dim)]
        by_task = {r.task: r.metrics.get("ndcg_at_10") for r in alike}
        scores = [row.metrics.get(metric) for metric in metrics]
        scores += [by_task.get(task) for task in tasks]
        cells = [wording.printable(row.label), str(row.dim or "")]
        if has_codes:
            size = row.dim and quantization.bytes_per_vector(row.precision, row.dim)
            cells.append(f"{size:,}" if size else "")
        cells += ["" if score is None else f"{score:.3f}" for score in scores]
        table.add_row(*cells, style="bold" if row.label == MODEL else None)
    return table


def _means(results: Results) -> list[Row]:
    """Returns means over the retrieval sets if there are several."""
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in results.rows:
        if row.task == ALL and "ndcg_at_10" in row.metrics:
            groups.setdefault((row.system, row.precision, row.dim), []).append(row)
    num_sets = max(map(len, groups.values()), default=0)
    if num_sets < 2:
        return []
    means = []
    for rows in groups.values():
        shared = [n for n in rows[0].metrics if all(n in row.metrics for row in rows)]
        metrics = {n: float(np.mean([row.metrics[n] for row in rows])) for n in shared}
        name, count = f"mean of {num_sets} sets", sum(row.count for row in rows)
        mean = dataclasses.replace(
            rows[0], set=name, count=count, metrics=metrics, note=""
        )
        means.append(mean)
    return means


def save(results: Results, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes results.json, table.txt and quality.png; returns their paths."""
    folder = pathlib.Path(folder)
    paths = [folder / name for name in ("results.json", "table.txt", "quality.png")]
    checksums.write_object(paths[0], results.to_dict())
    with writing.write_file(paths[1]) as temporary:
        temporary.write_text(format_table(results) + "\n")
    with writing.write_file(paths[2]) as temporary:
        # The plot compares systems, so it omits quantized vectors.
        exact = [r for r in results.rows if r.precision == quantization.FLOAT32]
        shown = dataclasses.replace(results, rows=tuple(exact) or results.rows)
        quality.plot_quality(shown.to_dict(), temporary)
    return paths


def read(path: str | os.PathLike) -> Results:
    """Reads a results.json that `save` wrote; raises ValueError for any other file."""
    path = pathlib.Path(path)
    remedy = "pass the results.json of `gecko evaluate`, or evaluate again"
    try:
        values = checksums.read_object(path, _FIELDS, remedy=remedy)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; `gecko evaluate --output=DIR` writes results.json"
        ) from None
    results = Results.from_dict(values)
    with_overall = {row.set for row in results.rows if row.task == ALL and row.metrics}
    for name in (row.set for row in results.rows):
        if name not in with_overall:
            raise ValueError(
                f"{path}: set {name!r} has no row for all its queries; evaluate again"
            )
    return results
