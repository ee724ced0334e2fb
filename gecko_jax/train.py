"""The training loop: contrastive steps on a mesh, resumable at any checkpoint.

`train_step` is the whole of the mathematics; `train` reads top to bottom around it.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import logging
from jaxtyping import Array, Float, Key

from gecko_jax import (
    checkpoints,
    initialization,
    losses,
    metrics,
    model,
    numerics,
    optimizer,
    progress,
    sharding,
    text,
    vocabulary,
)
from gecko_jax import config as config_lib
from gecko_jax import workdir as workdir_lib
from gecko_jax.data import pipeline, tasks

Evaluate = Callable[[Any, int], Mapping[str, float]]


class TrainState(NamedTuple):
    """What a step changes: parameters, optimizer state, number of updates."""

    params: Any
    opt_state: Any
    step: Array


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    encoder: model.DualEncoder,
    tx: optax.GradientTransformation,
    num_segments: int,
    num_tasks: int,
    loss_settings: Mapping[str, Any],
) -> tuple[TrainState, dict[str, Array]]:
    """One update on one global batch.

    Args:
        state: Donated.
        batch: Model features, see `gecko_jax.data.pipeline`.
        key: Randomness of the run; the step is folded in.
        encoder: The model.
        tx: The optimizer.
        num_segments: Texts a row may hold.
        num_tasks: Length of the per-task sums.
        loss_settings: Keyword arguments of `losses.mrl_loss`.

    Returns:
        The next state, unchanged but for the step when the loss or a gradient is not
        finite, and metrics: means over the batch, and sums per task.
    """
    query_key, passage_key = jax.random.split(jax.random.fold_in(key, state.step))
    keys: dict[str, Array] = {"query": query_key, "passage": passage_key}
    ids = losses.BatchIds(**{name: batch[name] for name in losses.BatchIds._fields})
    batch_size, num_negatives = ids.negative_mask.shape
    mask = ids.example_mask.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask), 1.0)

    def embed(params: Any, side: str) -> Float[Array, "T D"]:
        key = keys[side] if encoder.config.dropout_rate else None
        return model.embed_texts(
            encoder, params, batch, side, num_segments=num_segments, dropout_key=key
        )

    def mean_loss(params: Any) -> tuple[Array, Any]:
        queries, passages = embed(params, "query"), embed(params, "passage")
        positives, negatives = jnp.split(passages, [batch_size])
        negatives = negatives.reshape(batch_size, num_negatives, passages.shape[-1])
        loss, terms = losses.mrl_loss(
            queries, positives, negatives, ids, **loss_settings
        )
        return jnp.sum(loss) / count, (loss, terms)

    (loss, (row_loss, terms)), grads = jax.value_and_grad(mean_loss, has_aux=True)(
        state.params
    )
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    proposed = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        proposed,
        (state.params, state.opt_state),
    )

    full = terms[max(terms)]
    means = {
        "loss": row_loss,
        "accuracy": full.accuracy,
        "positive_similarity": full.positive_similarity,
        "negative_similarity": full.negative_similarity,
        **{f"loss_{dim}": terms[dim].loss for dim in terms},
    }
    by_task = functools.partial(
        jax.ops.segment_sum, segment_ids=batch["task_index"], num_segments=num_tasks
    )
    summary = {name: jnp.sum(value) / count for name, value in means.items()} | {
        "grad_norm": grad_norm,
        "task_loss_sum": by_task(row_loss),
        "task_count": by_task(mask),
    }
    return TrainState(params, opt_state, state.step + 1), summary


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    evaluate: Evaluate | None = None,
) -> dict[str, float]:
    """Trains a model, or goes on from the newest checkpoint of the workdir.

    A run that was interrupted and taken up again ends with the parameters of one that
    was not, bit for bit on CPU.

    Args:
        config: See `configs/`; checked here.
        workdir: The run's folder; see `checkpoints` for what it will hold.
        evaluate: Called with (parameters, step) every `evaluation.every_steps` and at
            the end; what it returns is logged.

    Returns:
        The last metrics.

    Raises:
        ValueError: A fault in the config, the data or the workdir.
        FloatingPointError: The loss or a gradient was not finite; says where.
    """
    config_lib.check(config)
    numerics.check()
    workdir = pathlib.Path(workdir)
    is_main = jax.process_index() == 0
    workdir_lib.check_config(workdir, config)
    mesh = sharding.build_mesh(**config.mesh.to_dict())

    # Data, and the model's own files, which no step changes.
    start = initialization.load_start(config)
    batches = build_batches(
        config,
        text_format=start.text_format if start else text.TextFormat(),
        row_multiple=sharding.num_batch_shards(mesh),
    )
    initialization.check_vocabulary(batches.vocabulary, config, start)
    encoder_config = config_lib.encoder_config(config)
    if is_main:
        workdir_lib.write_model(workdir, config, encoder_config, batches, start)

    # Model, optimizer, and where each of their arrays lives.
    encoder = model.DualEncoder(encoder_config)
    schedule, tx = build_optimizer(config)
    shapes, logical_axes = model.abstract_params(encoder_config)
    param_shardings = sharding.param_shardings(shapes, logical_axes, mesh)
    opt_shapes = jax.eval_shape(tx.init, shapes)
    opt_shardings = sharding.state_shardings(opt_shapes, shapes, param_shardings, mesh)
    everywhere: Any = sharding.replicated(mesh)
    shardings = TrainState(param_shardings, opt_shardings, everywhere)
    key = jax.random.key(config.seed)

    # The starting point: own workdir, then init.checkpoint, then scratch.
    checkpoints.remove_temporary(workdir)
    checkpointer = checkpoints.Checkpointer(
        workdir,
        keep=config.checkpoint.keep,
        keep_every_steps=config.checkpoint.keep_every_steps,
    )
    first_step = checkpointer.latest_step() or 0
    if first_step:
        workdir_lib.check_position(
            checkpointer.restore_position(first_step), batches, config
        )
        params, opt_state = checkpointer.restore(
            first_step,
            _with_shardings(shapes, param_shardings),
            _with_shardings(opt_shapes, opt_shardings),
        )
        logging.info("going on from step %d of %s", first_step, workdir)
    elif start is not None:
        params = jax.device_put(start.params, param_shardings)
        opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(params)
        logging.info("starting from %s", config.init.checkpoint)
    else:
        params = initialization.init_params(
            config, encoder, batches, key, mesh, param_shardings
        )
        opt_state = jax.jit(tx.init, out_shardings=opt_shardings)(params)
    step_array = jax.device_put(np.int32(first_step), sharding.replicated(mesh))
    state = TrainState(params, opt_state, step_array)
    del start, params, opt_state

    step_fn = jax.jit(
        functools.partial(
            train_step,
            encoder=encoder,
            tx=tx,
            num_segments=batches.num_segments,
            num_tasks=len(batches.task_names),
            loss_settings=config.loss.to_dict(),
        ),
        in_shardings=(shardings, None, None),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    num_steps = config.train.num_steps
    _log_start(config, shapes, batches, mesh)
    writer = metrics.Writer(workdir, first_step, enabled=is_main)
    window = metrics.Window(batches.task_names)
    bar = progress.Progress("Training", num_steps, first_step, enabled=is_main)
    position = {
        "mixture_hash": batches.mixture_hash,
        "mixture": batches.facts,
        "seed": config.seed,
    }
    last: dict[str, float] = {}

    def finish(step: int, summary: dict[str, Array]) -> None:
        """Takes in the metrics of a step, once the next one is on its way."""
        nonlocal last
        values = jax.device_get(summary)
        _check_finite(step, values, batches.task_names, workdir)
        window.add(values)
        if step % config.train.log_every_steps == 0 or step == num_steps:
            rate = float(np.asarray(schedule(step - 1)))
            last = window.means() | {"learning_rate": rate}
            writer.write(step, last)
        bar.update(step, f"loss {values['loss']:.3f}")

    def evaluate_now(step: int, params: Any) -> None:
        assert evaluate is not None
        began = time.monotonic()
        results = {
            f"evaluation/{k}": float(v) for k, v in evaluate(params, step).items()
        }
        writer.write(step, results)
        last.update(results)
        window.pause(time.monotonic() - began)

    try:
        if evaluate is not None and first_step == 0:
            evaluate_now(0, state.params)
        pending = None
        stream = batches.iterate(first_step, num_steps)
        for step, batch in enumerate(stream, start=first_step + 1):
            window.count(batch)
            state, summary = step_fn(state, sharding.place_batch(batch, mesh), key)
            if pending is not None:
                finish(*pending)
            pending = (step, summary)
            every = config.evaluation.every_steps
            is_saving = step % config.checkpoint.every_steps == 0 or step == num_steps
            is_evaluating = evaluate is not None and (
                (every and step % every == 0) or step == num_steps
            )
            if is_saving or is_evaluating:
                finish(*pending)
                pending = None
            if is_evaluating:
                evaluate_now(step, state.params)
            if is_saving:
                # What was logged up to here is on disk before the step counts as done.
                writer.flush()
                checkpointer.save(step, state.params, state.opt_state, position)
        checkpointer.wait()
    finally:
        bar.close()
        writer.close()
        checkpointer.close()
    if first_step >= num_steps:
        logging.info("%s is finished: %d steps of %d", workdir, first_step, num_steps)
    return last


def build_optimizer(
    config: ml_collections.ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the schedule and the optimizer that a config names."""
    settings = config.optimizer
    schedule = optimizer.build_schedule(
        settings.schedule,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        num_steps=config.train.num_steps,
    )
    tx = optimizer.build_optimizer(
        settings.name,
        schedule,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        beta1=settings.beta1,
        beta2=settings.beta2,
    )
    return schedule, tx


def build_batches(
    config: ml_collections.ConfigDict,
    *,
    text_format: text.TextFormat,
    row_multiple: int = 1,
) -> pipeline.Batches:
    """Returns the batches that a config names, building their caches if need be."""
    settings = config.data.to_dict()
    path = settings.pop("vocabulary")
    path = str(tasks.QUICKSTART_VOCABULARY) if path == "quickstart" else path
    cache_dir = pathlib.Path(settings.pop("cache_dir")).expanduser()
    return pipeline.Batches(
        vocabulary=vocabulary.load(path, settings.pop("extra_ids")),
        vocabulary_path=path,
        text_format=text_format,
        seed=config.seed,
        cache_dir=cache_dir,
        row_multiple=row_multiple,
        **settings,
    )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        shapes,
        shardings,
    )


def _log_start(
    config: ml_collections.ConfigDict,
    shapes: Any,
    batches: pipeline.Batches,
    mesh: jax.sharding.Mesh,
) -> None:
    num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    batch_size = config.data.batch_size
    same_tower = (batch_size - 1) * config.loss.same_tower
    logging.info(
        "%.1fM parameters on %s (mesh %s); %s examples of %d tasks; batch %d, each "
        "query against %d in-batch, %d same-tower, %d hard negatives",
        num_params / 1e6,
        jax.devices()[0].device_kind,
        "x".join(str(size) for size in mesh.shape.values()),
        f"{batches.num_examples:,}",
        len(batches.task_names),
        batch_size,
        batch_size - 1,
        same_tower,
        config.data.num_negatives
        * (batch_size if config.loss.all_hard_negatives else 1),
    )


def _check_finite(
    step: int,
    values: Mapping[str, Any],
    task_names: tuple[str, ...],
    workdir: pathlib.Path,
) -> None:
    if np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]):
        return
    sums = values["task_loss_sum"]
    bad = [
        name
        for name, value in zip(task_names, sums, strict=True)
        if not np.isfinite(value)
    ]
    seen = [name for name, n in zip(task_names, values["task_count"], strict=True) if n]
    where = (
        f"in task {', '.join(bad)}"
        if bad
        else f"in the gradient (the loss is finite; tasks {', '.join(seen)})"
    )
    raise FloatingPointError(
        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not "
        f"finite, {where}; the update was not applied. Lower optimizer.learning_rate, "
        "set optimizer.clip_norm or raise loss.temperature; the last checkpoint in "
        f"{workdir / checkpoints.CHECKPOINTS} is from before"
    )
