"""Markup of the report: tables, column charts and the style of the page.

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


HEAD = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta http-equiv=Content-Security-Policy
 content="default-src 'none'; style-src 'unsafe-inline'">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>FRet report</title>
<style>
body { margin: 0; background: #f5f7f8; color: #22313f;
       font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.5rem 5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .3rem 0 .8rem; }
.lead { font-size: 1.05rem; }
.note, small, figcaption { color: #61707d; font-size: .85rem; }
.tiles, .figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); margin-top: 1.2rem; }
.figures { grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.tile, figure, article, table { background: #fff; border: 1px solid #e0e5e9;
  border-radius: 6px; }
.tile { padding: .9rem 1rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.6rem; color: #135457; }
figure { margin: 0; padding: .8rem 1rem; }
.columns { display: flex; height: 8rem; gap: .2rem; border-top: 1px solid #e4e8ec; }
.columns span { flex: 1; min-width: 0; display: grid; grid-template-rows: 1fr auto;
  text-align: center; }
.columns i { align-self: end; background: #3fa796; }
.columns small { font-size: .7rem; overflow: hidden; }
article { padding: 1rem 1.2rem; margin: 0 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
article table { border: 0; }
td:nth-child(4):not(.n) { min-width: 8rem; }
.wide { overflow-x: auto; }
article .wide td:last-child { min-width: 24rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem;
  border-bottom: 1px solid #eef1f3; }
td:last-child { overflow-wrap: anywhere; }
th { color: #61707d; font-weight: 600; font-size: .8rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sides { display: grid; gap: .4rem 1.4rem; margin-top: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); }
.sides p { margin: .3rem 0; overflow-wrap: anywhere; font-size: .9rem; }
.positive, .negative, .seed, .given, .false { border-radius: 3px; padding: .05rem .4rem;
  margin: 0 .2rem .2rem 0; font-size: .78rem; display: inline-block; }
.positive { background: #1f7a73; color: #fff; }
.negative { background: #b64a27; color: #fff; }
.seed, .given { border: 1px solid #7b8794; color: #22313f; }
.false { background: #e9b44c; color: #22313f; }
</style></head><body><main>"""
