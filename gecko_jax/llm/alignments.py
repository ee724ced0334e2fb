"""Alignments: where the echoed tokens put the border of a prompt and what follows it.

    find(["The", " cat", " sat", "."], "The cat", " sat", None)    yields (2, 3)

Tokens show their texts, but a character that is split over tokens is whole in none of
them: each shows a replacement character, or vLLM's `bytes:` form. So the texts are
compared byte by byte, and every way to read such a mark is followed.
"""

import re
from collections.abc import Iterator, Sequence

SPLIT = "\N{REPLACEMENT CHARACTER}"
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")
# Ways to read the tokens that are followed at once; more take longer than they help.
_MOST_STATES = 128


def find(
    tokens: Sequence[str], head: str, tail: str, num_prompt_tokens: int | None
) -> Iterator[tuple[int, int]]:
    """Yields every (begin, end) of the continuation with which the tokens agree.

    Args:
        tokens: As a server shows them.
        head: The prompt.
        tail: The continuation.
        num_prompt_tokens: Tokens before the continuation, where they are known.

    Raises:
        ValueError: Split characters can be read in too many ways.
    """
    border = len(head.encode("utf-8", "surrogatepass"))
    text = (head + tail).encode("utf-8", "surrogatepass")
    # (bytes spelled so far, the continuation's first token if it has begun)
    states: set[tuple[int, int | None]] = {(0, None)}
    for position, token in enumerate(tokens):
        if position == 1:
            states.add((0, None))  # After a special token.
        if num_prompt_tokens in (None, position) and (border, None) in states:
            states.add((border, position))
        states = {
            (after, begin)
            for before, begin in states
            for after in _spell(text, before, token)
            if begin is not None or after <= border
        }
        if len(states) > _MOST_STATES:
            raise ValueError("too many characters are split over tokens")
        for after, begin in list(states):
            if after == len(text):
                states.discard((after, begin))
                # We ask for one token more; some servers leave it out.
                if begin is not None and position + 2 >= len(tokens):
                    yield begin, position + 1
        if not states and position:
            return


def _spell(text: bytes, start: int, token: str) -> set[int]:
    """Returns where a token may end that begins at `start`; empty if it does not."""
    if match := _BYTES.fullmatch(token):
        raw = bytes.fromhex(match[1].replace("\\x", ""))
        return {start + len(raw)} if text.startswith(raw, start) else set()
    first, *rest = token.split(SPLIT)
    ends = _spell_part(text, {start}, first)
    for part in rest:
        # One mark stands for a part of a character: one to three bytes above ASCII.
        split = {
            end + size
            for end in ends
            for size in (1, 2, 3)
            if end + size <= len(text) and min(text[end : end + size]) > 127
        }
        ends = _spell_part(text, split, part)
    return ends


def _spell_part(text: bytes, starts: set[int], part: str) -> set[int]:
    raw = part.encode("utf-8", "surrogatepass")
    return {start + len(raw) for start in starts if text.startswith(raw, start)}
