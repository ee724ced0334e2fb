"""Drawing: texts that a decoder writes, some tokens at a time, until each has its end.

Every row has randomness of its own, which its prompt and seed decide: what is drawn
does not depend on the rows beside it.
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
    """What a model wrote.

    Attributes:
        text: Without the stop string that ended it.
        is_cut: The limit of tokens ended it.
        num_tokens: Drawn, the one that ended it included.
    """

    text: str
    is_cut: bool
    num_tokens: int


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
    """Returns the randomness that a seed and the prompt's tokens decide."""
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
    """Draws a continuation of each of the first `count` rows; the others are filling.

    Args:
        params: Of the decoder.
        config: The decoder.
        tokenizer: Its tokens.
        prefix: What all rows share.
        tokens: Of the prompts, behind the prefix.
        positions: Of these tokens.
        lengths: Tokens of each whole prompt.
        keys: Randomness of each row.
        sampling: How to draw.
        count: Rows whose ends are waited for.
    """
    rounds = -(-sampling.max_tokens // decoding.STEPS)
    hidden, cache = decoding.start(
        params, config, prefix, tokens, positions, num_slots=rounds * decoding.STEPS
    )
    drawn = np.empty((count, 0), np.int32)
    completions: list[Completion] = []
    for turn in range(rounds):
        start = turn * decoding.STEPS
        fresh, cache, hidden = decoding.decode(
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
        drawn = np.concatenate([drawn, np.asarray(fresh)[:count]], axis=1)
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
    ends = [at for at in (text.find(mark) for mark in stop) if at >= 0]
    control = np.isin(tokens, list(tokenizer.end_ids))
    num_tokens = int(control.argmax()) + 1 if control.any() else len(tokens)
    if ends:
        return Completion(text[: min(ends)], False, num_tokens)
    return Completion(text, not control.any(), num_tokens)
