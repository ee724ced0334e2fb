"""Request bodies and the numbers in replies, without any network.

The formats are OpenAI's completions API as vLLM, SGLang and llama.cpp implement it, and
llama.cpp's own. Replies are untrusted: every reader compares a reply with its request
(texts, token ids, counts) and with the range of a log-probability. A reply that fails
is a `NoAnswer`, whose reason the run counts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.io import wording
from gecko_jax.llm import alignments

# Ways to score a continuation; see `docs/fret.md`.
SCORING = ("echo", "echo_tokens", "forced", "none")

# A log-probability above the first is wrong, not rounded; one below the second is a
# server's stand-in for minus infinity, such as -9999.0.
_MAX_LOG_PROB, _MIN_LOG_PROB = 1e-5, -500.0


class NoAnswer(Exception):
    """A request without a usable answer.

    `reason` is one of a few categories, which are counted; `detail` is what arrived
    instead, and may quote the server; `retry_after` is the wait that it asks for.
    """

    def __init__(self, reason: str, detail: str, retry_after: float = 0.0):
        self.reason = reason
        self.detail = wording.printable(detail)
        self.retry_after = retry_after
        super().__init__(f"{reason}: {self.detail}")


def generation_body(body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """Returns the fields of a request for text."""
    names = ("temperature", "top_p", "max_tokens", "stop", "seed")
    return {name: body[name] for name in names} | _prompt(body["prompt"], chat)


def read_generation(reply: Any, chat: bool, prompt: str) -> tuple[str, bool]:
    """Returns the text, and whether the token limit cut it."""
    choice = _choice(reply, prompt)
    text = _get(choice, "message", "content") if chat else choice.get("text")
    if not isinstance(text, str):
        raise NoAnswer("no_text", shorten(choice))
    return whole_characters(text), choice.get("finish_reason") == "length"


def whole_characters(text: str) -> str:
    """Replaces each lone surrogate, half of a character, by a replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def label_body(prompt: str, top: int, chat: bool) -> dict[str, Any]:
    """Returns the fields of a request for the likeliest first tokens."""
    fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
    fields |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    return fields | _prompt(prompt, chat)


def read_labels(reply: Any, labels: Sequence[str], prompt: str) -> list[float]:
    """Returns the log-probability of each label's first token; see `match_labels`."""
    choice = _choice(reply, prompt)
    listed = _only(_get(choice, "logprobs", "top_logprobs"))
    if isinstance(listed, dict):
        pairs = list(listed.items())
    else:  # The form of the chat API, in which llama.cpp answers both APIs.
        listed = _get(_only(_get(choice, "logprobs", "content")), "top_logprobs")
        pairs = [
            (str(entry.get("token", "")), entry.get("logprob"))
            for entry in (listed if isinstance(listed, list) else [])
            if isinstance(entry, dict)
        ]
    if not pairs:
        raise NoAnswer("no_log_probs", shorten(choice))
    return match_labels(pairs, labels)


def match_labels(
    pairs: Sequence[tuple[str, Any]], labels: Sequence[str]
) -> list[float]:
    """Returns one log-probability per label from (token, log-probability) pairs.

    A label is represented by the longest token that it begins with (" Per", not " P",
    which begins other words too). Probabilities of tokens that differ only in the
    word-start mark (" Per", "Per") are added. Raises NoAnswer if a label is missing,
    two labels share a token, or the numbers are not probabilities of distinct tokens.
    """
    for _, value in pairs:
        _number(value)
    chosen = [_label_tokens(pairs, label) for label in labels]
    if len({token for tokens in chosen for token in tokens}) < sum(map(len, chosen)):
        raise NoAnswer("label_shared", f"one token begins two of {list(labels)}")
    numbers = [math.log(math.fsum(map(math.exp, tokens.values()))) for tokens in chosen]
    total = math.fsum(map(math.exp, numbers))
    if total > 1.01:  # More than rounding explains.
        raise NoAnswer("not_probabilities", f"the labels sum to {total:.3f}")
    return numbers


def _label_tokens(pairs: Sequence[tuple[str, Any]], label: str) -> dict[str, float]:
    """Returns the tokens that represent a label, with their log-probabilities."""
    longest: dict[str, str] = {}  # Word-start mark -> token.
    values: dict[str, float] = {}
    for token, value in pairs:
        bare = token.lstrip(" \u2581\u0120")  # The three spellings of the mark.
        if not bare or not label.startswith(bare):
            continue
        if token in values:
            raise NoAnswer("label_twice", f"{token!r} is listed twice")
        values[token] = _log_prob(value)
        mark = token.removesuffix(bare)
        longest[mark] = max(longest.get(mark, ""), token, key=len)
    if not values:
        tokens = ", ".join(repr(token) for token, _ in pairs[:8])
        raise NoAnswer("label_missing", f"{label!r} is not among {tokens}")
    return {token: values[token] for token in longest.values()}


def echo_body(prompt: str | Sequence[int]) -> dict[str, Any]:
    """Returns the fields of a request that echoes its prompt with log-probabilities."""
    fields = {"prompt": prompt, "echo": True, "logprobs": 1, "temperature": 0.0}
    return fields | {"max_tokens": 1}  # Servers differ on zero.


def read_echo(
    reply: Any, prompt: str, continuation: str, num_prompt_tokens: int | None = None
) -> tuple[float, int]:
    """Returns the log-likelihood of the continuation, in nats, and its token count.

    The echoed tokens must spell the prompt and the continuation, so the texts locate
    the border, whatever the reply counts. `num_prompt_tokens` is the length of a prompt
    that was sent as token ids. Raises NoAnswer if the server did not echo these texts,
    no token begins at the border, or the numbers are not log-probabilities.
    """
    choice = _choice(reply)
    tokens = _get(choice, "logprobs", "tokens")
    values = _get(choice, "logprobs", "token_logprobs")
    if not isinstance(values, list) or not isinstance(tokens, list) or not values:
        raise NoAnswer("no_log_probs", shorten(choice))
    if len(tokens) != len(values):
        raise NoAnswer("no_log_probs", f"{len(tokens)} tokens, {len(values)} numbers")
    if not all(isinstance(token, str) for token in tokens):
        raise NoAnswer("no_log_probs", shorten(tokens))
    begin, end = align(tokens, prompt, continuation, num_prompt_tokens)
    # The first token of a text has no log-probability.
    _check_varied([_number(value) for value in values[1:end]])
    return _sum(values[begin:end]), end - begin


def align(
    tokens: Sequence[str],
    prompt: str,
    continuation: str,
    num_prompt_tokens: int | None = None,
) -> tuple[int, int]:
    """Returns where the continuation begins among the echoed tokens, and where it ends.

    A special token may precede the prompt, and one generated token may follow. Raises
    NoAnswer if the tokens do not spell both texts, one token spans the border, or split
    characters leave several borders possible.
    """
    # SentencePiece begins a text with an extra space.
    prompts = (prompt, f" {prompt}")
    continuations = (continuation, f" {continuation}")
    if num_prompt_tokens is None:
        continuations = continuations[:1]
    try:
        matches = {
            match
            for first in prompts
            for second in continuations
            for match in alignments.find(tokens, first, second, num_prompt_tokens)
        }
    except ValueError as error:
        raise NoAnswer("border", f"{error}; use echo_tokens") from None
    if len(matches) == 1:
        return matches.pop()
    if len(tokens) < 3:
        raise NoAnswer("echo_ignored", f"{len(tokens)} tokens for the whole prompt")
    problem = (
        "leave several borders possible"
        if matches
        else "do not spell the prompt and the continuation with a border between them"
    )
    last = "".join(tokens[-8:])[-80:]
    raise NoAnswer(
        "border", f"the echoed tokens {problem}; they end in {last!r}; use echo_tokens"
    )


def forced_body(prompt: Sequence[int], continuation: Sequence[int]) -> dict[str, Any]:
    """Returns the fields of llama.cpp's `/completion` that force the continuation.

    llama.cpp cannot echo. A grammar that allows only these token ids makes it generate
    them, and it reports their log-probabilities without the grammar.
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
    """Returns the log-likelihood of the forced tokens of `text`, in nats."""
    _check_reply(reply)
    evaluated = reply.get("tokens_evaluated")
    if evaluated is not None and evaluated != len(prompt):
        raise NoAnswer("cut_prompt", f"{evaluated!r} tokens read, {len(prompt):,} sent")
    listed = reply.get("completion_probabilities")
    if not isinstance(listed, list) or len(listed) != len(continuation):
        raise NoAnswer("no_log_probs", shorten(reply))
    for expected, entry in zip(continuation, listed, strict=True):
        if not isinstance(entry, dict) or entry.get("id") != expected:
            raise NoAnswer("not_forced", f"{shorten(entry)} instead of {expected}")
    tokens = [entry.get("token") for entry in listed]
    # Tokens that show a part of a character cannot be compared with the text.
    if all(isinstance(t, str) and alignments.SPLIT not in t for t in tokens):
        spelled = "".join(map(str, tokens))
        # SentencePiece begins a text with an extra space.
        if spelled not in (text, f" {text}"):
            raise NoAnswer("not_forced", f"{spelled!r} instead of {text!r}")
    return _sum([entry.get("logprob") for entry in listed])


def read_tokens(reply: Any, text: str) -> list[int]:
    """Returns the token ids in a reply of `/tokenize`, if they can be the text's."""
    _check_reply(reply)
    tokens = reply.get("tokens")
    if not isinstance(tokens, list) or not all(
        type(token) is int and 0 <= token < 2**31 for token in tokens
    ):
        raise NoAnswer("no_tokens", shorten(reply))
    num_bytes = len(text.encode("utf-8", "surrogatepass"))
    is_counted = reply.get("count") in (None, len(tokens))
    # The server may add one or two special tokens.
    if not is_counted or not 0 < len(tokens) <= num_bytes + 2:
        raise NoAnswer("no_tokens", f"{len(tokens)} for {num_bytes} bytes")
    return tokens


def usage(reply: Any) -> tuple[int | None, int | None]:
    """Returns (prompt tokens, completion tokens); None for what is missing or wrong."""
    used = _get(reply, "usage")
    if isinstance(used, dict):
        pair = used.get("prompt_tokens"), used.get("completion_tokens")
    else:  # llama.cpp's own form
        pair = _get(reply, "tokens_evaluated"), _get(reply, "tokens_predicted")
    prompt, completion = map(_count, pair)
    return prompt or None, completion  # No prompt has 0 tokens.


def tokens_used(
    reply: Any, min_read: int, max_read: int, max_written: int
) -> tuple[int, int]:
    """Returns the tokens that a reply is charged for, read and written.

    The server's count is used, but never less than `min_read`. Without a count, the
    echoed tokens are counted, or the maximum is charged.
    """
    read, written = usage(reply)
    if read is None:
        choices = _get(reply, "choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        echoed = _get(first, "logprobs", "tokens")
        is_echo = isinstance(echoed, list) and len(echoed) > max_written
        read = min(len(echoed), max_read) if is_echo else max_read
    return max(read, min_read), max_written if written is None else written


def shorten(value: Any) -> str:
    """Returns a value as errors show it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _prompt(prompt: str, chat: bool) -> dict[str, Any]:
    if chat:
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _check_reply(reply: Any) -> None:
    """Raises for a reply that the server itself calls wrong or shortened."""
    if not isinstance(reply, dict):
        raise NoAnswer("no_choice", shorten(reply))
    if reply.get("error"):
        raise NoAnswer("error_reply", shorten(reply["error"]))
    if reply.get("truncated"):
        raise NoAnswer("cut_prompt", "the server reports that it shortened the prompt")


def _choice(reply: Any, prompt: str = "") -> dict[str, Any]:
    """Returns the choice with index 0, wherever it is listed.

    The server must not have read fewer tokens than the prompt has words.
    """
    _check_reply(reply)
    read, _ = usage(reply)
    num_words = len(prompt.split())
    if read is not None and read < num_words:
        raise NoAnswer("cut_prompt", f"{read:,} tokens read of {num_words:,} words")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise NoAnswer("no_choice", shorten(reply))
    allowed = (0, None) if len(choices) == 1 else (0,)
    chosen = [choice for choice in choices if choice.get("index") in allowed]
    if len(chosen) != 1:
        raise NoAnswer("no_choice", shorten(reply))
    reason = chosen[0].get("finish_reason")
    if reason == "content_filter" or not isinstance(reason, str | None):
        raise NoAnswer("filtered", f"finish_reason is {shorten(reason)}")
    if chosen[0].get("truncated"):
        raise NoAnswer("cut_prompt", "the server reports that it shortened the prompt")
    return chosen[0]


def _get(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _only(values: Any) -> Any:
    """Returns the entry of the one token that the request asks for."""
    entries = values if isinstance(values, list) else []
    if len(entries) > 1:
        raise NoAnswer("no_log_probs", f"{len(entries)} tokens instead of one")
    return entries[0] if entries else None


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= 1_000_000_000 else None


def _number(value: Any) -> float:
    """Returns a number that can be the logarithm of a probability, however small."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoAnswer("no_log_probs", f"{shorten(value)} is not a number")
    # Compared before conversion: the largest integers do not fit a float.
    if not value <= _MAX_LOG_PROB:
        raise NoAnswer("no_log_probs", f"{shorten(value)} is not a log-probability")
    return min(float(max(value, -1e300)), 0.0)


def _log_prob(value: Any) -> float:
    """Returns a log-probability that a model can have computed."""
    number = _number(value)
    if number < _MIN_LOG_PROB:
        raise NoAnswer("no_log_probs", f"{shorten(value)} is a placeholder")
    return number


def _sum(values: Sequence[Any]) -> float:
    """Returns the log-likelihood of a text from those of its tokens."""
    numbers = [_log_prob(value) for value in values]
    if not any(numbers):
        raise NoAnswer("constant", f"all {len(numbers)} tokens have probability 1")
    _check_varied(numbers)
    return math.fsum(numbers)


def _check_varied(numbers: Sequence[float]) -> None:
    # Four equal numbers do not come from a model.
    if len(numbers) >= 4 and len(set(numbers)) == 1:
        raise NoAnswer("constant", f"every token has {numbers[0]}")
