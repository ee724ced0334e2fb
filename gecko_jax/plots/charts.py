"""Charts as SVG within a page: bars over ranks, bars of names, histograms."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

_MUTED, _FILL, _GRID = "#61707d", "#3fa796", "#e4e8ec"
_WIDTH, _HEIGHT = 360, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 14, 26


def bars(values: Mapping[str, int], caption: str) -> str:
    """Draws one upright bar for each value."""
    highest = max([*values.values(), 1])
    width = (_WIDTH - _LEFT - _RIGHT) / max(len(values), 1)
    height = _HEIGHT - _TOP - _BOTTOM
    every = max(1, -(-len(values) // 12))  # Names that would overlap are left out.
    parts = [_axis(highest)]
    for place, (name, value) in enumerate(values.items()):
        x = _LEFT + place * width
        tall = height * value / highest
        parts.append(
            f'<rect x="{x + 0.1 * width:.1f}" y="{_TOP + height - tall:.1f}" '
            f'width="{0.8 * width:.1f}" height="{tall:.1f}" fill="{_FILL}">'
            f"<title>{html.escape(name)}: {value:,}</title></rect>"
        )
        if place % every == 0:
            parts.append(_text(x + width / 2, _HEIGHT - 8, name, "middle"))
    return _figure("".join(parts), _HEIGHT, caption)


def histogram(values: Sequence[int], caption: str, num_bins: int = 15) -> str:
    """Draws how often values lie in bins of equal, whole width."""
    low, high = min(values, default=0), max(values, default=0)
    step = max(1, -(-(high - low + 1) // num_bins))
    edges = np.arange(low, high + step + 1, step)
    counts, _ = np.histogram(values, edges)
    names = [
        str(edge) if step == 1 else f"{edge}–{edge + step - 1}" for edge in edges[:-1]
    ]
    if step > 1:  # The range is long; its beginning tells enough under the axis.
        names = [name.partition("–")[0] for name in names]
    return bars(dict(zip(names, counts.tolist(), strict=True)), caption)


def rows(values: Mapping[str, int], caption: str) -> str:
    """Draws one lying bar for each name, the number beside it."""
    highest = max([*values.values(), 1])
    width, left, line = 2 * _WIDTH, 230, 22
    parts = []
    for place, (name, value) in enumerate(values.items()):
        y = 6 + place * line
        long = (width - left - 70) * value / highest
        shown = name if len(name) <= 34 else f"{name[:33]}…"
        parts.append(_text(left - 8, y + 13, shown, "end"))
        parts.append(
            f'<rect x="{left}" y="{y}" width="{long:.1f}" height="16" fill="{_FILL}"/>'
        )
        parts.append(_text(left + long + 6, y + 13, f"{value:,}", "start"))
    return _figure("".join(parts), 12 + len(values) * line, caption, width)


def _axis(highest: int) -> str:
    height = _HEIGHT - _TOP - _BOTTOM
    parts = []
    for value in sorted({0, highest // 2, highest}):
        y = _TOP + height * (1 - value / highest)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{_GRID}"/>' + _text(_LEFT - 6, y + 4, f"{value:,}", "end")
        )
    return "".join(parts)


def _text(x: int | float, y: int | float, text: str, anchor: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" '
        f'fill="{_MUTED}">{html.escape(text)}</text>'
    )


def _figure(content: str, height: int, caption: str, width: int = _WIDTH) -> str:
    caption = html.escape(caption)
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{caption}">{content}</svg><figcaption>{caption}</figcaption>'
        "</figure>"
    )
