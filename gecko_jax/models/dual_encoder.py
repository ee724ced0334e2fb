"""The Gecko dual encoder: one shared T5 tower, mean pooling, projection (eq. 1).

    tokens -> hidden states -> mean over a text -> projection -> cut -> normalize

Queries and passages use the same parameters; only their text format differs
(`text.text_formats`). MRL cuts the embedding to a prefix and normalizes it again
(section 3.1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gecko_jax.models import t5

EncoderConfig = t5.EncoderConfig

# T5 1.1 encoders (Shazeer 2020). `mini` is not from T5: it trains on a laptop CPU.
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

# An orthogonal projection preserves cosines.
PROJECTION_INIT = nn.initializers.orthogonal()


class DualEncoder(nn.Module):
    """Maps tokens to embeddings; queries and passages share all parameters."""

    config: EncoderConfig

    def setup(self):
        """Creates the submodules, under T5X's names."""
        config = self.config
        self.token_embedder = _TokenEmbedder(config)
        self.encoder = t5.Encoder(config)
        if config.projection:
            self.projection_layer = t5.Dense(
                config.embedding_dim,
                ("embed", "affinity"),
                PROJECTION_INIT,
                jnp.dtype(jnp.float32),
            )

    def hidden_states(
        self,
        tokens: Int[Array, "R L"],
        segment_ids: Int[Array, "R L"],
        *,
        dropout_keys: Key[Array, " R"] | None = None,
    ) -> Float[Array, "R L M"]:
        """Returns the encoder's output for each token, in the activation dtype."""
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
            tokens: Token ids; 0 for padding.
            segment_ids: 1 to S for the tokens of a row's texts; 0 for padding.
            num_segments: S, the largest number of texts in a row.
            dropout_keys: Dropout key of each row; None in evaluation.

        Returns:
            Text s of row r at [r, s - 1]; zeros where a row has fewer texts.
        """
        # Eq. 1: mean over all tokens of a text, task description included.
        hidden = self.hidden_states(tokens, segment_ids, dropout_keys=dropout_keys)
        pooled = mean_pool(hidden, segment_ids, num_segments)
        # The caller cuts and normalizes, in this order (MRL).
        return self.projection_layer(pooled) if self.config.projection else pooled


class _TokenEmbedder(nn.Module):
    """The embedding table (`token_embedder/embedding`); T5 does not scale it."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L M"]:
        # Flax unboxes it, but its types do not say so.
        embedding: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(1.0), ("vocab", "embed")
            ),
            (self.config.vocab_size, self.config.model_dim),
            jnp.float32,
        )
        # The default mode masks ids outside the table, which never occur.
        return jnp.take(embedding, tokens, axis=0, mode="clip")


def mean_pool(
    hidden: Float[Array, "R L M"], segment_ids: Int[Array, "R L"], num_segments: int
) -> Float[Array, "R S M"]:
    """Averages the hidden states of each segment in float32; an empty one gives 0."""
    # member[r, s, l]: token l of row r belongs to segment s + 1. A product with this
    # mask sums each segment without a scatter, and leaves out padding (segment 0).
    segments = jnp.arange(1, num_segments + 1)
    member = (segment_ids[:, None, :] == segments[None, :, None]).astype(jnp.float32)
    total = jnp.einsum("rsl,rlm->rsm", member, hidden.astype(jnp.float32))
    count = jnp.sum(member, axis=-1, keepdims=True)
    return total / jnp.maximum(count, 1.0)


def normalize(
    x: Float[Array, "... D"], epsilon: float = 1e-12
) -> Float[Array, "... D"]:
    """Scales vectors to unit length in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    # The epsilon is under the root: the gradient of a zero vector is finite.
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def gather_texts(
    embeddings: Float[Array, "R S D"], index: Int[Array, "T 2"]
) -> Float[Array, "T D"]:
    """Selects texts by (row, segment - 1) from packed rows."""
    return embeddings[index[:, 0], index[:, 1]]


def build_init(config: EncoderConfig):
    """Returns a function from a PRNG key to boxed parameters."""
    dummy = jnp.ones((1, 8), jnp.int32)  # No parameter depends on the row length.

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        variables: Any = DualEncoder(config).init(key, dummy, dummy)
        return variables["params"]

    return init


def init_params(config: EncoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns fresh parameters: nested dicts with T5X's names, in float32."""
    params: Any = nn.unbox(build_init(config)(key))
    return params


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
        batch: Model features, see `data.features`.
        side: "query" or "passage".
        num_segments: Largest number of texts in a row.
    """
    rows: Any = encoder.apply(
        {"params": params},
        batch[f"{side}_tokens"],
        batch[f"{side}_segment_ids"],
        num_segments=num_segments,
    )
    return gather_texts(rows, batch[f"{side}_index"])


def compute_params(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """Casts matrices to the activation dtype and stacks scanned layers.

    The encoder accepts these parameters too. Training calls this once per step rather
    than once per microbatch. The token embedding stays in float32, because its gradient
    accumulates over all tokens of a batch.
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
    """Returns the partition specs of `compute_params`, given the parameters' specs."""
    if not config.scan_layers:
        return dict(specs)

    # The layer axis in front is not split; all layers have the same spec.
    def stack(spec: PartitionSpec, *_: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(None, *spec)

    stacked = t5.stack_layers(specs["encoder"], config.num_layers, stack)
    return {**specs, "encoder": stacked}


def unstack_gradients(
    gradients: Mapping[str, Any], config: EncoderConfig
) -> dict[str, Any]:
    """Maps gradients of `compute_params` back to the parameter tree."""
    if not config.scan_layers:
        return dict(gradients)
    encoder = t5.unstack_layers(gradients["encoder"], config.num_layers)
    return {**gradients, "encoder": encoder}


def abstract_params(config: EncoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns shapes and logical axes of the parameters without allocating them."""
    boxed = jax.eval_shape(build_init(config), jax.random.key(0))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def flops_per_token(config: EncoderConfig, length: int) -> float:
    """Returns the training FLOPs per token of a row of `length` tokens.

    A matrix product costs 2 FLOPs per weight forward and 4 backward. Rematerialization
    does not count.
    """
    width = config.num_heads * config.head_dim
    # Weights of a layer: query, key, value and out; then the MLP's branches and `wo`.
    per_layer = 4 * config.model_dim * width
    per_layer += (len(config.mlp_activations) + 1) * config.model_dim * config.mlp_dim
    # A token's logits and weighted sum cost as much as 2 * H * K * L weights.
    attention = 2 * width * length
    return 6.0 * config.num_layers * (per_layer + attention)


def config_to_dict(config: EncoderConfig) -> dict[str, Any]:
    """Returns the config as a dict that JSON can represent."""
    return dataclasses.asdict(config)
