"""The contrastive losses on a mesh: eq. 2 and eq. 3 of `paper`, with masks.

Eq. 2 is `contrastive_loss` without negatives and with every switch off. Eq. 3 adds a
hard negative and `same_tower`. `mrl_loss` sums it over the MRL dims and can add
`embedding_matching` and the KL from a judge's scores (`distillation`).

Masks compare integer ids that travel with the examples. They never use positions in a
host's share of the batch, so a loss is the same under any sharding. A row's *self* is
its index in the global batch; a *duplicate* has the same content id.

In-batch negatives come from the whole batch, on all devices. Inside a `shard_map` each
device holds its own rows and visits the other devices' embeddings block by block
(`blockwise`), so no device holds all similarities or all embeddings.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from gecko_jax.losses import blockwise, distillation
from gecko_jax.models import dual_encoder


class BatchIds(NamedTuple):
    """Integer ids of the examples of a batch.

    Attributes:
        query_id: Content id of each query, two words (`text_formats.content_id`).
        passage_id: Content id of each positive.
        negative_id: Content id of each hard negative.
        negative_mask: False where an example has fewer than G hard negatives.
        example_mask: False where a row is padding.
        negative_group: Two rows are in-batch negatives of each other if and only if
            their groups are equal. A row with a group of its own has only its hard
            negatives.
    """

    query_id: UInt32[Array, "B 2"]
    passage_id: UInt32[Array, "B 2"]
    negative_id: UInt32[Array, "B G 2"]
    negative_mask: Bool[Array, "B G"]
    example_mask: Bool[Array, " B"]
    negative_group: Int[Array, " B"]


class LossTerms(NamedTuple):
    """Results of `contrastive_loss` for each query; zeros in padding rows."""

    loss: Float[Array, " B"]  # cross-entropy in nats, plus the weighted spread and KL
    accuracy: Float[Array, " B"]  # 1 where the positive has the largest similarity
    positive_similarity: Float[Array, " B"]  # cosine of the query and its positive
    # Mean cosine of the query and its in-batch negatives; 0 where it has none.
    negative_similarity: Float[Array, " B"]
    # None if the weight is 0: the spread-out regularizer, `embedding_matching` (at the
    # largest dim only) and `distillation.candidate_divergence` (from `mrl_loss` only).
    spread: Float[Array, " B"] | None = None
    matching: Float[Array, " B"] | None = None
    kl: Float[Array, " B"] | None = None


class TeacherVectors(NamedTuple):
    """Teacher embeddings of the texts of a batch; zeros where there is none."""

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
        negatives: Embeddings of the hard negatives, or None.
        ids: Integer ids by which self, duplicates and padding are masked.
        temperature: Divides the similarities; larger is softer. Must be > 0.
        same_tower: Adds the other queries to the denominator (eq. 3).
        same_tower_passages: Adds similarities of the row's positive and the others
            (SamToNe, Qwen3-Embedding).
        bidirectional: Adds the loss of choosing the query for the passage, among the
            queries of the batch only; a sum, as in t5x_retrieval (GTR).
        all_hard_negatives: Adds the hard negatives of every other row (GTR).
        mask_duplicates: Drops false negatives: an equal query, an equal positive, and
            a query or negative equal to the row's own positive.
        hardness: Multiplies the term of an own hard negative by exp(hardness * its
            cosine); the factor has no gradient (EmbeddingGemma uses 5).
        spread_weight: Weight of the spread-out regularizer (GOR's second moment, Zhang
            et al. 2017; EmbeddingGemma): the mean squared cosine of the row's query
            with the other queries, plus that of its positive with other positives.
        axis_names: Mesh axes over which the batch is split, inside a `shard_map`. The
            arguments are then the rows of one device; negatives still come from all.
        block_size: Keys per block. It affects memory and rounding only.

    Returns:
        The terms of each query, not reduced. Only `loss` has a gradient.
    """
    queries, positives = map(dual_encoder.normalize, (queries, positives))
    ids = jax.tree.map(jnp.asarray, ids)
    batch_size = queries.shape[0]
    # Index of each row in the global batch.
    first = jax.lax.axis_index(axis_names) * batch_size if axis_names else 0
    index = first + jnp.arange(batch_size)

    def compare(
        left: Float[Array, "B D"],
        right: Float[Array, "N D"],
        duplicates: Sequence[tuple[Array, Array]],
        mask: Bool[Array, " N"] = ids.example_mask,
        with_self: bool = False,
    ) -> blockwise.Sums:
        # Sums over all keys of the global batch; `right` has those of this device. A
        # key is dropped if its content id is the row's, in any pair of `duplicates`.
        duplicates = duplicates if mask_duplicates else ()
        # Hard negatives have G keys per row, which share the row's index and group.
        keys_per_row = right.shape[0] // batch_size
        row_ids = _stack([row_id for row_id, _ in duplicates], batch_size)
        key_ids = _stack([key_id for _, key_id in duplicates], right.shape[0])
        rows = blockwise.Rows(index, ids.negative_group, row_ids)
        keys = blockwise.Keys(
            jnp.repeat(index, keys_per_row),
            jnp.repeat(ids.negative_group, keys_per_row),
            key_ids,
            mask,
        )
        return blockwise.sums(
            left, right, rows, keys, temperature, with_self, axis_names, block_size
        )

    # The numerator, and the denominator's terms: positives of the batch ...
    own = jnp.sum(queries * positives, axis=-1)
    duplicates = [(ids.query_id, ids.query_id), (ids.passage_id, ids.passage_id)]
    to_positives = compare(queries, positives, duplicates, with_self=True)
    in_batch = [to_positives]
    # ... other queries; one of them may have the same text as the row's positive ...
    if same_tower:
        crossed = [*duplicates, (ids.passage_id, ids.query_id)]
        in_batch.append(compare(queries, queries, crossed))
    if same_tower_passages:
        in_batch.append(compare(positives, positives, duplicates))
    logits = [sums.log_sum_exp[:, None] for sums in in_batch]
    best_other = [sums.best for sums in in_batch]
    # ... and hard negatives: the row's own, then those of others (no `with_self`).
    if negatives is not None and negatives.shape[1]:
        negatives = dual_encoder.normalize(negatives)
        similarity = jnp.einsum(
            "bd,bgd->bg", queries, negatives, precision=jax.lax.Precision.HIGHEST
        )
        weight = hardness * jax.lax.stop_gradient(similarity) if hardness else 0.0
        keep = ids.negative_mask
        if mask_duplicates:
            keep &= ~jnp.all(ids.negative_id == ids.passage_id[:, None], axis=-1)
        logits.append(jnp.where(keep, similarity / temperature + weight, -jnp.inf))
        best_other.append(jnp.max(jnp.where(keep, similarity, -jnp.inf), axis=1))
        if all_hard_negatives:
            of_others = compare(
                queries,
                _flatten(negatives),
                [(ids.passage_id, _flatten(ids.negative_id))],
                mask=_flatten(ids.negative_mask & ids.example_mask[:, None]),
            )
            logits.append(of_others.log_sum_exp[:, None])
            best_other.append(of_others.best)
    # Cross-entropy. `to_positives` includes the row's own positive (`with_self`).
    denominator = jax.nn.logsumexp(jnp.concatenate(logits, axis=1), axis=1)
    loss = denominator - own / temperature

    if bidirectional:  # Row i of `positives` must prefer row i of `queries`, too.
        backward = compare(positives, queries, duplicates, with_self=True)
        loss += backward.log_sum_exp - own / temperature
    spread = None
    if spread_weight:
        spread = _mean_square(compare(queries, queries, duplicates))
        spread += _mean_square(compare(positives, positives, duplicates))
        loss += spread_weight * spread

    terms = LossTerms(
        loss=loss,
        accuracy=(own > functools.reduce(jnp.maximum, best_other)).astype(jnp.float32),
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
    """Distance of each example's embeddings to a teacher's (EmbeddingGemma).

    The distance is 2 - 2 cos, the squared distance of unit vectors, summed over the
    query, the positive and the mean of the hard negatives. EmbedDistill (Kim et al.
    2023) uses the distance itself, which has no derivative where student and teacher
    are equal. The student's embedding is cut to the teacher's T dims. A text without a
    teacher vector adds 0. The arguments are those of `mrl_loss`.
    """

    def distance(
        student: Float[Array, "*N D"], target: Float[Array, "*N T"]
    ) -> tuple[Float[Array, "*N"], Bool[Array, "*N"]]:
        # A teacher vector of zeros means that the text has none.
        target = target.astype(jnp.float32)
        has_target = jnp.any(target != 0, axis=-1)
        student = dual_encoder.normalize(student[..., : target.shape[-1]])
        cosine = jnp.sum(student * dual_encoder.normalize(target), axis=-1)
        return jnp.where(has_target, 2.0 - 2.0 * cosine, 0.0), has_target

    total = distance(queries, teacher.query_teacher)[0]
    total += distance(positives, teacher.passage_teacher)[0]
    if negatives is not None and negatives.shape[1]:
        each, has_target = distance(negatives, teacher.negative_teacher)
        keep = ids.negative_mask & has_target
        # The mean over the row's negatives with a vector; 0 if there is none.
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
    kl_weight: float = 0.0,
    kl_temperature: float = 1.0,
    scores: Float[Array, "B N"] | None = None,
    **switches,
) -> tuple[Float[Array, " B"], dict[int, LossTerms]]:
    """Sums `contrastive_loss` over prefixes of the embedding (MRL, section 3.1).

    Args:
        queries: Projected query embeddings, not yet cut or normalized.
        positives: Projected positives.
        negatives: Projected hard negatives, or None.
        ids: See `BatchIds`.
        mrl_dims: Trained prefixes, each normalized after the cut.
        mrl_weights: Weight of each prefix; the paper's total is the plain sum.
        matching_weight: Weight of `embedding_matching`, which is added once, not for
            every prefix.
        teacher: Teacher vectors; required if `matching_weight` is above 0.
        kl_weight: Weight of `distillation.candidate_divergence` at every prefix.
        kl_temperature: Its `judge_temperature`; similarities keep `temperature`.
        scores: Scores of the candidates; required if `kl_weight` is above 0.
        **switches: Keyword arguments of `contrastive_loss`.

    Returns:
        The weighted sum per query, and the terms at each dim.
    """
    if kl_weight and scores is None:
        raise ValueError(
            f"kl_weight={kl_weight}: the batch has no scores; give them, or set the "
            "weight to 0"
        )

    # The backward pass recomputes normalized prefixes and keeps only the row sums.
    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(blockwise.SUMS),
        static_argnums=3,
    )
    def contrast(
        embeddings: tuple[Array, Array, Array | None],
        ids: BatchIds,
        scores: Float[Array, "B N"] | None,
        dim: int,
    ) -> LossTerms:
        prefixes = cut(embeddings, dim)
        terms = contrastive_loss(*prefixes, ids, **switches)
        if scores is None or not kl_weight:
            return terms
        kl = distillation.candidate_divergence(
            *prefixes,
            ids.negative_mask,
            scores,
            temperature=switches["temperature"],
            judge_temperature=kl_temperature,
        )
        kl = jnp.where(ids.example_mask, kl, 0.0)
        return terms._replace(loss=terms.loss + kl_weight * kl, kl=kl)

    terms = {}
    total = jnp.zeros_like(queries[:, 0], jnp.float32)
    embeddings = (queries, positives, negatives)
    for dim, weight in zip(mrl_dims, mrl_weights, strict=True):
        # The barrier makes XLA process one MRL prefix at a time in both passes, so only
        # one prefix's recomputed embeddings are alive.
        embeddings, total = jax.lax.optimization_barrier((embeddings, total))
        terms[dim] = contrast(embeddings, ids, scores, dim)
        total += weight * terms[dim].loss
    if matching_weight:
        if teacher is None:
            raise ValueError(
                f"matching_weight={matching_weight}: the batch has no teacher vectors; "
                "set data.teacher, or set the weight to 0"
            )
        matching = embedding_matching(queries, positives, negatives, ids, teacher)
        total += matching_weight * matching
        # The distance is the same for all prefixes, so it is reported once.
        largest = max(terms)
        terms[largest] = terms[largest]._replace(matching=matching)
    return total, terms


def cut(
    embeddings: tuple[Array, Array, Array | None], dim: int
) -> tuple[Array, Array, Array | None]:
    """Returns the first `dim` dims of every embedding."""
    return jax.tree.map(lambda embedding: embedding[..., :dim], embeddings)


def _mean_square(sums: blockwise.Sums) -> Float[Array, " B"]:
    return sums.squares / jnp.maximum(sums.number, 1.0)


def _stack(ids: Sequence[Array], num: int) -> UInt32[Array, "C E 2"]:
    return jnp.stack(ids, axis=1) if ids else jnp.zeros((num, 0, 2), jnp.uint32)


def _flatten(leaf: Shaped[Array, "C G ..."]) -> Shaped[Array, "N ..."]:
    return leaf.reshape(-1, *leaf.shape[2:])
