"""The paper's losses against loops over its formulas, and against the product's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax import losses
from gecko_jax.losses import contrastive, paper

B, D = 5, 8
TEMPERATURE = 0.1


@pytest.fixture(scope="module")
def embeddings():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((B, D)), jnp.float32) for _ in "qpn")


def _ids(num_negatives):
    distinct = np.arange(B * 2, dtype=np.uint32).reshape(B, 2)
    return contrastive.BatchIds(
        query_id=distinct,
        passage_id=distinct + 100,
        negative_id=distinct[:, None] + 200 if num_negatives else np.zeros((B, 0, 2)),
        negative_mask=np.ones((B, num_negatives), bool),
        example_mask=np.ones(B, bool),
        negative_group=np.zeros(B, np.int32),
    )


def _cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def _exp(a, b):
    return math.exp(_cosine(a, b) / TEMPERATURE)


def _equation_2(q, p):
    return [
        -math.log(_exp(q[i], p[i]) / sum(_exp(q[i], p[j]) for j in range(B)))
        for i in range(B)
    ]


def _equation_3(q, p, n):
    result = []
    for i in range(B):
        denominator = sum(_exp(q[i], p[j]) for j in range(B))
        denominator += sum(_exp(q[i], q[j]) for j in range(B) if j != i)
        denominator += _exp(q[i], n[i])
        result.append(-math.log(_exp(q[i], p[i]) / denominator))
    return result


def test_prefinetune_loss_is_equation_2(embeddings):
    q, p, _ = np.asarray(embeddings, np.float64)
    loss = losses.prefinetune_loss(*embeddings[:2], temperature=TEMPERATURE)
    np.testing.assert_allclose(loss, _equation_2(q, p), rtol=1e-5)


def test_finetune_loss_is_equation_3(embeddings):
    q, p, n = np.asarray(embeddings, np.float64)
    loss = losses.finetune_loss(*embeddings, temperature=TEMPERATURE)
    np.testing.assert_allclose(loss, _equation_3(q, p, n), rtol=1e-5)


def test_the_mesh_form_and_its_gradient_equal_equation_2(embeddings):
    def dense(q, p):
        return losses.prefinetune_loss(q, p, temperature=TEMPERATURE).sum()

    def blockwise(q, p):
        ids = _ids(0)
        terms = losses.contrastive_loss(
            q, p, None, ids, temperature=TEMPERATURE, block_size=2
        )
        return terms.loss.sum()

    _assert_equal(dense, blockwise, embeddings[:2])


def test_the_mesh_form_and_its_gradient_equal_equation_3(embeddings):
    def dense(q, p, n):
        return losses.finetune_loss(q, p, n, temperature=TEMPERATURE).sum()

    def blockwise(q, p, n):
        terms = losses.contrastive_loss(
            *(q, p, n[:, None], _ids(1)),
            temperature=TEMPERATURE,
            same_tower=True,
            block_size=2,
        )
        return terms.loss.sum()

    _assert_equal(dense, blockwise, embeddings)


def test_the_mesh_form_equals_mrl(embeddings):
    dims = {"mrl_dims": (2, D), "mrl_weights": (0.5, 1.0)}

    def dense(q, p, n):
        def equation_3(*parts):
            return losses.finetune_loss(*parts, temperature=TEMPERATURE)

        return paper.mrl_loss(equation_3, q, p, n, **dims).sum()

    def blockwise(q, p, n):
        loss, _ = contrastive.mrl_loss(
            *(q, p, n[:, None], _ids(1)),
            temperature=TEMPERATURE,
            same_tower=True,
            **dims,
        )
        return loss.sum()

    _assert_equal(dense, blockwise, embeddings)


def _assert_equal(first, second, arguments):
    number = tuple(range(len(arguments)))
    (a, a_gradients) = jax.jit(jax.value_and_grad(first, number))(*arguments)
    (b, b_gradients) = jax.jit(jax.value_and_grad(second, number))(*arguments)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(a_gradients, b_gradients, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
