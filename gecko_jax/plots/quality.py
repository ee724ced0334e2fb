"""Quality of a model at every dim, next to the baselines."""

import itertools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.plots import style


def plot_quality(results: Mapping[str, Any], output: str | os.PathLike) -> pathlib.Path:
    """Draws quality over dims next to the baselines, and per task or set, into a PNG.

    `results` is `evaluation.Results.to_dict()`; raises ValueError without scores of a
    model.
    """
    rows = results["rows"]
    metric = style.first_metric(name for row in rows for name in row["metrics"])
    rows = [row for row in rows if metric in row["metrics"]]
    dim = max((row["dim"] for row in rows if row["system"] == "model"), default=None)
    if metric is None or dim is None:
        raise ValueError("no scores of a model to plot")
    sets = list(dict.fromkeys(row["set"] for row in rows))
    names = results.get("about", {}).get("beside", ())
    others = dict(zip(names, itertools.cycle(style.OTHERS), strict=False))
    groups = _groups(rows, sets, ("model", *others, "BM25"))
    pyplot, styled = style.start()
    with styled:
        group_width = 0.95 + 0.6 * len(others)
        widths = [5.6] + ([1.6 + group_width * len(groups)] if groups else [])
        figure, axes = pyplot.subplots(
            1,
            len(widths),
            figsize=(sum(widths), 4.4),
            squeeze=False,
            layout="constrained",
            width_ratios=widths,
        )
        overall = [row for row in rows if row["task"] == "all"]
        _draw_dims(axes[0, 0], overall, metric, others)
        title = sets[0] if len(sets) == 1 else f"mean of {len(sets)} sets"
        axes[0, 0].set_title(title)
        if groups:
            shown = {"model": (f"Gecko, {dim} dims", style.DIMS[2])}
            shown |= {name: (name, color) for name, color in others.items()}
            shown["BM25"] = ("BM25", style.LINE_TO_BEAT)
            _draw_bars(axes[0, 1], groups, shown)
            axes[0, 1].set_title("by set" if len(sets) > 1 else "by task")
        for ax in axes[0]:
            ax.set_ylabel(style.LABELS[metric])
            ax.grid(visible=False, axis="x")
        return style.save(figure, output)


def _draw_dims(
    axes: Any, rows: Sequence[Mapping[str, Any]], metric: str, models: Mapping[str, str]
) -> None:
    """Draws a curve for each model and a line for each system without dims."""
    points: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        key = row["system"], row["dim"]
        points.setdefault(key, []).append(row["metrics"][metric])
    means = {key: sum(values) / len(values) for key, values in points.items()}
    dims = sorted(dim for system, dim in means if system == "model" and dim)
    values = [means["model", dim] for dim in dims]
    x = [math.log2(dim) for dim in dims]
    own = style.DIMS[2]
    axes.plot(x, values, "o-", color=own, linewidth=2.5, markersize=7, zorder=3)
    margin = 0.35 * max(x[-1] - x[0], 1.0)
    left, right = x[0] - 0.5 * margin, x[-1] + 0.5 * margin
    best = {
        system: max(v for (s, _), v in means.items() if s == system)
        for system, _ in means
        if system != "model"
    }
    best["Gecko"] = values[-1]
    top = max(best.values())
    text_height = 0.062 * 1.2 * top  # In units of the axis.
    lines = [v for system, v in best.items() if system not in ("Gecko", *models)]
    for place, value in zip(x, values, strict=True):
        side = _clear_side(value, lines, 1.5 * text_height)
        axes.annotate(
            f"{value:.3f}",
            (place, value),
            textcoords="offset points",
            xytext=(0, 9 * side),
            ha="center",
            va="bottom" if side > 0 else "top",
            fontweight="bold",
            color=own,
            # Keeps the label legible over a line.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    colors = {"Gecko": own, "BM25": style.LINE_TO_BEAT, **models}
    for system, height in _apart(best, text_height).items():
        value, color = best[system], colors.get(system, style.BAG)
        if system in models:
            own_dims = sorted(dim for s, dim in means if s == system and dim)
            heights = [means[system, dim] for dim in own_dims]
            places = [math.log2(dim) for dim in own_dims]
            axes.plot(places, heights, "o-", color=color, linewidth=2, markersize=5)
        elif system != "Gecko":
            dashes = "--" if system == "BM25" else ":"
            axes.plot([left, right], [value] * 2, color=color, ls=dashes, linewidth=1.8)
        axes.annotate(
            system if system == "Gecko" else f"{system}  {value:.3f}",
            (right, height),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
            fontsize=10,
            color=style.MUTED if color == style.BAG else color,
            annotation_clip=False,
        )
    axes.set_xlim(left, right)
    axes.set_ylim(0, 1.2 * top if top > 0 else 1)
    axes.set_xticks(x, [str(dim) for dim in dims])
    axes.set_xlabel("dims of the embedding")


def _draw_bars(
    axes: Any,
    groups: Mapping[str, Mapping[str, float]],
    shown: Mapping[str, tuple[str, str]],
) -> None:
    """Draws a group of bars per task or set; `shown` has (label, colour) per system."""
    width = 0.76 / len(shown)
    for number, (system, (label, color)) in enumerate(shown.items()):
        offset = (number - (len(shown) - 1) / 2) * width
        bars = {p: g[system] for p, g in enumerate(groups.values()) if system in g}
        if bars:
            places = [place + offset for place in bars]
            drawn = axes.bar(places, bars.values(), width, color=color, label=label)
            axes.bar_label(drawn, fmt="%.2f", fontsize=9, padding=2, color=style.INK)
    names = [style.shorten(name, 14) for name in groups]
    tilt = {"rotation": 30, "ha": "right"} if len(groups) > 6 else {}
    axes.set_xticks(range(len(groups)), names, **tilt)
    highest = max(value for group in groups.values() for value in group.values())
    axes.set_ylim(0, 1.25 * highest if highest > 0 else 1)
    axes.legend(ncols=len(shown), fontsize=9, loc="upper right")


def _groups(
    rows: Sequence[Mapping[str, Any]], sets: Sequence[str], systems: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Returns {task or set: {system: score}} at the largest dim of each system."""
    key = "set" if len(sets) > 1 else "task"
    groups: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["dim"] or 0):
        if (row["task"] == "all") == (key == "set") and row["system"] in systems:
            metric = style.first_metric(row["metrics"]) or ""
            groups.setdefault(row[key], {})[row["system"]] = row["metrics"][metric]
    return dict(sorted(groups.items()))


def _apart(values: Mapping[str, float], gap: float) -> dict[str, float]:
    """Returns label heights, moved up until no two are closer than `gap`."""
    places: dict[str, float] = {}
    floor = -math.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        places[name] = floor = max(value, floor + gap)
    return places


def _clear_side(value: float, lines: Sequence[float], reach: float) -> int:
    """Returns the side on which a point's label meets no line: 1 above, -1 below."""
    above, below = (
        any(0 <= side * (line - value) <= reach for line in lines) for side in (1, -1)
    )
    return -1 if above and not below else 1
