"""Rows of the report: a query with its candidates, and what was judged of them."""

import math

import numpy as np

from gecko_jax.fret import export, html_page, pipeline, stages

_MAX_CHARACTERS = 420  # of a passage

# Records of the queries, retrieve and fuse; then those of likelihood and relevance.
Row = tuple[stages.Record, stages.Record, stages.Record, stages.Record, stages.Record]


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
            f"{html_page.escape(text)}</small><p>"
            f"{html_page.escape(shortened(passes.source.store.write(number)))}</p></div>"
        )
    return _article(query, f"<div class=sides>{''.join(sides)}</div>")


def _article(query: stages.Record, body: str, note: str = "") -> str:
    """Returns a query, where it is from, and what follows."""
    about = query.get("line")
    if about is None:
        shots = f"prompt {query['prompt']}, examples {query['shots']}"
        about = f"seed {query['id']} · {shots}"
    return (
        f"<article><h3>{html_page.escape(query['query'])}</h3><p class=note>"
        f"{html_page.escape(query['task'])} · {html_page.escape(about)}{note}</p>"
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
        lines.append((*judged, html_page.Markup(marks), text))
    head = ("*retrieval", "*QL", "*RC", "*fused", "", "passage")
    moved = " · moved" if record["moved"] else ""
    return _article(query, html_page.table(head, lines), moved)
