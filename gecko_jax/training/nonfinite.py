"""Steps whose loss or gradient is not finite: skipped, or the end of the run."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from gecko_jax.formats import checkpoints


class Guard:
    """Counts steps that are not finite; `train_step` does not apply their updates."""

    def __init__(
        self, max_skipped: int, task_names: tuple[str, ...], workdir: pathlib.Path
    ):
        """Allows `max_skipped` skipped steps in a row; errors name the workdir."""
        self.total = self._in_a_row = 0  # skipped steps
        self._max_skipped = max_skipped
        self._task_names = task_names
        self._workdir = workdir

    def state(self) -> dict[str, int]:
        """Returns the counts for a resumed run, as JSON."""
        return {"total": self.total, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, int]) -> None:
        """Restores the counts of `state`; zeros if it is empty."""
        self.total = state.get("total", 0)
        self._in_a_row = state.get("in_a_row", 0)

    def is_finite(self, step: int, values: Mapping[str, Any]) -> bool:
        """Returns whether a step's metrics are finite; logs a warning if not.

        Raises FloatingPointError if more than `max_skipped` steps in a row are not.
        """
        # One NaN in the gradient of any parameter makes the norm NaN.
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self._in_a_row = 0  # Only consecutive steps count towards the limit.
            return True
        self.total += 1
        self._in_a_row += 1
        message = (
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: "
            f"not finite, {self._where(values)}; the update was not applied"
        )
        if self._in_a_row > self._max_skipped:
            raise FloatingPointError(
                f"{message}. Lower optimizer.learning_rate, set optimizer.clip_norm, "
                "raise loss.temperature, or raise train.max_skipped_steps to skip such "
                f"steps; the checkpoints in {self._workdir / checkpoints.CHECKPOINTS} "
                "are from earlier steps"
            )
        logging.warning(
            "%s (%d in a row; train.max_skipped_steps=%d)",
            message,
            self._in_a_row,
            self._max_skipped,
        )
        return False

    def _where(self, values: Mapping[str, Any]) -> str:
        sums, counts = values["task_loss_sum"], values["task_count"]
        # Tasks without examples in this batch have a sum of 0.
        totals = {
            name: total
            for name, total, count in zip(self._task_names, sums, counts, strict=True)
            if count
        }
        # A finite loss with an infinite gradient overflowed in the backward pass.
        if bad := [name for name, total in totals.items() if not np.isfinite(total)]:
            return f"in task {', '.join(bad)}"
        return f"in the gradient (the loss is finite; tasks {', '.join(totals)})"
