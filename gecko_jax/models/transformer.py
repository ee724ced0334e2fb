"""The decoder: a language model of the Llama or the Gemma 3 family, as pure functions.

    hidden, own = extend(params, config, tokens, positions)
    log_probs = token_log_probs(params, config, hidden[0], targets)

`extend` is all there is: tokens in, hidden states and the tokens' keys and values out.
What came before is handed in as `KeyValues`: a *prefix* that all rows share, held once
however many rows there are, and a *cache* of each row's own. Order is told by positions
alone: a token sees every key whose position is not after its own, so padding is a key
at `PAD_POSITION`, which is after everything.

Layers are stacked and run as a scan, so that a deep model compiles as fast as a flat
one. RMS norms, rotary positions, grouped heads and gated MLPs are common to both
families; what Gemma 3 adds are settings of `DecoderConfig`.

Dimension letters beside the usual: `R` query heads of a key head, `G` key heads, `S`
keys, `T` scored positions, `Y` targets of a position.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PAD_POSITION = np.iinfo(np.int32).max

# Logits that are in memory at once: 128 MiB in float32.
_HEAD_LOGITS = 1 << 25


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shapes and settings of a decoder.

    Attributes:
        vocab_size: Rows of the token table.
        model_dim: Width of the hidden states.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves `num_heads / num_kv_heads`.
        head_dim: Width of a head.
        mlp_dim: Width of the gated MLP.
        context_length: Tokens the model was trained for.
        norm_epsilon: Added to mean squares.
        rope_base: Base of the rotary frequencies.
        rope_factors: Divides each frequency (Llama 3's and linear scaling); None is 1.
        tied: The output head is the token table.
        activation: Of the MLP's gate; "gelu" is the tanh approximation.
        embedding_scale: Multiplies the token embeddings.
        query_scale: Multiplies the queries; None is `head_dim ** -0.5`.
        sandwich_norms: Norms after attention and MLP as well as before.
        head_norms: Norms of each query and key head.
        local_window: Keys that a local layer sees; None where all layers are global.
        global_every: Of so many layers the last is global, the others local.
        local_rope_base: Base of the local layers, whose frequencies are not scaled.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    context_length: int
    norm_epsilon: float
    rope_base: float
    rope_factors: tuple[float, ...] | None = None
    tied: bool = True
    activation: Literal["silu", "gelu"] = "silu"
    embedding_scale: float = 1.0
    query_scale: float | None = None
    sandwich_norms: bool = False
    head_norms: bool = False
    local_window: int | None = None
    global_every: int = 1
    local_rope_base: float = 10_000.0

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Of each layer, whether it sees `local_window` keys only."""
        return tuple(
            self.local_window is not None and (layer + 1) % self.global_every != 0
            for layer in range(self.num_layers)
        )


class KeyValues(NamedTuple):
    """Keys and values of every layer, `[layers, B, S, G, K]`, and their positions.

    A prefix that all rows share has no `B`.
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
    """Runs tokens on top of what came before them.

    Args:
        params: As `decoder_weights` loads them; their dtype is that of the products.
        config: The decoder.
        tokens: Token ids, anything where there is padding.
        positions: Of each token in its text, from 0; `PAD_POSITION` for padding.
        prefix: Keys and values that all rows share.
        cache: Keys and values of each row.

    Returns:
        The normalized hidden states (padding's are meaningless), and the keys and
        values of `tokens` alone.
    """
    with _precision(params):
        return _extend(params, config, tokens, positions, prefix, cache)


def token_log_probs(
    params: dict[str, Any],
    config: DecoderConfig,
    hidden: Float[Array, "T M"],
    targets: Int[Array, "T Y"],
) -> Float[Array, "T Y"]:
    """Returns the log-probabilities of tokens to come next, in nats, float32.

    The logits of a few positions are in memory at once, whatever T is.
    """
    size = min(max(_HEAD_LOGITS // config.vocab_size, 1), hidden.shape[0])
    blocks = -(-hidden.shape[0] // size)
    rows = ((0, blocks * size - hidden.shape[0]), (0, 0))
    hidden_blocks = jnp.pad(hidden, rows).reshape(blocks, size, hidden.shape[1])
    target_blocks = jnp.pad(targets, rows).reshape(blocks, size, targets.shape[1])

    def block(inputs: tuple[Array, Array]) -> Array:
        logits = next_logits(params, config, inputs[0])
        chosen = jnp.take_along_axis(logits, inputs[1], axis=1)
        return chosen - jax.nn.logsumexp(logits, axis=1, keepdims=True)

    found = jax.lax.map(block, (hidden_blocks, target_blocks))
    return found.reshape(blocks * size, targets.shape[1])[: hidden.shape[0]]


def next_logits(
    params: dict[str, Any], config: DecoderConfig, hidden: Float[Array, "T M"]
) -> Float[Array, "T V"]:
    """Returns the logits of the token that follows each position, in float32."""
    head = params["embedding"] if config.tied else params["output"]
    with _precision(params):
        return jnp.einsum("tm,vm->tv", hidden, head, preferred_element_type=jnp.float32)


def logical_axes(config: DecoderConfig) -> dict[str, Any]:
    """Returns the logical axis names of every parameter, in the shape of the tree."""
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
    """Returns the shape of every parameter, in the shape of the tree."""
    sizes = {
        "layers": config.num_layers,
        "embed": config.model_dim,
        "vocab": config.vocab_size,
        "mlp": config.mlp_dim,
        "kv": config.head_dim,
    }

    def shape(path: Any, axes: jax.sharding.PartitionSpec) -> tuple[int, ...]:
        is_kv = path[-1].key in ("key", "value")
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
    hidden = jnp.take(params["embedding"], tokens, axis=0, mode="clip")
    hidden = hidden * jnp.asarray(config.embedding_scale, hidden.dtype)
    # What each token may see of the prefix, of its row's cache, and of its own call.
    seen = [positions]
    if cache is not None:
        seen.insert(0, cache.positions)
    if prefix is not None:
        seen.insert(0, jnp.broadcast_to(prefix.positions, (1, *prefix.positions.shape)))
    masks = [
        keys[:, None, :] <= positions[:, :, None]  # B (or 1), L, S
        for keys in seen
    ]
    rotary = _rotary(positions, config.rope_base, config.rope_factors, config.head_dim)
    has_local = any(config.is_local)
    local_masks, local_rotary = masks, rotary
    if config.local_window is not None:
        local_masks = [
            mask & (positions[:, :, None] - keys[:, None, :] < config.local_window)
            for mask, keys in zip(masks, seen, strict=True)
        ]
        local_rotary = _rotary(positions, config.local_rope_base, None, config.head_dim)

    def layer(hidden: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array]]:
        weights, is_local, *before = inputs
        layer_masks, layer_rotary = masks, rotary
        if has_local:
            layer_masks, layer_rotary = jax.tree.map(
                lambda local, full: jnp.where(is_local, local, full),
                (local_masks, local_rotary),
                (masks, rotary),
            )
        normed = _norm(hidden, weights["attention_norm"], config)
        query, key, value = (
            jnp.einsum("blm,mhk->blhk", normed, weights[name])
            for name in ("query", "key", "value")
        )
        if config.head_norms:
            query = _norm(query, weights["query_norm"], config)
            key = _norm(key, weights["key_norm"], config)
        scale = config.query_scale or config.head_dim**-0.5
        query = _rotate(query, layer_rotary) * jnp.asarray(scale, query.dtype)
        key = _rotate(key, layer_rotary)
        mixed = _attend(query, [*before, (key, value)], layer_masks)
        attended = jnp.einsum("blhk,hkm->blm", mixed, weights["out"])
        if config.sandwich_norms:
            attended = _norm(attended, weights["post_attention_norm"], config)
        hidden = hidden + attended
        normed = _norm(hidden, weights["mlp_norm"], config)
        gate = jnp.einsum("blm,mf->blf", normed, weights["gate"])
        gate = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate)
        up = jnp.einsum("blm,mf->blf", normed, weights["up"])
        widened = jnp.einsum("blf,fm->blm", gate * up, weights["down"])
        if config.sandwich_norms:
            widened = _norm(widened, weights["post_mlp_norm"], config)
        return hidden + widened, (key, value)

    earlier = [(part.keys, part.values) for part in (prefix, cache) if part is not None]
    inputs = (params["layers"], jnp.array(config.is_local), *earlier)
    hidden, (keys, values) = jax.lax.scan(layer, hidden, inputs)
    normed = _norm(hidden, params["final_norm"], config)
    return normed, KeyValues(keys, values, positions)


def _attend(
    query: Float[Array, "B L H K"],
    parts: list[tuple[Array, Array]],
    masks: list[Array],
) -> Float[Array, "B L H K"]:
    """Attends to several parts of keys with one softmax over all of them.

    A part without `B` is shared by the rows, and so is a mask whose first size is 1.
    """
    batch, length, heads, width = query.shape
    num_kv_heads = parts[0][0].shape[-2]
    is_own = [keys.ndim == 4 for keys, _ in parts]
    own_parts = [part for part, own in zip(parts, is_own, strict=True) if own]
    masks = [jnp.broadcast_to(mask, (batch, *mask.shape[1:])) for mask in masks]

    def attend_row(row: tuple) -> Array:
        query, own, masks = row
        own = iter(own)
        all_parts = [
            next(own) if is_row else part
            for part, is_row in zip(parts, is_own, strict=True)
        ]
        grouped = query.reshape(length, num_kv_heads, -1, width)
        logits = [
            jnp.where(
                mask[None, None],
                jnp.einsum(
                    "lgrk,sgk->grls",
                    grouped,
                    keys,
                    preferred_element_type=jnp.float32,
                ),
                -jnp.inf,
            )
            for (keys, _), mask in zip(all_parts, masks, strict=True)
        ]
        top = functools.reduce(
            jnp.maximum, [jnp.max(part, axis=-1, keepdims=True) for part in logits]
        )
        weights = [jnp.exp(part - top) for part in logits]
        total = sum(
            (jnp.sum(part, axis=-1, keepdims=True) for part in weights),
            start=jnp.zeros_like(top),
        )
        mixed = sum(
            jnp.einsum(
                "grls,sgk->grlk",
                part.astype(values.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            for part, (_, values) in zip(weights, all_parts, strict=True)
        )
        mixed = (mixed / total).astype(query.dtype)
        return mixed.transpose(2, 0, 1, 3).reshape(length, heads, width)

    # A CPU is fastest row by row, whose logits stay in its caches.
    row_by_row = jax.default_backend() == "cpu" and length > 1
    over_rows = jax.lax.map if row_by_row else lambda f, rows: jax.vmap(f)(rows)
    return over_rows(attend_row, (query, own_parts, masks))


def _norm(
    inputs: Float[Array, "*rows M"], weight: Float[Array, " M"], config: DecoderConfig
) -> Float[Array, "*rows M"]:
    """Divides by the root mean square, in float32."""
    wide = inputs.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + config.norm_epsilon)
    scaled = normed * jnp.broadcast_to(weight.astype(jnp.float32), normed.shape)
    return scaled.astype(inputs.dtype)


def _rotary(
    positions: Int[Array, "B L"],
    base: float,
    factors: tuple[float, ...] | None,
    width: int,
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """Returns cosine and sine of each position's angles."""
    frequencies = base ** -(np.arange(0, width, 2) / width)
    if factors is not None:
        frequencies = frequencies / np.array(factors)
    # Not a matrix product, which accelerators may round.
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(
        frequencies.astype(np.float32)[None, None]
    )
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _rotate(
    heads: Float[Array, "B L N K"], rotary: tuple[Array, Array]
) -> Float[Array, "B L N K"]:
    """Turns dimension i with dimension i + K/2, as Hugging Face's weights expect."""
    cosine, sine = rotary
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(heads.dtype)


def _precision(params: dict[str, Any]) -> Any:
    # Accelerators round float32 products unless they are told not to.
    is_float32 = params["embedding"].dtype == jnp.float32
    return jax.default_matmul_precision("highest" if is_float32 else "default")
