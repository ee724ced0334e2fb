"""The wire: bodies of requests and the numbers in their replies, without any network.

The completions API of OpenAI as vLLM, SGLang and llama.cpp speak it, and llama.cpp's
own. Replies are what another program wrote. Every reader compares a reply with its
request (texts, token ids, counts) and with what a probability can be; a reply that
fails is a `Malformed` with the reason that failures are counted by.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.io import wording
from gecko_jax.llm import alignments

# Ways to score a continuation; see `docs/fret.md`.
SCORING = ("echo", "echo_tokens", "forced", "none")

# Above the first, a log-probability is not rounded but wrong; below the second, it is a
# server's stand-in for minus infinity, such as -9999.0.
_MOST_LOG_PROB, _LEAST_LOG_PROB = 1e-5, -500.0
# What rounding may add to a sum of probabilities.
_SUM_TOLERANCE = 0.01
# Of a server's token count; more is no count.
_MOST_TOKENS = 1_000_000_000
# So many equal numbers in a row do not come from a model.
_FEWEST_EQUAL = 4


class Malformed(Exception):
    """A reply that does not hold what was asked for."""

    def __init__(self, reason: str, detail: str):
        """Keeps the reason apart from the detail.

        Args:
            reason: A few words of ours.
            detail: What came instead, with the server's words in it.
        """
        self.reason = reason
        self.detail = wording.printable(detail)
        super().__init__(f"{reason}: {self.detail}")


def generation_body(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Returns the fields of a request for text."""
    fields = {
        name: body[name] for name in ("temperature", "top_p", "max_tokens", "stop")
    } | {"seed": body["seed"]}
    return fields | _prompt(body["prompt"], chat)


def read_generation(reply: Any, chat: bool, prompt: str) -> tuple[str, bool]:
    """Returns the text, and whether the limit of tokens cut it."""
    choice = _choice(reply)
    _check_prompt_count(reply, prompt)
    text = _get(choice, "message", "content") if chat else choice.get("text")
    if not isinstance(text, str):
        raise Malformed("no_text", shorten(choice))
    return whole_characters(text), choice.get("finish_reason") == "length"


def whole_characters(text: str) -> str:
    """Returns a text with a mark for each half of a character that was cut in two."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def label_body(prompt: str, top: int, chat: bool) -> dict[str, Any]:
    """Returns the fields of a request for the likeliest first tokens."""
    fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    fields |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    return fields | _prompt(prompt, chat)


def read_labels(
    reply: Any, labels: Sequence[str], chat: bool, prompt: str
) -> list[float]:
    """Returns the log-probability of each label's first token; see `match_labels`."""
    choice = _choice(reply)
    _check_prompt_count(reply, prompt)
    if chat:
        listed = _get(choice, "logprobs", "content")
        first = _get(_only(listed), "top_logprobs")
    else:
        first = _only(_get(choice, "logprobs", "top_logprobs"))
        if not isinstance(first, dict):
            # llama.cpp answers the completions API in the form of the chat API.
            content = _get(choice, "logprobs", "content")
            first = _get(_only(content), "top_logprobs")
    pairs = list(first.items()) if isinstance(first, dict) else _pairs(first)
    if not pairs:
        raise Malformed("no_log_probs", shorten(choice))
    return match_labels(pairs, labels)


def match_labels(
    pairs: Sequence[tuple[str, Any]], labels: Sequence[str]
) -> list[float]:
    """Returns one number per label from (token, log-probability) pairs.

    A label begins with the longest of the tokens that it can begin with (" Per", not
    " P", which begins other words too). Tokens that differ in the mark of a word's
    beginning alone (" Per", "Per") are added up.

    Raises:
        Malformed: A label is not among the tokens, or two labels share one; a token
            comes twice; the numbers are no probabilities of different tokens.
    """
    for _, value in pairs:
        _number(value)
    chosen = [_label_tokens(pairs, label) for label in labels]
    if len({token for tokens in chosen for token in tokens}) < sum(map(len, chosen)):
        raise Malformed(
            "label_shared", f"one token begins two of {', '.join(map(repr, labels))}"
        )
    numbers = [math.log(math.fsum(map(math.exp, tokens.values()))) for tokens in chosen]
    total = math.fsum(map(math.exp, numbers))
    if total > 1 + _SUM_TOLERANCE:
        raise Malformed("not_probabilities", f"the labels have {total:.3f} together")
    return numbers


def _label_tokens(pairs: Sequence[tuple[str, Any]], label: str) -> dict[str, float]:
    """Returns the tokens that a label begins with, with their numbers."""
    longest: dict[str, str] = {}
    values: dict[str, float] = {}
    for token, value in pairs:
        bare = _bare(token)
        if not bare or not label.startswith(bare):
            continue
        if token in values:
            raise Malformed("label_twice", f"{token!r} is listed twice")
        values[token] = _log_prob(value)
        mark = token.removesuffix(bare)
        if len(token) > len(longest.get(mark, "")):
            longest[mark] = token
    if not values:
        tokens = ", ".join(repr(token) for token, _ in pairs[:8])
        raise Malformed("label_missing", f"{label!r} is not among {tokens}")
    return {token: values[token] for token in longest.values()}


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
    reply: Any, prompt: str, continuation: str, num_prompt_tokens: int | None = None
) -> tuple[float, int]:
    """Returns the sum over the continuation's tokens, and their number.

    The echoed tokens must spell the prompt and the continuation, so the texts say
    where the border is, whatever the reply counts.

    Args:
        reply: To `echo_body`.
        prompt: What the continuation is scored after.
        continuation: What is scored.
        num_prompt_tokens: Where the prompt was sent as token ids; None for a text.

    Raises:
        Malformed: The server did not echo these texts, no token begins at the border,
            or the numbers are no log-probabilities.
    """
    choice = _choice(reply)
    tokens = _get(choice, "logprobs", "tokens")
    values = _get(choice, "logprobs", "token_logprobs")
    if not isinstance(values, list) or not isinstance(tokens, list) or not values:
        raise Malformed("no_log_probs", shorten(choice))
    if len(tokens) != len(values):
        raise Malformed("no_log_probs", f"{len(tokens)} tokens, {len(values)} numbers")
    if not all(isinstance(token, str) for token in tokens):
        raise Malformed("no_log_probs", shorten(tokens))
    begin, end = align(tokens, prompt, continuation, num_prompt_tokens)
    # Nothing comes before the first token, and so nothing predicts it.
    given = [_number(value) for value in values[1:end]]
    if len(given) >= _FEWEST_EQUAL and len(set(given)) == 1:
        raise Malformed("constant", f"every token has {given[0]}")
    return _sum(values[begin:end]), end - begin


def align(
    tokens: Sequence[str],
    prompt: str,
    continuation: str,
    num_prompt_tokens: int | None = None,
) -> tuple[int, int]:
    """Returns the positions of the continuation's first token and of what follows it.

    A special token may come before the prompt, and one token that the server wrote
    after the continuation. Where a character is split over tokens, each of them shows
    a replacement character or vLLM's `bytes:` form.

    Raises:
        Malformed: The tokens do not spell both texts, or a token holds both the end of
            the prompt and the beginning of the continuation, or split characters leave
            several borders possible.
    """
    # SentencePiece begins a text with a space of its own.
    heads = (prompt, f" {prompt}")
    tails = (
        (continuation,)
        if num_prompt_tokens is None
        else (
            continuation,
            f" {continuation}",
        )
    )
    try:
        found = {
            alignment
            for head in heads
            for tail in tails
            for alignment in alignments.find(tokens, head, tail, num_prompt_tokens)
        }
    except ValueError as error:
        raise Malformed("border", f"{error}; use echo_tokens") from None
    if len(found) == 1:
        return found.pop()
    if len(tokens) < 3:
        raise Malformed("echo_ignored", f"{len(tokens)} tokens for the whole prompt")
    what = (
        "leave several borders possible"
        if found
        else "do not spell the prompt and the continuation with a border between them"
    )
    last = "".join(tokens[-8:])[-80:]
    raise Malformed(
        "border", f"the echoed tokens {what}; they end in {last!r}; use echo_tokens"
    )


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


def read_forced(
    reply: Any, prompt: Sequence[int], continuation: Sequence[int], text: str
) -> float:
    """Returns the sum over the forced tokens.

    Args:
        reply: To `forced_body`.
        prompt: Token ids that were sent.
        continuation: Token ids that were forced.
        text: What the continuation's ids were made from.
    """
    _check_reply(reply)
    evaluated = reply.get("tokens_evaluated")
    if evaluated is not None and evaluated != len(prompt):
        raise Malformed(
            "cut_prompt", f"{evaluated!r} tokens read, {len(prompt):,} sent"
        )
    listed = reply.get("completion_probabilities")
    if not isinstance(listed, list) or len(listed) != len(continuation):
        raise Malformed("no_log_probs", shorten(reply))
    for expected, entry in zip(continuation, listed, strict=True):
        if not isinstance(entry, dict) or entry.get("id") != expected:
            raise Malformed("not_forced", f"{shorten(entry)} instead of {expected}")
    _check_spelling(listed, text)
    return _sum([entry.get("logprob") for entry in listed])


def _check_spelling(listed: Sequence[Mapping[str, Any]], text: str) -> None:
    """Compares the forced tokens with their text, where every one is shown whole."""
    tokens = [entry.get("token") for entry in listed]
    if not all(
        isinstance(token, str) and alignments.SPLIT not in token for token in tokens
    ):
        return
    spelled = "".join(map(str, tokens))
    # SentencePiece begins a text with a space of its own.
    if spelled not in (text, f" {text}"):
        raise Malformed("not_forced", f"{spelled!r} instead of {text!r}")


def read_tokens(reply: Any, text: str) -> list[int]:
    """Returns the ids of a reply of `/tokenize`.

    Raises:
        Malformed: They are no ids, or more than the text has bytes.
    """
    _check_reply(reply)
    tokens = reply.get("tokens")
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in tokens
    ):
        raise Malformed("no_tokens", shorten(reply))
    # A special token or two may come beside the text's own.
    most = len(text.encode("utf-8", "surrogatepass")) + 2
    if (
        not tokens
        or len(tokens) > most
        or reply.get("count")
        not in (
            None,
            len(tokens),
        )
    ):
        raise Malformed("no_tokens", f"{len(tokens)} for {most - 2} bytes")
    return tokens


def usage(reply: Any) -> tuple[int | None, int | None]:
    """Returns (prompt tokens, completion tokens), None for what the reply omits.

    A number that cannot be a count is as good as none.
    """
    if not isinstance(reply, dict):
        return None, None
    used = reply.get("usage")
    if isinstance(used, dict):
        pair = used.get("prompt_tokens"), used.get("completion_tokens")
    else:  # llama.cpp's own form
        pair = reply.get("tokens_evaluated"), reply.get("tokens_predicted")
    prompt, completion = map(_count, pair)
    return prompt or None, completion  # No prompt has 0 tokens.


def tokens_used(
    reply: Any, least: int, most: int, most_written: int
) -> tuple[int, int]:
    """Returns the tokens that a reply is charged for, read and written.

    A server's count is taken, but never below what was sent; where there is none, the
    echoed tokens are counted, and otherwise the most that it can be.

    Args:
        reply: Any.
        least: Fewest tokens that the prompt can have.
        most: Most tokens that the prompt can have.
        most_written: The limit of tokens that was sent.
    """
    read, written = usage(reply)
    if read is None:
        choices = reply.get("choices") if isinstance(reply, dict) else None
        echoed = _get(_first(choices), "logprobs", "tokens")
        is_echo = isinstance(echoed, list) and len(echoed) > most_written
        read = min(len(echoed), most) if is_echo else most
    return max(read, least), most_written if written is None else written


def shorten(value: Any) -> str:
    """Returns a value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _prompt(prompt: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _check_reply(reply: Any) -> None:
    """Refuses what the server itself calls wrong or shortened."""
    if not isinstance(reply, dict):
        raise Malformed("no_choice", shorten(reply))
    if reply.get("error"):
        raise Malformed("error_reply", shorten(reply["error"]))
    if reply.get("truncated"):
        raise Malformed("cut_prompt", "the server says that it shortened the prompt")


def _choice(reply: Any) -> dict[str, Any]:
    """Returns the first choice by its index, wherever it is listed."""
    _check_reply(reply)
    choices = reply.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise Malformed("no_choice", shorten(reply))
    if len(choices) == 1:
        found = [c for c in choices if c.get("index") in (0, None)]
    else:
        found = [c for c in choices if c.get("index") == 0]
    if len(found) != 1:
        raise Malformed("no_choice", shorten(reply))
    reason = found[0].get("finish_reason")
    if reason == "content_filter" or not isinstance(reason, str | None):
        raise Malformed("filtered", f"finish_reason is {shorten(reason)}")
    if found[0].get("truncated"):
        raise Malformed("cut_prompt", "the server says that it shortened the prompt")
    return found[0]


def _check_prompt_count(reply: Any, prompt: str) -> None:
    """Refuses a reply to a prompt that the server counts as shorter than it is."""
    read, _ = usage(reply)
    words = num_words(prompt)
    if read is not None and read < words:
        raise Malformed(
            "cut_prompt", f"{read:,} tokens read of a prompt of {words:,} words"
        )


def num_words(text: str) -> int:
    """Returns the words of a text, none of which shares a token with another."""
    return len(text.split())


def _get(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _first(values: Any) -> Any:
    return values[0] if isinstance(values, list) and values else None


def _only(values: Any) -> Any:
    """Returns the one entry of the one token that was asked for."""
    if isinstance(values, list) and len(values) > 1:
        raise Malformed("no_log_probs", f"{len(values)} tokens instead of one")
    return _first(values)


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


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def _number(value: Any) -> float:
    """Returns a number that can be the logarithm of a probability, however small."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("no_log_probs", f"{shorten(value)} is not a number")
    # Compared before it is a float, which the largest integers cannot be.
    if not value <= _MOST_LOG_PROB:
        raise Malformed("no_log_probs", f"{shorten(value)} is not a log-probability")
    return min(float(max(value, -1e300)), 0.0)


def _log_prob(value: Any) -> float:
    """Returns a log-probability that a model gave."""
    number = _number(value)
    if number < _LEAST_LOG_PROB:
        raise Malformed("no_log_probs", f"{shorten(value)} stands for no number")
    return number


def _sum(values: Sequence[Any]) -> float:
    """Returns the log-likelihood of a text from those of its tokens."""
    numbers = [_log_prob(value) for value in values]
    if not any(numbers):
        raise Malformed("constant", f"{len(numbers)} tokens, each of them certain")
    if len(numbers) >= _FEWEST_EQUAL and len(set(numbers)) == 1:
        raise Malformed("constant", f"every token has {numbers[0]}")
    return math.fsum(numbers)
