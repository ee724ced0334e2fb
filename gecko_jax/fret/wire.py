"""The wire: bodies of requests and the numbers in their replies, without any network.

The completions API of OpenAI as vLLM, SGLang and llama.cpp speak it, and llama.cpp's
own. Replies are what another program wrote: whatever is missing, of another type or
not finite is a `Malformed` with the reason that failures are counted by.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Ways to score a continuation; see `docs/fret.md`.
SCORING = ("echo", "echo_tokens", "forced", "none")


class Malformed(Exception):
    """A reply that does not hold what was asked for."""

    def __init__(self, reason: str, detail: str):
        """Keeps the reason apart from the detail."""
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def generation_body(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Returns the fields of a request for text."""
    fields = {
        name: body[name] for name in ("temperature", "top_p", "max_tokens", "stop")
    } | {"seed": body["seed"]}
    return fields | _prompt(body["prompt"], chat)


def read_generation(reply: Any, chat: bool) -> tuple[str, bool]:
    """Returns the text, and whether the limit of tokens cut it."""
    choice = _choice(reply)
    text = _get(choice, "message", "content") if chat else choice.get("text")
    if not isinstance(text, str):
        raise Malformed("no_text", _shorten(choice))
    # A character that was cut in two is no text; its place is marked.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, choice.get("finish_reason") == "length"


def label_body(prompt: str, top: int, chat: bool) -> dict[str, Any]:
    """Returns the fields of a request for the likeliest first tokens."""
    fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    fields |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    return fields | _prompt(prompt, chat)


def read_labels(reply: Any, labels: Sequence[str], chat: bool) -> list[float]:
    """Returns the log-probability of each label's first token.

    A token stands for the label that it is a beginning of; several (" Per", "Per") are
    added up.
    """
    choice = _choice(reply)
    if chat:
        content = _get(choice, "logprobs", "content")
        first = content[0] if isinstance(content, list) and content else {}
        listed = first.get("top_logprobs") if isinstance(first, dict) else None
        pairs = _pairs(listed)
    else:
        tops = _get(choice, "logprobs", "top_logprobs")
        first = tops[0] if isinstance(tops, list) and tops else None
        pairs = (
            list(first.items())
            if isinstance(first, dict)
            else _pairs(
                # llama.cpp answers the completions API in the form of the chat API.
                _get(_first(_get(choice, "logprobs", "content")), "top_logprobs")
            )
        )
    if not pairs:
        raise Malformed("no_log_probs", _shorten(choice))
    return match_labels(pairs, labels)


def match_labels(
    pairs: Sequence[tuple[str, Any]], labels: Sequence[str]
) -> list[float]:
    """Returns one number per label from (token, log-probability) pairs.

    Raises:
        Malformed: A label is not among the tokens.
    """
    numbers = []
    for label in labels:
        found = [
            _finite(value)
            for token, value in pairs
            if _bare(token) and label.startswith(_bare(token))
        ]
        if not found:
            tokens = ", ".join(repr(token) for token, _ in pairs[:8])
            raise Malformed("label_missing", f"{label!r} is not among {tokens}")
        highest = max(found)
        numbers.append(
            highest + math.log(sum(math.exp(value - highest) for value in found))
        )
    return numbers


def echo_body(prompt: Any) -> dict[str, Any]:
    """Returns the fields of a request that repeats its prompt with log-probabilities.

    One token is written, because servers differ on zero.
    """
    return {
        "prompt": prompt,
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "temperature": 0.0,
    }


def read_echo(
    reply: Any, prompt: str | Sequence[int], continuation: str | Sequence[int]
) -> tuple[float, int]:
    """Returns the sum over the continuation's tokens, and their number.

    With texts, the border is the token that begins where the prompt ends; with token
    ids it is known.

    Raises:
        Malformed: The server did not echo, or no token begins at the border.
    """
    choice = _choice(reply)
    tokens = _get(choice, "logprobs", "tokens")
    values = _get(choice, "logprobs", "token_logprobs")
    if not isinstance(values, list) or not isinstance(tokens, list) or not values:
        raise Malformed("no_log_probs", _shorten(choice))
    if len(tokens) != len(values):
        raise Malformed("no_log_probs", f"{len(tokens)} tokens, {len(values)} numbers")
    used = usage(reply)
    if used is None or used[0] < 2:
        raise Malformed("no_usage", _shorten(reply))
    end = used[0]
    # The prompt's tokens and at most the one that was written after them.
    if not end <= len(values) <= end + max(used[1], 1):
        raise Malformed(
            "echo_ignored",
            f"{len(values)} log-probabilities for {end} prompt tokens",
        )
    if isinstance(prompt, str):
        begin = find_border([str(t) for t in tokens[:end]], prompt, str(continuation))
    else:
        begin = end - len(continuation)
        if begin != len(prompt):
            raise Malformed(
                "border", f"{end} prompt tokens, {len(prompt)} + {len(continuation)}"
            )
    summed = [_finite(value) for value in values[begin:end]]
    if not summed:
        raise Malformed("border", "the continuation has no token")
    return math.fsum(summed), len(summed)


def find_border(tokens: Sequence[str], prompt: str, continuation: str) -> int:
    """Returns the position of the continuation's first token.

    The tokens' texts are put together from whichever end they are whole: a special
    token at the beginning, or a character split over tokens, spoils only one side.

    Raises:
        Malformed: A token holds both the end of the prompt and the beginning of the
            continuation, or both sides are spoilt.
    """
    joined = "".join(tokens)
    if joined.endswith(continuation):
        border = len(joined) - len(continuation)
    elif prompt in joined and joined.index(prompt) < 40:
        border = joined.index(prompt) + len(prompt)
    else:
        raise Malformed(
            "border", "the echoed tokens do not spell the prompt; use echo_tokens"
        )
    length = 0
    for position, token in enumerate(tokens):
        if length == border and token:
            return position
        length += len(token)
        if length > border:
            raise Malformed("border", f"token {token!r} holds the border")
    raise Malformed("border", "the continuation has no token")


def forced_body(prompt: Sequence[int], continuation: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of llama.cpp's `/completion` that may write only these ids.

    Its server repeats no prompt; made to write the continuation token by token, it
    reports what each would have had without the force.
    """
    return {
        "prompt": list(prompt),
        "grammar": "root ::= " + " ".join(f"<[{number}]>" for number in continuation),
        "n_predict": len(continuation),
        "n_probs": 1,
        "temperature": 0.0,
        "cache_prompt": True,
    }


def read_forced(reply: Any, continuation: Sequence[int]) -> float:
    """Returns the sum over the forced tokens."""
    listed = reply.get("completion_probabilities") if isinstance(reply, dict) else None
    if not isinstance(listed, list) or len(listed) < len(continuation):
        raise Malformed("no_log_probs", _shorten(reply))
    numbers = []
    for expected, entry in zip(continuation, listed, strict=False):
        if not isinstance(entry, dict) or entry.get("id") != expected:
            raise Malformed("not_forced", f"{_shorten(entry)} instead of {expected}")
        numbers.append(_finite(entry.get("logprob")))
    return math.fsum(numbers)


def read_tokens(reply: Any) -> list[int]:
    """Returns the ids of a reply of `/tokenize`."""
    tokens = reply.get("tokens") if isinstance(reply, dict) else None
    if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
        raise Malformed("no_tokens", _shorten(reply))
    return tokens


def usage(reply: Any) -> tuple[int, int] | None:
    """Returns (prompt tokens, completion tokens), None where the reply has none."""
    if not isinstance(reply, dict):
        return None
    used = reply.get("usage")
    if isinstance(used, dict):
        pair = (used.get("prompt_tokens"), used.get("completion_tokens", 0))
    else:  # llama.cpp's own form
        pair = (reply.get("tokens_evaluated"), reply.get("tokens_predicted", 0))
    if type(pair[0]) is int and type(pair[1]) is int:
        return pair  # pyright: ignore[reportReturnType]  (checked just now)
    return None


def _prompt(prompt: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Malformed("no_choice", _shorten(reply))
    return choices[0]


def _get(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _pairs(listed: Any) -> list[tuple[str, Any]]:
    if not isinstance(listed, list):
        return []
    return [
        (str(entry.get("token", "")), entry.get("logprob"))
        for entry in listed
        if isinstance(entry, dict)
    ]


def _bare(token: str) -> str:
    """Drops the mark of a word's beginning, in its three spellings."""
    return token.lstrip(" \u2581\u0120")


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("no_log_probs", f"{value!r} is not a number")
    if not math.isfinite(value) or value > 1e-3:
        raise Malformed("no_log_probs", f"{value!r} is not a log-probability")
    return min(float(value), 0.0)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
