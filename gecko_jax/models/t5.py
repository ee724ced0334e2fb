"""The layers of a T5 encoder, under T5X's parameter names and logical axes.

T5 differs from today's transformers, and its checkpoints require the differences: an
RMS norm without bias before each sublayer, no 1/sqrt(K) in the attention (the query
initializer includes it), no biases, and a learned bias on the attention logits that
depends only on the distance between two tokens.

Several texts can share a row. `segment_ids` assigns tokens to texts (0 is padding), and
a token attends only to its own segment. The relative bias depends only on distances
within a row, so a packed text has exactly the embedding that it has alone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gecko_jax.models import families, layers


def relative_position_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "L L"]:
    """Returns the bucket of key position minus query position.

    Each direction has half of the buckets. Half of those are exact distances; the rest
    grow logarithmically up to `max_distance` (T5, bidirectional).
    """
    # The upper half of the buckets is for keys after the query.
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    num_buckets //= 2
    buckets = (relative > 0).astype(np.int32) * num_buckets
    distance = np.abs(relative)
    exact = num_buckets // 2
    # float32 as in T5: rounding decides some bucket borders.
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.log(
        np.float32(max_distance / exact)
    )
    large = exact + (log_ratio * (num_buckets - exact)).astype(np.int32)
    large = np.minimum(large, num_buckets - 1)
    return (buckets + np.where(distance < exact, distance, large)).astype(np.int32)


class RelativePositionBias(nn.Module):
    """A learned bias per head and distance bucket, added to the attention logits."""

    config: families.EncoderConfig

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "H L L"]:
        """Returns the bias of rows of `length` tokens, query by key."""
        config = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")  # T5X's.
        axes = ("heads", "relpos_buckets")
        shape = (config.num_heads, config.relpos_num_buckets)
        table = layers.param(self, "rel_embedding", init, axes, shape)
        buckets = relative_position_buckets(
            length, config.relpos_num_buckets, config.relpos_max_distance
        )
        # A one-hot product instead of a gather: its gradient is a matrix product rather
        # than a scatter of H * L * L entries.
        one_hot = jax.nn.one_hot(buckets, config.relpos_num_buckets, dtype=jnp.float32)
        return jnp.einsum("hb,lmb->hlm", table, one_hot)


class Attention(nn.Module):
    """Multi-head self-attention inside each segment."""

    config: families.EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L M"],
        bias: Float[Array, "R H L L"],
        dropout_keys: Key[Array, " R"] | None,
    ) -> Float[Array, "R L M"]:
        """Attends within segments; `bias` includes the segment mask."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        joined = config.num_heads * config.head_dim

        def project(name: str, stddev: float) -> Float[Array, "R H L K"]:
            init = nn.initializers.normal(stddev)
            dense = layers.Dense(joined, ("embed", "joined_kv"), init, dtype, name=name)
            heads = dense(x).reshape(*x.shape[:2], config.num_heads, config.head_dim)
            return heads.swapaxes(1, 2)

        fan_in = config.model_dim**-0.5
        # T5 puts the attention's 1/sqrt(K) into the query's initializer.
        query = project("query", fan_in * config.head_dim**-0.5)
        key = project("key", fan_in)
        value = project("value", fan_in)
        is_fused = (
            config.attention == "cudnn"
            and config.dtype == "bfloat16"
            and (dropout_keys is None or config.dropout_rate == 0.0)
            and jax.default_backend() == "gpu"
        )
        # Logits and softmax are float32 in every activation dtype.
        if is_fused:
            mixed = _fused_attention(query, key, value, bias)
        else:
            logits = jnp.einsum(
                "bhlk,bhmk->bhlm", query, key, preferred_element_type=jnp.float32
            )
            weights = jax.nn.softmax(logits + bias, axis=-1)
            weights = layers.dropout(weights, config.dropout_rate, dropout_keys)
            mixed = jnp.einsum("bhlm,bhmk->bhlk", weights.astype(dtype), value)
            mixed = mixed.swapaxes(1, 2)
        init = nn.initializers.normal(config.residual_init_scale * joined**-0.5)
        out = layers.Dense(
            config.model_dim, ("joined_kv", "embed"), init, dtype, name="out"
        )
        return out(mixed.reshape(*x.shape[:2], joined))


def _fused_attention(
    query: Float[Array, "R H L K"],
    key: Float[Array, "R H L K"],
    value: Float[Array, "R H L K"],
    bias: Float[Array, "R H L L"],
) -> Float[Array, "R L H K"]:
    """Attends in one kernel, which keeps the logits out of memory.

    The bias is rounded to the query's dtype, the only one that cuDNN accepts.
    """
    return jax.nn.dot_product_attention(
        *(heads.swapaxes(1, 2) for heads in (query, key, value)),
        bias=bias.astype(query.dtype),
        scale=1.0,
        implementation="cudnn",
    )


class Mlp(nn.Module):
    """The position-wise MLP: gated (`wi_0`, `wi_1`) in T5 1.1, plain (`wi`) in 1.0."""

    config: families.EncoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R L M"], dropout_keys: Key[Array, " R"] | None
    ) -> Float[Array, "R L M"]:
        """Applies the MLP to each token."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        hidden: Array | None = None
        # A gated MLP multiplies its branches: gelu(x wi_0) * (x wi_1).
        for index, activation in enumerate(config.mlp_activations):
            name = "wi" if len(config.mlp_activations) == 1 else f"wi_{index}"
            init = nn.initializers.normal(config.model_dim**-0.5)
            dense = layers.Dense(
                config.mlp_dim, ("embed", "mlp"), init, dtype, name=name
            )
            branch = layers.ACTIVATIONS[activation](dense(x))
            hidden = branch if hidden is None else hidden * branch
        assert hidden is not None
        hidden = layers.dropout(hidden, config.dropout_rate, dropout_keys)
        init = nn.initializers.normal(config.residual_init_scale * config.mlp_dim**-0.5)
        wo = layers.Dense(config.model_dim, ("mlp", "embed"), init, dtype, name="wo")
        return wo(hidden)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with a norm before it and a residual around it."""

    config: families.EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L M"],
        segment_mask: Float[Array, "R 1 L L"],
        shared_bias: Float[Array, "H L L"] | None,
        dropout_keys: Key[Array, " R"] | None,
    ) -> Float[Array, "R L M"]:
        """Runs the layer; without `shared_bias` it has its own (umT5)."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        # One dropout key each for the attention weights, the attention's output, the
        # MLP's hidden units and its output.
        keys: Sequence[Array | None] = [None] * 4
        if dropout_keys is not None:
            keys = list(jax.vmap(lambda key: jax.random.split(key, 4))(dropout_keys).T)
        if shared_bias is None:
            shared_bias = RelativePositionBias(config, name="relpos_bias")(x.shape[1])
        # Pre-norm residual blocks: x + f(norm(x)).
        y = layers.LayerNorm(dtype, name="pre_attention_layer_norm")(x)
        bias = segment_mask + shared_bias[None]
        y = Attention(config, name="attention")(y, bias, keys[0])
        x = x + layers.dropout(y, config.dropout_rate, keys[1])
        y = layers.LayerNorm(dtype, name="pre_mlp_layer_norm")(x)
        y = Mlp(config, name="mlp")(y, keys[2])
        return x + layers.dropout(y, config.dropout_rate, keys[3])
