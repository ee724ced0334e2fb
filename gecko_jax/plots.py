"""Plots: how long texts are, how training went, how good the model is at every dim."""

import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gecko_jax import metrics

_INK, MUTED, _GRID = "#22313f", "#7b8794", "#e4e8ec"
LINE_TO_BEAT, _BAG = "#d1603d", "#a9b2bc"
# Other models, in the order in which they are named.
_OTHERS = ("#8c5fa8", "#c2933b", "#4f7fb8")
# Dims, from the smallest to the largest: one hue, growing darker.
DIMS = ("#7cc6b3", "#3fa796", "#1f7a73", "#135457", "#0b3540")

# Metric -> its name on an axis, the one to draw first.
_LABELS = {"ndcg_at_10": "nDCG@10", "spearman": "Spearman", "accuracy": "accuracy"}

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
}


def plot_training(
    runs: Sequence[str | os.PathLike], output: str | os.PathLike
) -> pathlib.Path:
    """Draws loss and evaluation over the steps, one column per run.

    Args:
        runs: Files `metrics.jsonl` of workdirs, in the order of training.
        output: The PNG to write.

    Raises:
        ValueError: A file holds no logged step.
    """
    logs = []
    for path in map(pathlib.Path, runs):
        lines = metrics.read(path)
        if not any("loss" in line for line in lines):
            raise ValueError(f"{path}: no logged step to plot; train first")
        logs.append((path.resolve().parent.name, lines))
    scores = [_series(lines, "evaluation/") for _, lines in logs]
    score = _first_metric(
        name.rpartition("/")[0] for series in scores for name in series
    )
    num_rows = 2 if score else 1
    pyplot, style = start()
    with style:
        figure, axes = pyplot.subplots(
            num_rows,
            len(logs),
            figsize=(1.5 + 5.0 * len(logs), 3.6 * num_rows + 0.4),
            squeeze=False,
            sharey="row",
            layout="constrained",
        )
        for column, (name, lines) in enumerate(logs):
            _draw_losses(axes[0, column], name, lines)
            if score:
                _draw_scores(axes[1, column], scores[column], score)
            axes[-1, column].set_xlabel("step")
        axes[0, 0].set_ylabel("loss (nats)")
        if score:
            axes[1, 0].set_ylabel(_LABELS[score])
        return save(figure, output)


def plot_quality(results: Mapping[str, Any], output: str | os.PathLike) -> pathlib.Path:
    """Draws quality over dims beside the lines to beat, and per task or set.

    Args:
        results: `evaluation.Results.to_dict()`.
        output: The PNG to write.
    """
    rows = results["rows"]
    metric = _first_metric(name for row in rows for name in row["metrics"])
    rows = [row for row in rows if metric in row["metrics"]]
    dim = max((row["dim"] for row in rows if row["system"] == "model"), default=None)
    if metric is None or dim is None:
        raise ValueError("no scores of a model to plot")
    sets = list(dict.fromkeys(row["set"] for row in rows))
    # Other models, which have a line of their own and a color.
    others = dict(
        zip(
            results.get("about", {}).get("beside", ()),
            itertools.cycle(_OTHERS),
            strict=False,
        )
    )
    groups = _groups(rows, sets, ("model", *others, "BM25"))
    pyplot, style = start()
    with style:
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
                "model": (f"Gecko, {dim} dims", DIMS[2]),
                **{name: (name, color) for name, color in others.items()},
                "BM25": ("BM25", LINE_TO_BEAT),
            }
            _draw_bars(axes[0, 1], groups, metric, shown, len(sets) > 1)
        return save(figure, output)


def plot_lengths(
    tasks: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    query_length: int,
    passage_length: int,
    output: str | os.PathLike,
) -> pathlib.Path:
    """Draws how many tokens the texts of each task have, and where they are cut.

    Args:
        tasks: Name, tokens of the queries and tokens of the passages of each.
        query_length: Tokens that are kept of a query.
        passage_length: Tokens that are kept of a passage.
        output: The PNG to write.
    """
    longest = [
        2 * max([kept, *(length for task in tasks for length in task[column])])
        for column, kept in ((1, query_length), (2, passage_length))
    ]
    pyplot, style = start()
    with style:
        figure, axes = pyplot.subplots(
            len(tasks),
            2,
            figsize=(9.0, 1.0 + 1.2 * len(tasks)),
            squeeze=False,
            sharex="col",
            layout="constrained",
        )
        for row, (name, *sides) in enumerate(tasks):
            for column, (lengths, kept) in enumerate(
                zip(sides, (query_length, passage_length), strict=True)
            ):
                _draw_lengths(axes[row, column], lengths, kept)
            shown = name if len(name) <= 18 else f"{name[:17]}…"
            axes[row, 0].set_ylabel(
                shown, rotation=0, ha="right", va="center", labelpad=8
            )
        for column, side in enumerate(("queries", "passages")):
            axes[0, column].set_title(side)
            axes[0, column].set_xlim(2, longest[column])
            axes[-1, column].set_xlabel("tokens, cut at the line")
        return save(figure, output)


def _draw_lengths(axes: Any, lengths: Sequence[int], kept: int) -> None:
    """Draws the share of texts in four bins for each doubling of the length."""
    edges = [2 ** (step / 4) for step in range(4 * 14 + 1)]
    axes.hist(
        lengths,
        bins=edges,
        weights=[1 / max(len(lengths), 1)] * len(lengths),
        color=DIMS[1],
    )
    axes.axvline(kept, color=LINE_TO_BEAT, linewidth=1.5)
    over = sum(length > kept for length in lengths) / max(len(lengths), 1)
    axes.annotate(
        f"{over:.1%} cut" if over else "",
        (0.98, 0.8),
        xycoords="axes fraction",
        ha="right",
        fontsize=9,
        color=LINE_TO_BEAT,
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks([])


def _draw_losses(
    axes: Any, name: str, lines: Sequence[Mapping[str, int | float]]
) -> None:
    logged = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in logged]
    last = logged[-1]
    dims = sorted(
        int(key.removeprefix("loss_"))
        for key in last
        if key.startswith("loss_") and key.removeprefix("loss_").isdigit()
    )
    for dim, color in zip(dims, _shades(len(dims)), strict=True):
        _draw_smooth(
            axes, steps, [line[f"loss_{dim}"] for line in logged], color, f"{dim} dims"
        )
    if not dims:
        _draw_smooth(axes, steps, [line["loss"] for line in logged], DIMS[2], "loss")
    axes.set_title(name)
    axes.set_xlim(left=0)
    axes.legend(ncols=3, fontsize=9, loc="upper right")


def _draw_smooth(
    axes: Any,
    steps: Sequence[int | float],
    values: Sequence[int | float],
    color: str,
    label: str,
) -> None:
    """Draws the values faintly and their running mean firmly."""
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    window = max(len(values) // 25, 1)
    means = [
        sum(values[max(0, i - window) : i + window + 1])
        / len(values[max(0, i - window) : i + window + 1])
        for i in range(len(values))
    ]
    axes.plot(steps, means, color=color, linewidth=2, label=label)


def _draw_scores(
    axes: Any, series: Mapping[str, list[tuple[int | float, int | float]]], metric: str
) -> None:
    names = sorted(
        (name for name in series if name.startswith(f"{metric}/")),
        key=lambda name: int(name.rpartition("/")[2]),
    )
    for name, color in zip(names, _shades(len(names)), strict=True):
        steps, values = zip(*series[name], strict=True)
        label = f"{name.rpartition('/')[2]} dims"
        axes.plot(
            steps,
            values,
            color=color,
            marker="o",
            markersize=4,
            linewidth=2,
            label=label,
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if names:
        axes.legend(ncols=3, fontsize=9, loc="lower right")


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
    axes.plot(
        x, values, color=DIMS[2], linewidth=2.5, marker="o", markersize=7, zorder=3
    )
    for place, value in zip(x, values, strict=True):
        axes.annotate(
            f"{value:.3f}",
            (place, value),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            fontweight="bold",
            color=DIMS[2],
        )
    margin = 0.35 * max(x[-1] - x[0], 1.0)
    left, right = x[0] - 0.5 * margin, x[-1] + 0.5 * margin
    # The systems that no one trained are lines to be compared with.
    others = {
        system: max(v for (s, _), v in means.items() if s == system)
        for system, _ in means
        if system != "model"
    }
    others["Gecko"] = values[-1]
    top = max(others.values())
    labels = _apart(others, 0.062 * 1.2 * top)
    for system, value in others.items():
        color = {"Gecko": DIMS[2], "BM25": LINE_TO_BEAT, **models}.get(system, _BAG)
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
            color=MUTED if color == _BAG else color,
            annotation_clip=False,
        )
    axes.set_xlim(left, right)
    axes.set_ylim(0, 1.2 * top if top > 0 else 1)
    axes.set_xticks(x, [str(dim) for dim in dims])
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("dims of the embedding")
    axes.set_ylabel(_LABELS[metric])
    axes.set_title(title)


def _draw_bars(
    axes: Any,
    groups: Mapping[str, Mapping[str, float]],
    metric: str,
    shown: Mapping[str, tuple[str, str]],
    by_set: bool,
) -> None:
    """Draws a group of bars for each task or set; `shown` has label and color."""
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
        axes.bar_label(bars, fmt="%.2f", fontsize=9, padding=2, color=_INK)
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
    axes.set_ylabel(_LABELS[metric])
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
            metric = _first_metric(row["metrics"]) or ""
            groups.setdefault(row[key], {})[row["system"]] = row["metrics"][metric]
    return dict(sorted(groups.items()))


def _series(
    lines: Iterable[Mapping[str, int | float]], prefix: str
) -> dict[str, list[tuple[int | float, int | float]]]:
    series: dict[str, list[tuple[int | float, int | float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(prefix):
                short = name.removeprefix(prefix)
                series.setdefault(short, []).append((line["step"], value))
    return series


def _first_metric(names: Iterable[str]) -> str | None:
    """Returns the metric to draw: the first of `_LABELS` that is there."""
    names = set(names)
    return next((metric for metric in _LABELS if metric in names), None)


def _apart(values: Mapping[str, float], gap: float) -> dict[str, float]:
    """Moves labels up until no two are nearer than `gap`."""
    places: dict[str, float] = {}
    floor = -math.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        places[name] = floor = max(value, floor + gap)
    return places


def _shades(count: int) -> list[str]:
    if count == 1:
        return [DIMS[2]]
    return [DIMS[round(i * (len(DIMS) - 1) / max(count - 1, 1))] for i in range(count)]


def start() -> tuple[Any, Any]:
    """Returns pyplot without a screen, and the style as a context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot, matplotlib.rc_context(_STYLE)


def save(figure: Any, output: str | os.PathLike) -> pathlib.Path:
    """Writes a figure as PNG and closes it; returns the path."""
    from matplotlib import pyplot

    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")
    pyplot.close(figure)
    return output
