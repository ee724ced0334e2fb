"""One update of the train state: `train_step`, and how it is compiled for a config.

`build` returns the model, the optimizer, all shardings and the jitted step. Training
runs it; `gecko compile` lowers it for a TPU.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

import gecko_jax.config
from gecko_jax.data import features
from gecko_jax.losses import whole_batch
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.training import gradients, optimizer


class TrainState(NamedTuple):
    """Parameters, optimizer state and number of updates."""

    params: Any
    opt_state: Any
    step: Any


class Step(NamedTuple):
    """A train step for one config and mesh."""

    encoder: dual_encoder.DualEncoder
    schedule: optax.Schedule  # learning rate by step
    tx: optax.GradientTransformation
    shapes: TrainState  # with shardings
    shardings: TrainState
    run: Any  # jitted (state, batch, key) -> (state, metrics); donates the state


def train_step(
    state: TrainState,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    loss_and_gradients: gradients.LossAndGradients,
    tx: optax.GradientTransformation,
    num_tasks: int,
) -> tuple[TrainState, dict[str, Array]]:
    """One update on one global batch of `gecko_jax.data.features`.

    Returns the next state, and metrics: means over the batch and sums for each of
    `num_tasks` tasks. If the loss or a gradient is not finite, only the step of the
    state changes. `key` is that of the run, and the step is folded in.
    """
    # Dropout differs from step to step, and a resumed run repeats it.
    key = jax.random.fold_in(key, state.step)
    row_loss, terms, grads = loss_and_gradients(state.params, batch, key)
    # Mean over the examples of the batch; padding has a loss of 0.
    mask = batch["example_mask"].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(mask), 1.0)
    loss = jnp.sum(row_loss) / count
    grad_norm = optax.tree.norm(grads)
    # A step that is not finite keeps the old parameters and moments; the host decides
    # whether the run stops. Selecting afterwards needs no branch and no wait for it.
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    proposed = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        proposed,
        (state.params, state.opt_state),
    )

    # Metrics, at the largest dim unless their name says otherwise.
    full = terms[max(terms)]
    means = {
        "accuracy": full.accuracy,
        "positive_similarity": full.positive_similarity,
        "negative_similarity": full.negative_similarity,
        **{f"loss_{dim}": terms[dim].loss for dim in terms},
    }
    for name in ("spread", "matching", "kl"):
        if getattr(full, name) is not None:
            means[name] = getattr(full, name)
    # Sums per task rather than means: a window of steps divides them by its counts.
    by_task = functools.partial(
        jax.ops.segment_sum, segment_ids=batch["task_index"], num_segments=num_tasks
    )
    summary = {name: jnp.sum(value) / count for name, value in means.items()} | {
        "loss": loss,
        "grad_norm": grad_norm,
        "task_loss_sum": by_task(row_loss),
        "task_count": by_task(mask),
    }
    return TrainState(params, opt_state, state.step + 1), summary


def build(
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    *,
    num_segments: int,
    num_tasks: int,
    loss: whole_batch.Loss | None = None,
) -> Step:
    """Builds the step of a config on a mesh; nothing is compiled yet.

    `num_segments` is the largest number of texts in a row, and `loss` replaces that of
    `config.loss`. Raises ValueError if the batch does not divide over the mesh, or a
    sharding rule is wrong.
    """
    microbatch_size = config.train.microbatch_size
    sharding.check_batch(config.data.batch_size, microbatch_size, mesh)
    encoder_config = gecko_jax.config.encoder_config(config)
    encoder = dual_encoder.DualEncoder(encoder_config)
    schedule, tx = build_optimizer(config)
    # Shapes and shardings come first: no array is ever whole on one device.
    shapes, logical_axes = dual_encoder.abstract_params(encoder_config)
    params = sharding.param_shardings(shapes, logical_axes, mesh, config.mesh.rules)
    # Moments are sharded like the parameters they belong to.
    opt_shapes = jax.eval_shape(tx.init, shapes)
    opt_state = sharding.state_shardings(opt_shapes, shapes, params, mesh)
    shardings = TrainState(params, opt_state, sharding.replicated(mesh))
    step_shape = jax.ShapeDtypeStruct((), jnp.int32)
    run = functools.partial(
        train_step,
        loss_and_gradients=gradients.build(
            encoder,
            mesh,
            params,
            num_segments=num_segments,
            microbatch_size=microbatch_size,
            loss_settings=config.loss.to_dict(),
            loss=loss,
        ),
        tx=tx,
        num_tasks=num_tasks,
    )
    return Step(
        encoder,
        schedule,
        tx,
        # Shapes with shardings let `gecko compile` lower the step without arrays.
        _with_shardings(TrainState(shapes, opt_shapes, step_shape), shardings),
        shardings,
        # Donating the state lets XLA update parameters and moments in place.
        jax.jit(
            run,
            in_shardings=(shardings, None, None),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
    )


def build_optimizer(
    config: ml_collections.ConfigDict,
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the schedule and the optimizer of a config."""
    settings = config.optimizer.to_dict()
    schedule = optimizer.build_schedule(
        settings.pop("schedule"),
        learning_rate=settings.pop("learning_rate"),
        warmup_steps=settings.pop("warmup_steps"),
        num_steps=config.train.num_steps,
    )
    name = settings.pop("name")
    return schedule, optimizer.build_optimizer(name, schedule, **settings)


def mesh_sizes(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the arguments of `sharding.build_mesh`."""
    return {name: size for name, size in config.mesh.items() if name != "rules"}


def batch_shape(
    config: ml_collections.ConfigDict, num_shards: int = 1
) -> features.Shape:
    """Returns the shape of a config's batches, split over `num_shards` devices."""
    data = config.data
    return features.Shape(
        data.query_length,
        data.passage_length,
        data.num_negatives,
        data.packing,
        row_multiple=num_shards,
        microbatch_rows=config.train.microbatch_size,
        teacher_dim=data.teacher_dim,
        scores=config.loss.kl_weight > 0,
    )


def abstract_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Returns shapes and shardings of a batch of full-length texts."""
    shape = batch_shape(config, sharding.num_batch_shards(mesh))
    sizes = features.largest(config.data.batch_size, shape)
    shapes = {
        name: jax.ShapeDtypeStruct(dims, dtype) for name, (dims, dtype) in sizes.items()
    }
    return _with_shardings(shapes, sharding.batch_shardings(shapes, mesh))


def model_flops(config: ml_collections.ConfigDict, mean_length: float = 1.0) -> float:
    """Returns the model FLOPs of a step; recomputation does not count.

    `mean_length` is the mean text length, as a share of the maximum length.
    """
    # Every query comes with its positive and G hard negatives.
    encoder_config = gecko_jax.config.encoder_config(config)
    texts = {
        "query": config.data.batch_size,
        "passage": config.data.batch_size * (1 + config.data.num_negatives),
    }
    return sum(
        texts[side]
        * config.data[f"{side}_length"]
        * mean_length
        * dual_encoder.flops_per_token(encoder_config, config.data[f"{side}_length"])
        for side in gradients.SIDES
    )


def describe(config: ml_collections.ConfigDict, step: Step, mesh: Mesh) -> list[str]:
    """Returns lines that describe the batch, the FLOPs and the parameters of a step."""
    data, loss = config.data, config.loss
    params = step.shapes.params
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = mesh.devices.flat[0]
    in_batch = data.batch_size - 1
    # Negatives of one query.
    hard = data.num_negatives * (data.batch_size if loss.all_hard_negatives else 1)
    passages = data.batch_size * (1 + data.num_negatives)
    tokens = data.batch_size * data.query_length + passages * data.passage_length
    microbatch = config.train.microbatch_size
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of_microbatch = (
        f"microbatches of {microbatch:,} rows, "
        f"{microbatch // sharding.num_batch_shards(mesh)} a device"
        if microbatch
        else "no microbatches"
    )
    flops = f" and {model_flops(config):.3g} FLOPs" if config.model.num_layers else ""
    lines = [
        f"{num_params / 1e6:,.1f}M parameters on {mesh.size} x {device.device_kind} "
        f"({shape})",
        f"batch {data.batch_size:,}: each query against {in_batch:,} in-batch, "
        f"{in_batch * loss.same_tower:,} same-tower, {hard:,} hard negatives; "
        f"{of_microbatch}",
        f"at most {tokens:,} tokens{flops} a step",
    ]
    if mesh.size > 1:
        lines += sharding.describe(params, step.shardings.params)
    return lines


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        shapes,
        shardings,
    )
