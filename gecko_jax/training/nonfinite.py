"""Steps whose loss or gradient is not a finite number: skipped, or the end of a run."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from gecko_jax.formats import checkpoints


class Guard:
    """Counts such steps; their updates were not applied (`step.train_step`).

    Attributes:
        total: Steps that were skipped.
    """

    def __init__(
        self, max_skipped: int, task_names: tuple[str, ...], workdir: pathlib.Path
    ):
        """Starts with none.

        Args:
            max_skipped: How many in a row may be skipped.
            task_names: What the per-task sums are of.
            workdir: Named in the error.
        """
        self.total = 0
        self._in_a_row = 0
        self._max_skipped = max_skipped
        self._task_names = task_names
        self._workdir = workdir

    def state(self) -> dict[str, int]:
        """Returns what a resumed run needs to go on counting, as JSON."""
        return {"total": self.total, "in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes on counting from a `state`; from 0 where it is empty."""
        self.total = state.get("total", 0)
        self._in_a_row = state.get("in_a_row", 0)

    def is_finite(self, step: int, values: Mapping[str, Any]) -> bool:
        """Returns whether the step counts; a warning says where it does not.

        Raises:
            FloatingPointError: More than `max_skipped` in a row do not.
        """
        if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
            self._in_a_row = 0
            return True
        self.total += 1
        self._in_a_row += 1
        what = (
            f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: "
            f"not finite, {self._where(values)}; the update was not applied"
        )
        if self._in_a_row > self._max_skipped:
            raise FloatingPointError(
                f"{what}. Lower optimizer.learning_rate, set optimizer.clip_norm, "
                "raise loss.temperature, or let train.max_skipped_steps in a row pass; "
                f"the last checkpoint in {self._workdir / checkpoints.CHECKPOINTS} is "
                "from before"
            )
        logging.warning(
            "%s (%d in a row; %d may be, train.max_skipped_steps)",
            what,
            self._in_a_row,
            self._max_skipped,
        )
        return False

    def _where(self, values: Mapping[str, Any]) -> str:
        of_tasks = zip(
            self._task_names, values["task_loss_sum"], values["task_count"], strict=True
        )
        seen = [(name, total) for name, total, count in of_tasks if count]
        bad = [name for name, total in seen if not np.isfinite(total)]
        if bad:
            return f"in task {', '.join(bad)}"
        names = ", ".join(name for name, _ in seen)
        return f"in the gradient (the loss is finite; tasks {names})"
