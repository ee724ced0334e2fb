"""The loss of a global batch and its gradient, on a mesh, in microbatches.

A device encodes its own rows, a microbatch at a time, and keeps the embeddings alone
(GradCache, Gao et al. 2021). The loss is of the whole batch. Then the device encodes
each microbatch again, backward, and adds up the gradients; only their sum is reduced
over the mesh. So the result is that of one large batch, while the memory is that of a
microbatch, and no microbatch waits for another device.

The configured rows of a microbatch are those of the longer side. Of the shorter one as
many are encoded together as have no more tokens: fewer microbatches, each of which
reads all weights and all gradients.

Parameters that are split over `fsdp` are gathered once for the step, the matrices in
the activation dtype; what is added up over microbatches is float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gecko_jax.losses import contrastive
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding

SIDES = ("query", "passage")

# What the loops over microbatches are called in a compiled step.
MICROBATCHES = "microbatches"

LossAndGradients = Callable[
    [Any, Mapping[str, Array], Array],
    tuple[Array, dict[int, contrastive.LossTerms], Any],
]


def build(
    encoder: dual_encoder.DualEncoder,
    mesh: Mesh,
    param_shardings: Any,
    *,
    num_segments: int,
    microbatch_size: int,
    loss_settings: Mapping[str, Any],
) -> LossAndGradients:
    """Returns a function from (parameters, batch, key) to the loss and its gradient.

    It is to be called under `jax.jit`. It returns the MRL loss of each query, the terms
    at each dim, and the gradient of the mean loss, which lies where the parameters do.

    Args:
        encoder: The model.
        mesh: The devices.
        param_shardings: Where the parameters lie.
        num_segments: Texts a row may hold.
        microbatch_size: Rows of the longer side that are encoded together, over all
            devices; 0 for all of them.
        loss_settings: Keyword arguments of `losses.mrl_loss`.
    """
    # The `tensor` axis stays the compiler's; of the others every collective is here.
    specs = jax.tree.map(sharding.batch_axes_spec, param_shardings)
    num_shards = sharding.num_batch_shards(mesh)
    embed = _build_embed(encoder, specs, num_segments)
    batch_spec = PartitionSpec(sharding.BATCH_AXES)

    def of_device(
        params: Any, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Array, dict[int, contrastive.LossTerms], Any]:
        ids = contrastive.BatchIds(
            **{name: batch[name] for name in contrastive.BatchIds._fields}
        )
        teacher = None
        if "query_teacher" in batch:
            names = contrastive.TeacherVectors._fields
            teacher = contrastive.TeacherVectors(*(batch[name] for name in names))
        batch_size, num_negatives = ids.negative_mask.shape
        mask = jnp.sum(ids.example_mask.astype(jnp.float32))
        count = jnp.maximum(jax.lax.psum(mask, sharding.BATCH_AXES), 1.0)
        whole = {
            side: _rows(batch, side, key if encoder.config.dropout_rate else None)
            for side in SIDES
        }
        longest = max(rows["tokens"].shape[1] for rows in whole.values())
        sides = {
            side: _split_rows(rows, microbatch_size // num_shards, longest)
            for side, rows in whole.items()
        }

        def mean_loss(params: Any) -> tuple[Array, Any]:
            embedded = embed(params, sides)
            queries = _collect(embedded["query"], batch["query_index"])
            # The positives of all examples come first, then the negatives of all.
            index = batch["passage_index"]
            total = batch_size * num_shards
            positives = _collect(embedded["passage"], index[:total])
            negatives = None
            if num_negatives:
                negatives = _collect(embedded["passage"], index[total:])
                negatives = negatives.reshape(batch_size, num_negatives, -1)
            loss, terms = contrastive.mrl_loss(
                queries,
                positives,
                negatives,
                ids,
                teacher=teacher,
                axis_names=sharding.BATCH_AXES,
                **loss_settings,
            )
            total_loss = jax.lax.psum(jnp.sum(loss), sharding.BATCH_AXES)
            return total_loss / count, (loss, terms)

        gradients, (loss, terms) = jax.grad(mean_loss, has_aux=True)(params)
        return loss, terms, gradients

    def loss_and_gradients(
        params: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[int, contrastive.LossTerms], Any]:
        batch = {name: leaf for name, leaf in batch.items() if name != "task_index"}
        return jax.shard_map(
            of_device,
            mesh=mesh,
            in_specs=(specs, sharding.batch_specs(batch), PartitionSpec()),
            out_specs=(batch_spec, batch_spec, specs),
            axis_names=set(sharding.BATCH_AXES),
        )(params, batch, key)

    return loss_and_gradients


def _build_embed(
    encoder: dual_encoder.DualEncoder, specs: Any, num_segments: int
) -> Callable[[Any, Mapping[str, Any]], dict[str, Float[Array, "R S D"]]]:
    """Returns a differentiable function that embeds the rows of both sides.

    Its backward pass is written out, because automatic differentiation would add up
    gradients in the dtype of what was gathered, and once for each side.
    """
    config = encoder.config
    compute_specs = dual_encoder.stack_specs(specs, config)

    def encode(params: Any, rows: Any) -> Float[Array, "R S D"]:
        embedded: Any = encoder.apply(
            {"params": params},
            rows["tokens"],
            rows["segment_ids"],
            num_segments=num_segments,
            dropout_keys=rows["keys"],
        )
        return embedded

    def is_whole(sides: Mapping[str, Any]) -> bool:
        return all(len(rows["tokens"]) == 1 for rows in sides.values())

    def encode_whole(params: Any, sides: Mapping[str, Any]) -> dict[str, Array]:
        return {
            side: encode(params, jax.tree.map(lambda leaf: leaf[0], rows))
            for side, rows in sides.items()
        }

    @jax.custom_vjp
    def embed(params: Any, sides: Mapping[str, Any]) -> dict[str, Array]:
        return forward(params, sides)[0]

    def forward(params: Any, sides: Mapping[str, Any]) -> tuple[dict[str, Array], Any]:
        params = dual_encoder.compute_params(params, config)
        params = jax.tree.map(_gather, params, compute_specs)
        if is_whole(sides):
            # One microbatch: nothing is gained by encoding it twice.
            embedded, pull = jax.vjp(lambda p: encode_whole(p, sides), params)
            return embedded, (pull, None)
        embedded = {}
        for side, rows in sides.items():
            with jax.named_scope(MICROBATCHES):
                _, chunks = jax.lax.scan(
                    lambda _, chunk: (None, encode(params, chunk)), None, rows
                )
            embedded[side] = chunks.reshape(-1, *chunks.shape[2:])
        return embedded, (params, sides)

    def backward(saved: Any, slopes: dict[str, Array]) -> tuple[Any, None]:
        saved, sides = saved
        if sides is None:
            (gradients,) = saved(slopes)
            gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
        else:
            gradients = jax.tree.map(
                lambda leaf: jnp.zeros_like(leaf, jnp.float32), saved
            )
            for side, rows in sides.items():
                chunks = slopes[side].reshape(
                    *rows["tokens"].shape[:2], *slopes[side].shape[1:]
                )
                with jax.named_scope(MICROBATCHES):
                    gradients, _ = jax.lax.scan(
                        functools.partial(add_gradients, saved),
                        gradients,
                        (rows, chunks),
                    )
        gradients = jax.tree.map(_reduce, gradients, compute_specs)
        return dual_encoder.unstack_gradients(gradients, config), None

    def add_gradients(params: Any, so_far: Any, chunk: Any) -> tuple[Any, None]:
        rows, slopes = chunk
        _, pull = jax.vjp(lambda p: encode(p, rows), params)
        (found,) = pull(slopes)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), so_far, found), None

    embed.defvjp(forward, backward)
    return embed


def _rows(
    batch: Mapping[str, Array], side: str, key: Key[Array, ""] | None
) -> dict[str, Any]:
    """Returns a device's rows of one side, with a key for each."""
    tokens = batch[f"{side}_tokens"]
    keys = None
    if key is not None:
        first = jax.lax.axis_index(sharding.BATCH_AXES) * tokens.shape[0]
        number = first + jnp.arange(tokens.shape[0])
        key = jax.random.fold_in(key, SIDES.index(side))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
    return {
        "tokens": tokens,
        "segment_ids": batch[f"{side}_segment_ids"],
        "keys": keys,
    }


def _split_rows(
    rows: dict[str, Any], microbatch_size: int, longest: int
) -> dict[str, Any]:
    """Cuts a device's own rows: no row moves, so globally the cut is strided.

    Args:
        rows: See `_rows`.
        microbatch_size: Rows of `longest` tokens in a microbatch; 0 for all.
        longest: Tokens of a row of the longer side.
    """
    num_rows, length = rows["tokens"].shape
    size = microbatch_rows(num_rows, microbatch_size, longest // length)
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_rows // size, size, *leaf.shape[1:]), rows
    )


def microbatch_rows(num_rows: int, microbatch_size: int, ratio: int) -> int:
    """Returns the rows of one side that a device encodes together.

    Args:
        num_rows: Rows of the side on a device, a multiple of `microbatch_size`.
        microbatch_size: Rows of the longer side in a microbatch; 0 for all.
        ratio: How many rows of this side have the tokens of one of the longer.
    """
    size = min(microbatch_size or num_rows, num_rows)
    parts, rest = divmod(num_rows, size)
    assert not rest, f"{num_rows} rows in microbatches of {size}"
    return size * next(n for n in range(min(ratio, parts), 0, -1) if parts % n == 0)


def _collect(
    embedded: Float[Array, "R S D"], index: Int[Array, "T 2"]
) -> Float[Array, "t D"]:
    """Returns this device's share of the texts, wherever their rows are.

    Every device puts in the texts it has; each text is a sum with one term.
    """
    first = jax.lax.axis_index(sharding.BATCH_AXES) * embedded.shape[0]
    row = index[:, 0] - first
    is_here = (row >= 0) & (row < embedded.shape[0])
    texts = embedded[jnp.where(is_here, row, 0), index[:, 1]]
    return jax.lax.psum_scatter(
        jnp.where(is_here[:, None], texts, 0.0), sharding.BATCH_AXES, tiled=True
    )


def _gather(leaf: Array, spec: PartitionSpec) -> Array:
    """Returns a parameter whole, and varying: its gradients are then each device's."""
    for axis, names in _split_axes(spec):
        # Of one device it would be a copy, on CPU into another layout.
        if jax.lax.axis_size(names) > 1:
            leaf = jax.lax.all_gather(leaf, names, axis=axis, tiled=True)
    return jax.lax.pcast(leaf, _unsplit_names(spec), to="varying")


def _reduce(leaf: Array, spec: PartitionSpec) -> Array:
    """Sums a gradient over devices, each keeping what it has of the parameter."""
    for axis, names in _split_axes(spec):
        if jax.lax.axis_size(names) > 1:
            leaf = jax.lax.psum_scatter(leaf, names, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(leaf, _unsplit_names(spec))


def _split_axes(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    names = [sharding.axis_names(axes) for axes in spec]
    return [(axis, of_axis) for axis, of_axis in enumerate(names) if of_axis]


def _unsplit_names(spec: PartitionSpec) -> tuple[str, ...]:
    used = {name for _, names in _split_axes(spec) for name in names}
    return tuple(name for name in sharding.BATCH_AXES if name not in used)
