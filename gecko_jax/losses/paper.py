"""The losses as the paper writes them: eq. 2, eq. 3 and MRL.

These dense forms build the whole similarity matrix, on one device and without masks.
They are the definition: training computes the same values with `contrastive`, which
adds masks, runs on a mesh and never holds the matrix, and tests hold the two equal.

    q_i   embedding of query i
    p_i   embedding of its positive
    n_i   embedding of its hard negative
    sim   cosine similarity
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gecko_jax.models import dual_encoder


def prefinetune_loss(
    queries: Float[Array, "B D"], positives: Float[Array, "B D"], *, temperature: float
) -> Float[Array, " B"]:
    """In-batch cross-entropy (eq. 2), in nats per query."""
    to_positives = similarities(queries, positives) / temperature
    # Row i must prefer column i: its own positive.
    return jax.nn.logsumexp(to_positives, axis=1) - jnp.diagonal(to_positives)


def finetune_loss(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B D"],
    *,
    temperature: float,
) -> Float[Array, " B"]:
    """Cross-entropy with hard and same-tower negatives (eq. 3), in nats per query."""
    to_positives = similarities(queries, positives) / temperature
    to_queries = similarities(queries, queries) / temperature
    to_negatives = similarities(queries, negatives) / temperature
    # Same-tower negatives: every other query, j != i.
    is_self = jnp.eye(len(queries), dtype=bool)
    to_queries = jnp.where(is_self, -jnp.inf, to_queries)
    # A query sees its own hard negative and no one else's.
    to_own_negative = jnp.diagonal(to_negatives)[:, None]
    logits = jnp.concatenate([to_positives, to_queries, to_own_negative], axis=1)
    return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(to_positives)


def mrl_loss(
    loss: Callable[..., Float[Array, " B"]],
    *embeddings: Float[Array, "B D"],
    mrl_dims: tuple[int, ...],
    mrl_weights: tuple[float, ...],
) -> Float[Array, " B"]:
    """Weighted sum of a loss over prefixes of the embeddings (MRL, section 3.1).

    Each prefix is normalized after the cut, because `loss` takes cosines.
    """
    # The paper trains all prefixes at once and sums their losses.
    total = jnp.zeros(len(embeddings[0]))
    for dim, weight in zip(mrl_dims, mrl_weights, strict=True):
        total += weight * loss(*(embedding[:, :dim] for embedding in embeddings))
    return total


def similarities(
    left: Float[Array, "B D"], right: Float[Array, "C D"]
) -> Float[Array, "B C"]:
    """Cosine similarity of every row of `left` with every row of `right`."""
    left, right = dual_encoder.normalize(left), dual_encoder.normalize(right)
    return jnp.einsum("bd,cd->bc", left, right, precision=jax.lax.Precision.HIGHEST)
