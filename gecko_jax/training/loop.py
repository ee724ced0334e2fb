"""The training loop: contrastive steps on a mesh, resumable at any checkpoint.

`step` holds the mathematics; `train` reads top to bottom around it.
"""

import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array

import gecko_jax.config
from gecko_jax.data import features, negatives, pipeline, selection, task_table
from gecko_jax.formats import checkpoints
from gecko_jax.io import progress
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import chips, numerics, sharding
from gecko_jax.text import text_formats, vocabularies
from gecko_jax.training import (
    initialization,
    interruption,
    metrics,
    nonfinite,
    train_step,
    workdirs,
)

Evaluate = Callable[[Any, int], Mapping[str, float]]

# Steps before a trace begins: the first ones compile.
_STEPS_BEFORE_PROFILE = 3

# JAX has one trace at a time, and so has a process.
_is_tracing = False

# Processes ask for the time together, which takes some milliseconds.
_STEPS_BETWEEN_CLOCKS = 20


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    evaluate: Evaluate | None = None,
    *,
    profile_steps: int = 0,
) -> dict[str, float]:
    """Trains a model, or goes on from the newest checkpoint of the workdir.

    A run that was interrupted and taken up again ends with the parameters of one that
    was not, bit for bit on CPU.

    Args:
        config: See `configs/`; checked here.
        workdir: The run's folder; see `checkpoints` for what it will hold.
        evaluate: Called with (parameters, step) at the start, at the end and every
            `evaluation.every_steps`; what it returns is logged. SIGTERM does not wait
            for it: the run that goes on begins with what was left out.
        profile_steps: Steps of which a trace is written to `profile/`; 0 for none.

    Returns:
        The last metrics.

    Raises:
        ValueError: A fault in the config, the data or the workdir.
        FloatingPointError: The loss or a gradient was not finite; says where.
        interruption.Interrupted: SIGTERM came; all is saved, and the same call goes on.
    """
    gecko_jax.config.check(config)
    numerics.check()
    workdir = pathlib.Path(workdir)
    is_main = jax.process_index() == 0
    with workdirs.hold(workdir, is_main), interruption.watch() as stop:
        return _train(config, workdir, evaluate, stop, is_main, profile_steps)


def _train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    evaluate: Evaluate | None,
    stop: interruption.Flag,
    is_main: bool,
    profile_steps: int,
) -> dict[str, float]:
    clock = metrics.Clock()
    workdirs.check_config(workdir, config)
    _set_compilation_cache(config.train.compilation_cache)
    mesh = sharding.build_mesh(**train_step.mesh_sizes(config))

    _check_memory(f"data.batch_size={config.data.batch_size:,}", _batch_bytes(config))

    # Data, and the model's own files, which no step changes.
    start = initialization.load_start(config)
    initialization.check_vocabulary(load_vocabulary(config), config, start)
    batches = build_batches(
        config,
        text_format=initialization.text_format(start, config.data.text_format),
        row_multiple=sharding.num_batch_shards(mesh),
    )
    encoder_config = gecko_jax.config.encoder_config(config)
    if is_main:
        workdirs.write_model(workdir, config, encoder_config, batches, start)

    # Model, optimizer, and where each of their arrays lives.
    step_fn = train_step.build(
        config,
        mesh,
        num_segments=batches.num_segments,
        num_tasks=len(batches.task_names),
    )
    shardings = step_fn.shardings
    state_bytes = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step_fn.shapes)
    )
    _check_memory("the parameters and the optimizer state", state_bytes)
    key = jax.random.key(config.seed)

    # The starting point: own workdir, then init.checkpoint, then scratch.
    if is_main:
        checkpoints.remove_temporary(workdir)
    checkpointer = checkpoints.Checkpointer(
        workdir,
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_steps,
    )
    restored = checkpointer.restore(step_fn.shapes.params, step_fn.shapes.opt_state)
    first_step, before = 0, {}
    if restored is not None:
        first_step, params, opt_state, before = restored
        workdirs.check_position(before, batches, config)
        logging.info("going on from step %d of %s", first_step, workdir)
    else:
        if start is not None:
            params = jax.device_put(start.params, shardings.params)
            logging.info("starting from %s", config.init.checkpoint)
        else:
            params = initialization.init_params(
                config, step_fn.encoder, batches, key, mesh, shardings.params
            )
        init = jax.jit(step_fn.tx.init, out_shardings=shardings.opt_state)
        opt_state = init(params)
    step_array = jax.device_put(np.int32(first_step), shardings.step)
    state = train_step.TrainState(params, opt_state, step_array)
    del start, restored, params, opt_state

    num_steps = config.train.num_steps
    logging.info(
        "%s examples of %d tasks", f"{batches.num_examples:,}", len(batches.task_names)
    )
    for line in train_step.describe(config, step_fn, mesh):
        logging.info("%s", line)
    writer = metrics.Writer(workdir, first_step, enabled=is_main)
    window = _window(config, batches, mesh)
    window.restore(before.get("window", {}))
    bar = progress.Progress("Training", num_steps, first_step, enabled=is_main)
    position = {
        "mixture_hash": batches.mixture_hash,
        "mixture": batches.facts,
        "seed": config.seed,
    }
    guard = nonfinite.Guard(config.train.max_skipped_steps, batches.task_names, workdir)
    watch = negatives.Watch(
        batches.task_names, all_hard_negatives=config.loss.all_hard_negatives
    )
    guard.restore(before.get("skipped", {}))
    last: dict[str, float] = {}

    def finish(
        step: int, summary: dict[str, Array], batch: dict[str, np.ndarray]
    ) -> None:
        """Takes in the metrics of a step, once the next one is on its way."""
        nonlocal last
        window.count(batch)
        watch.add(batch)
        values = jax.device_get(summary)
        if guard.is_finite(step, values):
            window.add(values)
        bar.update(step, f"loss {values['loss']:.3f}")
        if step % config.train.log_every_steps == 0 or step == num_steps:
            watch.warn()
            rate = float(np.asarray(step_fn.schedule(step - 1)))
            last = window.means() | clock.shares()
            last |= {"learning_rate": rate, "skipped_steps": guard.total}
            writer.write(step, last)

    def is_evaluation_step(step: int) -> bool:
        every = config.evaluation.every_steps
        is_due = step in (0, num_steps) or (every > 0 and step % every == 0)
        return evaluate is not None and is_due

    def evaluate_now(step: int, params: Any) -> None:
        assert evaluate is not None
        began = time.monotonic()
        with clock.within("evaluation"):
            results = {
                f"evaluation/{k}": float(v) for k, v in evaluate(params, step).items()
            }
        writer.write(step, results)
        last.update(results)
        window.pause(time.monotonic() - began)

    def save(step: int) -> None:
        # What was logged up to here is on disk before the step counts as done.
        writer.flush()
        # What the next line of metrics needs of the steps since the last one.
        counters = {"window": window.state(), "skipped": guard.state()}
        with clock.within("checkpoint"):
            checkpointer.save(step, state.params, state.opt_state, position | counters)

    step, is_interrupted = first_step, False
    try:
        if is_evaluation_step(first_step) and not _is_evaluated(workdir, first_step):
            evaluate_now(first_step, state.params)
        pending = None
        shapes_seen = set()
        saved_at = time.monotonic()
        stream = batches.iterate(first_step, num_steps)
        clock.enter("data")
        for step, batch in enumerate(stream, start=first_step + 1):
            _trace(step - first_step, profile_steps, workdir)
            # The first call with a shape compiles it before it returns.
            shape = tuple(leaf.shape for leaf in batch.values())
            clock.enter("step" if shape in shapes_seen else "compile")
            shapes_seen.add(shape)
            placed = sharding.place_batch(batch, mesh)
            state, summary = step_fn.run(state, placed, key)
            clock.enter("step")
            if pending is not None:
                finish(*pending)
            pending = (step, summary, batch)
            is_stopping = stop.is_raised(step)
            is_saving = (
                is_stopping
                or step % config.checkpoint.every_steps == 0
                or step == num_steps
                or _is_due(saved_at, config.checkpoint.every_minutes, step)
            )
            is_evaluating = is_evaluation_step(step)
            if is_saving or is_evaluating:
                finish(*pending)
                pending = None
            if is_evaluating and not is_stopping:
                evaluate_now(step, state.params)
            if is_saving:
                save(step)
                saved_at = time.monotonic()
            is_interrupted = is_stopping and (step < num_steps or is_evaluating)
            if is_interrupted:
                break
            clock.enter("data")
        clock.enter("checkpoint")
        checkpointer.wait()
    finally:
        _trace(0, profile_steps, workdir)
        bar.close()
        writer.close()
        checkpointer.close()
    if is_interrupted:
        raise interruption.Interrupted(
            f"SIGTERM after step {step} of {num_steps}: saved in {workdir}; the same "
            "command goes on from there"
        )
    if first_step >= num_steps:
        logging.info("%s is finished: %d steps of %d", workdir, first_step, num_steps)
    return last


def _batch_bytes(config: ml_collections.ConfigDict) -> int:
    """Returns the least memory of a batch whose texts all have full length."""
    passages = (1 + config.data.num_negatives) * config.data.passage_length
    tokens = config.data.batch_size * (config.data.query_length + passages)
    return 2 * 4 * tokens  # ids and segments


def _check_memory(what: str, num_bytes: int) -> None:
    """Refuses what the memory of a CPU host cannot hold.

    A host promises more memory than it has, and ends a process that uses it; an
    accelerator says itself that its memory is full.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu" and num_bytes > memory * jax.process_count():
        raise ValueError(
            f"{what}: needs {num_bytes / 2**30:,.1f} GiB, and this machine has "
            f"{memory / 2**30:,.1f} GiB of memory; choose a smaller model or batch"
        )


def _is_evaluated(workdir: pathlib.Path, step: int) -> bool:
    """Whether the metrics hold the evaluation of a step, as the first process sees."""
    is_evaluated = any(
        line["step"] == step and any(name.startswith("evaluation/") for name in line)
        for line in metrics.read(workdir / metrics.METRICS)
    )
    if jax.process_count() == 1:
        return is_evaluated
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(is_evaluated)))


def _is_due(saved_at: float, every_minutes: int, step: int) -> bool:
    """Whether it is time to save again, by the clock of the first process."""
    if not every_minutes:
        return False
    is_due = time.monotonic() - saved_at > 60 * every_minutes
    if jax.process_count() == 1:
        return is_due
    if step % _STEPS_BETWEEN_CLOCKS:
        return False
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(is_due)))


def _trace(steps_begun: int, profile_steps: int, workdir: pathlib.Path) -> None:
    """Begins or ends a trace where a step begins; with 0 steps begun, ends it."""
    global _is_tracing
    first = _STEPS_BEFORE_PROFILE + 1
    is_wanted = first <= steps_begun < first + profile_steps
    if is_wanted and not _is_tracing:
        jax.profiler.start_trace(workdir / "profile")
    elif _is_tracing and not is_wanted:
        jax.profiler.stop_trace()
        logging.info("a trace is in %s; xprof shows it", workdir / "profile")
    _is_tracing = is_wanted


def _set_compilation_cache(folder: str) -> None:
    if folder:
        path = pathlib.Path(folder).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(path))


def _window(
    config: ml_collections.ConfigDict, batches: pipeline.Batches, mesh: Any
) -> metrics.Window:
    encoder_config = gecko_jax.config.encoder_config(config)
    chip = chips.of(mesh.devices.flat[0])
    lengths = train_step.row_lengths(config)
    return metrics.Window(
        batches.task_names,
        flops_per_token={
            side: dual_encoder.flops_per_token(encoder_config, length)
            for side, length in lengths.items()
        },
        peak_flops_per_second=chip and chip.flops_per_second * mesh.size,
    )


def build_batches(
    config: ml_collections.ConfigDict,
    *,
    text_format: text_formats.TextFormat,
    row_multiple: int = 1,
) -> pipeline.Batches:
    """Returns the batches that a config names, building their caches if need be."""
    data = config.data
    chosen = selection.select(
        mixture=data.mixture,
        files=data.files,
        vocabulary=load_vocabulary(config),
        text_format=text_format,
        cache_dir=pathlib.Path(data.cache_dir).expanduser(),
        prepared_dir=data.prepared_dir,
        unique_ids=data.unique_ids,
    )
    return pipeline.Batches(
        chosen,
        features.Shape(
            data.query_length,
            data.passage_length,
            data.num_negatives,
            data.packing,
            row_multiple,
            config.train.microbatch_size,
            data.teacher_dim,
        ),
        batch_size=data.batch_size,
        one_task_per_batch=data.one_task_per_batch,
        seed=config.seed,
        teacher=data.teacher,
    )


def load_vocabulary(config: ml_collections.ConfigDict) -> vocabularies.Vocabulary:
    """Returns the vocabulary that a config names."""
    path = task_table.vocabulary_path(config.data.vocabulary)
    return vocabularies.load(path, config.data.extra_ids)
