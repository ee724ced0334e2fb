"""Device functions for a batch: shared prefix, scores, and sampled tokens.

Each function is compiled once per shape; `local` keeps the number of shapes small.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gecko_jax.models import transformer
from gecko_jax.parallel import numerics

# Tokens that one call of `decode` draws.
STEPS = 16


def _jit(**settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function of parameters, with options that suit their dtype."""

    def compile_variants(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def variant(is_fast: bool) -> Callable[..., Any]:
            options = numerics.bfloat16_options() if is_fast else None
            return jax.jit(function, compiler_options=options, **settings)

        @functools.wraps(function)
        def call(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            is_fast = params["embedding"].dtype in (jnp.bfloat16, jnp.uint16)
            return variant(is_fast)(params, *args, **kwargs)

        return call

    return compile_variants


@_jit(static_argnames="config")
def compute_prefix(
    params: dict[str, Any],
    config: transformer.DecoderConfig,
    tokens: Int[Array, " S"],
    positions: Int[Array, " S"],
) -> transformer.KeyValues:
    """Returns keys and values that any number of rows can share."""
    _, own = transformer.extend(params, config, tokens[None], positions[None])
    return transformer.KeyValues(own.keys[:, 0], own.values[:, 0], positions)


@_jit(static_argnames="config")
def read(
    params: dict[str, Any],
    config: transformer.DecoderConfig,
    prefix: transformer.KeyValues | None,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
) -> Float[Array, "B L M"]:
    """Returns the hidden states of rows after their prefix."""
    return transformer.extend(params, config, tokens, positions, prefix)[0]


@_jit(static_argnames="config")
def score(
    params: dict[str, Any],
    config: transformer.DecoderConfig,
    hidden: Float[Array, "B L M"],
    rows: Int[Array, " T"],
    columns: Int[Array, " T"],
    targets: Int[Array, "T Y"],
) -> Float[Array, "T Y"]:
    """Returns the log-probabilities of targets after the tokens at [rows, columns].

    It is separate from `read` so that the values of T do not multiply the shapes of the
    layers, which compile slowly. The output head, which is larger than all layers
    together, is applied to these positions only.
    """
    return transformer.token_log_probs(params, config, hidden[rows, columns], targets)


@_jit(static_argnames=("config", "num_slots"))
def start(
    params: dict[str, Any],
    config: transformer.DecoderConfig,
    prefix: transformer.KeyValues | None,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    num_slots: int,
) -> tuple[Float[Array, "B M"], transformer.KeyValues]:
    """Returns the last hidden state of each prompt, and a cache with free slots."""
    hidden, own = transformer.extend(params, config, tokens, positions, prefix)
    is_text = positions != transformer.PAD_POSITION
    last = jnp.sum(is_text, axis=1) - 1
    slots = ((0, 0), (0, num_slots))
    room = ((0, 0), *slots, (0, 0), (0, 0))
    cache = transformer.KeyValues(
        jnp.pad(own.keys, room),
        jnp.pad(own.values, room),
        jnp.pad(positions, slots, constant_values=transformer.PAD_POSITION),
    )
    return hidden[jnp.arange(hidden.shape[0]), last], cache


@_jit(static_argnames=("config", "is_greedy", "is_nucleus"), donate_argnames="cache")
def decode(
    params: dict[str, Any],
    config: transformer.DecoderConfig,
    prefix: transformer.KeyValues | None,
    cache: transformer.KeyValues,
    hidden: Float[Array, "B M"],
    positions: Int[Array, " B"],
    slot: Int[Array, ""],
    keys: UInt32[Array, "B 2"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    *,
    is_greedy: bool,
    is_nucleus: bool,
) -> tuple[Int[Array, "B steps"], transformer.KeyValues, Float[Array, "B M"]]:
    """Draws `STEPS` tokens for every row.

    All rows share the `prefix`; the `cache`, which is donated, has their own keys and
    values. `hidden` is the state of each row's last token, `positions` are those of the
    next tokens, and `slot` is where the cache takes them. The random `keys` are folded
    with the position of each draw. Returns the tokens, the cache with them, and the
    hidden state of the last.
    """

    def step(carry: tuple, number: Array) -> tuple[tuple, Array]:
        hidden, cache = carry
        logits = transformer.next_logits(params, config, hidden)
        here = positions + number
        if is_greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = _draw(logits / temperature, keys, here, top_p, is_nucleus)
        drawn, own = transformer.extend(
            params, config, token[:, None], here[:, None], prefix, cache
        )
        write = jax.lax.dynamic_update_slice_in_dim
        cache = transformer.KeyValues(
            write(cache.keys, own.keys, slot + number, axis=2),
            write(cache.values, own.values, slot + number, axis=2),
            write(cache.positions, own.positions, slot + number, axis=1),
        )
        return (drawn[:, 0], cache), token

    (hidden, cache), tokens = jax.lax.scan(step, (hidden, cache), jnp.arange(STEPS))
    return tokens.T, cache, hidden


def _draw(
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    positions: Int[Array, " B"],
    top_p: Float[Array, ""],
    is_nucleus: bool,
) -> Int[Array, " B"]:
    """Draws from each row with its own key, so that rows are independent."""
    if is_nucleus:
        logits = jnp.where(is_in_nucleus(logits, top_p), logits, -jnp.inf)

    def noise(key: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), position)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    return jnp.argmax(logits + jax.vmap(noise)(keys, positions), axis=-1)


def is_in_nucleus(
    logits: Float[Array, "B V"], top_p: Float[Array, ""]
) -> Array:  # Bool[Array, "B V"]
    """Marks the smallest set of likeliest tokens whose probabilities reach `top_p`.

    Bisection finds the threshold, because sorting a vocabulary is slow on a CPU.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        probs = jnp.where(log_probs >= middle, jnp.exp(log_probs), 0.0)
        is_enough = jnp.sum(probs, axis=-1, keepdims=True) >= top_p
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    high = jnp.max(log_probs, axis=-1, keepdims=True)
    # 32 steps over 100 nats reach float32's precision.
    low, _ = jax.lax.fori_loop(0, 32, halve, (high - 100.0, high))
    return log_probs >= low
