"""Markup of the report: tables, column charts, and rows with their candidates.

Text from models and files is escaped, and the page cannot load or run anything.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.fret import export, pipeline, stages

_MAX_CHARACTERS = 420  # of a passage

# Records of the queries, retrieve and fuse; then those of likelihood and relevance.
Row = tuple[stages.Record, stages.Record, stages.Record, stages.Record, stages.Record]


class Markup(str):
    """HTML that is not escaped again."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; a "*" before a heading marks a column of numbers."""
    classes = ["class=n" if name.startswith("*") else "" for name in head]

    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(
            f"<{tag} {name}>{cell if isinstance(cell, Markup) else escape(cell)}"
            for name, cell in zip(classes, cells, strict=True)
        )

    lines = [line("th", (name.removeprefix("*") for name in head))]
    lines += [line("td", row) for row in rows]
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def histogram(values: Sequence[int]) -> dict[str, int]:
    """Counts values in 15 bins of equal, whole width, named by their first value."""
    low, high = min(values, default=0), max(values, default=0)
    step = -(-(high - low + 1) // 15)
    edges = np.arange(low, high + step + 1, step)
    counts, _ = np.histogram(values, edges)
    return dict(zip(map(str, edges), counts.tolist(), strict=False))


def columns(values: Mapping[str, int], caption: str) -> str:
    """Returns a column chart."""
    highest = max(*values.values(), 1)
    columns = "".join(
        f'<span title="{name}: {count:,}"><i style="height:{count / highest:.1%}"></i>'
        f"<small>{name}</small></span>"
        for name, count in values.items()
    )
    return (
        f"<figure><small>{highest:,}</small><div class=columns>{columns}</div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def escape(text: Any) -> str:
    """Returns HTML that displays a text."""
    return html.escape(str(text), quote=True)


def shortened(text: str) -> str:
    """Returns the start of a text, cut at a word."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS].rsplit(' ', 1)[0]} …"


def side_by_side(passes: pipeline.Pipeline, row: Row, seed: str) -> str:
    """Returns the seed and the positive of a row, with what was judged of each."""
    query, retrieved, record, *_ = row
    sides = []
    for kind, name, number in (
        ("seed", seed, stages.seed_of(retrieved)),
        ("positive", "positive", record["positive"]),
    ):
        judged = _judgements(passes, row, stages.position(retrieved, number))
        shown = zip(("retrieval", "QL", "RC", "R"), judged, strict=True)
        text = " · ".join(f"{judge} {value}" for judge, value in shown if value != "–")
        sides.append(
            f"<div><span class={kind}>{name}</span> <small>"
            f"{escape(text)}</small><p>"
            f"{escape(shortened(passes.source.store.write(number)))}</p></div>"
        )
    return _article(query, f"<div class=sides>{''.join(sides)}</div>")


def _article(query: stages.Record, body: str, note: str = "") -> str:
    """Returns a query, where it is from, and what follows."""
    about = query.get("line")
    if about is None:
        shots = f"prompt {query['prompt']}, examples {query['shots']}"
        about = f"seed {query['id']} · {shots}"
    return (
        f"<article><h3>{escape(query['query'])}</h3><p class=note>"
        f"{escape(query['task'])} · {escape(about)}{note}</p>"
        f"{body}</article>"
    )


def _judgements(passes: pipeline.Pipeline, row: Row, place: int) -> list[str]:
    """Returns rank by retrieval, rank and value of QL and of RC, and R."""
    _, retrieved, record, likelihood, relevance = row
    scored = retrieved["scores"][place] is not None
    result = [str(place + 1) if scored else "not found"]
    for name, judged in (("likelihood", likelihood), ("relevance", relevance)):
        ranks, value = record["ranks"][name], ""
        if name == "likelihood" and judged:
            log_probs = stages.of_candidates(judged["log_probs"], retrieved)
            value = f" ({log_probs[place]:.1f})"
        elif judged:
            listed = stages.of_candidates(judged["label_log_probs"], retrieved)[place]
            best = int(np.argmax(listed))
            label = list(passes.source.prompts.relevance.labels)[best]
            value = f" ({label} {math.exp(listed[best]):.0%})"
        result.append("–" if ranks is None else f"{ranks[place]}{value}")
    return [*result, f"{record['fused'][place]:.3f}"]


def with_candidates(passes: pipeline.Pipeline, row: Row, seed: str) -> str:
    """Returns one row with its candidates."""
    query, retrieved, record, *_ = row
    false = record.get("false_negatives", ())
    lines = []
    for place, number in enumerate(retrieved["candidates"]):
        marks = "".join(
            f"<span class={kind}>{name}</span>"
            for kind, name, chosen in (
                ("positive", "positive", number == record["positive"]),
                ("positive", "further positive", number in record.get("positives", ())),
                ("negative", "negative", number in export.negatives_of(record)),
                ("seed", seed, number == stages.seed_of(retrieved)),
                ("false", "false negative?", number in false),
                ("given", "given negative", number in query.get("negatives", ())),
            )
            if chosen
        )
        text = shortened(passes.source.store.write(number))
        judged = _judgements(passes, row, place)
        lines.append((*judged, Markup(marks), text))
    head = ("*retrieval", "*QL", "*RC", "*fused", "", "passage")
    moved = " · moved" if record["moved"] else ""
    return _article(query, table(head, lines), moved)
