"""Initial parameters for a small model that starts from scratch.

The paper starts from a pre-trained T5. A model without one is at first a bag of its
tokens. Two functions improve that start with statistics of the data: `weight_tokens`
makes rare tokens count more, `align_projection` orders the dims of the embedding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from gecko_jax.models import dual_encoder


def weight_tokens(
    params: dict[str, Any],
    weights: Float[np.ndarray, " V"],
    key: Key[Array, ""],
    hidden_share: float,
    embedding_scale: float = 1.0,
) -> dict[str, Any]:
    """Draws new token embeddings whose influence on the embedding follows `weights`.

    The length of a T5 token vector has no effect, because the last norm makes all
    lengths equal. A token's weight is therefore the share of its vector that the
    projection sees: some dims are hidden from it (their rows of the projection are 0),
    and a token of weight w has sqrt(1 - w^2) of its length in them. Training updates
    all dims.

    Args:
        params: Fresh parameters, of which embedding and projection are replaced.
        weights: Weight of each token id, in [0, 1].
        key: PRNG key of the directions.
        hidden_share: Share of the dims hidden from the projection.
        embedding_scale: Factor of the token embeddings in the model.
    """
    # The first `num_hidden` dims are hidden from the projection.
    embedding = params["token_embedder"]["embedding"]
    kernel = params["projection_layer"]["kernel"]
    vocab_size, width = embedding.shape
    num_hidden = int(width * hidden_share)
    is_hidden = jnp.arange(width) < num_hidden
    directions = jax.random.normal(key, (vocab_size, width))
    # Random unit vectors in both parts, mixed so that every token has length 1.
    weight = jnp.asarray(weights, jnp.float32)[:, None]
    hidden = dual_encoder.normalize(directions[:, :num_hidden])
    visible = dual_encoder.normalize(directions[:, num_hidden:])
    vectors = jnp.concatenate(
        [hidden * jnp.sqrt(1 - jnp.square(weight)), visible * weight], axis=1
    )
    return params | {
        # Entries of variance 1 in the model, like T5's.
        "token_embedder": {"embedding": vectors * (width**0.5 / embedding_scale)},
        "projection_layer": {"kernel": jnp.where(is_hidden[:, None], 0.0, kernel)},
    }


def align_projection(
    params: dict[str, Any], covariance: Float[Array, "D D"]
) -> dict[str, Any]:
    """Rotates the projection so that its first dims carry what pairs share most.

    A rotation of all dims changes no similarity at full width. But each MRL prefix of a
    random projection is a random part of the embedding; after this rotation a prefix
    holds the directions in which queries and their positives vary together.

    `covariance` is that of query embeddings (rows) and positives (columns).
    """
    # Only the symmetric part of C contributes to q^T C q. `eigh` sorts its eigenvalues
    # upwards, so the columns are reversed: the first dims get the largest covariance.
    _, directions = jnp.linalg.eigh(covariance + covariance.T)
    kernel = params["projection_layer"]["kernel"]
    return params | {"projection_layer": {"kernel": kernel @ directions[:, ::-1]}}
