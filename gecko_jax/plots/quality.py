"""How good a model is at every dim, beside the lines to beat."""

import itertools
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.plots import style


def plot_quality(results: Mapping[str, Any], output: str | os.PathLike) -> pathlib.Path:
    """Draws quality over dims beside the lines to beat, and per task or set.

    Args:
        results: `evaluation.Results.to_dict()`.
        output: The PNG to write.
    """
    rows = results["rows"]
    metric = style.first_metric(name for row in rows for name in row["metrics"])
    rows = [row for row in rows if metric in row["metrics"]]
    dim = max((row["dim"] for row in rows if row["system"] == "model"), default=None)
    if metric is None or dim is None:
        raise ValueError("no scores of a model to plot")
    sets = list(dict.fromkeys(row["set"] for row in rows))
    # Other models, which have a line of their own and a colour.
    named = results.get("about", {}).get("beside", ())
    others = dict(zip(named, itertools.cycle(style.OTHERS), strict=False))
    groups = _groups(rows, sets, ("model", *others, "BM25"))
    pyplot, drawn = style.start()
    with drawn:
        each = 0.95 + 0.6 * len(others)
        width = 5.6 + (1.6 + each * len(groups) if groups else 0)
        figure, axes = pyplot.subplots(
            1,
            2 if groups else 1,
            figsize=(width, 4.4),
            squeeze=False,
            layout="constrained",
            width_ratios=(5.6, width - 5.6) if groups else None,
        )
        title = sets[0] if len(sets) == 1 else f"mean of {len(sets)} sets"
        overall = [row for row in rows if row["task"] == "all"]
        _draw_dims(axes[0, 0], overall, metric, title, others)
        if groups:
            shown = {
                "model": (f"Gecko, {dim} dims", style.DIMS[2]),
                **{name: (name, color) for name, color in others.items()},
                "BM25": ("BM25", style.LINE_TO_BEAT),
            }
            _draw_bars(axes[0, 1], groups, metric, shown, len(sets) > 1)
        return style.save(figure, output)


def _draw_dims(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    title: str,
    models: Mapping[str, str],
) -> None:
    points: dict[tuple[str, int | None], list[float]] = {}
    for row in rows:
        points.setdefault((row["system"], row["dim"]), []).append(
            row["metrics"][metric]
        )
    means = {key: sum(values) / len(values) for key, values in points.items()}
    dims = sorted(dim for system, dim in means if system == "model" and dim)
    values = [means["model", dim] for dim in dims]
    x = [math.log2(dim) for dim in dims]
    own = style.DIMS[2]
    axes.plot(x, values, color=own, linewidth=2.5, marker="o", markersize=7, zorder=3)
    margin = 0.35 * max(x[-1] - x[0], 1.0)
    left, right = x[0] - 0.5 * margin, x[-1] + 0.5 * margin
    # The systems that no one trained are flat lines to be compared with.
    others = {
        system: max(v for (s, _), v in means.items() if s == system)
        for system, _ in means
        if system != "model"
    }
    others["Gecko"] = values[-1]
    top = max(others.values())
    # A line of text, in the units of the axis.
    height = 0.062 * 1.2 * top
    lines = [v for system, v in others.items() if system not in ("Gecko", *models)]
    for place, value in zip(x, values, strict=True):
        side = _clear_side(value, lines, 1.5 * height)
        axes.annotate(
            f"{value:.3f}",
            (place, value),
            textcoords="offset points",
            xytext=(0, 9 * side),
            ha="center",
            va="bottom" if side > 0 else "top",
            fontweight="bold",
            color=own,
            # Where lines are on both sides, or a steep one is near.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    labels = _apart(others, height)
    for system, value in others.items():
        known = {"Gecko": own, "BM25": style.LINE_TO_BEAT, **models}
        color = known.get(system, style.BAG)
        if system in models:
            places = sorted(dim for s, dim in means if s == system and dim)
            axes.plot(
                [math.log2(dim) for dim in places],
                [means[system, dim] for dim in places],
                color=color,
                linewidth=2,
                marker="o",
                markersize=5,
            )
        elif system != "Gecko":
            dashes = "--" if system == "BM25" else ":"
            axes.plot([left, right], [value] * 2, color=color, ls=dashes, linewidth=1.8)
        shown = system if system == "Gecko" else f"{system}  {value:.3f}"
        axes.annotate(
            shown,
            (right, labels[system]),
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
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("dims of the embedding")
    axes.set_ylabel(style.LABELS[metric])
    axes.set_title(title)


def _draw_bars(
    axes: Any,
    groups: Mapping[str, Mapping[str, float]],
    metric: str,
    shown: Mapping[str, tuple[str, str]],
    by_set: bool,
) -> None:
    """Draws a group of bars for each task or set; `shown` has label and colour."""
    width = 0.76 / len(shown)
    for number, (system, (label, color)) in enumerate(shown.items()):
        offset = (number - (len(shown) - 1) / 2) * width
        places = [p for p, group in enumerate(groups.values()) if system in group]
        values = [group[system] for group in groups.values() if system in group]
        if not values:
            continue
        bars = axes.bar(
            [place + offset for place in places],
            values,
            width,
            color=color,
            label=label,
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2, color=style.INK)
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in groups]
    steep = len(groups) > 6
    axes.set_xticks(
        range(len(groups)),
        names,
        rotation=30 if steep else 0,
        ha="right" if steep else "center",
    )
    highest = max(value for group in groups.values() for value in group.values())
    axes.set_ylim(0, 1.25 * highest if highest > 0 else 1)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(style.LABELS[metric])
    axes.set_title("by set" if by_set else "by task")
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
    """Moves labels up until no two are nearer than `gap`."""
    places: dict[str, float] = {}
    floor = -math.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        places[name] = floor = max(value, floor + gap)
    return places


def _clear_side(value: float, lines: Sequence[float], reach: float) -> int:
    """Returns where the label of a point meets no line: 1 above it, -1 below."""
    is_met = {
        side: any(0 <= side * (line - value) <= reach for line in lines)
        for side in (1, -1)
    }
    return -1 if is_met[1] and not is_met[-1] else 1
