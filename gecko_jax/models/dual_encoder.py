"""The Gecko dual encoder: one shared T5 tower, mean pooling, projection (eq. 1).

    tokens -> hidden states -> mean over a text -> projection -> cut -> normalize

Queries and passages use the same parameters; only their text format differs
(`text.text_formats`). MRL cuts the embedding to a prefix and normalizes it again
(section 3.1).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Key

from gecko_jax.models import encoder, families, layers

EncoderConfig = families.EncoderConfig

_SIZES = (
    *("vocab_size", "model_dim", "num_layers", "num_heads", "head_dim", "mlp_dim"),
    "embedding_dim",
)
_GEMMA: dict[str, Any] = {"family": "gemma", "global_every": 6}
# Qwen3-Embedding (arXiv 2506.05176) has no projection. Its embedding tables have fewer
# rows than those of Qwen3 (151,936).
_QWEN3: dict[str, Any] = {
    "family": "qwen3",
    "num_kv_heads": 8,
    "mlp_activations": ("silu", "linear"),
    "projection": False,
    "pooling": "last",
}
PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_SIZES, sizes, strict=True)) | settings
    for name, sizes, settings in (
        # T5 1.1 encoders (Shazeer 2020). `mini` is not from T5: it trains on a laptop.
        ("mini", (8_064, 256, 2, 4, 64, 512, 256), {}),
        ("small", (32_128, 512, 8, 6, 64, 1_024, 512), {}),
        ("base", (32_128, 768, 12, 12, 64, 2_048, 768), {}),
        ("large", (32_128, 1_024, 24, 16, 64, 2_816, 768), {}),
        ("xl", (32_128, 2_048, 24, 32, 64, 5_120, 768), {}),
        ("xxl", (32_128, 4_096, 24, 64, 64, 10_240, 768), {}),
        # Gemma 3's encoders: one for a laptop, EmbeddingGemma (arXiv 2509.20354), and
        # the encoder of T5Gemma 2.
        (
            "gemma",
            (8_064, 256, 3, 4, 64, 512, 256),
            _GEMMA | {"num_kv_heads": 2, "local_window": (32, 32), "global_every": 3},
        ),
        (
            "embeddinggemma",
            (262_144, 768, 24, 3, 256, 1_152, 768),
            _GEMMA | {"num_kv_heads": 1, "local_window": (256, 256)},
        ),
        (
            "t5gemma2-270m",
            (262_144, 640, 18, 4, 256, 2_048, 768),
            _GEMMA
            | {"num_kv_heads": 1, "local_window": (255, 256), "rope_factor": 8.0},
        ),
        (
            "embeddinggemma-2",
            (262_144, 512, 24, 4, 256, 2_048, 768),
            {
                "family": "embeddinggemma2",
                "num_kv_heads": 2,
                "global_num_kv_heads": 1,
                "global_head_dim": 512,
                "local_window": (512, 512),
                "global_every": 6,
                "query_scale": 1.0,
                "per_layer_dim": 512,
            },
        ),
        ("qwen3-0.6b", (151_669, 1_024, 28, 16, 128, 3_072, 1_024), _QWEN3),
        ("qwen3-4b", (151_665, 2_560, 36, 32, 128, 9_728, 2_560), _QWEN3),
        ("qwen3-8b", (151_665, 4_096, 36, 32, 128, 12_288, 4_096), _QWEN3),
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
        self.encoder = encoder.Encoder(config)
        if config.projection:
            self.projection_layer = layers.Dense(
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
        pool = last_pool if self.config.pooling == "last" else mean_pool
        pooled = pool(hidden, segment_ids, num_segments)
        # The caller cuts and normalizes, in this order (MRL).
        return self.projection_layer(pooled) if self.config.projection else pooled


class _TokenEmbedder(nn.Module):
    """The embedding table (`token_embedder/embedding`); Gemma scales its rows."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "R L"]) -> Float[Array, "R L M"]:
        scale = self.config.embedding_scale
        init, axes = nn.initializers.normal(1.0 / scale), ("vocab", "embed")
        shape = (self.config.vocab_size, self.config.model_dim)
        embedding = layers.param(self, "embedding", init, axes, shape)
        # The default mode masks ids outside the table, which never occur.
        rows = jnp.take(embedding, tokens, axis=0, mode="clip")
        return rows if scale == 1.0 else rows * scale


def mean_pool(
    hidden: Float[Array, "R L M"], segment_ids: Int[Array, "R L"], num_segments: int
) -> Float[Array, "R S M"]:
    """Averages the hidden states of each segment in float32; an empty one gives 0."""
    # A product with the mask sums each segment without a scatter, and leaves out
    # padding (segment 0).
    member = _members(segment_ids, num_segments)
    total = jnp.einsum("rsl,rlm->rsm", member, hidden.astype(jnp.float32))
    count = jnp.sum(member, axis=-1, keepdims=True)
    return total / jnp.maximum(count, 1.0)


def last_pool(
    hidden: Float[Array, "R L M"], segment_ids: Int[Array, "R L"], num_segments: int
) -> Float[Array, "R S M"]:
    """Returns the hidden state of each segment's last token; an empty one gives 0."""
    member = _members(segment_ids, num_segments)
    has_next = jnp.pad(member[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    return jnp.einsum(
        "rsl,rlm->rsm", member * (1.0 - has_next), hidden.astype(jnp.float32)
    )


def _members(
    segment_ids: Int[Array, "R L"], num_segments: int
) -> Float[Array, "R S L"]:
    """Returns 1 where token l of row r belongs to segment s + 1."""
    segments = jnp.arange(1, num_segments + 1)
    same = segment_ids[:, None, :] == segments[None, :, None]
    return same.astype(jnp.float32)


def normalize(
    x: Float[Array, "... D"], epsilon: float = 1e-12
) -> Float[Array, "... D"]:
    """Scales vectors to unit length in float32; a zero vector stays zero."""
    x = x.astype(jnp.float32)
    # The epsilon is under the root: the gradient of a zero vector is finite.
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def _init(config: EncoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns fresh parameters, boxed with their logical axes."""
    dummy = jnp.ones((1, 8), jnp.int32)  # No parameter depends on the row length.
    variables: Any = DualEncoder(config).init(key, dummy, dummy)
    return variables["params"]


def init_params(config: EncoderConfig, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns fresh parameters: nested dicts with T5X's names, in float32."""
    params: Any = nn.unbox(_init(config, key))
    return params


def embed_texts(
    encoder: DualEncoder,
    params: Any,
    batch: Mapping[str, Array],
    side: str,
    *,
    num_segments: int,
) -> Float[Array, "T D"]:
    """Embeds the texts of one side of a batch, without dropout or normalization.

    `side` is "query" or "passage", and `num_segments` the largest number of texts in a
    row of the batch (`data.features`).
    """
    rows: Any = encoder.apply(
        {"params": params},
        batch[f"{side}_tokens"],
        batch[f"{side}_segment_ids"],
        num_segments=num_segments,
    )
    index = batch[f"{side}_index"]
    return rows[index[:, 0], index[:, 1]]


def compute_params(params: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """Casts matrices to the activation dtype and stacks scanned layers.

    The encoder accepts these parameters too. Training calls this once per step rather
    than once per microbatch. The token embedding stays in float32, because its gradient
    accumulates over all tokens of a batch.
    """
    tree: dict[str, Any] = jax.tree.map_with_path(
        lambda path, leaf: (
            leaf.astype(config.dtype) if path[-1].key == "kernel" else leaf
        ),
        params["encoder"],
    )
    if config.scan_layers:
        tree = encoder.stack_layers(tree, config)
    return {**params, "encoder": tree}


def stack_specs(specs: Mapping[str, Any], config: EncoderConfig) -> dict[str, Any]:
    """Returns the partition specs of `compute_params`, given the parameters' specs."""
    if not config.scan_layers:
        return dict(specs)

    # The layer axis in front is not split; all layers have the same spec.
    def stack(spec: PartitionSpec, *_: PartitionSpec) -> PartitionSpec:
        return PartitionSpec(None, *spec)

    stacked = encoder.stack_layers(specs["encoder"], config, stack)
    return {**specs, "encoder": stacked}


def unstack_gradients(
    gradients: Mapping[str, Any], config: EncoderConfig
) -> dict[str, Any]:
    """Maps gradients of `compute_params` back to the parameter tree."""
    if not config.scan_layers:
        return dict(gradients)
    tree = encoder.unstack_layers(gradients["encoder"], config)
    return {**gradients, "encoder": tree}


def abstract_params(config: EncoderConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns shapes and logical axes of the parameters without allocating them."""
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def flops_per_token(config: EncoderConfig, length: int) -> float:
    """Returns the training FLOPs per token of a row of `length` tokens.

    A matrix product costs 2 FLOPs per weight forward and 4 backward. Rematerialization
    does not count.
    """
    total = 0.0
    for is_local in config.is_local:
        num_heads, num_kv_heads, head_dim = config.heads(is_local)
        # Weights of a layer: query and out, key and value; the MLP's branches and `wo`;
        # gate, projection and output of the per-layer embeddings.
        total += 2 * config.model_dim * (num_heads + num_kv_heads) * head_dim
        total += (len(config.mlp_activations) + 1) * config.model_dim * config.mlp_dim
        total += 3 * config.model_dim * config.per_layer_dim
        # A token's logits and weighted sum cost as much as 2 * H * K * L weights.
        reach = min(length, sum(config.local_window) + 1) if is_local else length
        total += 2 * num_heads * head_dim * reach
    return 6.0 * total
