"""The KL from a judge's scores against the formula, written out as float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.losses import contrastive, distillation

B, D, G = 5, 6, 3
TEMPERATURE, JUDGE_TEMPERATURE = 0.2, 1.5


def _embeddings(num_negatives=G):
    rng = np.random.default_rng(num_negatives)
    shapes = (B, D), (B, D), (B, num_negatives, D)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def _cases(num_negatives):
    """(negative mask, scores): whole, gaps of both kinds, rows with too few scores."""
    rng = np.random.default_rng(7)
    whole = np.ones((B, num_negatives), bool)
    scores = 4 * rng.standard_normal((B, 1 + num_negatives)).astype(np.float32)
    yield whole, scores
    some = rng.random((B, num_negatives)) < 0.6
    yield some, scores
    gaps = scores.copy()
    gaps[rng.random(gaps.shape) < 0.4] = -np.inf
    gaps[0] = -np.inf
    gaps[1, 1:] = -np.inf  # the positive alone
    gaps[2, 0] = -np.inf  # the negatives alone
    yield whole, gaps
    yield some, gaps


def _softmax(logits):
    terms = [np.exp(logit) for logit in logits]
    return [term / sum(terms) for term in terms]


def _formula(queries, positives, negatives, mask, scores):
    """One number for each row; `negatives` may be complex, for derivatives."""
    rows = []
    for i in range(B):
        candidates = [positives[i], *negatives[i]]
        present = [True, *mask[i]]
        cosines, judged = [], []
        for candidate, is_present, score in zip(
            candidates, present, scores[i], strict=True
        ):
            if is_present and score > -np.inf:
                lengths = [np.sqrt((v * v).sum()) for v in (queries[i], candidate)]
                cosine = (queries[i] * candidate).sum() / (lengths[0] * lengths[1])
                cosines.append(cosine / TEMPERATURE)
                judged.append(np.float64(score) / JUDGE_TEMPERATURE)
        pairs = zip(_softmax(judged), _softmax(cosines), strict=True)
        rows.append(sum(t * np.log(t / s) for t, s in pairs))
    return np.array(rows)


def _divergence(parts, mask, scores):
    return distillation.candidate_divergence(
        *jax.tree.map(jnp.asarray, (*parts, mask, scores)),
        temperature=TEMPERATURE,
        judge_temperature=JUDGE_TEMPERATURE,
    )


@pytest.mark.parametrize("num_negatives", [1, G])
def test_the_divergence_and_its_gradient_follow_the_formula(num_negatives):
    parts = _embeddings(num_negatives)
    exact = [part.astype(np.float64) for part in parts]
    weights = np.random.default_rng(1).uniform(0.5, 1.5, B)

    def total(parts, mask, scores):
        rows = _divergence(parts, mask, scores)
        return jnp.sum(rows * jnp.float32(weights)), rows

    compute = jax.jit(jax.grad(total, has_aux=True))
    for case, (mask, scores) in enumerate(_cases(num_negatives)):
        gradients, found = compute(parts, mask, scores)
        expected = _formula(*exact, mask, scores)
        assert case > 1 or expected.max() > 0.1
        np.testing.assert_allclose(found, expected, atol=3e-6, err_msg=f"case {case}")
        for part in range(3):
            for place in np.ndindex(exact[part].shape):
                varied = [array.astype(complex) for array in exact]
                varied[part][place] += 1e-30j
                slope = (_formula(*varied, mask, scores) @ weights).imag / 1e-30
                np.testing.assert_allclose(gradients[part][place], slope, atol=3e-5)


def test_an_example_with_fewer_than_two_scores_contributes_nothing():
    parts = _embeddings()
    _, (_, some_scores), (mask, scores), _ = _cases(G)
    gradients = jax.grad(lambda parts: _divergence(parts, mask, scores)[:2].sum())(
        parts
    )
    assert not any(gradient.any() for gradient in gradients)
    # Nor does an example without hard negatives.
    alone = [*parts[:2], None]
    none = np.zeros((B, 0), bool)
    assert not _divergence(alone, none, some_scores[:, :1]).any()


def test_a_student_that_agrees_with_the_judge_has_no_divergence():
    queries, positives, negatives = _embeddings()
    candidates = np.concatenate([positives[:, None], negatives], axis=1)
    lengths = [np.linalg.norm(part, axis=-1) for part in (queries, candidates)]
    cosines = np.einsum("bd,bnd->bn", queries, candidates)
    cosines /= lengths[0][:, None] * lengths[1]
    # A softmax does not depend on the sum of its logits.
    scores = cosines * JUDGE_TEMPERATURE / TEMPERATURE - 40
    mask = np.ones((B, G), bool)
    found = _divergence([queries, positives, negatives], mask, scores)
    np.testing.assert_allclose(found, 0.0, atol=1e-5)


def test_every_dim_of_mrl_adds_its_divergence():
    queries, positives, negatives = parts = [jnp.asarray(p) for p in _embeddings()]
    words = np.arange(2 * B * (2 + G), dtype=np.uint32).reshape(-1, 2)
    mask, scores = map(jnp.asarray, list(_cases(G))[-1])
    ids = contrastive.BatchIds(
        query_id=words[:B],
        passage_id=words[B : 2 * B],
        negative_id=words[2 * B :].reshape(B, G, 2),
        negative_mask=mask,
        example_mask=np.array([True, True, True, False, True]),
        negative_group=np.zeros(B, np.int32),
    )
    settings = {
        "mrl_dims": (2, 6),
        "mrl_weights": (0.5, 2.0),
        "temperature": TEMPERATURE,
    }
    plain, terms = contrastive.mrl_loss(*parts, ids, **settings)
    assert terms[2].kl is terms[6].kl is None
    off, _ = contrastive.mrl_loss(*parts, ids, **settings, scores=scores)
    np.testing.assert_array_equal(off, plain)
    total, terms = contrastive.mrl_loss(
        *(*parts, ids),
        **settings,
        kl_weight=0.3,
        kl_temperature=JUDGE_TEMPERATURE,
        scores=scores,
    )
    expected = np.float64(plain)
    for dim, weight in ((2, 0.5), (6, 2.0)):
        cut = [np.float64(part[..., :dim]) for part in (queries, positives, negatives)]
        kl = np.where(ids.example_mask, _formula(*cut, mask, scores), 0.0)
        np.testing.assert_allclose(terms[dim].kl, kl, atol=3e-6)
        expected += weight * 0.3 * kl
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"kl_weight=0\.3: the batch has no scores"):
        contrastive.mrl_loss(*parts, ids, **settings, kl_weight=0.3)
