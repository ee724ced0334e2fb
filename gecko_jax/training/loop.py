"""The training loop: contrastive steps on a mesh, resumable from any checkpoint.

`_train` is the whole run from top to bottom. The mathematics of a step is in
`train_step`, `gradients` and `gecko_jax.losses`.
"""

import os
import pathlib
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

import gecko_jax.config
from gecko_jax.data import pipeline, selection, task_table
from gecko_jax.formats import checkpoints, model_folder
from gecko_jax.losses import whole_batch
from gecko_jax.parallel import numerics, sharding
from gecko_jax.text import text_formats, vocabularies
from gecko_jax.training import (
    initialization,
    interruption,
    metrics,
    reporting,
    train_step,
    workdirs,
)

# Steps before a profile begins: the first steps compile.
_STEPS_BEFORE_PROFILE = 3

# JAX allows one profile at a time in a process.
_is_profiling = False

# Processes agree on the time by a collective, which takes milliseconds.
_STEPS_BETWEEN_CLOCKS = 20


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    evaluate: reporting.Evaluate | None = None,
    *,
    loss: whole_batch.Loss | None = None,
    profile_steps: int = 0,
) -> dict[str, float]:
    """Trains a model, or continues from the newest checkpoint of the workdir.

    A run that is interrupted and resumed ends with the parameters of an uninterrupted
    run, bit for bit on CPU.

    Args:
        config: See `configs/`; checked here.
        workdir: Folder of the run; see `checkpoints` for its contents.
        evaluate: Called with (parameters, step) at the start, at the end and every
            `evaluation.every_steps`; its results are logged. SIGTERM does not wait for
            it: the resumed run begins with the evaluation that was left out.
        loss: Loss to train with; None is the contrastive loss of `config.loss`. See
            `losses.whole_batch` for its signature.
        profile_steps: Steps to profile into `profile/`; 0 for none.

    Returns:
        The last metrics.

    Raises:
        ValueError: The config, the data or the workdir is wrong.
        FloatingPointError: The loss or a gradient is not finite; names the step.
        interruption.Interrupted: SIGTERM arrived. Everything is saved, and the same
            call continues.
    """
    gecko_jax.config.check(config)
    numerics.check()
    workdir = pathlib.Path(workdir)
    is_main = jax.process_index() == 0
    with workdirs.hold(workdir, is_main), interruption.watch() as stop:
        return _train(config, workdir, evaluate, loss, stop, profile_steps)


def _train(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    evaluate: reporting.Evaluate | None,
    loss: whole_batch.Loss | None,
    stop: interruption.Flag,
    profile_steps: int,
) -> dict[str, float]:
    clock = metrics.Clock()
    workdirs.check_config(workdir, config)
    _set_compilation_cache(config.train.compilation_cache)
    mesh = sharding.build_mesh(**train_step.mesh_sizes(config))

    # Bad data or a bad checkpoint fails here, before the step compiles.
    batches, start = _open_data(config, workdir, mesh, loss)
    step_fn = train_step.build(
        config,
        mesh,
        num_segments=batches.shape.num_segments,
        num_tasks=len(batches.task_names),
        loss=loss,
    )
    keep = {name: config.checkpoint[name] for name in ("keep", "keep_every_steps")}
    checkpointer = checkpoints.Checkpointer(workdir, **keep)
    # One key for the run: steps, dropout and initialization fold in their numbers.
    key = jax.random.key(config.seed)
    state, saved = _starting_point(
        config, checkpointer, step_fn, batches, start, key, mesh, loss
    )
    del start  # Its parameters may be as large as the model.
    step = first_step = int(state.step)
    num_steps = config.train.num_steps
    report = reporting.Report(
        config, workdir, batches, step_fn, mesh, clock, first_step, saved, evaluate
    )
    is_interrupted = False
    try:
        report.evaluate_once(step, state.params)
        # Metrics are read after the next step has begun, but before a checkpoint.
        pending = None
        shapes = set()
        saved_at = time.monotonic()
        clock.enter("data")
        stream = batches.iterate(first_step, num_steps)
        for step, batch in enumerate(stream, start=first_step + 1):
            _profile(step - first_step, profile_steps, workdir)
            # The first call with a new shape compiles before it returns.
            shape = tuple(leaf.shape for leaf in batch.values())
            clock.enter("step" if shape in shapes else "compile")
            shapes.add(shape)
            state, summary = step_fn.run(state, sharding.place_batch(batch, mesh), key)
            clock.enter("step")
            # The device now works on this step; read the metrics of the one before.
            if pending is not None:
                report.add(*pending)
            pending = (step, summary, batch)

            # All processes decide alike: saving and evaluating are collective.
            is_stopping = stop.is_raised(step)
            is_evaluating = report.is_evaluation_step(step)
            is_saving = is_stopping or _is_saving_step(config, step, saved_at)
            # A checkpoint and an evaluation need the metrics of all steps so far.
            if is_saving or is_evaluating:
                report.add(*pending)
                pending = None
            if is_evaluating and not is_stopping:
                report.evaluate(step, state.params)
            if is_saving:
                position = workdirs.position(batches, config, loss) | report.state()
                with clock.within("checkpoint"):
                    checkpointer.save(step, state.params, state.opt_state, position)
                saved_at = time.monotonic()
            # SIGTERM after the last step changes nothing, unless its evaluation is due.
            is_interrupted = is_stopping and (step < num_steps or is_evaluating)
            if is_interrupted:
                break
            clock.enter("data")
        # Checkpoints are written in the background.
        clock.enter("checkpoint")
        checkpointer.wait()
    finally:
        _profile(0, profile_steps, workdir)
        report.close()
        checkpointer.close()
    if is_interrupted:
        raise interruption.Interrupted(
            f"SIGTERM after step {step} of {num_steps}: saved in {workdir}; run the "
            "same command to continue"
        )
    return report.last


def _open_data(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    mesh: jax.sharding.Mesh,
    loss: whole_batch.Loss | None,
) -> tuple[pipeline.Batches, model_folder.ModelFiles | None]:
    """Opens the training data and `init.checkpoint`, and writes the model folder."""
    _check_memory(f"data.batch_size={config.data.batch_size:,}", _batch_bytes(config))
    start = initialization.open_start(config, load_vocabulary(config))
    if start is not None:
        start = initialization.read_start(config, start)
    batches = build_batches(
        config,
        text_format=initialization.text_format(start, config.data.text_format),
        row_multiple=sharding.num_batch_shards(mesh),
    )
    if jax.process_index() == 0:
        workdirs.write_model(workdir, config, batches, start, loss)
        checkpoints.remove_temporary(workdir)
    num_examples, num_tasks = batches.num_examples, len(batches.task_names)
    logging.info("%s examples of %d tasks", f"{num_examples:,}", num_tasks)
    return batches, start


def _starting_point(
    config: ml_collections.ConfigDict,
    checkpointer: checkpoints.Checkpointer,
    step_fn: train_step.Step,
    batches: pipeline.Batches,
    start: model_folder.ModelFiles | None,
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    loss: whole_batch.Loss | None,
) -> tuple[train_step.TrainState, dict[str, Any]]:
    """Returns the initial train state, and the position saved in its checkpoint.

    It comes from the workdir's newest checkpoint, else from `init.checkpoint`, else
    from fresh parameters.
    """
    # Arrays are restored or created directly with their shardings.
    _check_memory("the parameters and the optimizer state", _num_bytes(step_fn.shapes))
    shardings = step_fn.shardings
    restored = checkpointer.restore(step_fn.shapes.params, step_fn.shapes.opt_state)
    if restored is not None:
        step, params, opt_state, saved = restored
        workdirs.check_position(saved, batches, config, loss)
        logging.info("continuing from step %d of %d", step, config.train.num_steps)
    else:
        step, saved = 0, {}
        if start is not None:
            params = jax.device_put(start.params, shardings.params)
            logging.info("starting from %s", config.init.checkpoint)
        else:
            params = initialization.init_params(
                config, step_fn.encoder, batches, key, mesh, shardings.params
            )
        # The optimizer state is never restored from `init.checkpoint`.
        init = jax.jit(step_fn.tx.init, out_shardings=shardings.opt_state)
        opt_state = init(params)
    step = jax.device_put(np.int32(step), shardings.step)
    return train_step.TrainState(params, opt_state, step), saved


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _batch_bytes(config: ml_collections.ConfigDict) -> int:
    """Returns the size of a batch whose texts all have full length, at least."""
    # Each example has a query, a positive and G hard negatives.
    passages = (1 + config.data.num_negatives) * config.data.passage_length
    tokens = config.data.batch_size * (config.data.query_length + passages)
    return 2 * 4 * tokens  # ids and segments


def _check_memory(subject: str, num_bytes: int) -> None:
    """Refuses what does not fit the memory of a CPU host.

    Linux overcommits memory and kills a process that uses too much; an accelerator
    reports the error itself.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu" and num_bytes > memory * jax.process_count():
        raise ValueError(
            f"{subject}: {num_bytes / 2**30:,.1f} GiB do not fit this machine's "
            f"{memory / 2**30:,.1f} GiB of memory; choose a smaller model or batch"
        )


def _is_saving_step(
    config: ml_collections.ConfigDict, step: int, saved_at: float
) -> bool:
    """Returns whether to save a checkpoint after the step: the same on all processes.

    `saved_at` is the time of the last checkpoint, in seconds of `time.monotonic`.
    """
    settings = config.checkpoint
    if step % settings.every_steps == 0 or step == config.train.num_steps:
        return True
    if not settings.every_minutes:
        return False
    # Also by time, so that a preemption costs at most `every_minutes`.
    is_due = time.monotonic() - saved_at > 60 * settings.every_minutes
    if jax.process_count() == 1:
        return is_due
    # The clock of process 0 decides.
    if step % _STEPS_BETWEEN_CLOCKS:
        return False
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(is_due)))


def _profile(step: int, profile_steps: int, workdir: pathlib.Path) -> None:
    """Starts or stops the profile at the beginning of a step; step 0 stops it.

    Steps are those of this process, counted from 1.
    """
    global _is_profiling
    first = _STEPS_BEFORE_PROFILE + 1
    is_profiled = first <= step < first + profile_steps
    if is_profiled and not _is_profiling:
        jax.profiler.start_trace(workdir / "profile")
    elif _is_profiling and not is_profiled:
        jax.profiler.stop_trace()
        logging.info("profile written to %s; open it in XProf", workdir / "profile")
    _is_profiling = is_profiled


def _set_compilation_cache(folder: str) -> None:
    """Keeps compiled steps in the folder, unless JAX already has a cache."""
    if folder and not jax.config.values["jax_compilation_cache_dir"]:
        path = pathlib.Path(folder).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(path))


def build_batches(
    config: ml_collections.ConfigDict,
    *,
    text_format: text_formats.TextFormat,
    row_multiple: int = 1,
) -> pipeline.Batches:
    """Returns the batches of a config; builds their caches if they are missing."""
    data = config.data
    chosen = selection.select(
        mixture=data.mixture,
        files=data.files,
        vocabulary=load_vocabulary(config),
        text_format=text_format,
        cache_dir=pathlib.Path(data.cache_dir).expanduser(),
        prepared_dir=data.prepared_dir,
        unique_ids=data.unique_ids,
        scores=config.loss.kl_weight > 0,
    )
    return pipeline.Batches(
        chosen,
        train_step.batch_shape(config, row_multiple),
        batch_size=data.batch_size,
        one_task_per_batch=data.one_task_per_batch,
        seed=config.seed,
        teacher=data.teacher,
    )


def load_vocabulary(config: ml_collections.ConfigDict) -> vocabularies.Vocabulary:
    """Returns the vocabulary of a config."""
    path = task_table.vocabulary_path(config.data.vocabulary)
    return vocabularies.load(path, config.data.extra_ids)
