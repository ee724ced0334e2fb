"""Markup of the report: tables and column charts.

Text from models and files is escaped, and the page cannot load or run anything.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_MAX_BINS = 15  # of a histogram


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
    """Counts values in bins of equal, whole width, named by their first value."""
    low, high = min(values, default=0), max(values, default=0)
    step = -(-(high - low + 1) // _MAX_BINS)
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
