"""One transformer layer, as a pure function: Llama, Qwen, Gemma 3, EmbeddingGemma 2.

FRet's language model (`transformer`) and the encoders with rotary positions
(`rotary_encoder`) run it. Dimension letter: `G` key heads.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gecko_jax.models import layers


def run_layer(
    weights: Mapping[str, Array],
    hidden: Float[Array, "B L M"],
    angles: tuple[Array, Array],
    attend: Callable[[Array, Array, Array], Float[Array, "B L H K"]],
    *,
    activation: str,
    query_scale: float,
    norm_epsilon: float,
    value_norm: bool = False,
    drop: Callable[[int, Array], Array] = lambda site, x: x,
    embedded: Float[Array, "B L M"] | None = None,
) -> tuple[Float[Array, "B L M"], tuple[Array, Array]]:
    """Runs one layer: attention and gated MLP, each with a norm before it.

    What a family adds is present in `weights`: biases (`query_bias`, ...), norms of
    query and key heads (`query_norm`, ...), norms after the sublayers
    (`post_attention_norm`, ...), and a third sublayer (`per_layer_...`).

    Args:
        weights: Weights of the layer by the names of `transformer.logical_axes`.
        hidden: Hidden states.
        angles: Result of `rotary`.
        attend: Function of query [B, L, H, K], key and value [B, L, G, K].
        activation: Activation of the MLP's gate, one of `layers.ACTIVATIONS`.
        query_scale: Factor of the queries.
        norm_epsilon: Added to the mean square in norms.
        value_norm: Whether value heads are normalized, without a scale.
        drop: Dropout; 0 to 2 are the attention's output, the MLP's hidden units and
            its output.
        embedded: Token embeddings, for the third sublayer.

    Returns:
        The hidden states, and the rotated keys and the values.
    """
    gate_activation = layers.ACTIVATIONS[activation]
    # Attention.
    normed = layers.norm(hidden, weights["attention_norm"], norm_epsilon)
    query, key, value = (
        _product("blm,mhk->blhk", normed, weights[name])
        for name in ("query", "key", "value")
    )
    # Qwen 2.
    if "query_bias" in weights:
        query = query + weights["query_bias"][None, None]
        key = key + weights["key_bias"][None, None]
        value = value + weights["value_bias"][None, None]
    # Qwen 3 and Gemma 3: a norm of each head keeps the logits in range.
    if "query_norm" in weights:
        query = layers.norm(query, weights["query_norm"], norm_epsilon)
        key = layers.norm(key, weights["key_norm"], norm_epsilon)
    if value_norm:
        value = layers.norm(value, None, norm_epsilon)
    # The norms come before the rotation, which keeps the length of a head.
    query = _rotate(query, angles) * jnp.asarray(query_scale, query.dtype)
    key = _rotate(key, angles)
    mixed = attend(query, key, value)
    attended = _product("blhk,hkm->blm", mixed, weights["out"])
    # Gemma 3's sandwich norms: the residual adds a normalized output.
    if "post_attention_norm" in weights:
        attended = layers.norm(attended, weights["post_attention_norm"], norm_epsilon)
    hidden = hidden + drop(0, attended)
    # Gated MLP.
    normed = layers.norm(hidden, weights["mlp_norm"], norm_epsilon)
    gate = gate_activation(_product("blm,mf->blf", normed, weights["gate"]))
    up = _product("blm,mf->blf", normed, weights["up"])
    down = _product("blf,fm->blm", drop(1, gate * up), weights["down"])
    if "post_mlp_norm" in weights:
        down = layers.norm(down, weights["post_mlp_norm"], norm_epsilon)
    hidden = hidden + drop(2, down)
    # Per-layer embeddings: the token embeddings, projected for this layer, pass a gate
    # that depends on the hidden states.
    if "per_layer_gate" in weights:
        assert embedded is not None
        own = jnp.einsum("blm,mp->blp", embedded, weights["per_layer_projection"])
        own = own * embedded.shape[-1] ** -0.5
        own = layers.norm(own, weights["per_layer_norm"], norm_epsilon)
        gate = jnp.einsum("blm,mp->blp", hidden, weights["per_layer_gate"])
        gated = gate_activation(gate) * own
        mixed = jnp.einsum("blp,pm->blm", gated, weights["per_layer_out"])
        mixed = layers.norm(mixed, weights["post_per_layer_norm"], norm_epsilon)
        hidden = hidden + mixed
        hidden = hidden * weights["layer_scalar"][None, None].astype(hidden.dtype)
    return hidden, (key, value)


def _product(
    spec: str, inputs: Float[Array, "..."], weights: Float[Array, "..."]
) -> Float[Array, "..."]:
    """A matrix product; float32 inputs are rounded to the dtype of the weights."""
    if inputs.dtype == weights.dtype:
        return jnp.einsum(spec, inputs, weights)
    inputs = inputs.astype(weights.dtype)
    return jnp.einsum(spec, inputs, weights, preferred_element_type=jnp.float32)


def rotary(
    positions: Int[Array, "B L"],
    base: float,
    factors: tuple[float, ...] | None,
    width: int,
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """Returns the cosine and sine of each position's rotary angles (RoPE)."""
    # One frequency for each pair of dims; computed in float64 on the host.
    frequencies = base ** -(np.arange(0, width, 2) / width)
    if factors is not None:
        frequencies = frequencies / np.array(factors)
    # A broadcast product: accelerators may round a matrix product.
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(
        frequencies.astype(np.float32)[None, None]
    )
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _rotate(
    heads: Float[Array, "B L N K"], rotary: tuple[Array, Array]
) -> Float[Array, "B L N K"]:
    """Rotates dims (i, i + K/2) as a pair, the order of Hugging Face's weights."""
    cosine, sine = rotary
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)
