"""The contrastive losses of pre-finetuning (eq. 2) and fine-tuning (eq. 3).

Every mask is a comparison of integer ids that travel with the examples, never of
positions in a host's share of the batch, so a loss is the same under any sharding.
*Self* is the row's index in the global batch; *duplicate* is an equal content id.

Eq. 2 is `contrastive_loss` without negatives and with every switch off. Eq. 3 adds the
row's own hard negative and `same_tower`. Their total over the MRL dims is `mrl_loss`,
which may also draw the embeddings to a teacher's (`embedding_matching`).

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

from gecko_jax.losses import blockwise
from gecko_jax.models import dual_encoder


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
        loss: Cross-entropy in nats, with `spread_weight` times the spread.
        accuracy: 1 where the positive beats every other term of the denominator.
        positive_similarity: Cosine of the query and its positive.
        negative_similarity: Mean cosine of the query and the other positives that count
            as its negatives; 0 where there are none.
        spread: See `contrastive_loss`; None where it has no weight.
        matching: See `embedding_matching`, at the largest dim alone; None where it has
            no weight.
    """

    loss: Float[Array, " B"]
    accuracy: Float[Array, " B"]
    positive_similarity: Float[Array, " B"]
    negative_similarity: Float[Array, " B"]
    spread: Float[Array, " B"] | None = None
    matching: Float[Array, " B"] | None = None


class TeacherVectors(NamedTuple):
    """What a teacher makes of the texts of a batch; zeros where it has nothing.

    Attributes:
        query_teacher: Of each query.
        passage_teacher: Of each positive.
        negative_teacher: Of each hard negative.
    """

    query_teacher: Float[Array, "B T"]
    passage_teacher: Float[Array, "B T"]
    negative_teacher: Float[Array, "B G T"]


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
    hardness: float = 0.0,
    spread_weight: float = 0.0,
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
        hardness: A hard negative of the row's own counts exp(hardness * its cosine)
            times, a weight without a gradient (EmbeddingGemma has 5).
        spread_weight: Of the spread-out regularizer, the mean squared cosine of the
            row's query and the other queries, plus that of its positive and the other
            positives: those that are its in-batch negatives. It is the second moment
            of the global orthogonal regularization (GOR, Zhang et al. 2017), as
            EmbeddingGemma has it.
        axis_names: Mesh axes over which the batch is split, inside a `shard_map`; the
            arguments are then one device's rows, and the negatives still everyone's.
        block_size: Keys at a time; decides memory, and nothing beyond rounding.

    Returns:
        The terms of each query, at full width; not reduced. Only the loss has a
        gradient.
    """
    queries = dual_encoder.normalize(queries)
    positives = dual_encoder.normalize(positives)
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
        negatives = dual_encoder.normalize(negatives)
        keep = ids.negative_mask
        if mask_duplicates:
            keep &= ~jnp.all(ids.negative_id == ids.passage_id[:, None], axis=-1)
        similarity = jnp.einsum(
            "bd,bgd->bg", queries, negatives, precision=jax.lax.Precision.HIGHEST
        )
        weighted = similarity / temperature
        if hardness:
            weighted += hardness * jax.lax.stop_gradient(similarity)
        logits.append(jnp.where(keep, weighted, -jnp.inf))
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

    spread = None
    if spread_weight:
        spread = jnp.zeros_like(own)
        for side in (queries, positives):
            pairs = compare(side, side, duplicates)
            spread += pairs.squares / jnp.maximum(pairs.number, 1.0)
        loss += spread_weight * spread

    best = functools.reduce(jnp.maximum, best_other)
    terms = LossTerms(
        loss=loss,
        accuracy=(own > best).astype(jnp.float32),
        positive_similarity=own,
        negative_similarity=to_positives.total / jnp.maximum(to_positives.number, 1.0),
        spread=spread,
    )
    return jax.tree.map(lambda term: jnp.where(ids.example_mask, term, 0.0), terms)


def embedding_matching(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B G D"] | None,
    ids: BatchIds,
    teacher: TeacherVectors,
) -> Float[Array, " B"]:
    """Distance of each example's embeddings to those of a teacher (EmbeddingGemma).

    The sum over the query, the positive and the hard negatives (their mean) of the
    squared distance of unit vectors, 2 - 2 cos. EmbedDistill (Kim et al. 2023) takes
    the distance itself, which has no derivative where student and teacher meet. Of the
    student, the first T entries are compared: the teacher's width, normalized after
    the cut.

    Args:
        queries: Projected query embeddings, not yet cut or normalized.
        positives: Projected positives.
        negatives: Projected hard negatives, or None.
        ids: Masks padding, and negatives that are not there.
        teacher: Its vectors, of any length. A text without one adds nothing.
    """

    def distance(
        ours: Float[Array, "*N D"], theirs: Float[Array, "*N T"]
    ) -> tuple[Float[Array, "*N"], Bool[Array, "*N"]]:
        theirs = theirs.astype(jnp.float32)
        is_there = jnp.any(theirs != 0, axis=-1)
        ours = dual_encoder.normalize(ours[..., : theirs.shape[-1]])
        cosine = jnp.sum(ours * dual_encoder.normalize(theirs), axis=-1)
        return jnp.where(is_there, 2.0 - 2.0 * cosine, 0.0), is_there

    total = distance(queries, teacher.query_teacher)[0]
    total += distance(positives, teacher.passage_teacher)[0]
    if negatives is not None and negatives.shape[1]:
        each, is_there = distance(negatives, teacher.negative_teacher)
        keep = ids.negative_mask & is_there
        number = jnp.sum(keep.astype(jnp.float32), axis=1)
        total += jnp.sum(jnp.where(keep, each, 0.0), axis=1) / jnp.maximum(number, 1.0)
    return jnp.where(ids.example_mask, total, 0.0)


def mrl_loss(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B G D"] | None,
    ids: BatchIds,
    *,
    mrl_dims: tuple[int, ...],
    mrl_weights: tuple[float, ...],
    matching_weight: float = 0.0,
    teacher: TeacherVectors | None = None,
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
        matching_weight: Of `embedding_matching`, which is added once and not for every
            prefix.
        teacher: Must be given if that is above 0.
        **switches: The keyword arguments of `contrastive_loss`.

    Returns:
        The weighted sum per query, and the terms at each dim.
    """

    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(blockwise.SUMS),
        static_argnums=2,
    )
    def contrast(
        parts: tuple[Array, Array, Array | None], ids: BatchIds, dim: int
    ) -> LossTerms:
        queries, positives, negatives = parts
        return contrastive_loss(
            queries[..., :dim],
            positives[..., :dim],
            None if negatives is None else negatives[..., :dim],
            ids,
            **switches,
        )

    terms = {}
    total = jnp.zeros_like(queries[:, 0], jnp.float32)
    parts = (queries, positives, negatives)
    for dim, weight in zip(mrl_dims, mrl_weights, strict=True):
        # One prefix after the other, backward too, where its normalized vectors are
        # made again: those of one are in memory at a time.
        parts, total = jax.lax.optimization_barrier((parts, total))
        terms[dim] = contrast(parts, ids, dim)
        total += weight * terms[dim].loss
    if matching_weight:
        if teacher is None:
            raise ValueError(
                f"matching_weight={matching_weight}: the batch has no vectors of a "
                "teacher; name them with data.teacher, or set the weight to 0"
            )
        matching = embedding_matching(queries, positives, negatives, ids, teacher)
        total += matching_weight * matching
        widest = max(terms)
        terms[widest] = terms[widest]._replace(matching=matching)
    return total, terms


def _stack(ids: Sequence[Array], num: int) -> UInt32[Array, "C E 2"]:
    return jnp.stack(ids, axis=1) if ids else jnp.zeros((num, 0, 2), jnp.uint32)


def _flatten(leaf: Shaped[Array, "C G ..."]) -> Shaped[Array, "N ..."]:
    return leaf.reshape(-1, *leaf.shape[2:])
