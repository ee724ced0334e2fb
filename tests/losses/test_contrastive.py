"""The losses against the formulas, written out as float64 loops over examples.

The loops take a leading axis of variations, complex ones too: a step of 1e-30 i gives
every derivative to machine precision, since the formulas are analytic.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gecko_jax.losses import contrastive
from gecko_jax.parallel import sharding

B, D = 5, 6
TEMPERATURE = 0.2
SWITCHES = (
    "same_tower",
    "same_tower_passages",
    "bidirectional",
    "all_hard_negatives",
    "mask_duplicates",
)
COMBINATIONS = [
    dict(zip(SWITCHES, values, strict=True))
    for values in itertools.product((False, True), repeat=len(SWITCHES))
]
# Two words each; the first two differ in the second word alone, the next in the first.
POOL = np.array([[1, 1], [1, 2], [3, 2], [4, 5], [2**32 - 1, 7]], np.uint32)


def _distinct_ids(num_negatives):
    words = np.arange(2 * (2 * B + B * num_negatives), dtype=np.uint32).reshape(-1, 2)
    query, passage, negative = np.split(words, [B, 2 * B])
    return contrastive.BatchIds(
        query_id=query,
        passage_id=passage,
        negative_id=negative.reshape(B, num_negatives, 2),
        negative_mask=np.ones((B, num_negatives), bool),
        example_mask=np.ones(B, bool),
        negative_group=np.zeros(B, np.int32),
    )


@functools.cache
def _compiled(**settings):
    return jax.jit(functools.partial(contrastive.contrastive_loss, **settings))


def _loss(parts, ids, **switches):
    """The losses that are under test, compiled once for each setting."""
    parts = [None if part is None else jnp.float32(part) for part in parts]
    return _compiled(**{"temperature": TEMPERATURE, **switches})(*parts, ids).loss


def _cases(num_negatives):
    """Plain, padding, groups, gaps, each kind of duplicate, then all at once."""
    rng = np.random.default_rng(num_negatives)
    plain = _distinct_ids(num_negatives)
    groups = np.array([0, 0, 1, 0, 1], np.int32)
    some = rng.random((B, num_negatives)) < 0.5
    padding = np.array([True, True, False, True, False])
    yield plain
    yield plain._replace(example_mask=padding)
    yield plain._replace(negative_group=groups)
    yield plain._replace(negative_group=np.arange(B, dtype=np.int32))
    yield plain._replace(negative_mask=some)
    equal_queries = plain.query_id.copy()
    equal_queries[3] = equal_queries[0]
    yield plain._replace(query_id=equal_queries)
    equal_passages = plain.passage_id.copy()
    equal_passages[4] = equal_passages[1]
    yield plain._replace(passage_id=equal_passages)
    # In a symmetric task, query 2 is the very text of positive 0.
    crossed = plain.query_id.copy()
    crossed[2] = plain.passage_id[0]
    yield plain._replace(query_id=crossed)
    negative_id = plain.negative_id.copy()
    if num_negatives:
        negative_id[1, 0] = plain.passage_id[1]  # its own positive
        negative_id[2, -1] = plain.passage_id[3]  # the positive of another
    yield plain._replace(negative_id=negative_id)
    for _ in range(3):
        yield contrastive.BatchIds(
            query_id=POOL[rng.integers(5, size=B)],
            passage_id=POOL[rng.integers(5, size=B)],
            negative_id=POOL[rng.integers(5, size=(B, num_negatives))],
            negative_mask=rng.random((B, num_negatives)) < 0.7,
            example_mask=rng.random(B) < 0.8,
            negative_group=rng.integers(2, size=B).astype(np.int32),
        )


def _embeddings(num_negatives, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, D), (B, D), (B, num_negatives, D)
    return [rng.standard_normal(shape) for shape in shapes]


def _cosine(x, y):
    norms = [np.sqrt((v * v).sum(-1) + 1e-12) for v in (x, y)]
    return (x * y).sum(-1) / (norms[0] * norms[1])


def _formula(
    queries,
    positives,
    negatives,
    ids,
    temperature,
    hardness=0.0,
    spread_weight=0.0,
    **switches,
):
    """Eq. 2, eq. 3 and the switches; loss, accuracy and similarities of each row."""

    def equal(left, right):
        return switches["mask_duplicates"] and bool((left == right).all())

    q = [queries[..., i, :] for i in range(B)]
    p = [positives[..., i, :] for i in range(B)]
    zero = np.zeros(queries.shape[:-2], queries.dtype)
    rows = []
    for i in range(B):
        if not ids.example_mask[i]:
            rows.append((zero,) * 5)
            continue
        own = _cosine(q[i], p[i])
        in_batch, rest, backward, hard, spread = [], [], [], [], []
        for j in range(B):
            if (
                j == i
                or ids.negative_group[j] != ids.negative_group[i]
                or not ids.example_mask[j]
            ):
                continue
            duplicate = equal(ids.query_id[j], ids.query_id[i]) or equal(
                ids.passage_id[j], ids.passage_id[i]
            )
            if not duplicate:
                in_batch.append(_cosine(q[i], p[j]))
                backward.append(_cosine(q[j], p[i]))
                squares = _cosine(q[i], q[j]) ** 2 + _cosine(p[i], p[j]) ** 2
                spread.append(squares)
                crossed = equal(ids.query_id[j], ids.passage_id[i])
                if switches["same_tower"] and not crossed:
                    rest.append(_cosine(q[i], q[j]))
                if switches["same_tower_passages"]:
                    rest.append(_cosine(p[i], p[j]))
            if switches["all_hard_negatives"]:
                for g in range(negatives.shape[-2]):
                    if ids.negative_mask[j, g] and not equal(
                        ids.negative_id[j, g], ids.passage_id[i]
                    ):
                        rest.append(_cosine(q[i], negatives[..., j, g, :]))
        for g in range(negatives.shape[-2]):
            if ids.negative_mask[i, g] and not equal(
                ids.negative_id[i, g], ids.passage_id[i]
            ):
                hard.append(_cosine(q[i], negatives[..., i, g, :]))
        terms = [np.exp(t / temperature) for t in (own, *in_batch, *rest)]
        # Of a complex step the real part alone: the weight has no gradient.
        terms += [np.exp(t / temperature) * np.exp(hardness * t.real) for t in hard]
        loss = np.log(sum(terms)) - own / temperature
        if switches["bidirectional"]:
            terms = [own, *backward]
            loss = loss + np.log(sum(np.exp(t / temperature) for t in terms))
            loss = loss - own / temperature
        best = np.ones(own.shape, bool)
        for term in (*in_batch, *rest, *hard):
            best &= own.real > term.real
        mean = sum(in_batch) / len(in_batch) if in_batch else zero
        spread = sum(spread) / len(spread) if spread else zero
        loss = loss + spread_weight * spread
        rows.append((loss, best.astype(queries.dtype), own, mean, spread))
    terms = contrastive.LossTerms(
        *(np.stack(part, -1) for part in zip(*rows, strict=True))
    )
    return terms if spread_weight else terms._replace(spread=None)


def _gradients(queries, positives, negatives, ids, row_weights, **settings):
    """Derivatives of the weighted sum of the rows' losses, by complex steps."""
    parts = [queries, positives, negatives]
    sizes = [part.size for part in parts]
    flat = np.concatenate([part.ravel() for part in parts])
    steps = flat + 1e-30j * np.eye(len(flat))
    varied = [
        piece.reshape(len(flat), *part.shape)
        for piece, part in zip(
            np.split(steps, np.cumsum(sizes)[:-1], axis=1), parts, strict=True
        )
    ]
    loss = _formula(*varied, ids, **settings).loss
    slopes = (loss @ row_weights).imag / 1e-30
    return [
        piece.reshape(part.shape)
        for piece, part in zip(
            np.split(slopes, np.cumsum(sizes)[:-1]), parts, strict=True
        )
    ]


EVERYTHING = COMBINATIONS[-1]
# Every two switches in all four settings.
PAIRS = [c for c in COMBINATIONS if sum(c.values()) in (0, 1, 4, 5)]
# What EmbeddingGemma adds, alone, with eq. 3 and with everything.
MODERN = [
    {**c, "hardness": hardness, "spread_weight": spread_weight}
    for c, hardness, spread_weight in (
        (COMBINATIONS[1], 5.0, 0.0),
        (COMBINATIONS[1], 0.0, 1.0),
        (COMBINATIONS[0], 2.0, 0.7),
        (COMBINATIONS[-1], 5.0, 0.4),
    )
]
EQUATION_3 = next(c for c in COMBINATIONS if [k for k in c if c[k]] == ["same_tower"])


@pytest.mark.parametrize(
    ("num_negatives", "combinations", "block_size"),
    [
        (0, [c for c in COMBINATIONS if not c["all_hard_negatives"]], 1024),
        (1, [EQUATION_3, EVERYTHING], 1),
        (3, PAIRS, 2),  # the last block is not full
        (0, [c for c in MODERN if not c["all_hard_negatives"]], 1024),
        (3, MODERN, 2),
        pytest.param(3, COMBINATIONS, 2, marks=pytest.mark.slow),
    ],
)
def test_every_switch_and_mask_follows_the_formula(
    num_negatives, combinations, block_size
):
    cases = list(_cases(num_negatives))
    # One gradient for all combinations: of their sum with a weight for each row.
    weights = np.random.default_rng(1).uniform(0.5, 1.5, (len(combinations), B))

    def total(parts, ids):
        terms = [
            contrastive.contrastive_loss(
                *parts,
                ids,
                temperature=TEMPERATURE,
                block_size=block_size,
                **switches,
            )
            for switches in combinations
        ]
        rows = jnp.stack([each.loss for each in terms])
        return jnp.sum(rows * jnp.asarray(weights, jnp.float32)), terms

    compute = jax.jit(
        jax.grad(total, has_aux=True),
        compiler_options={"xla_backend_optimization_level": 0},  # compiles faster
    )
    single = [part.astype(np.float32) for part in _embeddings(num_negatives)]
    exact = [part.astype(np.float64) for part in single]
    for case, ids in enumerate(cases):
        gradients, found = jax.device_get(compute(single, ids))
        slopes = [np.zeros_like(part) for part in exact]
        for switches, terms, row_weights in zip(
            combinations, found, weights, strict=True
        ):
            settings = {"temperature": TEMPERATURE, **switches}
            expected = _formula(*exact, ids, **settings)
            for name, value in expected._asdict().items():
                if value is None:
                    assert getattr(terms, name) is None
                    continue
                np.testing.assert_allclose(
                    getattr(terms, name),
                    value,
                    atol=3e-6,
                    err_msg=f"{name} of case {case}, {switches}",
                )
            parts = _gradients(*exact, ids, row_weights, **settings)
            slopes = [total + part for total, part in zip(slopes, parts, strict=True)]
        for ours, slope in zip(gradients, slopes, strict=True):
            np.testing.assert_allclose(
                ours, slope, atol=2e-4, rtol=2e-5, err_msg=f"case {case}"
            )


def test_no_negatives_and_an_empty_axis_of_them_are_the_same():
    queries, positives, none = _embeddings(0)
    ids = _distinct_ids(0)
    assert (
        _loss([queries, positives, none], ids) == _loss([queries, positives, None], ids)
    ).all()


def test_equations_in_closed_form_count_each_term_once():
    # Queries equal to their positives, and orthogonal to all others.
    rows = [np.eye(B), np.eye(B), None]
    ids = _distinct_ids(0)
    others = (B - 1) * np.exp(-1 / TEMPERATURE)
    np.testing.assert_allclose(_loss(rows, ids), np.log1p(others), atol=1e-6)
    # With j = i they would be log(2 + ...): a text is most similar to itself.
    for switch in ("same_tower", "same_tower_passages"):
        np.testing.assert_allclose(
            _loss(rows, ids, **{switch: True}), np.log1p(2 * others), atol=1e-6
        )


def test_swapping_query_and_positive_changes_the_loss():
    queries, positives, negatives = _embeddings(1)
    ids = _distinct_ids(1)
    forward = _loss([queries, positives, negatives], ids, **EQUATION_3)
    backward = _loss([positives, queries, negatives], ids, **EQUATION_3)
    assert (abs(forward - backward) > 1e-2).all()


def test_a_padded_row_changes_nothing_and_gets_no_gradient():
    parts = [jnp.float32(e) for e in _embeddings(3)]
    ids = _distinct_ids(3)._replace(example_mask=np.arange(B) < B - 1)

    def total(parts):
        return _loss(parts, ids, **EVERYTHING).sum()

    # Zeros are what padding may really hold; even they must not give NaN.
    zeros = [part.at[-1].set(0.0) for part in parts]
    compute = jax.jit(jax.value_and_grad(total))
    values, gradients = zip(compute(parts), compute(zeros), strict=True)
    assert values[0] == values[1]
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient[-1]) == 0).all()


def test_a_permuted_batch_gives_permuted_losses():
    parts = _embeddings(3)
    order = np.array([3, 0, 4, 2, 1])
    ids = list(_cases(3))[-1]
    straight = _loss(parts, ids, **EVERYTHING)
    shuffled = contrastive.BatchIds(*(leaf[order] for leaf in ids))
    permuted = _loss([part[order] for part in parts], shuffled, **EVERYTHING)
    np.testing.assert_allclose(straight[order], permuted, atol=2e-6)


def test_a_low_temperature_stays_finite():
    assert np.isfinite(_loss(_embeddings(1), _distinct_ids(1), temperature=1e-3)).all()


def test_mrl_loss_is_the_weighted_sum_over_normalized_prefixes():
    parts = _embeddings(2)
    single = [jnp.float32(part) for part in parts]
    ids = _distinct_ids(2)
    compute = functools.partial(
        contrastive.mrl_loss,
        mrl_dims=(2, 6),
        mrl_weights=(0.5, 2.0),
        temperature=TEMPERATURE,
        **EQUATION_3,
    )
    total, terms = jax.jit(compute)(*single, ids)
    expected = {
        dim: _formula(
            *(part[..., :dim] for part in parts),
            ids,
            temperature=TEMPERATURE,
            **EQUATION_3,
        ).loss
        for dim in (2, 6)
    }
    assert list(terms) == [2, 6]
    for dim in (2, 6):
        np.testing.assert_allclose(terms[dim].loss, expected[dim], atol=3e-6)
    np.testing.assert_allclose(total, 0.5 * expected[2] + 2 * expected[6], atol=1e-5)


def _teacher(num_negatives, width):
    """Vectors of any length; of some texts there are none."""
    rng = np.random.default_rng(7)
    shapes = (B, width), (B, width), (B, num_negatives, width)
    vectors = [rng.standard_normal(shape) for shape in shapes]
    for number, part in enumerate(vectors):
        if part.size:
            part[number] = 0.0
    if num_negatives:
        vectors[2][4, 0] = 0.0
    return contrastive.TeacherVectors(*(jnp.float16(part) for part in vectors))


def _matching(queries, positives, negatives, ids, teacher):
    """The distances, written out for each example."""
    width = teacher.query_teacher.shape[-1]
    theirs = [np.asarray(part, np.float64) for part in teacher]
    rows = []
    for i in range(B):
        total = np.zeros(queries.shape[:-2], queries.dtype)
        if ids.example_mask[i]:
            for part, one in ((queries, theirs[0]), (positives, theirs[1])):
                if one[i].any():
                    ours = part[..., i, :width]
                    ours = ours / np.sqrt((ours * ours).sum(-1, keepdims=True))
                    total = total + ((ours - one[i] / np.linalg.norm(one[i])) ** 2).sum(
                        -1
                    )
            kept = [
                2 - 2 * _cosine(negatives[..., i, g, :width], theirs[2][i, g])
                for g in range(negatives.shape[-2])
                if ids.negative_mask[i, g] and theirs[2][i, g].any()
            ]
            if kept:
                total = total + sum(kept) / len(kept)
        rows.append(total)
    return np.stack(rows, -1)


@pytest.mark.parametrize(("num_negatives", "width"), [(0, D), (1, 4), (3, D)])
def test_embedding_matching_follows_the_formula(num_negatives, width):
    teacher = _teacher(num_negatives, width)
    single = [part.astype(np.float32) for part in _embeddings(num_negatives)]
    exact = [part.astype(np.float64) for part in single]
    weights = np.random.default_rng(1).uniform(0.5, 1.5, B)

    def total(parts, ids):
        rows = contrastive.embedding_matching(*parts, ids, teacher)
        return jnp.sum(rows * jnp.float32(weights)), rows

    compute = jax.jit(jax.grad(total, has_aux=True))
    for case, ids in enumerate(_cases(num_negatives)):
        gradients, found = compute(single, ids)
        expected = _matching(*exact, ids, teacher)
        np.testing.assert_allclose(found, expected, atol=3e-6, err_msg=f"case {case}")
        for part in range(3):
            for place in np.ndindex(exact[part].shape):
                varied = [array.astype(complex) for array in exact]
                varied[part][place] += 1e-30j
                slope = (_matching(*varied, ids, teacher) @ weights).imag / 1e-30
                np.testing.assert_allclose(gradients[part][place], slope, atol=3e-5)


def test_embedding_matching_is_added_once_to_the_loss_of_all_dims():
    parts = [jnp.float32(part) for part in _embeddings(2)]
    ids, teacher = _distinct_ids(2), _teacher(2, 4)
    settings = {
        "mrl_dims": (2, 6),
        "mrl_weights": (0.5, 2.0),
        "temperature": TEMPERATURE,
    }
    plain, terms = contrastive.mrl_loss(*parts, ids, **settings)
    assert terms[6].matching is None
    total, terms = contrastive.mrl_loss(
        *parts, ids, **settings, matching_weight=0.3, teacher=teacher
    )
    matching = contrastive.embedding_matching(*parts, ids, teacher)
    np.testing.assert_allclose(total, plain + 0.3 * matching, rtol=1e-6)
    np.testing.assert_array_equal(terms[6].matching, matching)
    assert terms[2].matching is None
    with pytest.raises(ValueError, match=r"no teacher vectors.*data\.teacher"):
        contrastive.mrl_loss(*parts, ids, **settings, matching_weight=0.3)


def test_memory_grows_with_the_batch_and_not_with_its_square():
    def total(parts, ids):
        return contrastive.contrastive_loss(
            *parts, ids, temperature=0.05, block_size=64, **MODERN[-1]
        ).loss.sum()

    temporary = []
    for num in (1024, 4096):
        parts, ids = jax.tree.map(
            lambda leaf, num=num: jax.ShapeDtypeStruct(
                (num, *leaf.shape[1:]), leaf.dtype
            ),
            ([np.float32(part) for part in _embeddings(1)], _distinct_ids(1)),
        )
        compiled = jax.jit(jax.value_and_grad(total)).lower(parts, ids).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 4.4 * temporary[0]
    # One matrix of all pairs in float32 is more than all there is.
    assert temporary[1] < 4 * num**2


def test_no_device_holds_the_keys_of_the_whole_batch():
    mesh = sharding.build_mesh()
    spec = PartitionSpec(sharding.BATCH_AXES)
    width = 64

    def total(parts, ids):
        return contrastive.mrl_loss(
            *parts,
            ids,
            mrl_dims=(32, width),
            mrl_weights=(1.0, 1.0),
            temperature=0.05,
            same_tower=True,
            mask_duplicates=True,
            axis_names=sharding.BATCH_AXES,
            block_size=64,
        )[0].sum()

    gradient = jax.shard_map(
        jax.grad(total), mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )
    temporary = []
    for num in (2048, 4096):
        parts = [jax.ShapeDtypeStruct((num, width), np.float32)] * 2 + [None]
        ids = jax.tree.map(
            lambda leaf, num=num: jax.ShapeDtypeStruct(
                (num, *leaf.shape[1:]), leaf.dtype
            ),
            _distinct_ids(0),
        )
        compiled = jax.jit(gradient).lower(parts, ids).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporary[1] < 2.2 * temporary[0]
    # Two sums at each of two dims, forward and backward: none is made a third time.
    assert (compiled.as_text() or "").count(" while(") == 8
    # Nothing gathered is as large as the queries or the positives of all devices.
    gathered = re.findall(r"f32\[(\d+),64\]\S* all-gather", compiled.as_text() or "")
    assert gathered
    assert max(map(int, gathered)) == 64
