"""Training metrics: means over a window of steps, to JSON lines and TensorBoard.

*Goodput* is the share of a run's time that its steps took; `Clock` says where the rest
went.
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
    """Where the time of a run goes: each moment belongs to one of `PHASES`."""

    def __init__(self):
        """Starts in "init"."""
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._phase = "init"
        self._since = time.monotonic()

    def enter(self, phase: str) -> str:
        """Begins another phase; returns the one that ends."""
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Spends what the context takes in a phase, and goes back to the one before."""
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
    """Means of the steps since the last log, and how fast they went."""

    def __init__(
        self,
        task_names: tuple[str, ...],
        *,
        flops_per_token: Mapping[str, float] | None = None,
        peak_flops_per_second: float | None = None,
    ):
        """Starts the clock.

        Args:
            task_names: Names of the entries of `task_loss_sum` and `task_count`.
            flops_per_token: Of training the model, for each side; padding counts for
                nothing.
            peak_flops_per_second: Of all chips; without it no utilisation is given.
        """
        self._task_names = task_names
        self._flops_per_token = flops_per_token or {}
        self._peak = peak_flops_per_second
        self._reset()

    def _reset(self) -> None:
        self._num_steps = 0
        # Sums over the steps: numbers, or a list with an entry for each task.
        self._sums: dict[str, Any] = {}
        self._tokens = self._slots = 0
        self._reset_speed()

    def _reset_speed(self) -> None:
        self._timed_examples = self._timed_tokens = 0
        self._flops = 0.0
        self._began = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs to finish the window, as JSON."""
        return {
            "num_steps": self._num_steps,
            "sums": self._sums,
            "tokens": self._tokens,
            "slots": self._slots,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with a window that another process began.

        Speeds are those of this process alone.

        Args:
            state: What `state` returned; empty for an empty window.
        """
        self._reset()
        if state:
            self._num_steps = state["num_steps"]
            self._sums = dict(state["sums"])
            self._tokens, self._slots = state["tokens"], state["slots"]

    def count(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts the examples, tokens and padding of a batch."""
        self._timed_examples += int(batch["example_mask"].sum())
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
            # In float64, which JSON holds exactly.
            value = np.asarray(value, np.float64) + self._sums.get(name, 0.0)
            self._sums[name] = value.tolist()

    def pause(self, seconds: float) -> None:
        """Leaves time that was not training out of the speeds."""
        self._began += seconds

    def means(self) -> dict[str, float]:
        """Returns the means of the window and opens the next one."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        if not self._num_steps:  # all were skipped
            self._reset()
            return {}
        result = {
            name: total / self._num_steps
            for name, total in self._sums.items()
            if not name.startswith("task_")
        }
        sums, counts = self._sums["task_loss_sum"], self._sums["task_count"]
        for name, total, number in zip(self._task_names, sums, counts, strict=True):
            if number:
                result[f"loss/{name}"] = total / number
        result |= {
            "examples_per_second": self._timed_examples / seconds,
            "tokens_per_second": self._timed_tokens / seconds,
            "padding_share": 1 - self._tokens / max(self._slots, 1),
        }
        if self._peak:
            result["model_flops_utilisation"] = self._flops / seconds / self._peak
        self._reset()
        return result


class Writer:
    """Writes metrics to `metrics.jsonl` and to TensorBoard."""

    def __init__(
        self, workdir: str | pathlib.Path, first_step: int, enabled: bool = True
    ):
        """Opens the files, and forgets what was logged after the restored step.

        Args:
            workdir: The run's folder.
            first_step: Updates the run begins with; later lines are dropped.
            enabled: False on every process but the first.
        """
        self._file = self._board = None
        if not enabled:
            return
        from tensorboardX import SummaryWriter

        path = pathlib.Path(workdir) / METRICS
        lines = [line for line in read(path) if line["step"] <= first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=first_step + 1
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line."""
        if self._file is None or self._board is None:
            return
        line = {"step": step} | {k: round(v, 6) for k, v in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            path = self._file.name
            with contextlib.suppress(OSError):  # Closing writes again.
                self._file.close()
            self._file = None
            raise OSError(
                error.errno,
                f"{path}: the metrics of step {step} cannot be written "
                f"({error.strerror}); make room on the disk, and the same command goes "
                "on from the last checkpoint",
            ) from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Brings everything to disk."""
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read(path: str | pathlib.Path) -> list[dict[str, int | float]]:
    """Returns the lines of a `metrics.jsonl`; a line cut off or damaged ends it."""
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
