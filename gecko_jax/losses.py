"""The contrastive losses of pre-finetuning (eq. 2) and fine-tuning (eq. 3).

Every mask is a comparison of integer ids that travel with the examples, never of
positions in a host's share of the batch, so a loss is the same under any sharding.
*Self* is the row's index in the global batch; *duplicate* is an equal content id.

Eq. 2 is `contrastive_loss` without negatives and with every switch off. Eq. 3 adds the
row's own hard negative and `same_tower`. Their total over the MRL dims is `mrl_loss`.

Negatives are those of the whole batch on all devices. Inside a `shard_map` each device
has its own rows, and sums over the embeddings of all devices block by block
(`blockwise`): none ever holds a matrix of all pairs, nor all embeddings.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from gecko_jax import blockwise, model


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
    axis_names: Sequence[str] = (),
    block_size: int = blockwise.BLOCK_SIZE,
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
        axis_names: Mesh axes over which the batch is split, inside a `shard_map`; the
            arguments are then one device's rows, and the negatives still everyone's.
        block_size: Keys at a time; decides memory, and nothing beyond rounding.

    Returns:
        The terms of each query, at full width; not reduced. Only the loss has a
        gradient.
    """
    queries = model.normalize(queries)
    positives = model.normalize(positives)
    batch_size = queries.shape[0]
    first = jax.lax.axis_index(axis_names) * batch_size if axis_names else 0
    index = first + jnp.arange(batch_size)

    ids = jax.tree.map(jnp.asarray, ids)

    def compare(
        left: Array,
        right: Array,
        reasons: Sequence[tuple[Array, Array]],
        *,
        with_self: bool = False,
        mask: Array = ids.example_mask,
    ) -> blockwise.Sums:
        """Sums over what each example of the batch, on any device, has of `right`.

        A reason leaves out pairs with equal content ids.
        """
        reasons = reasons if mask_duplicates else ()
        each = right.shape[0] // batch_size
        rows = blockwise.Rows(
            index, ids.negative_group, _stack([ours for ours, _ in reasons], batch_size)
        )
        keys = blockwise.Keys(
            jnp.repeat(index, each),
            jnp.repeat(ids.negative_group, each),
            _stack([theirs for _, theirs in reasons], right.shape[0]),
            mask,
        )
        return blockwise.sums(
            left, right, rows, keys, temperature, with_self, axis_names, block_size
        )

    duplicates = [(ids.query_id, ids.query_id), (ids.passage_id, ids.passage_id)]
    own = jnp.sum(queries * positives, axis=-1)
    to_positives = compare(queries, positives, duplicates, with_self=True)
    columns = [to_positives]
    if same_tower:
        # In symmetric tasks another query may be the very text of the positive.
        crossed = (ids.passage_id, ids.query_id)
        columns.append(compare(queries, queries, [*duplicates, crossed]))
    if same_tower_passages:
        columns.append(compare(positives, positives, duplicates))
    logits = [column.log_sum_exp[:, None] for column in columns]
    best_other = [column.best for column in columns]
    if negatives is not None and negatives.shape[1]:
        negatives = model.normalize(negatives)
        keep = ids.negative_mask
        if mask_duplicates:
            keep &= ~jnp.all(ids.negative_id == ids.passage_id[:, None], axis=-1)
        similarity = jnp.einsum(
            "bd,bgd->bg", queries, negatives, precision=jax.lax.Precision.HIGHEST
        )
        logits.append(jnp.where(keep, similarity / temperature, -jnp.inf))
        best_other.append(jnp.max(jnp.where(keep, similarity, -jnp.inf), axis=1))
        if all_hard_negatives:
            theirs = ids.negative_mask & ids.example_mask[:, None]
            of_others = compare(
                queries,
                _flatten(negatives),
                [(ids.passage_id, _flatten(ids.negative_id))],
                mask=_flatten(theirs),
            )
            logits.append(of_others.log_sum_exp[:, None])
            best_other.append(of_others.best)

    denominator = jax.nn.logsumexp(jnp.concatenate(logits, axis=1), axis=1)
    loss = denominator - own / temperature
    if bidirectional:
        backward = compare(positives, queries, duplicates, with_self=True)
        loss += backward.log_sum_exp - own / temperature

    best = functools.reduce(jnp.maximum, best_other)
    terms = LossTerms(
        loss=loss,
        accuracy=(own > best).astype(jnp.float32),
        positive_similarity=own,
        negative_similarity=to_positives.total / jnp.maximum(to_positives.number, 1.0),
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


def _stack(ids: Sequence[Array], num: int) -> UInt32[Array, "C E 2"]:
    return jnp.stack(ids, axis=1) if ids else jnp.zeros((num, 0, 2), jnp.uint32)


def _flatten(leaf: Shaped[Array, "C G ..."]) -> Shaped[Array, "N ..."]:
    return leaf.reshape(-1, *leaf.shape[2:])
