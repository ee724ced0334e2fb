"""The loss and its gradient: the same on every mesh, in any number of microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax import losses
from gecko_jax.data import features
from gecko_jax.losses import contrastive
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.training import gradients
from tests import tiny_encoders

B, G = 32, 1
NUM_SEGMENTS = features.Shape(6, 14, G, packing=True).num_segments
MESHES = [(1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]
EQUATION_3 = {
    "temperature": 0.1,
    "mrl_dims": (4, 8),
    "mrl_weights": (1.0, 0.5),
    "same_tower": True,
    "mask_duplicates": True,
}
# With what EmbeddingGemma adds.
EVERYTHING = EQUATION_3 | {
    "hardness": 5.0,
    "spread_weight": 0.5,
    "matching_weight": 0.7,
    "kl_weight": 0.6,
    "kl_temperature": 2.0,
    "same_tower_passages": True,
    "bidirectional": True,
    "all_hard_negatives": True,
}
# Optimizing takes longer than the little there is to compute.
COMPILE = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def _encoder(family="t5", **settings):
    config = tiny_encoders.FAMILIES[family]
    if family == "t5":
        config = dataclasses.replace(config, model_dim=16, head_dim=8, mlp_dim=24)
    settings = {"scan_layers": True, "remat": "full"} | settings
    return dual_encoder.DualEncoder(dataclasses.replace(config, **settings))


def _mesh(sizes):
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.build_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


@functools.cache
def _batch(packing, row_multiple, num_negatives=G):
    rng = np.random.default_rng(0)

    def text(longest):
        return rng.integers(2, 64, size=rng.integers(2, longest)).astype(np.int32)

    def content_id():
        return rng.integers(0, 40, size=2).astype(np.uint32)

    examples = [
        features.Example(
            query=text(6),
            positive=text(14),
            negatives=(text(14),) * int(rng.integers(0, 2)),
            query_id=content_id(),
            passage_id=content_id(),
            negative_ids=content_id()[None],
            negative_group=int(rng.integers(0, 2)),
        )
        for _ in range(B)
    ]
    shape = features.Shape(6, 14, num_negatives, packing, row_multiple)
    batch = features.convert(examples, shape)
    batch["example_mask"][5] = False
    vectors = rng.standard_normal((2 + num_negatives, B, 6)).astype(np.float16)
    vectors[0, 3] = 0.0  # no vector of this query
    batch["query_teacher"], batch["passage_teacher"] = vectors[0], vectors[1]
    batch["negative_teacher"] = vectors[2:].swapaxes(0, 1)
    batch["scores"] = rng.normal(size=(B, 1 + num_negatives)).astype(np.float32)
    batch["scores"][2:6] = -np.inf  # no scores of these examples
    return batch


def _compute(
    encoder, mesh, params, batch, microbatch_size, num_segments, settings, loss=None
):
    shapes, axes = dual_encoder.abstract_params(encoder.config)
    shardings = sharding.param_shardings(shapes, axes, mesh)
    compute = gradients.build(
        encoder,
        mesh,
        shardings,
        num_segments=num_segments,
        microbatch_size=microbatch_size,
        loss_settings=settings,
        loss=loss,
    )
    placed = sharding.place_batch(batch, mesh)
    params = jax.device_put(params, shardings)
    return COMPILE(compute), (params, placed, jax.random.key(3))


@functools.cache
def _params(encoder):
    return jax.jit(dual_encoder.init_params, static_argnums=0)(
        encoder.config, jax.random.key(1)
    )


def _dense(encoder, batch, num_segments, settings):
    """Without mesh or microbatches: what automatic differentiation says."""
    batch = {name: jnp.asarray(leaf) for name, leaf in batch.items()}
    ids = contrastive.BatchIds(
        **{name: batch[name] for name in contrastive.BatchIds._fields}
    )

    def keys(side):
        if not encoder.config.dropout_rate:
            return None
        key = jax.random.fold_in(jax.random.key(3), gradients.SIDES.index(side))
        rows = jnp.arange(len(batch[f"{side}_tokens"]))
        return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def mean_loss(params):
        texts = {
            side: encoder.apply(
                {"params": params},
                batch[f"{side}_tokens"],
                batch[f"{side}_segment_ids"],
                num_segments=num_segments,
                dropout_keys=keys(side),
            )[tuple(batch[f"{side}_index"].T)]
            for side in gradients.SIDES
        }
        teacher = contrastive.TeacherVectors(
            **{name: batch[name] for name in contrastive.TeacherVectors._fields}
        )
        positives, negatives = jnp.split(texts["passage"], [B])
        loss, terms = contrastive.mrl_loss(
            texts["query"],
            positives,
            negatives.reshape(*ids.negative_mask.shape, encoder.config.embedding_dim),
            ids,
            teacher=teacher,
            scores=batch["scores"],
            **settings,
        )
        return loss.sum() / ids.example_mask.sum(), (loss, terms)

    compute = COMPILE(jax.grad(mean_loss, has_aux=True))
    found, (loss, terms) = compute(_params(encoder))
    return jax.device_get((loss, terms, found))


@functools.cache
def _expected(family, dropout_rate, packing, everything):
    encoder = _encoder(family, dropout_rate=dropout_rate)
    num_segments = NUM_SEGMENTS if packing else 1
    settings = EVERYTHING if everything else EQUATION_3
    return _dense(encoder, _batch(packing, 8), num_segments, settings)


def _assert_same(found, expected):
    """The tolerances of the arithmetic: 1e-5 of a loss, 1e-4 of a leaf's norm."""
    (loss, terms, grads), (loss_0, terms_0, grads_0) = jax.device_get(found), expected
    np.testing.assert_allclose(loss, loss_0, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(terms), jax.tree.leaves(terms_0), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(grads_0), strict=True
    ):
        # A constant of the checkpoint (EmbeddingGemma 2's layer scalar) has gradient 0.
        wrong = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-9)
        assert wrong < 1e-4, (jax.tree_util.keystr(path), wrong)


@pytest.mark.parametrize(
    ("family", "mesh", "microbatch", "packing", "dropout", "everything"),
    [
        ("t5", (2, 2, 2), 8, True, 0.1, False),
        ("gemma", (2, 2, 1), 16, False, 0.0, True),
    ]
    + [
        pytest.param(family, mesh, 8, True, 0.1, True, marks=pytest.mark.slow)
        for family in ("gemma", "embeddinggemma2", "qwen3")
        for mesh in MESHES
    ]
    + [
        pytest.param("t5", mesh, *case, marks=pytest.mark.slow)
        for mesh in MESHES
        for case in (
            (8, True, 0.1, True),
            (8, False, 0.0, False),
            (16, False, 0.1, True),
            (0, False, 0.0, True),
            (0, True, 0.1, False),
        )
    ],
)
def test_every_mesh_and_microbatch_gives_the_dense_gradient(
    family, mesh, microbatch, packing, dropout, everything
):
    encoder = _encoder(family, dropout_rate=dropout)
    compute, arguments = _compute(
        encoder,
        _mesh(mesh),
        _params(encoder),
        _batch(packing, 8),
        microbatch,
        NUM_SEGMENTS if packing else 1,
        EVERYTHING if everything else EQUATION_3,
    )
    _assert_same(compute(*arguments), _expected(family, dropout, packing, everything))


@pytest.mark.parametrize(
    ("mesh", "settings"),
    [
        ((2, 1, 1), EQUATION_3),
        pytest.param((2, 2, 1), EVERYTHING, marks=pytest.mark.slow),
    ],
)
def test_pairs_without_hard_negatives_give_the_dense_gradient(mesh, settings):
    encoder, batch = _encoder(), _batch(False, 8, 0)
    compute, arguments = _compute(
        encoder, _mesh(mesh), _params(encoder), batch, 16, 1, settings
    )
    _assert_same(compute(*arguments), _dense(encoder, batch, 1, settings))


def _own_loss(queries, positives, negatives, ids, features):
    """Equation 3 with the masks of `contrastive`, as a user would write it."""
    teacher = set(contrastive.TeacherVectors._fields)
    assert set(features) == {"task_index", "scores"} | teacher
    is_self = jnp.eye(len(queries), dtype=bool)
    group = ids.negative_group
    others = (group[:, None] == group[None]) & ids.example_mask[None] & ~is_self
    to_positives = losses.similarities(queries, positives)
    to_queries = losses.similarities(queries, queries)
    to_negatives = jnp.einsum("bd,bgd->bg", queries, negatives)
    logits = jnp.concatenate(
        [
            jnp.where(others | is_self, to_positives, -jnp.inf),
            jnp.where(others, to_queries, -jnp.inf),
            jnp.where(ids.negative_mask, to_negatives, -jnp.inf),
        ],
        axis=1,
    )
    own = jnp.diagonal(to_positives) / 0.1
    return jax.nn.logsumexp(logits / 0.1, axis=1) - own


@pytest.mark.parametrize(
    ("mesh", "microbatch", "packing"),
    [
        ((2, 1, 1), 8, True),
        pytest.param((2, 2, 2), 8, True, marks=pytest.mark.slow),
        pytest.param((2, 2, 1), 16, False, marks=pytest.mark.slow),
        pytest.param((1, 1, 1), 0, True, marks=pytest.mark.slow),
    ],
)
def test_a_loss_of_the_user_trains_like_ours(mesh, microbatch, packing):
    encoder, batch = _encoder(dropout_rate=0.1), _batch(packing, 8)
    batch = batch | {"task_index": np.zeros(B, np.int32)}
    settings = EQUATION_3 | {"mask_duplicates": False}
    num_segments = NUM_SEGMENTS if packing else 1
    compute, arguments = _compute(
        *(encoder, _mesh(mesh), _params(encoder), batch),
        *(microbatch, num_segments, settings, _own_loss),
    )
    loss, terms, grads = compute(*arguments)
    expected = _dense(encoder, batch, num_segments, settings)
    _assert_same(
        (loss, {dim: own.loss for dim, own in terms.items()}, grads),
        (expected[0], {dim: own.loss for dim, own in expected[1].items()}, expected[2]),
    )
    # A dim's metrics do not depend on the loss.
    for dim, own in terms.items():
        np.testing.assert_allclose(
            own.positive_similarity, expected[1][dim].positive_similarity, atol=1e-5
        )


def test_a_loss_of_another_shape_is_refused():
    encoder, batch = _encoder(), _batch(False, 8)
    compute, arguments = _compute(
        *(encoder, _mesh((2, 1, 1)), _params(encoder), batch, 0, 1, EQUATION_3),
        lambda queries, *_: queries.sum(),
    )
    with pytest.raises(ValueError, match=r"loss: returned shape \(\).*\(32,\)"):
        compute(*arguments)


@pytest.mark.parametrize(
    ("num_rows", "microbatch_size", "ratio", "expected"),
    [(32, 2, 8, 16), (32, 0, 8, 32), (32, 2, 1, 2), (24, 2, 8, 12), (8, 16, 4, 8)],
)
def test_short_rows_share_a_microbatch(num_rows, microbatch_size, ratio, expected):
    found = gradients.microbatch_rows(num_rows, microbatch_size, ratio)
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_five_steps_of_sgd_end_at_the_same_parameters(dropout):
    encoder = _encoder(dropout_rate=dropout)
    ends = []
    for mesh, microbatch in (((1, 1, 1), 0), ((8, 1, 1), 16), ((2, 2, 2), 8)):
        compute, (params, batch, key) = _compute(
            encoder,
            _mesh(mesh),
            _params(encoder),
            _batch(True, 8),
            microbatch,
            NUM_SEGMENTS,
            EQUATION_3,
        )
        for step in range(5):
            _, _, found = compute(params, batch, jax.random.fold_in(key, step))
            params = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, found)
        ends.append(jax.device_get(params))
    assert not np.allclose(
        ends[0]["projection_layer"]["kernel"],
        _params(encoder)["projection_layer"]["kernel"],
        atol=1e-3,
    )
    for other in ends[1:]:
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5),
            ends[0],
            other,
        )
