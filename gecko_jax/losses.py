"""The contrastive losses of pre-finetuning (eq. 2) and fine-tuning (eq. 3).

Every mask is a comparison of integer ids that travel with the examples, never of
positions in a host's share of the batch, so a loss is the same under any sharding.
*Self* is the row's index in the global batch; *duplicate* is an equal content id.

Eq. 2 is `contrastive_loss` without negatives and with every switch off. Eq. 3 adds the
row's own hard negative and `same_tower`. Their total over the MRL dims is `mrl_loss`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gecko_jax import model


class BatchIds(NamedTuple):
    """What tells the examples of a batch apart.

    Attributes:
        query_id: Content id of each query, two words (`text.content_id`).
        passage_id: Content id of each positive.
        negative_id: Content id of each hard negative.
        negative_mask: False where an example has fewer hard negatives than G.
        example_mask: False where a row is padding.
        negative_group: Rows are each other's in-batch negatives iff these are equal;
            a number of its own leaves a row its hard negatives alone.
    """

    query_id: UInt32[Array, "B 2"]
    passage_id: UInt32[Array, "B 2"]
    negative_id: UInt32[Array, "B G 2"]
    negative_mask: Bool[Array, "B G"]
    example_mask: Bool[Array, " B"]
    negative_group: Int[Array, " B"]


class LossTerms(NamedTuple):
    """Per-query results of `contrastive_loss`; zeros where a row is padding.

    Attributes:
        loss: Cross-entropy in nats.
        accuracy: 1 where the positive beats every other term of the denominator.
        positive_similarity: Cosine of the query and its positive.
        negative_similarity: Mean cosine of the query and the other positives that count
            as its negatives; 0 where there are none.
    """

    loss: Float[Array, " B"]
    accuracy: Float[Array, " B"]
    positive_similarity: Float[Array, " B"]
    negative_similarity: Float[Array, " B"]


def contrastive_loss(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B G D"] | None,
    ids: BatchIds,
    *,
    temperature: float,
    same_tower: bool = False,
    same_tower_passages: bool = False,
    bidirectional: bool = False,
    all_hard_negatives: bool = False,
    mask_duplicates: bool = False,
) -> LossTerms:
    """In-batch cross-entropy with hard and same-tower negatives (eq. 2 and 3).

    Row i of `queries` must prefer row i of `positives` over every other row of
    `positives`, over its own `negatives` and over what the switches add.

    Args:
        queries: Query embeddings, normalized here.
        positives: Embeddings of the relevant passages.
        negatives: Embeddings of the hard negatives; None for none.
        ids: Integer ids by which self, duplicates and padding are masked.
        temperature: Divides the similarities; larger is softer. Must be > 0.
        same_tower: Adds the other queries to the denominator (eq. 3).
        same_tower_passages: Adds the similarities of the row's positive and the other
            positives (SamToNe, Qwen3-Embedding).
        bidirectional: Adds the loss of choosing the query for the passage, among the
            queries of the batch alone; the sum of both, as in t5x_retrieval (GTR).
        all_hard_negatives: Adds the hard negatives of every other row (GTR).
        mask_duplicates: Leaves out what only looks like a negative: an equal query, an
            equal positive, a query or negative equal to the row's own positive.

    Returns:
        The terms of each query, at full width; not reduced.
    """
    queries = model.normalize(queries)
    positives = model.normalize(positives)
    batch_size = queries.shape[0]
    is_self = jnp.eye(batch_size, dtype=bool)
    same_group = ids.negative_group[:, None] == ids.negative_group[None, :]
    # others[i, j]: example j may supply negatives to example i.
    others = same_group & ids.example_mask[None, :] & ~is_self
    if mask_duplicates:
        others &= ~_equal(ids.query_id, ids.query_id)
        others &= ~_equal(ids.passage_id, ids.passage_id)

    to_positives = jnp.einsum("bd,pd->bp", queries, positives)
    own = jnp.diagonal(to_positives)
    columns = [(to_positives, others | is_self)]
    if same_tower:
        keep = others
        if mask_duplicates:
            # In symmetric tasks another query may be the very text of the positive.
            keep &= ~_equal(ids.passage_id, ids.query_id)
        columns.append((jnp.einsum("bd,cd->bc", queries, queries), keep))
    if same_tower_passages:
        columns.append((jnp.einsum("bd,cd->bc", positives, positives), others))
    if negatives is not None and negatives.shape[1]:
        negatives = model.normalize(negatives)
        keep = ids.negative_mask
        if mask_duplicates:
            keep &= ~jnp.all(ids.negative_id == ids.passage_id[:, None], axis=-1)
        columns.append((jnp.einsum("bd,bgd->bg", queries, negatives), keep))
        if all_hard_negatives:
            others_negatives = same_group & ids.example_mask[None, :] & ~is_self
            keep = others_negatives[:, :, None] & ids.negative_mask[None]
            if mask_duplicates:
                keep &= ~jnp.all(
                    ids.negative_id[None] == ids.passage_id[:, None, None], axis=-1
                )
            similarity = jnp.einsum("bd,cgd->bcg", queries, negatives)
            shape = (batch_size, -1)
            columns.append((similarity.reshape(shape), keep.reshape(shape)))

    similarity = jnp.concatenate([column for column, _ in columns], axis=1)
    keep = jnp.concatenate([mask for _, mask in columns], axis=1)
    loss = _cross_entropy(own, similarity, keep, temperature)
    if bidirectional:
        loss += _cross_entropy(own, to_positives.T, others | is_self, temperature)

    best_other = jnp.max(
        jnp.where(keep.at[:, :batch_size].set(others), similarity, -jnp.inf), axis=1
    )
    in_batch = jnp.sum(jnp.where(others, to_positives, 0.0), axis=1)
    terms = LossTerms(
        loss=loss,
        accuracy=(own > best_other).astype(jnp.float32),
        positive_similarity=own,
        negative_similarity=in_batch / jnp.maximum(jnp.sum(others, axis=1), 1),
    )
    return LossTerms(*(jnp.where(ids.example_mask, term, 0.0) for term in terms))


def mrl_loss(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B G D"] | None,
    ids: BatchIds,
    *,
    mrl_dims: tuple[int, ...],
    mrl_weights: tuple[float, ...],
    **switches,
) -> tuple[Float[Array, " B"], dict[int, LossTerms]]:
    """Sums `contrastive_loss` over prefixes of the embedding (MRL, section 3.1).

    Args:
        queries: Projected query embeddings, not yet cut or normalized.
        positives: Projected positives.
        negatives: Projected hard negatives, or None.
        ids: See `BatchIds`.
        mrl_dims: Prefixes that are trained, each normalized after the cut.
        mrl_weights: Weight of each prefix; the paper's total is the plain sum.
        **switches: The keyword arguments of `contrastive_loss`.

    Returns:
        The weighted sum per query, and the terms at each dim.
    """
    terms = {}
    total = jnp.zeros(queries.shape[0], jnp.float32)
    for dim, weight in zip(mrl_dims, mrl_weights, strict=True):
        terms[dim] = contrastive_loss(
            queries[..., :dim],
            positives[..., :dim],
            None if negatives is None else negatives[..., :dim],
            ids,
            **switches,
        )
        total += weight * terms[dim].loss
    return total, terms


def _equal(
    left: UInt32[Array, "B 2"], right: UInt32[Array, "C 2"]
) -> Bool[Array, "B C"]:
    return jnp.all(left[:, None] == right[None], axis=-1)


def _cross_entropy(
    own: Float[Array, " B"],
    similarity: Float[Array, "B C"],
    keep: Bool[Array, "B C"],
    temperature: float,
) -> Float[Array, " B"]:
    logits = jnp.where(keep, similarity / temperature, -jnp.inf)
    return jax.nn.logsumexp(logits, axis=1) - own / temperature
