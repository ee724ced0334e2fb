"""Colours, metric names, and opening and saving of figures."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

INK, MUTED, GRID = "#22313f", "#7b8794", "#e4e8ec"
LINE_TO_BEAT, BAG = "#d1603d", "#a9b2bc"
# Other models, in the order in which they are named.
OTHERS = ("#8c5fa8", "#c2933b", "#4f7fb8")
# Dims, from the smallest to the largest.
DIMS = ("#7cc6b3", "#3fa796", "#1f7a73", "#135457", "#0b3540")

# Metric -> label of an axis, in the order of preference.
LABELS = {"ndcg_at_10": "nDCG@10", "spearman": "Spearman", "accuracy": "accuracy"}

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
}


def start() -> tuple[Any, Any]:
    """Returns pyplot without a display, and a context with the style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot, matplotlib.rc_context(_STYLE)


def save(figure: Any, output: str | os.PathLike) -> pathlib.Path:
    """Writes the figure as a PNG, closes it, and returns the path."""
    from matplotlib import pyplot

    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")
    pyplot.close(figure)
    return output


def shorten(name: str, length: int) -> str:
    """Returns a name of at most `length` characters."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def first_metric(names: Iterable[str]) -> str | None:
    """Returns the first metric of `LABELS` among the names."""
    names = set(names)
    return next((metric for metric in LABELS if metric in names), None)


def shades(count: int) -> list[str]:
    """Returns a colour per dim, from light to dark."""
    if count == 1:
        return [DIMS[2]]
    return [DIMS[round(i * (len(DIMS) - 1) / max(count - 1, 1))] for i in range(count)]
