"""Finds the tokens of a continuation in the echoed tokens of prompt and continuation.

    find(["The", " cat", " sat", "."], "The cat", " sat", None)    yields (2, 3)

Tokens show their texts. A character that is split over several tokens appears in each
as a replacement character or in vLLM's `bytes:` form, so texts are compared byte by
byte, and every way to read a replacement character is followed.
"""

import re
from collections.abc import Iterator, Sequence

SPLIT = "\N{REPLACEMENT CHARACTER}"
_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


def find(
    tokens: Sequence[str], prompt: str, continuation: str, num_prompt_tokens: int | None
) -> Iterator[tuple[int, int]]:
    """Yields every (begin, end) of the continuation that agrees with the tokens' texts.

    `num_prompt_tokens` counts the tokens before the continuation; None if unknown.
    Raises ValueError if split characters can be read in too many ways.
    """
    border = len(prompt.encode("utf-8", "surrogatepass"))
    text = (prompt + continuation).encode("utf-8", "surrogatepass")
    # (bytes spelled so far, first token of the continuation or None before it)
    states: set[tuple[int, int | None]] = {(0, None)}
    for position, token in enumerate(tokens):
        if position == 1:
            states.add((0, None))  # The first token may be a special token.
        if num_prompt_tokens in (None, position) and (border, None) in states:
            states.add((border, position))
        states = {
            (after, begin)
            for before, begin in states
            for after in _spell(text, before, token)
            if begin is not None or after <= border
        }
        if len(states) > 128:  # Bounds the time that a hostile server can cost.
            raise ValueError("too many characters are split over tokens")
        for after, begin in list(states):
            if after == len(text):
                states.discard((after, begin))
                # The request asks for one more token; some servers leave it out.
                if begin is not None and position + 2 >= len(tokens):
                    yield begin, position + 1
        if not states and position:
            return


def _spell(text: bytes, start: int, token: str) -> set[int]:
    """Returns the possible ends of a token that begins at `start`."""
    if match := _BYTES.fullmatch(token):
        raw = bytes.fromhex(match[1].replace("\\x", ""))
        return {start + len(raw)} if text.startswith(raw, start) else set()
    ends = {start}
    for number, part in enumerate(token.split(SPLIT)):
        if number:  # A mark stands for one to three bytes of a character above ASCII.
            ends = {
                end + size
                for end in ends
                for size in (1, 2, 3)
                if end + size <= len(text) and min(text[end : end + size]) > 127
            }
        raw = part.encode("utf-8", "surrogatepass")
        ends = {end + len(raw) for end in ends if text.startswith(raw, end)}
    return ends
