"""A loss of your own in training: it sees the whole batch, on any mesh.

A loss is a function

    loss(queries, positives, negatives, ids, features) -> one number for each query

of normalized embeddings. Training calls it once for each MRL dim, with the embeddings
of the global batch gathered on every device. The loss therefore needs no collectives,
works with microbatches and packed rows, and gives the same gradients on any mesh. Its
similarity matrix is whole in memory, unlike that of `contrastive`: at a batch of 8,192,
256 MiB.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gecko_jax.losses import contrastive
from gecko_jax.models import dual_encoder

# (queries [B, D], positives [B, D], negatives [B, G, D] or None, ids, features) -> [B]
Loss = Callable[
    [Array, Array, Array | None, contrastive.BatchIds, Mapping[str, Array]], Array
]


def mrl_loss(
    loss: Loss,
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B G D"] | None,
    ids: contrastive.BatchIds,
    features: Mapping[str, Array],
    *,
    mrl_dims: tuple[int, ...],
    mrl_weights: tuple[float, ...],
    temperature: float,
    axis_names: tuple[str, ...],
) -> tuple[Float[Array, " B"], dict[int, contrastive.LossTerms]]:
    """Sums a user's loss over prefixes of the embedding, inside a `shard_map`.

    The arguments are those of `contrastive.mrl_loss`, of this device's examples, with
    their further features, such as `task_index`. The temperature is that of the
    metrics. Raises ValueError if the loss does not return one number for each query.

    Returns:
        The weighted sum for each query of this device; and the terms at each dim, whose
        `loss` is this loss and whose other metrics are those of eq. 2.
    """

    def gather(leaf: Array) -> Array:
        return jax.lax.all_gather(leaf, axis_names, tiled=True)

    # Gather embeddings, ids and features of the whole batch onto every device. The
    # gradient of an all-gather is a reduce-scatter, so each device gets back the
    # cotangents of its own embeddings, summed over all devices.
    batch_size = queries.shape[0]
    first = jax.lax.axis_index(axis_names) * batch_size
    embeddings = (queries, positives, negatives)
    all_embeddings, all_ids, all_features = jax.tree.map(
        gather, (embeddings, ids, dict(features))
    )
    terms = {}
    total = jnp.zeros_like(queries[:, 0], jnp.float32)
    for dim, weight in zip(mrl_dims, mrl_weights, strict=True):
        # Every device computes the loss of the whole batch and keeps its own rows.
        prefixes = jax.tree.map(
            dual_encoder.normalize, contrastive.cut(all_embeddings, dim)
        )
        values = loss(prefixes[0], prefixes[1], prefixes[2], all_ids, all_features)
        if jnp.shape(values) != all_ids.example_mask.shape:
            raise ValueError(
                f"loss: returned shape {jnp.shape(values)}; return one number for each "
                f"query, shape {all_ids.example_mask.shape}"
            )
        values = jnp.where(all_ids.example_mask, values, 0.0)
        own = jax.lax.dynamic_slice_in_dim(values, first, batch_size)
        # Metrics: the terms of eq. 2, without a gradient.
        metrics = contrastive.contrastive_loss(
            *jax.lax.stop_gradient(contrastive.cut(embeddings, dim)),
            ids,
            temperature=temperature,
            axis_names=axis_names,
        )
        terms[dim] = metrics._replace(loss=own)
        total += weight * own
    return total, terms
