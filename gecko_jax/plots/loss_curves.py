"""How training went: loss and evaluation over the steps."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gecko_jax.plots import style
from gecko_jax.training import metrics


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
    score = style.first_metric(
        name.rpartition("/")[0] for series in scores for name in series
    )
    num_rows = 2 if score else 1
    pyplot, drawn = style.start()
    with drawn:
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
            axes[1, 0].set_ylabel(style.LABELS[score])
        return style.save(figure, output)


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
    for dim, color in zip(dims, style.shades(len(dims)), strict=True):
        _draw_smooth(
            axes, steps, [line[f"loss_{dim}"] for line in logged], color, f"{dim} dims"
        )
    if not dims:
        _draw_smooth(
            axes, steps, [line["loss"] for line in logged], style.DIMS[2], "loss"
        )
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
    for name, color in zip(names, style.shades(len(names)), strict=True):
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
