"""Distillation from a judge's scores of an example's candidates.

The candidates of a query are its positive and its hard negatives. A judge, such as the
language model of `gecko fret` or a cross-encoder, has scored them. The judge's
distribution over the candidates is the target of the student's:

    t_n  softmax over n of score_n / judge_temperature
    s_n  softmax over n of cosine(query, candidate_n) / temperature
    KL   sum over n of t_n log(t_n / s_n)

E5 (Wang et al. 2022) adds this KL from a cross-encoder to the contrastive loss. BGE-M3
(Chen et al. 2024) uses the cross-entropy of t and s, which has the same gradient. Other
queries' candidates have no score and do not take part.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gecko_jax.models import dual_encoder

# Logit of a missing candidate. A finite one keeps gradients of masked entries finite.
_MISSING = -1e30


def candidate_divergence(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B G D"] | None,
    negative_mask: Bool[Array, "B G"],
    scores: Float[Array, "B N"],
    *,
    temperature: float,
    judge_temperature: float,
) -> Float[Array, " B"]:
    """KL divergence of the student's distribution from the judge's, in nats per query.

    It runs over the candidates with a score, and is 0 if there are fewer than two. The
    embeddings are normalized here. `scores` are the judge's, of the positive and of
    each hard negative (N = 1 + G), minus infinity where a candidate has none.
    `temperature` divides the cosines, and `judge_temperature` the scores; larger is
    softer.
    """
    # [B, N, D]: the positive first, as in `scores`.
    candidates = positives[:, None]
    if negatives is not None:
        candidates = jnp.concatenate([candidates, negatives], axis=1)
    cosine = jnp.einsum(
        "bd,bnd->bn",
        dual_encoder.normalize(queries),
        dual_encoder.normalize(candidates),
        precision=jax.lax.Precision.HIGHEST,
    )
    # Column 0 is the positive, which is never padding. `keep` also requires a score.
    is_present = jnp.pad(negative_mask, ((0, 0), (1, 0)), constant_values=True)
    keep = is_present & jnp.isfinite(scores)
    student, judge = (
        jax.nn.log_softmax(jnp.where(keep, logits, _MISSING), axis=1)
        for logits in (cosine / temperature, scores / judge_temperature)
    )
    # With a single candidate both distributions are 1, and the divergence is 0.
    return jnp.sum(jnp.where(keep, jnp.exp(judge) * (judge - student), 0.0), axis=1)
