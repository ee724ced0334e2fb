"""Loss and evaluation over the training steps."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.plots import style
from gecko_jax.training import metrics

_EVALUATION = "evaluation/"


def plot_training(
    runs: Sequence[str | os.PathLike], output: str | os.PathLike
) -> pathlib.Path:
    """Draws loss and evaluation over the steps, one column per run, into a PNG.

    `runs` are files `metrics.jsonl` of workdirs, in the order of training. Raises
    ValueError if one holds no logged step.
    """
    logs = {}
    for path in map(pathlib.Path, runs):
        lines = metrics.read(path)
        if not any("loss" in line for line in lines):
            raise ValueError(f"{path}: no logged step to plot; train first")
        logs[path] = lines
    keys = {key for lines in logs.values() for line in lines for key in line}
    metric = style.first_metric(
        key.split("/")[1] for key in keys if key.startswith(_EVALUATION)
    )
    num_rows = 2 if metric else 1
    pyplot, styled = style.start()
    with styled:
        figure, axes = pyplot.subplots(
            num_rows,
            len(logs),
            figsize=(1.5 + 5.0 * len(logs), 3.6 * num_rows + 0.4),
            squeeze=False,
            sharey="row",
            layout="constrained",
        )
        for column, (path, lines) in zip(axes.T, logs.items(), strict=True):
            _draw_losses(column[0], lines)
            column[0].set_title(path.resolve().parent.name)
            if metric:
                _draw_scores(column[1], lines, f"{_EVALUATION}{metric}/")
            column[-1].set_xlabel("step")
        axes[0, 0].set_ylabel("loss (nats)")
        if metric:
            axes[1, 0].set_ylabel(style.LABELS[metric])
        return style.save(figure, output)


def _dims(lines: Sequence[Mapping[str, Any]], prefix: str) -> list[int]:
    """Returns the numbers that follow a prefix among the keys, ascending."""
    ends = {k.removeprefix(prefix) for n in lines for k in n if k.startswith(prefix)}
    return sorted(int(end) for end in ends if end.isdigit())


def _draw_losses(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draws the loss of each dim, faintly, and its running mean."""
    logged = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in logged]
    dims = _dims(logged[-1:], "loss_")
    curves = {f"{dim} dims": f"loss_{dim}" for dim in dims} or {"loss": "loss"}
    window = max(len(logged) // 25, 1)
    for (label, key), color in zip(
        curves.items(), style.shades(len(curves)), strict=True
    ):
        values = [line[key] for line in logged]
        spans = (slice(max(0, i - window), i + window + 1) for i in range(len(values)))
        means = [np.mean(values[span]) for span in spans]
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        axes.plot(steps, means, color=color, linewidth=2, label=label)
    axes.set_xlim(left=0)
    axes.legend(ncols=3, fontsize=9, loc="upper right")


def _draw_scores(axes: Any, lines: Sequence[Mapping[str, Any]], prefix: str) -> None:
    dims = _dims(lines, prefix)
    for dim, color in zip(dims, style.shades(len(dims)), strict=True):
        key, label = f"{prefix}{dim}", f"{dim} dims"
        steps = [line["step"] for line in lines if key in line]
        scores = [line[key] for line in lines if key in line]
        drawn = {"color": color, "markersize": 4, "linewidth": 2, "label": label}
        axes.plot(steps, scores, "o-", **drawn)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    if dims:
        axes.legend(ncols=3, fontsize=9, loc="lower right")
