"""The loss of a global batch and its gradient, on a mesh, in microbatches.

Each device encodes its own rows one microbatch at a time and keeps only the embeddings
(GradCache, Gao et al. 2021). The loss is that of the whole batch. The backward pass
encodes each microbatch again and accumulates the gradients; only their sum is reduced
over the mesh. The result is that of one large batch with the memory of a microbatch,
and no microbatch waits for another device.

`microbatch_size` counts rows of the longer side. A microbatch of the shorter side has
more rows, but no more tokens, which saves passes over the weights and the gradients.

Parameters that are sharded over `fsdp` are gathered once per step, with matrices in the
activation dtype. Gradients accumulate in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gecko_jax.losses import contrastive, whole_batch
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding

SIDES = ("query", "passage")

# Name scope of the microbatch loops in the compiled step.
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
    loss: whole_batch.Loss | None = None,
) -> LossAndGradients:
    """Returns a function from (parameters, batch, key) to the loss and its gradient.

    Call it under `jax.jit`. It returns the MRL loss of each query, the terms at each
    dim, and the gradient of the mean loss, sharded like the parameters.

    `num_segments` is the largest number of texts in a row, and `microbatch_size` the
    rows of the longer side per microbatch, over all devices; 0 for no microbatches.
    `loss_settings` are keyword arguments of `contrastive.mrl_loss`, which a `loss` of
    the user replaces (`whole_batch`).
    """
    # Collectives over the batch axes are explicit here; those of `tensor` are XLA's.
    specs = jax.tree.map(sharding.batch_axes_spec, param_shardings)
    num_shards = sharding.num_batch_shards(mesh)
    embed = _build_embed(encoder, specs, num_segments)
    batch_spec = PartitionSpec(sharding.BATCH_AXES)

    def device_loss(
        queries: Array,
        positives: Array,
        negatives: Array | None,
        ids: contrastive.BatchIds,
        features: Mapping[str, Array],
    ) -> tuple[Array, dict[int, contrastive.LossTerms]]:
        embeddings = (queries, positives, negatives)
        axis_names = sharding.BATCH_AXES
        if loss is not None:
            names = ("mrl_dims", "mrl_weights", "temperature")
            settings = {name: loss_settings[name] for name in names}
            return whole_batch.mrl_loss(
                loss, *embeddings, ids, features, **settings, axis_names=axis_names
            )
        teacher = None
        if "query_teacher" in features:
            names = contrastive.TeacherVectors._fields
            teacher = contrastive.TeacherVectors(*(features[name] for name in names))
        return contrastive.mrl_loss(
            *embeddings,
            ids,
            teacher=teacher,
            scores=features.get("scores"),
            axis_names=axis_names,
            **loss_settings,
        )

    def device_gradients(
        params: Any, batch: Mapping[str, Array], key: Key[Array, ""]
    ) -> tuple[Array, dict[int, contrastive.LossTerms], Any]:
        batch = dict(batch)
        ids = contrastive.BatchIds(
            **{name: batch.pop(name) for name in contrastive.BatchIds._fields}
        )
        batch_size, num_negatives = ids.negative_mask.shape
        query_index = batch.pop("query_index")
        passage_index = batch.pop("passage_index")

        # Cut this device's rows into microbatches.
        dropout_key = key if encoder.config.dropout_rate else None
        rows = {side: _pop_rows(batch, side, dropout_key) for side in SIDES}
        longest = max(of_side["tokens"].shape[1] for of_side in rows.values())
        microbatches = {
            side: _split_rows(of_side, microbatch_size // num_shards, longest)
            for side, of_side in rows.items()
        }
        # The loss is a mean over the examples of all devices; padding does not count.
        mask = jnp.sum(ids.example_mask.astype(jnp.float32))
        num_examples = jnp.maximum(jax.lax.psum(mask, sharding.BATCH_AXES), 1.0)

        def mean_loss(params: Any) -> tuple[Array, Any]:
            # Encode, then bring each example's embeddings to its device. Positives of
            # all examples come first in `passage_index`, negatives of all after them.
            embedded = embed(params, microbatches)
            queries = _collect(embedded["query"], query_index)
            num_positives = batch_size * num_shards
            positives = _collect(embedded["passage"], passage_index[:num_positives])
            negatives = None
            if num_negatives:
                negatives = _collect(embedded["passage"], passage_index[num_positives:])
                negatives = negatives.reshape(batch_size, num_negatives, -1)
            # What is left in the batch are features of single examples.
            row_loss, terms = device_loss(queries, positives, negatives, ids, batch)
            # Sum over the rows of all devices.
            total = jax.lax.psum(jnp.sum(row_loss), sharding.BATCH_AXES)
            return total / num_examples, (row_loss, terms)

        gradients, (row_loss, terms) = jax.grad(mean_loss, has_aux=True)(params)
        return row_loss, terms, gradients

    def loss_and_gradients(
        params: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[int, contrastive.LossTerms], Any]:
        batch_specs = sharding.batch_specs(batch)
        if "task_index" in batch:
            batch_specs["task_index"] = batch_spec  # a feature of each example
        return jax.shard_map(
            device_gradients,
            mesh=mesh,
            in_specs=(specs, batch_specs, PartitionSpec()),
            out_specs=(batch_spec, batch_spec, specs),
            axis_names=set(sharding.BATCH_AXES),
        )(params, batch, key)

    return loss_and_gradients


def _build_embed(
    encoder: dual_encoder.DualEncoder, specs: Any, num_segments: int
) -> Callable[[Any, Mapping[str, Any]], dict[str, Float[Array, "R S D"]]]:
    """Returns a differentiable function that embeds the microbatches of both sides.

    Its backward pass is written out, because automatic differentiation would reduce
    gradients over the mesh in the activation dtype, once for each side.
    """
    config = encoder.config
    gathered_specs = dual_encoder.stack_specs(specs, config)

    def encode(params: Any, rows: Any) -> Float[Array, "R S D"]:
        embedded: Any = encoder.apply(
            {"params": params},
            rows["tokens"],
            rows["segment_ids"],
            num_segments=num_segments,
            dropout_keys=rows["keys"],
        )
        return embedded

    def encode_at_once(params: Any, sides: Mapping[str, Any]) -> dict[str, Array]:
        return {
            side: encode(params, jax.tree.map(lambda leaf: leaf[0], rows))
            for side, rows in sides.items()
        }

    def encode_in_microbatches(params: Any, sides: Mapping[str, Any]) -> dict[str, Any]:
        embedded = {}
        for side, rows in sides.items():
            with jax.named_scope(MICROBATCHES):
                _, chunks = jax.lax.scan(
                    lambda _, chunk: (None, encode(params, chunk)), None, rows
                )
            embedded[side] = chunks.reshape(-1, *chunks.shape[2:])
        return embedded

    def pull_back_in_microbatches(
        params: Any, sides: Mapping[str, Any], cotangents: dict[str, Array]
    ) -> tuple[Any]:
        def add_gradients(so_far: Any, chunk: Any) -> tuple[Any, None]:
            # Encode the microbatch again, and pull its embeddings' cotangents back.
            rows, cotangent = chunk
            _, pull_back = jax.vjp(lambda params: encode(params, rows), params)
            (gradients,) = pull_back(cotangent)
            return jax.tree.map(
                lambda total, leaf: total + leaf.astype(total.dtype), so_far, gradients
            ), None

        # Accumulate in float32 over the microbatches of both sides.
        gradients = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
        for side, rows in sides.items():
            # Cut the cotangents like the rows.
            shape = (*rows["tokens"].shape[:2], *cotangents[side].shape[1:])
            chunks = (rows, cotangents[side].reshape(shape))
            with jax.named_scope(MICROBATCHES):
                gradients, _ = jax.lax.scan(add_gradients, gradients, chunks)
        return (gradients,)

    @jax.custom_vjp
    def embed(params: Any, sides: Mapping[str, Any]) -> dict[str, Array]:
        return forward(params, sides)[0]

    # The residual is a function that pulls the embeddings' cotangents back.
    def forward(params: Any, sides: Mapping[str, Any]) -> tuple[dict[str, Array], Any]:
        # Cast and stack before gathering: half the bytes, and once per step.
        params = dual_encoder.compute_params(params, config)
        params = jax.tree.map(_gather, params, gathered_specs)
        if all(len(rows["tokens"]) == 1 for rows in sides.values()):
            # One microbatch: encoding it twice would save no memory.
            return jax.vjp(lambda params: encode_at_once(params, sides), params)
        # GradCache: keep parameters and tokens instead of activations.
        pull_back = jax.tree_util.Partial(pull_back_in_microbatches, params, sides)
        return encode_in_microbatches(params, sides), pull_back

    def backward(pull_back: Any, cotangents: dict[str, Array]) -> tuple[Any, None]:
        (gradients,) = pull_back(cotangents)
        # Reduce once, in float32.
        gradients = jax.tree.map(
            lambda leaf, spec: _reduce(leaf.astype(jnp.float32), spec),
            gradients,
            gathered_specs,
        )
        return dual_encoder.unstack_gradients(gradients, config), None

    embed.defvjp(forward, backward)
    return embed


def _pop_rows(
    batch: dict[str, Array], side: str, key: Key[Array, ""] | None
) -> dict[str, Any]:
    """Takes this device's rows of one side out of the batch.

    Each row gets a dropout key by its index in the global batch, so that its masks
    depend on neither the mesh nor the microbatch.
    """
    tokens = batch.pop(f"{side}_tokens")
    keys = None
    if key is not None:
        first = jax.lax.axis_index(sharding.BATCH_AXES) * tokens.shape[0]
        index = first + jnp.arange(tokens.shape[0])
        key = jax.random.fold_in(key, SIDES.index(side))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
    segment_ids = batch.pop(f"{side}_segment_ids")
    return {"tokens": tokens, "segment_ids": segment_ids, "keys": keys}


def _split_rows(
    rows: dict[str, Any], microbatch_size: int, longest: int
) -> dict[str, Any]:
    """Cuts the rows of a device into microbatches; no row moves to another device.

    A microbatch has `microbatch_size` rows of `longest` tokens, 0 for all.
    """
    # [R, L] becomes [microbatches, rows, L], which the scans run over.
    num_rows, length = rows["tokens"].shape
    size = microbatch_rows(num_rows, microbatch_size, longest // length)
    return jax.tree.map(
        lambda leaf: leaf.reshape(num_rows // size, size, *leaf.shape[1:]), rows
    )


def microbatch_rows(num_rows: int, microbatch_size: int, ratio: int) -> int:
    """Returns the rows of one side per microbatch, of its `num_rows` on one device.

    A microbatch of the longer side has `microbatch_size` rows, 0 for all, which are
    `ratio` times as long.
    """
    # Up to `ratio` microbatches of the shorter side have the tokens of one microbatch
    # of the longer side; merge as many as divide evenly.
    size = min(microbatch_size or num_rows, num_rows)
    parts, remainder = divmod(num_rows, size)
    assert not remainder, f"{num_rows} rows in microbatches of {size}"
    return size * next(n for n in range(min(ratio, parts), 0, -1) if parts % n == 0)


def _collect(
    embedded: Float[Array, "R S D"], index: Int[Array, "T 2"]
) -> Float[Array, "t D"]:
    """Returns the texts of this device's examples, whichever device encoded them.

    Every device contributes the texts it encoded and zeros for the others, so that the
    sum over devices has one nonzero term per text.
    """
    first = jax.lax.axis_index(sharding.BATCH_AXES) * embedded.shape[0]
    row = index[:, 0] - first
    is_here = (row >= 0) & (row < embedded.shape[0])
    texts = embedded[jnp.where(is_here, row, 0), index[:, 1]]
    return jax.lax.psum_scatter(
        jnp.where(is_here[:, None], texts, 0.0), sharding.BATCH_AXES, tiled=True
    )


def _gather(leaf: Array, spec: PartitionSpec) -> Array:
    """Gathers a parameter and marks it as varying, so that gradients stay local."""
    for axis, names in _split_axes(spec):
        # Skip the all-gather on a single device: XLA:CPU would still copy the array.
        if jax.lax.axis_size(names) > 1:
            leaf = jax.lax.all_gather(leaf, names, axis=axis, tiled=True)
    return jax.lax.pcast(leaf, _unsplit_names(spec), to="varying")


def _reduce(leaf: Array, spec: PartitionSpec) -> Array:
    """Sums a gradient over devices; each keeps its shard of the parameter."""
    for axis, names in _split_axes(spec):
        if jax.lax.axis_size(names) > 1:
            leaf = jax.lax.psum_scatter(leaf, names, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(leaf, _unsplit_names(spec))


def _split_axes(spec: PartitionSpec) -> list[tuple[int, tuple[str, ...]]]:
    names = [sharding.axis_names(entry) for entry in spec]
    return [(axis, axis_names) for axis, axis_names in enumerate(names) if axis_names]


def _unsplit_names(spec: PartitionSpec) -> tuple[str, ...]:
    used = {name for _, names in _split_axes(spec) for name in names}
    return tuple(name for name in sharding.BATCH_AXES if name not in used)
