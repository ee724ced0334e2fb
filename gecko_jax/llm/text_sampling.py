"""Sampling: draws continuations a few tokens at a time until each one has ended.

Every row has its own random key, made from its prompt and seed, so a draw does not
depend on the other rows of the batch.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from gecko_jax.llm import decoder_tokenizer, decoding, protocol
from gecko_jax.models import transformer


class Completion(NamedTuple):
    """A generated text."""

    text: str  # text without the stop string that ended it
    is_cut: bool  # whether the token limit ended it
    num_tokens: int  # generated tokens, including the one that ended it


def check(sampling: protocol.Sampling) -> None:
    """Raises unless every setting is in its range."""
    if sampling.max_tokens < 1:
        raise ValueError(f"max_tokens={sampling.max_tokens}: it must be at least 1")
    if not 0 <= sampling.temperature < math.inf:
        raise ValueError(f"temperature={sampling.temperature}: it must be 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p}: it must be in (0, 1]")
    if not all(sampling.stop):
        raise ValueError(f"stop={sampling.stop!r}: no string may be empty")


def key(seed: int, prompt: Sequence[int]) -> UInt32[np.ndarray, " 2"]:
    """Returns the random key for a seed and a prompt's tokens."""
    digest = hashlib.sha256(f"{seed} {list(prompt)}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint32)


def draw(
    params: dict[str, Any],
    config: transformer.DecoderConfig,
    tokenizer: decoder_tokenizer.Tokenizer,
    prefix: transformer.KeyValues | None,
    tokens: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    keys: UInt32[Array, "B 2"],
    sampling: protocol.Sampling,
    count: int,
) -> list[Completion]:
    """Draws a continuation of each of the first `count` rows; the rest is padding.

    `tokens` are those of the prompts after the shared prefix, `lengths` count the
    tokens of whole prompts, and `keys` are the rows' random keys.
    """
    num_slots = -(-sampling.max_tokens // decoding.STEPS) * decoding.STEPS
    hidden, cache = decoding.start(params, config, prefix, tokens, positions, num_slots)
    drawn = np.empty((count, 0), np.int32)
    completions: list[Completion] = []
    for start in range(0, num_slots, decoding.STEPS):
        new, cache, hidden = decoding.decode(
            params,
            config,
            prefix,
            cache,
            hidden,
            lengths + start,
            jnp.int32(tokens.shape[1] + start),
            keys,
            jnp.float32(sampling.temperature),
            jnp.float32(sampling.top_p),
            is_greedy=sampling.temperature == 0,
            is_nucleus=sampling.temperature > 0 and sampling.top_p < 1,
        )
        drawn = np.concatenate([drawn, np.asarray(new)[:count]], axis=1)
        drawn = drawn[:, : sampling.max_tokens]
        completions = [_complete(row, tokenizer, sampling.stop) for row in drawn]
        if not any(completion.is_cut for completion in completions):
            break
    return completions


def _complete(
    tokens: Int[np.ndarray, " T"],
    tokenizer: decoder_tokenizer.Tokenizer,
    stop: Sequence[str],
) -> Completion:
    text = tokenizer.decode(tokens.tolist())
    stops = [place for place in map(text.find, stop) if place >= 0]
    is_end = np.isin(tokens, list(tokenizer.end_ids))
    num_tokens = int(is_end.argmax()) + 1 if is_end.any() else len(tokens)
    if stops:
        return Completion(text[: min(stops)], False, num_tokens)
    return Completion(text, not is_end.any(), num_tokens)
