"""Tables: the scores of systems on evaluation sets, to be printed and saved."""

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

# The task that stands for all queries, pairs or texts.
ALL = "all"

# Systems beside the model, and how tables call them.
MODEL, BM25 = "model", "BM25"
UNTRAINED = "untrained model"
BAG, IDF_BAG = "random bag of words", "random bag, IDF weights"
SYSTEMS = (MODEL, BM25, UNTRAINED, BAG, IDF_BAG)

# Note on the row of BM25 when no query finds a passage.
NO_HIT = "no query shares a word with a passage"

# Metric -> its name in a table, and what is counted of its sets.
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
# What results.json must hold; there may be more.
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
    """Scores of one system at one dim on one task of one set.

    Attributes:
        set: Name of the evaluation set.
        system: One of `SYSTEMS`, or the name of another model.
        dim: Entries of the vectors; None for BM25.
        task: The queries' task, `ALL` for all of them.
        count: Queries, pairs of sentences, or texts to classify.
        metrics: ndcg_at_10, recall_at_100 and mrr_at_10, or spearman, or accuracy.
        precision: How the vectors of passages are stored (`quantization`).
        note: What the numbers do not say, such as `NO_HIT`; "" for nothing.
    """

    set: str
    system: str
    dim: int | None
    task: str
    count: int
    metrics: dict[str, float]
    precision: str = quantization.FLOAT32
    note: str = ""

    @property
    def label(self) -> str:
        """The system, and its precision where that is not float32."""
        is_exact = self.precision == quantization.FLOAT32
        return self.system if is_exact else f"{self.system}, {self.precision}"


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores, and what must be known to reproduce them."""

    rows: tuple[Row, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            if not row["note"]:
                del row["note"]
        return {"about": self.about, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Results":
        """Inverse of `to_dict`, of values that have the fields of results.json."""
        rows = []
        for row in values["rows"]:
            given: dict[str, Any] = {
                key: value
                for key, value in row.items()
                if key == "dim" or value is not None
            }
            given["metrics"] = {key: float(v) for key, v in row["metrics"].items()}
            rows.append(Row(**given))
        return cls(tuple(rows), dict(values["about"]))

    def check_model(self, model_files: model_folder.ModelFiles) -> "Results":
        """Returns itself; raises ValueError if the scores are of another model."""
        if self.about.get("revision") != model_files.revision:
            raise ValueError(
                f"the results are of revision {self.about.get('revision')}, the model "
                f"is {model_files.revision}: evaluate this model, or leave them out"
            )
        return self

    def find(self, system: str, dim: int | None = None, task: str = ALL) -> list[Row]:
        """Returns the rows of a system, one per set."""
        return [
            row
            for row in self.rows
            if (row.system, row.task) == (system, task) and dim in (None, row.dim)
        ]


def format_table(results: Results, width: int = 100) -> str:
    """Returns the scores as tables, one per set, and one of means over several."""
    from rich import console

    buffer = io.StringIO()
    # A name may look like markup.
    screen = console.Console(file=buffer, width=width, markup=False, emoji=False)
    for name in dict.fromkeys(row.set for row in results.rows):
        rows = [row for row in results.rows if row.set == name]
        screen.print(_build_table(results, name, rows))
    means = _means(results)
    if means:
        screen.print(_build_table(results, means[0].set, means))
    lines = buffer.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()


def _build_table(results: Results, name: str, rows: Sequence[Row]) -> Any:
    from rich import box, table

    overall = [row for row in rows if row.task == ALL]
    tasks = list(dict.fromkeys(row.task for row in rows if row.task != ALL))
    scored = {metric for row in overall for metric in row.metrics}
    metrics = [metric for metric in METRICS if metric in scored]
    unit = METRICS[metrics[0]][1]
    has_codes = any(row.precision != quantization.FLOAT32 for row in overall)
    num_passages = (results.about.get("num_passages") or {}).get(name)
    title = f"{wording.printable(name)}: {overall[0].count:,} {unit}"
    title += f", {wording.counted(num_passages, 'passage')}" if num_passages else ""
    captions = ["under a task: nDCG@10 of its queries"] if tasks else []
    captions += [
        wording.printable(f"{row.label}: {row.note}") for row in overall if row.note
    ]
    if num_own := (results.about.get("num_own_left_out") or {}).get(name):
        left_out = wording.counted(num_own, "passage")
        captions.append(f"left out of rankings: {left_out} with the id of the query")
    built = table.Table(
        title=title,
        title_justify="left",
        caption="\n".join(captions) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    built.add_column("system", no_wrap=True)
    built.add_column("dims", justify="right")
    if has_codes:
        built.add_column("bytes", justify="right")
    for metric in metrics:
        built.add_column(METRICS[metric][0], justify="right", no_wrap=True)
    for task in tasks:
        built.add_column(wording.printable(task), justify="right", style="dim")
    for label in dict.fromkeys(row.label for row in overall):
        for row in overall:
            if row.label != label:
                continue
            by_task = {
                other.task: other.metrics.get("ndcg_at_10")
                for other in rows
                if (other.label, other.dim) == (label, row.dim) and other.task != ALL
            }
            built.add_row(
                wording.printable(label),
                str(row.dim or ""),
                *([_bytes(row)] if has_codes else []),
                *(_score(row.metrics.get(metric)) for metric in metrics),
                *(_score(by_task.get(task)) for task in tasks),
                style="bold" if label == MODEL else None,
            )
    return built


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _bytes(row: Row) -> str:
    """Memory of a passage; BM25 has no vectors."""
    if row.dim is None:
        return ""
    return f"{quantization.bytes_per_vector(row.precision, row.dim):,}"


def _means(results: Results) -> list[Row]:
    """Returns means over the retrieval sets, when there are several."""
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in results.rows:
        if row.task == ALL and "ndcg_at_10" in row.metrics:
            groups.setdefault((row.system, row.precision, row.dim), []).append(row)
    count = max(map(len, groups.values()), default=0)
    if count < 2:
        return []
    return [
        Row(
            set=f"mean of {count} sets",
            system=system,
            dim=dim,
            task=ALL,
            count=sum(row.count for row in rows),
            metrics={
                name: float(np.mean([row.metrics[name] for row in rows]))
                for name in rows[0].metrics
                if all(name in row.metrics for row in rows)
            },
            precision=precision,
        )
        for (system, precision, dim), rows in groups.items()
    ]


def save(results: Results, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes results.json, table.txt and quality.png; returns their paths."""
    folder = pathlib.Path(folder)
    paths = [folder / name for name in ("results.json", "table.txt", "quality.png")]
    checksums.write_object(paths[0], results.to_dict())
    with writing.write_file(paths[1]) as temporary:
        temporary.write_text(format_table(results) + "\n")
    with writing.write_file(paths[2]) as temporary:
        # The picture compares systems; codes of one are in the table.
        exact = [r for r in results.rows if r.precision == quantization.FLOAT32]
        shown = dataclasses.replace(results, rows=tuple(exact) or results.rows)
        quality.plot_quality(shown.to_dict(), temporary)
    return paths


def read(path: str | os.PathLike) -> Results:
    """Reads a results.json that `save` wrote.

    Raises:
        ValueError: The file is missing or is no such results.
    """
    path = pathlib.Path(path)
    try:
        values = checksums.read_object(
            path,
            _FIELDS,
            remedy="give the results.json of `gecko evaluate`, or evaluate again",
        )
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; `gecko evaluate --output=DIR` writes results.json"
        ) from None
    results = Results.from_dict(values)
    for name in dict.fromkeys(row.set for row in results.rows):
        if not any(
            row.metrics for row in results.rows if (row.set, row.task) == (name, ALL)
        ):
            raise ValueError(
                f"{path}: the set {name!r} has no row with the scores of all its "
                "queries; evaluate again"
            )
    return results
