"""The report of a run: metrics of its steps, evaluations, warnings and progress."""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

import gecko_jax.config
from gecko_jax.data import negatives, pipeline
from gecko_jax.io import progress
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import chips
from gecko_jax.training import gradients, metrics, nonfinite, train_step

# (parameters, step) -> metrics
Evaluate = Callable[[Any, int], Mapping[str, float]]


class Report:
    """Collects the metrics of steps and writes their means; `last` has the latest."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: pathlib.Path,
        batches: pipeline.Batches,
        step_fn: train_step.Step,
        mesh: Mesh,
        clock: metrics.Clock,
        first_step: int,
        saved: Mapping[str, Any],
        evaluate: Evaluate | None,
    ):
        """Continues the report of the run after `first_step`, 0 for a new run.

        `saved` is what the checkpoint holds of `state`, empty for a new run.
        """
        is_main = jax.process_index() == 0
        for line in train_step.describe(config, step_fn, mesh):
            logging.info("%s", line)
        self.clock = clock
        self.last: dict[str, float] = {}
        self._workdir = workdir
        self._evaluate = evaluate
        self._evaluate_every_steps = config.evaluation.every_steps
        self._num_steps = config.train.num_steps
        self._log_every_steps = config.train.log_every_steps
        self._schedule = step_fn.schedule
        self._writer = metrics.Writer(workdir, first_step, enabled=is_main)
        self._bar = progress.Progress(
            "Training", self._num_steps, first_step, enabled=is_main
        )
        encoder_config = gecko_jax.config.encoder_config(config)
        chip = chips.of(mesh.devices.flat[0])
        self._window = metrics.Window(
            batches.task_names,
            flops_per_token={
                side: dual_encoder.flops_per_token(
                    encoder_config, batches.shape.row_length(side)
                )
                for side in gradients.SIDES
            },
            peak_flops_per_second=chip and chip.flops_per_second * mesh.size,
        )
        self._window.restore(saved.get("window", {}))
        self._guard = nonfinite.Guard(
            config.train.max_skipped_steps, batches.task_names, workdir
        )
        self._guard.restore(saved.get("skipped", {}))
        self._watch = negatives.Watch(
            batches.task_names, all_hard_negatives=config.loss.all_hard_negatives
        )

    def add(
        self, step: int, summary: Mapping[str, Array], batch: Mapping[str, np.ndarray]
    ) -> None:
        """Adds a step; waits for its metrics, so call it after starting the next."""
        # Count tokens even if the step is skipped: they took time, too.
        self._window.count(batch)
        self._watch.add(batch)
        values = jax.device_get(summary)  # Waits for the step.
        if self._guard.is_finite(step, values):
            self._window.add(values)  # Means leave out skipped steps.
        self._bar.update(step, f"loss {values['loss']:.3f}")
        if step % self._log_every_steps == 0 or step == self._num_steps:
            self._watch.warn()
            # Update n used the schedule's value at n - 1.
            rate = float(np.asarray(self._schedule(step - 1)))
            self.last = self._window.means() | self.clock.shares()
            self.last |= {"learning_rate": rate, "skipped_steps": self._guard.total}
            self._writer.write(step, self.last)

    def is_evaluation_step(self, step: int) -> bool:
        """Returns whether an evaluation belongs to the step."""
        every = self._evaluate_every_steps
        is_due = step in (0, self._num_steps) or (every > 0 and step % every == 0)
        return self._evaluate is not None and is_due

    def evaluate(self, step: int, params: Any) -> None:
        """Runs the evaluation and writes its results."""
        assert self._evaluate is not None
        began = time.monotonic()
        with self.clock.within("evaluation"):
            results = {
                f"evaluation/{name}": float(value)
                for name, value in self._evaluate(params, step).items()
            }
        self._writer.write(step, results)
        self.last.update(results)
        # The time of an evaluation does not count in the reported training speed.
        self._window.pause(time.monotonic() - began)

    def evaluate_once(self, step: int, params: Any) -> None:
        """Runs the evaluation of the first step, unless the run did before."""
        if not self.is_evaluation_step(step):
            return
        # A resumed run has the evaluation of its first step, unless SIGTERM skipped it.
        is_done = any(
            line["step"] == step
            and any(name.startswith("evaluation/") for name in line)
            for line in metrics.read(self._workdir / metrics.METRICS)
        )
        if jax.process_count() > 1:  # Process 0 has the metrics.
            is_done = multihost_utils.broadcast_one_to_all(np.asarray(is_done))
        if not is_done:
            self.evaluate(step, params)

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run needs for its next line of metrics, as JSON.

        Lines up to here are on disk when this returns.
        """
        self._writer.flush()
        return {"window": self._window.state(), "skipped": self._guard.state()}

    def close(self) -> None:
        """Closes the progress bar and the metrics files."""
        self._bar.close()
        self._writer.close()
