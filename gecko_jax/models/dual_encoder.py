"""The Gecko dual encoder: one shared T5 tower, mean pooling, projection, MRL cut.

    tokens -> hidden states -> mean over a text -> projection -> cut -> normalize

Queries and passages go through the same parameters; only their text differs
(`gecko_jax.text`). Section 3.1, eq. 1.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gecko_jax.models import t5

EncoderConfig = t5.EncoderConfig

# T5 1.1 encoders (Shazeer 2020; PAPER.md gives their parameter counts). `mini` is ours:
# small enough that a laptop CPU trains it.
PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "vocab_size": vocab_size,
        "model_dim": model_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "head_dim": 64,
        "mlp_dim": mlp_dim,
        "embedding_dim": embedding_dim,
    }
    for name, vocab_size, model_dim, num_layers, num_heads, mlp_dim, embedding_dim in (
        ("mini", 8_064, 256, 2, 4, 512, 256),
        ("small", 32_128, 512, 8, 6, 1_024, 512),
        ("base", 32_128, 768, 12, 12, 2_048, 768),
        ("large", 32_128, 1_024, 24, 16, 2_816, 768),
        ("xl", 32_128, 2_048, 24, 32, 5_120, 768),
        ("xxl", 32_128, 4_096, 24, 64, 10_240, 768),
    )
}

# Keeps the cosines of what it projects.
_PROJECTION_INIT = nn.initializers.orthogonal()


class DualEncoder(nn.Module):
    """Texts to embeddings, both sides through one tower."""

    config: EncoderConfig

    def setup(self):
        """Names the parts as T5X does."""
        config = self.config
        self.token_embedder = _TokenEmbedder(config)
        self.encoder = t5.Encoder(config)
        if config.projection:
            self.projection_layer = t5.Dense(
                config.embedding_dim,
                ("embed", "affinity"),
                _PROJECTION_INIT,
                jnp.dtype(jnp.float32),
            )

    def hidden_states(
        self,
        tokens: Int[Array, "R L"],
        segment_ids: Int[Array, "R L"],
        *,
        dropout_keys: Key[Array, " R"] | None = None,
    ) -> Float[Array, "R L M"]:
        """Returns the encoder's output per token, in the activation dtype."""
        return self.encoder(self.token_embedder(tokens), segment_ids, dropout_keys)

    def __call__(
        self,
        tokens: Int[Array, "R L"],
        segment_ids: Int[Array, "R L"],
        *,
        num_segments: int = 1,
        dropout_keys: Key[Array, " R"] | None = None,
    ) -> Float[Array, "R S D"]:
        """Returns the projected mean of each text, not normalized, in float32.

        Args:
            tokens: Token ids; 0 where there is none.
            segment_ids: 1 to S for the tokens of a row's texts, 0 for padding.
            num_segments: S, texts a row may hold.
            dropout_keys: Randomness of each row's dropout; None in evaluation.

        Returns:
            Row r's text s at [r, s - 1]; zeros where a row holds fewer texts.
        """
        hidden = self.hidden_states(tokens, segment_ids, dropout_keys=dropout_keys)
        pooled = mean_pool(hidden, segment_ids, num_segments)
        return self.projection_layer(pooled) if self.config.projection else pooled


class _TokenEmbedder(nn.Module):
    """The embedding table (`token_embedder/embedding`), not scaled (T5)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L M"]:
        # Unboxed by Flax, which its types do not say.
        embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("vocab", "embed")
            ),
            (self.config.vocab_size, self.config.model_dim),
            jnp.float32,
        )
        return jnp.take(embedding, tokens, axis=0, mode="clip")


def mean_pool(
    hidden: Float[Array, "R L M"], segment_ids: Int[Array, "R L"], num_segments: int
) -> Float[Array, "R S M"]:
    """Averages the hidden states of each segment in float32; empty ones give zeros."""
    segments = jnp.arange(1, num_segments + 1)
    member = (segment_ids[:, None, :] == segments[None, :, None]).astype(jnp.float32)
    total = jnp.einsum("rsl,rlm->rsm", member, hidden.astype(jnp.float32))
    count = jnp.sum(member, axis=-1, keepdims=True)
    return total / jnp.maximum(count, 1.0)


def normalize(
    x: Float[Array, "... D"], epsilon: float = 1e-12
) -> Float[Array, "... D"]:
    """Scales vectors to length 1 in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def mrl_embedding(
    projected: Float[Array, "... D"], dim: int, epsilon: float = 1e-12
) -> Float[Array, "... E"]:
    """Cuts to the first `dim` entries and normalizes again (MRL, section 3.1)."""
    return normalize(projected[..., :dim], epsilon)


def gather_texts(
    embeddings: Float[Array, "R S D"], index: Int[Array, "T 2"]
) -> Float[Array, "T D"]:
    """Picks texts by (row, segment - 1) out of packed rows."""
    return embeddings[index[:, 0], index[:, 1]]


def build_init(config: EncoderConfig):
    """Returns a function from a key to boxed parameters, for `eval_shape` and `jit`."""
    dummy = jnp.ones((1, 8), jnp.int32)

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        variables: Any = DualEncoder(config).init(key, dummy, dummy)
        return variables["params"]

    return init


def init_params(config: EncoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns fresh parameters: nested dicts under T5X's names, float32."""
    params: Any = nn.unbox(build_init(config)(key))
    return params


def init_projection(config: EncoderConfig, key: Key[Array, ""]) -> Float[Array, "M D"]:
    """Returns a fresh projection, for an encoder that was trained without one."""
    shape = (config.model_dim, config.embedding_dim)
    return typing.cast(Array, _PROJECTION_INIT(key, shape, jnp.float32))


def weight_tokens(
    params: dict[str, Any], weights: Float[np.ndarray, " V"], key: Key[Array, ""]
) -> dict[str, Any]:
    """Draws new token embeddings that count by `weights` in an untrained model.

    The paper starts from a pre-trained encoder; a model that starts from scratch is at
    first a bag of its tokens, and a bag is far better when rare tokens count more. The
    length of a T5 token vector says nothing, because the last norm makes all lengths
    equal. So a token's weight is the share of its vector inside the space the
    projection sees: a quarter of the dimensions is closed to it, and a token of weight
    w lies with sqrt(1 - w^2) of its length in there. All of it is trained on.

    Args:
        params: Fresh parameters.
        weights: Of each token id, in [0, 1].
        key: Randomness of the directions.

    Returns:
        The parameters with another token embedding, and with zeros in the rows of the
        projection that belong to the closed dimensions.
    """
    embedding = params["token_embedder"]["embedding"]
    kernel = params["projection_layer"]["kernel"]
    vocab_size, width = embedding.shape
    closed = width // 4
    is_closed = jnp.arange(width) < closed
    directions = jax.random.normal(key, (vocab_size, width))
    weight = jnp.asarray(weights, jnp.float32)[:, None]
    vectors = jnp.concatenate(
        [
            normalize(directions[:, :closed]) * jnp.sqrt(1 - jnp.square(weight)),
            normalize(directions[:, closed:]) * weight,
        ],
        axis=1,
    )
    return params | {
        # Entries of variance 1, as T5's.
        "token_embedder": {"embedding": vectors * width**0.5},
        "projection_layer": {"kernel": jnp.where(is_closed[:, None], 0.0, kernel)},
    }


def embed_texts(
    encoder: "DualEncoder",
    params: Any,
    batch: Mapping[str, Array],
    side: str,
    *,
    num_segments: int,
) -> Float[Array, "T D"]:
    """Embeds the texts of one side of a batch, without dropout or normalization.

    Args:
        encoder: The model.
        params: Its parameters.
        batch: Model features, see `gecko_jax.data.features`.
        side: "query" or "passage".
        num_segments: Texts a row may hold.
    """
    rows: Any = encoder.apply(
        {"params": params},
        batch[f"{side}_tokens"],
        batch[f"{side}_segment_ids"],
        num_segments=num_segments,
    )
    return gather_texts(rows, batch[f"{side}_index"])


def compute_params(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """Returns the parameters as the encoder computes with them; it takes either.

    The matrices of the layers are in the activation dtype, and stacked if they are
    scanned: once for a step, and not for every microbatch of it. The token embedding
    stays in float32, because its gradient adds up over all tokens of a batch.
    """
    encoder: dict[str, Any] = jax.tree.map_with_path(
        lambda path, leaf: (
            leaf.astype(config.dtype) if path[-1].key == "kernel" else leaf
        ),
        params["encoder"],
    )
    if config.scan_layers:
        encoder = t5.stack_layers(encoder, config.num_layers)
    return {**params, "encoder": encoder}


def stack_specs(specs: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """Returns partition specs for `compute_params`, given those of the parameters."""
    if not config.scan_layers:
        return dict(specs)

    def stack(spec: PartitionSpec, *_: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(None, *spec)

    stacked = t5.stack_layers(specs["encoder"], config.num_layers, stack)
    return {**specs, "encoder": stacked}


def unstack_gradients(
    gradients: Mapping[str, Any], config: EncoderConfig
) -> dict[str, Any]:
    """Returns gradients of `compute_params` under the names of the parameters."""
    if not config.scan_layers:
        return dict(gradients)
    encoder = t5.unstack_layers(gradients["encoder"], config.num_layers)
    return {**gradients, "encoder": encoder}


def align_projection(
    params: dict[str, Any], covariance: Float[Array, "D D"]
) -> dict[str, Any]:
    """Turns the projection so that its first dims hold what pairs share the most.

    A turn of all dims changes no similarity at full width. But every MRL prefix of a
    random projection is a random part of the embedding; after this turn a prefix
    holds the directions along which queries and their positives vary together.

    Args:
        params: Parameters whose projection gave the embeddings.
        covariance: Of query embeddings (rows) with their positives (columns).

    Returns:
        The parameters with another projection.
    """
    # The skew part of a covariance adds nothing to q^T C q for any direction q.
    _, directions = jnp.linalg.eigh(covariance + covariance.T)
    kernel = params["projection_layer"]["kernel"]
    return params | {"projection_layer": {"kernel": kernel @ directions[:, ::-1]}}


def abstract_params(config: EncoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns shapes and logical axes of the parameters without making them."""
    boxed = jax.eval_shape(build_init(config), jax.random.key(0))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def flops_per_token(config: EncoderConfig, length: int) -> float:
    """Returns the FLOPs of training on a token of a row of `length` tokens.

    A product of matrices counts 2 for each entry of the weights forward and 4 backward;
    what is computed again to save memory is no work of the model and does not count.
    """
    width = config.num_heads * config.head_dim
    per_layer = 4 * config.model_dim * width
    per_layer += (len(config.mlp_activations) + 1) * config.model_dim * config.mlp_dim
    attention = 2 * width * length
    return 6.0 * config.num_layers * (per_layer + attention)


def config_to_dict(config: EncoderConfig) -> dict[str, Any]:
    """Returns plain values that JSON can hold."""
    return dataclasses.asdict(config)
