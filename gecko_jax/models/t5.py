"""The layers of a T5 encoder, under T5X's parameter names and logical axes.

T5 differs from today's transformers, and its checkpoints require the differences: an
RMS norm without bias before each sublayer, no 1/sqrt(K) in the attention (the query
initializer includes it), no biases, and a learned bias on the attention logits that
depends only on the distance between two tokens.

Several texts can share a row. `segment_ids` assigns tokens to texts (0 is padding), and
a token attends only to its own segment. The relative bias depends only on distances
within a row, so a packed text has exactly the embedding that it has alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

Initializer = Callable[..., Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # T5 1.1 uses the tanh form
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}
REMAT_POLICIES = ("none", "full", "dots")
ATTENTIONS = ("xla", "cudnn")
DTYPES = ("float32", "bfloat16")

# Name of the stacked layers in a parameter tree.
_STACKED = "layers"

# Below any real logit and far from overflow in bfloat16; its exp is 0.
MASKED_LOGIT = -1e9


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and settings of the dual encoder; every T5 encoder is one of these.

    Attributes:
        vocab_size: Rows of the embedding table (T5: 32,128; mT5: 250,112).
        model_dim: Encoder width M.
        num_layers: Encoder layers.
        num_heads: Attention heads H.
        head_dim: Head width K; H * K need not be M.
        mlp_dim: MLP width F.
        mlp_activations: ("gelu", "linear") is gated GELU (T5 1.1, mT5, umT5);
            ("relu",) is T5 1.0.
        shared_relative_bias: One relative bias for all layers (T5, mT5), or one each
            (umT5).
        relpos_num_buckets: Relative-position buckets of both directions together.
        relpos_max_distance: Distance in tokens from which all share a bucket.
        embedding_dim: Width D of the embedding.
        projection: Whether a matrix maps the pooled width M to D. Without one D is M (a
            plain T5 encoder, or a Sentence-T5 without its dense layer).
        dropout_rate: Share of activations dropped in training.
        dtype: Activation dtype, "float32" or "bfloat16". Parameters, norms, softmax,
            pooling and similarities are always float32.
        scan_layers: Compiles one layer and scans over all, which compiles faster.
        remat: Rematerialization of each layer: "none", everything ("full"), or all but
            matrix products ("dots").
        l2_epsilon: Added under the root when a trained model normalizes embeddings;
            t5x_retrieval uses 1e-6. Losses use 1e-12.
        attention: "cudnn" runs the attention as one cuDNN kernel on a GPU, in bfloat16
            and without dropout. In all other cases it is the same as "xla".
        residual_init_scale: Scale of residual-branch initializers, relative to T5X's.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    mlp_activations: Sequence[str] = ("gelu", "linear")
    shared_relative_bias: bool = True
    relpos_num_buckets: int = 32
    relpos_max_distance: int = 128
    embedding_dim: int = 768
    projection: bool = True
    dropout_rate: float = 0.0
    dtype: str = "float32"
    scan_layers: bool = False
    remat: str = "none"
    l2_epsilon: float = 1e-12
    attention: str = "xla"
    residual_init_scale: float = 0.1

    def __post_init__(self):
        # JSON and ml_collections pass lists, but the config must be hashable.
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        if not self.projection and self.embedding_dim != self.model_dim:
            raise ValueError(
                f"embedding_dim={self.embedding_dim}: without a projection it must "
                f"equal model_dim={self.model_dim}; change one, or set projection=True"
            )


def dropout(
    x: Float[Array, "R ..."], rate: float, keys: Key[Array, " R"] | None
) -> Float[Array, "R ..."]:
    """Drops entries with probability `rate`; without keys, drops nothing.

    All positions of a row (axis -2) share one mask, as in T5X: drawing random bits for
    every token would take longer than the layer. Each row has its own key, so its masks
    depend on neither the mesh nor the microbatch. The keys are an argument because a
    Flax rng stream folds in the module's path, which would give a scanned stack other
    masks than an unrolled one.
    """
    if keys is None or rate == 0.0:
        return x
    shape = (*x.shape[1:-2], 1, x.shape[-1])
    # The remaining entries are scaled up, so the expectation does not change.
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def relative_position_buckets(
    query_length: int, key_length: int, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Returns the bucket of key position minus query position, [L, L] int32.

    Each direction has half of the buckets. Half of those are exact distances; the rest
    grow logarithmically up to `max_distance` (T5, bidirectional).
    """
    # The upper half of the buckets is for keys after the query.
    relative = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
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


class Dense(nn.Module):
    """A matrix product without bias."""

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... X"]) -> Float[Array, "... Y"]:
        """Multiplies the last axis, in `dtype`."""
        # Flax unboxes it, but its types do not say so.
        kernel: Any = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        # Flatten to two dimensions: XLA:CPU sums a gradient over two leading axes with
        # a transpose, which made the training step a third slower.
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = jnp.einsum("xm,mf->xf", flat, kernel.astype(self.dtype))
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """T5's norm: root mean square in float32, no centering, no bias."""

    dtype: jnp.dtype
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... M"]) -> Float[Array, "... M"]:
        """Normalizes the last axis; takes any dtype and returns `dtype`."""
        # Flax unboxes it, but its types do not say so.
        scale: Any = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
            (x.shape[-1],),
            jnp.float32,
        )
        # Two dimensions, as in `Dense`, for the gradient of the scale.
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(flat), axis=-1, keepdims=True)
        normed = flat * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * scale[None]).astype(self.dtype).reshape(x.shape)


class RelativePositionBias(nn.Module):
    """A learned bias per head and distance bucket, added to the attention logits."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "H L L"]:
        """Returns the bias of rows of `length` tokens, query by key."""
        config = self.config
        table = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(
                # T5X: variance_scaling(1.0, "fan_avg", "uniform").
                nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
                ("heads", "relpos_buckets"),
            ),
            (config.num_heads, config.relpos_num_buckets),
            jnp.float32,
        )
        buckets = relative_position_buckets(
            length, length, config.relpos_num_buckets, config.relpos_max_distance
        )
        # A one-hot product instead of a gather: its gradient is a matrix product rather
        # than a scatter of H * L * L entries.
        one_hot = jax.nn.one_hot(buckets, config.relpos_num_buckets, dtype=jnp.float32)
        return jnp.einsum("hb,lmb->hlm", table, one_hot)


class Attention(nn.Module):
    """Multi-head self-attention inside each segment."""

    config: EncoderConfig

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
            dense = Dense(joined, ("embed", "joined_kv"), init, dtype, name=name)
            heads = dense(x).reshape(*x.shape[:2], config.num_heads, config.head_dim)
            return heads.swapaxes(1, 2)

        fan_in = config.model_dim**-0.5
        # T5 puts the attention's 1/sqrt(K) into the query's initializer.
        query = project("query", fan_in * config.head_dim**-0.5)
        key = project("key", fan_in)
        value = project("value", fan_in)
        # Logits and softmax are float32 in every activation dtype.
        if _is_fused(config, dropout_keys):
            mixed = _fused_attention(query, key, value, bias)
        else:
            logits = jnp.einsum(
                "bhlk,bhmk->bhlm", query, key, preferred_element_type=jnp.float32
            )
            weights = jax.nn.softmax(logits + bias, axis=-1)
            weights = dropout(weights, config.dropout_rate, dropout_keys).astype(dtype)
            mixed = jnp.einsum("bhlm,bhmk->bhlk", weights, value).swapaxes(1, 2)
        init = nn.initializers.normal(config.residual_init_scale * joined**-0.5)
        out = Dense(config.model_dim, ("joined_kv", "embed"), init, dtype, name="out")
        return out(mixed.reshape(*x.shape[:2], joined))


def _is_fused(config: EncoderConfig, dropout_keys: Key[Array, " R"] | None) -> bool:
    """Returns whether cuDNN computes the attention of this call."""
    return (
        config.attention == "cudnn"
        and config.dtype == "bfloat16"
        and (dropout_keys is None or config.dropout_rate == 0.0)
        and jax.default_backend() == "gpu"
    )


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

    config: EncoderConfig

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
            dense = Dense(config.mlp_dim, ("embed", "mlp"), init, dtype, name=name)
            branch = ACTIVATIONS[activation](dense(x))
            hidden = branch if hidden is None else hidden * branch
        assert hidden is not None
        hidden = dropout(hidden, config.dropout_rate, dropout_keys)
        init = nn.initializers.normal(config.residual_init_scale * config.mlp_dim**-0.5)
        wo = Dense(config.model_dim, ("mlp", "embed"), init, dtype, name="wo")
        return wo(hidden)


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each with a norm before it and a residual around it."""

    config: EncoderConfig

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
        y = LayerNorm(dtype, name="pre_attention_layer_norm")(x)
        bias = segment_mask + shared_bias[None]
        y = Attention(config, name="attention")(y, bias, keys[0])
        x = x + dropout(y, config.dropout_rate, keys[1])
        y = LayerNorm(dtype, name="pre_mlp_layer_norm")(x)
        y = Mlp(config, name="mlp")(y, keys[2])
        return x + dropout(y, config.dropout_rate, keys[3])


class Encoder(nn.Module):
    """Stack of layers, from token embeddings to hidden states."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L M"],
        segment_ids: Int[Array, "R L"],
        dropout_keys: Key[Array, " R"] | None = None,
    ) -> Float[Array, "R L M"]:
        """Returns normalized hidden states; those of padding are undefined."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        # Added to the logits: 0 inside a segment, a large negative number elsewhere.
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        segment_mask = jnp.where(same, 0.0, MASKED_LOGIT)[:, None]
        shared_bias = None
        if config.shared_relative_bias:
            shared_bias = RelativePositionBias(config, name="relpos_bias")(x.shape[1])

        def layer_keys(index: int | Array) -> Array | None:
            # Fold in the layer's index, so that a scan draws the same masks.
            if dropout_keys is None:
                return None
            return jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, index)

        input_keys = layer_keys(config.num_layers)
        x = dropout(x.astype(dtype), config.dropout_rate, input_keys)
        # Initialization always unrolls, so parameters have T5X's names `layers_{i}`.
        if config.scan_layers and not self.is_initializing():
            x = self._scan_layers(x, segment_mask, shared_bias, layer_keys)
        else:
            layer = _remat(EncoderLayer, config.remat)
            for i in range(config.num_layers):
                x = layer(config, name=f"layers_{i}")(
                    x, segment_mask, shared_bias, layer_keys(i)
                )
        x = LayerNorm(dtype, name="encoder_norm")(x)
        return dropout(x, config.dropout_rate, layer_keys(config.num_layers + 1))

    def _scan_layers(
        self,
        x: Float[Array, "R L M"],
        segment_mask: Float[Array, "R 1 L L"],
        shared_bias: Float[Array, "H L L"] | None,
        layer_keys: Callable[[Array], Array | None],
    ) -> Float[Array, "R L M"]:
        """Runs the layers as a scan over stacked parameters.

        Parameters are stacked only inside a step (`stack_layers`): the names on disk,
        the optimizer and the result do not depend on the setting (docs/decisions.md).
        """
        config = self.config
        # Training stacks once per step (`compute_params`); other callers do it here.
        params: Any = self.variables["params"]
        if _STACKED not in params:
            params = stack_layers(params, config.num_layers)
        stacked = params[_STACKED]
        layer = _remat(EncoderLayer, config.remat)(config, parent=None)

        def step(x: Array, layer_params_and_index: tuple) -> tuple[Any, None]:
            layer_params, index = layer_params_and_index
            y = layer.apply(
                {"params": layer_params},
                x,
                segment_mask,
                shared_bias,
                layer_keys(index),
            )
            return y, None

        x, _ = jax.lax.scan(step, x, (stacked, jnp.arange(config.num_layers)))
        return x


def stack_layers(
    params: Mapping[str, Any],
    num_layers: int,
    stack: Callable[..., Any] = lambda *leaves: jnp.stack(leaves),
) -> dict[str, Any]:
    """Stacks the layers of the encoder's parameters, or of a tree like them."""
    layers = [params[f"layers_{i}"] for i in range(num_layers)]
    others = {k: v for k, v in params.items() if not k.startswith("layers_")}
    return others | {_STACKED: jax.tree.map(stack, *layers)}


def unstack_layers(params: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Undoes `stack_layers`."""
    layers = {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params[_STACKED])
        for i in range(num_layers)
    }
    return {k: v for k, v in params.items() if k != _STACKED} | layers


def _remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
    if policy == "none":
        return layer
    # "dots" keeps the results of matrix products with weights and recomputes the rest,
    # attention included; "full" keeps nothing but the layer's input.
    policies = jax.checkpoint_policies
    saveable = policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return nn.remat(layer, policy=saveable, prevent_cse=True)
