"""Training metrics: means over a window of steps, as JSON lines and in TensorBoard.

*Goodput* is the share of a run's time spent in training steps; `Clock` measures it.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gecko_jax.io import reading

METRICS = "metrics.jsonl"

PHASES = ("init", "compile", "data", "step", "checkpoint", "evaluation")


class Clock:
    """Time of a run by phase; at any moment the run is in one of `PHASES`."""

    def __init__(self):
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._phase = "init"
        self._since = time.monotonic()

    def enter(self, phase: str) -> str:
        """Starts a phase; returns the one that ends."""
        # The time since the last switch belongs to the phase that ends.
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Enters a phase for the context, then returns to the previous one."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def shares(self) -> dict[str, float]:
        """Returns each phase's share of the run so far, as `time/PHASE`."""
        self.enter(self._phase)
        total = max(sum(self._seconds.values()), 1e-9)
        return {f"time/{phase}": s / total for phase, s in self._seconds.items()}


class Window:
    """Means and speeds of the steps since the last log."""

    def __init__(
        self,
        task_names: tuple[str, ...],
        *,
        flops_per_token: Mapping[str, float] | None = None,
        peak_flops_per_second: float | None = None,
    ):
        """Starts an empty window.

        The FLOPs are those of training, per token of each side, and the peak is that of
        all chips; None reports no utilisation.
        """
        self._task_names = task_names
        self._flops_per_token = flops_per_token or {}
        self._peak = peak_flops_per_second
        self._reset()

    def _reset(self) -> None:
        self._num_steps = 0
        # Sums over steps: a number, or a list with an entry per task.
        self._sums: dict[str, Any] = {}
        self._tokens = self._slots = 0
        # Speeds count this process only.
        self._timed_examples = self._timed_tokens = 0
        self._flops = 0.0
        self._began = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs to finish the window, as JSON."""
        return {
            "num_steps": self._num_steps,
            "sums": dict(self._sums),
            "tokens": self._tokens,
            "slots": self._slots,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the window of a `state`, empty for none; speeds start anew."""
        self._reset()
        if state:
            self._num_steps = state["num_steps"]
            self._sums = dict(state["sums"])
            self._tokens, self._slots = state["tokens"], state["slots"]

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts the examples, tokens and padding of a batch."""
        self._timed_examples += int(batch["example_mask"].sum())
        # Segment 0 is padding; the slots are tokens and padding.
        for side in ("query", "passage"):
            segments = batch[f"{side}_segment_ids"]
            tokens = int(np.count_nonzero(segments))
            self._tokens += tokens
            self._timed_tokens += tokens
            self._slots += segments.size
            self._flops += tokens * self._flops_per_token.get(side, 0.0)

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds the metrics of one step."""
        self._num_steps += 1
        for name, value in values.items():
            # JSON represents float64 exactly, so a resumed run has the same sums.
            value = np.asarray(value, np.float64) + self._sums.get(name, 0.0)
            self._sums[name] = value.tolist()

    def pause(self, seconds: float) -> None:
        """Excludes time that was not training from the speeds."""
        self._began += seconds

    def means(self) -> dict[str, float]:
        """Returns the means of the window and starts the next one."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        result = {}
        if self._num_steps:  # zero if every step was skipped
            # Batch metrics: mean over steps.
            for name, total in self._sums.items():
                if not name.startswith("task_"):
                    result[name] = total / self._num_steps
            # Task losses: mean over the task's examples.
            sums, counts = self._sums["task_loss_sum"], self._sums["task_count"]
            for name, total, count in zip(self._task_names, sums, counts, strict=True):
                if count:
                    result[f"loss/{name}"] = total / count
            result["examples_per_second"] = self._timed_examples / seconds
            result["tokens_per_second"] = self._timed_tokens / seconds
            result["padding_share"] = 1 - self._tokens / max(self._slots, 1)
            # Model FLOPs count real tokens once: no padding, no recomputation.
            if self._peak:
                result["model_flops_utilisation"] = self._flops / seconds / self._peak
        self._reset()
        return result


class Writer:
    """Writes metrics to `metrics.jsonl` and to TensorBoard."""

    def __init__(
        self, workdir: str | pathlib.Path, first_step: int, enabled: bool = True
    ):
        """Opens the files and drops lines from after `first_step`.

        `enabled` is False on every process but the first.
        """
        self._file = self._board = None
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        path = pathlib.Path(workdir) / METRICS
        # A resumed run computes the steps after `first_step` again, so their lines are
        # removed. The file is replaced in one rename, so a kill loses no line.
        lines = [line for line in read(path) if line["step"] <= first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=first_step + 1
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line; raises an OSError that names the file if it cannot."""
        if self._file is None or self._board is None:
            return
        line = {"step": step} | {k: round(v, 6) for k, v in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            path = self._file.name
            with contextlib.suppress(OSError):  # `close` flushes again.
                self._file.close()
            self._file = None
            raise OSError(
                error.errno,
                f"{path}: the metrics of step {step} cannot be written "
                f"({error.strerror}); free disk space and run the same command to "
                "continue from the last checkpoint",
            ) from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Flushes TensorBoard's events; `metrics.jsonl` is flushed on every write."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


def read(path: str | pathlib.Path) -> list[dict[str, int | float]]:
    """Returns the lines of a `metrics.jsonl` up to the first damaged one."""
    lines: list[dict[str, int | float]] = []
    path = pathlib.Path(path)
    if path.exists():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                values = reading.parse_json(line)
            except ValueError:
                break
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                break
            lines.append(values)
    return lines
