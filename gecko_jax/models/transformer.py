"""A decoder language model of the Llama, Qwen or Gemma 3 family, as pure functions.

    hidden, own = extend(params, config, tokens, positions)
    log_probs = token_log_probs(params, config, hidden[0], targets)

`extend` takes tokens and returns their hidden states, keys and values. Earlier tokens
are given as `KeyValues`: a *prefix* that all rows share and that is in memory once, and
a *cache* with the keys and values of each row. A token attends to every key whose
position is not after its own. Padding has the position `PAD_POSITION`, which is after
every token of a text, so no token attends to it.

Layers are stacked and run as a scan, so the compile time does not depend on the depth.
All families have RMS norms, rotary positions, grouped heads and gated MLPs; what Qwen
and Gemma 3 add are settings of `DecoderConfig`.

Additional dimension letters: `R` query heads per key head, `G` key heads, `S` keys, `T`
scored positions, `Y` targets per position.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gecko_jax.models import layers, transformer_layer

PAD_POSITION = np.iinfo(np.int32).max

# Maximum number of logits in memory at once (128 MiB in float32).
_HEAD_LOGITS = 1 << 25


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and settings of a decoder."""

    vocab_size: int  # rows of the token embedding
    model_dim: int  # width of the hidden states
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key and value heads; a divisor of `num_heads`
    head_dim: int
    mlp_dim: int  # width of the gated MLP
    context_length: int  # longest context in training, in tokens
    norm_epsilon: float  # added to the mean square in norms
    rope_base: float  # base of the rotary frequencies
    # Divisor of each frequency (Llama 3's and linear scaling); None for no scaling.
    rope_factors: tuple[float, ...] | None = None
    tied: bool = True  # the output head is the token embedding
    activation: Literal["silu", "gelu"] = "silu"  # "gelu" is the tanh approximation
    embedding_scale: float = 1.0  # factor of the token embeddings
    query_scale: float | None = None  # factor of the queries; None is head_dim ** -0.5
    sandwich_norms: bool = False  # a norm also follows the attention and the MLP
    head_norms: bool = False  # each query and key head is normalized
    qkv_bias: bool = False  # queries, keys and values have a bias (Qwen 2)
    # Keys that a token of a local layer attends to, itself included; None if all layers
    # are global.
    local_window: int | None = None
    global_every: int = 1  # the last of every `global_every` layers is global
    local_rope_base: float = 10_000.0  # base in local layers, without scaling

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Whether each layer is local."""
        return tuple(
            self.local_window is not None and (layer + 1) % self.global_every != 0
            for layer in range(self.num_layers)
        )


class KeyValues(NamedTuple):
    """Keys and values of every layer, `[layers, B, S, G, K]`, and their positions.

    A shared prefix has no axis `B`.
    """

    keys: Float[Array, "layers *rows S G K"]
    values: Float[Array, "layers *rows S G K"]
    positions: Int[Array, "*rows S"]


def extend(
    params: dict[str, Any],
    config: DecoderConfig,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    prefix: KeyValues | None = None,
    cache: KeyValues | None = None,
) -> tuple[Float[Array, "B L M"], KeyValues]:
    """Runs the decoder on tokens that follow a prefix and a cache.

    Args:
        params: Parameters of `llm.decoder_weights`; matrix products use their dtype,
            which is bfloat16 for uint16, its bits.
        config: The decoder.
        tokens: Token ids; any id for padding.
        positions: Position of each token in its text, from 0; `PAD_POSITION` for
            padding.
        prefix: Keys and values that all rows share.
        cache: Keys and values of each row.

    Returns:
        The normalized hidden states (undefined for padding), and the keys and values of
        `tokens`.
    """
    with _precision(params):
        return _extend(params, config, tokens, positions, prefix, cache)


def token_log_probs(
    params: dict[str, Any],
    config: DecoderConfig,
    hidden: Float[Array, "T M"],
    targets: Int[Array, "T Y"],
) -> Float[Array, "T Y"]:
    """Returns log-probabilities of the tokens after each position, in float32 nats.

    Memory does not grow with T * V: positions are processed in blocks.
    """
    # Pad the positions to whole blocks of `size`.
    size = min(max(_HEAD_LOGITS // config.vocab_size, 1), hidden.shape[0])
    blocks = -(-hidden.shape[0] // size)
    rows = ((0, blocks * size - hidden.shape[0]), (0, 0))
    hidden_blocks = jnp.pad(hidden, rows).reshape(blocks, size, hidden.shape[1])
    target_blocks = jnp.pad(targets, rows).reshape(blocks, size, targets.shape[1])

    def block(inputs: tuple[Array, Array]) -> Array:
        logits = next_logits(params, config, inputs[0])
        chosen = jnp.take_along_axis(logits, inputs[1], axis=1)
        return chosen - jax.nn.logsumexp(logits, axis=1, keepdims=True)

    log_probs = jax.lax.map(block, (hidden_blocks, target_blocks))
    # Drop the padding of the last block.
    return log_probs.reshape(blocks * size, targets.shape[1])[: hidden.shape[0]]


def next_logits(
    params: dict[str, Any], config: DecoderConfig, hidden: Float[Array, "T M"]
) -> Float[Array, "T V"]:
    """Returns the logits of the token after each position, in float32."""
    head = _from_bits(params["embedding"] if config.tied else params["output"])
    hidden = hidden.astype(head.dtype)
    with _precision(params):
        return jnp.einsum("tm,vm->tv", hidden, head, preferred_element_type=jnp.float32)


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """Returns a tree like the parameters, with their logical axes."""
    spec = jax.sharding.PartitionSpec
    layers = {
        "attention_norm": spec("layers", "embed"),
        "query": spec("layers", "embed", "heads", "kv"),
        "key": spec("layers", "embed", "heads", "kv"),
        "value": spec("layers", "embed", "heads", "kv"),
        "out": spec("layers", "heads", "kv", "embed"),
        "mlp_norm": spec("layers", "embed"),
        "gate": spec("layers", "embed", "mlp"),
        "up": spec("layers", "embed", "mlp"),
        "down": spec("layers", "mlp", "embed"),
    }
    if config.head_norms:
        layers |= {name: spec("layers", "kv") for name in ("query_norm", "key_norm")}
    if config.qkv_bias:
        for name in ("query_bias", "key_bias", "value_bias"):
            layers[name] = spec("layers", "heads", "kv")
    if config.sandwich_norms:
        for name in ("post_attention_norm", "post_mlp_norm"):
            layers[name] = spec("layers", "embed")
    axes = {
        "embedding": spec("vocab", "embed"),
        "layers": layers,
        "final_norm": spec("embed"),
    }
    if not config.tied:
        axes["output"] = spec("vocab", "embed")
    return axes


def param_shapes(config: DecoderConfig) -> dict[str, Any]:
    """Returns a tree like the parameters, with their shapes."""
    sizes = {
        "layers": config.num_layers,
        "embed": config.model_dim,
        "vocab": config.vocab_size,
        "mlp": config.mlp_dim,
        "kv": config.head_dim,
    }

    def shape(path: Any, axes: jax.sharding.PartitionSpec) -> tuple[int, ...]:
        is_kv = path[-1].key.removesuffix("_bias") in ("key", "value")
        heads = config.num_kv_heads if is_kv else config.num_heads
        return tuple(heads if axis == "heads" else sizes[axis] for axis in axes)

    return jax.tree.map_with_path(
        shape,
        logical_axes(config),
        is_leaf=lambda node: isinstance(node, jax.sharding.PartitionSpec),
    )


def _extend(
    params: dict[str, Any],
    config: DecoderConfig,
    tokens: Array,
    positions: Array,
    prefix: KeyValues | None,
    cache: KeyValues | None,
) -> tuple[Array, KeyValues]:
    # Hidden states are float32; keys, values and weights have the products' dtype.
    hidden = _from_bits(jnp.take(params["embedding"], tokens, axis=0, mode="clip"))
    dtype = hidden.dtype
    hidden = hidden.astype(jnp.float32) * config.embedding_scale
    # Up to three parts of keys: the prefix, the row's cache, and the tokens themselves.
    parts = [part for part in (prefix, cache) if part is not None]
    key_positions = [*(jnp.atleast_2d(part.positions) for part in parts), positions]
    # Causal masks, [B or 1, L, S]: True where a token attends to a key.
    masks = [keys[:, None, :] <= positions[:, :, None] for keys in key_positions]
    angles = transformer_layer.rotary(
        positions, config.rope_base, config.rope_factors, config.head_dim
    )
    full = local = (masks, angles)
    if config.local_window is not None:
        # A local layer attends to the last `local_window` positions only.
        local_masks = [
            mask & (positions[:, :, None] - keys[:, None, :] < config.local_window)
            for mask, keys in zip(masks, key_positions, strict=True)
        ]
        local_angles = transformer_layer.rotary(
            positions, config.local_rope_base, None, config.head_dim
        )
        local = (local_masks, local_angles)

    def layer(hidden: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        weights, is_local, *earlier = jax.tree.map(_from_bits, inputs)
        # The scan runs one program for all layers, so local layers select their masks
        # and rotary angles at run time.
        layer_masks, layer_rotary = full
        if local is not full:
            layer_masks, layer_rotary = jax.tree.map(
                lambda near, far: jnp.where(is_local, near, far), local, full
            )

        def attend(query: Array, key: Array, value: Array) -> Array:
            own = (key.astype(dtype), value.astype(dtype))
            mixed = _attend(query.astype(dtype), [*earlier, own], layer_masks)
            return mixed.astype(jnp.float32)

        # Keys are rotated before they are cached: a rotation depends only on the key's
        # own position.
        hidden, (key, value) = transformer_layer.run_layer(
            weights,
            hidden,
            layer_rotary,
            attend,
            activation=config.activation,
            query_scale=config.query_scale or config.head_dim**-0.5,
            norm_epsilon=config.norm_epsilon,
        )
        return hidden, (key.astype(dtype), value.astype(dtype))

    # Every input of the scan has a leading axis of layers, keys and values included.
    earlier = [(part.keys, part.values) for part in parts]
    inputs = (params["layers"], jnp.array(config.is_local), *earlier)
    hidden, (keys, values) = jax.lax.scan(layer, hidden, inputs)
    final_norm = _from_bits(params["final_norm"])
    normed = layers.norm(hidden, final_norm, config.norm_epsilon)
    return normed, KeyValues(keys, values, positions)


def _from_bits(x: Any) -> Any:
    """Returns bfloat16 values from their bits, and any other array unchanged.

    XLA:CPU converts a bfloat16 input of a loop to float32, all layers at once. Weights
    that are given as bits stay as they are, and each layer reads its own.
    """
    is_bits = x.dtype == jnp.uint16
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if is_bits else x


def _attend(
    query: Float[Array, "B L H K"], parts: list[tuple[Array, Array]], masks: list[Array]
) -> Float[Array, "B L H K"]:
    """Attends to several parts of keys with one softmax over all of them.

    The parts are never concatenated, so a shared prefix is not copied to every row. A
    part without the axis `B` is shared by the rows, and so is a mask with B = 1.
    """
    batch, length, heads, width = query.shape
    num_kv_heads = parts[0][0].shape[-2]
    is_own = [keys.ndim == 4 for keys, _ in parts]
    # `lax.map` and `vmap` split only the parts that belong to a row.
    # `attend_row` closes over the shared parts.
    own_parts = [part for part, own in zip(parts, is_own, strict=True) if own]
    masks = [jnp.broadcast_to(mask, (batch, *mask.shape[1:])) for mask in masks]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def attend_row(row: tuple) -> Array:
        query, own, masks = row
        own = iter(own)
        all_parts = [
            next(own) if is_row else part
            for part, is_row in zip(parts, is_own, strict=True)
        ]
        # Grouped-query attention: R query heads share a key head.
        grouped = query.reshape(length, num_kv_heads, -1, width)
        products = [product("lgrk,sgk->grls", grouped, keys) for keys, _ in all_parts]
        logits = [
            jnp.where(mask[None, None], part, -jnp.inf)
            for part, mask in zip(products, masks, strict=True)
        ]
        # A softmax over all parts: subtract the common maximum, exponentiate, divide by
        # the common sum. The maximum is finite, because a token attends to its own key.
        top = functools.reduce(
            jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in logits]
        )
        weights = [jnp.exp(part - top) for part in logits]
        total = sum(
            (jnp.sum(part, axis=-1, keepdims=True) for part in weights),
            start=jnp.zeros_like(top),
        )
        mixed = sum(
            product("grls,sgk->grlk", part.astype(values.dtype), values)
            for part, (_, values) in zip(weights, all_parts, strict=True)
        )
        # Dividing after the product takes K divisions per token instead of S.
        mixed = (mixed / total).astype(query.dtype)
        return mixed.transpose(2, 0, 1, 3).reshape(length, heads, width)

    # On a CPU, one row at a time is fastest: the logits of one row fit the caches.
    row_by_row = jax.default_backend() == "cpu" and length > 1
    over_rows = jax.lax.map if row_by_row else lambda f, rows: jax.vmap(f)(rows)
    return over_rows(attend_row, (query, own_parts, masks))


def _precision(params: dict[str, Any]) -> Any:
    # By default, accelerators round the inputs of float32 products.
    is_float32 = params["embedding"].dtype == jnp.float32
    return jax.default_matmul_precision("highest" if is_float32 else "default")
