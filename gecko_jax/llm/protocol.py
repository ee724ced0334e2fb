"""Language models: the one protocol that the stages speak, and its recorded form.

    model.generate(prompts, seeds)            texts that go on where the prompts end
    model.score(prompts, continuations)       log LLM(continuation | prompt), in nats
    model.label_log_probs(prompts, labels)    log LLM(label | prompt) of every label

An answer is a number or a text that the model gave. What it did not give is a
`Failure` with a reason: never a constant in its place.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from gecko_jax.llm import request_log, wire


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that an answer took.

    Attributes:
        prompt_tokens: Read.
        completion_tokens: Written.
        requests: Sent for it, those answered with an error left out.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 1

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.requests + other.requests,
        )


@dataclasses.dataclass(frozen=True)
class Generation:
    """A text.

    Attributes:
        text: What the model wrote, as it came.
        is_cut: It was stopped by the limit of tokens, not by its own end.
        usage: Of tokens.
    """

    text: str
    is_cut: bool
    usage: Usage


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation: the sum over its tokens, in nats."""

    log_prob: float
    num_tokens: int
    usage: Usage


@dataclasses.dataclass(frozen=True)
class LabelScores:
    """The log-probability of each label, in nats, in the order of the labels."""

    log_probs: tuple[float, ...]
    usage: Usage


@dataclasses.dataclass(frozen=True)
class Failure:
    """No answer.

    Attributes:
        reason: One of a few words, by which failures are counted.
        detail: What came instead, for people.
    """

    reason: str
    detail: str = ""


@runtime_checkable
class LanguageModel(Protocol):
    """What a stage asks of a model. Answers are in the order of the prompts."""

    @property
    def name(self) -> str:
        """Model and revision, as written beside every record."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """Everything about the model that changes an answer."""
        ...

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: "Sampling"
    ) -> list[Generation | Failure]:
        """Continues each prompt, with its own seed."""
        ...

    def score(
        self, prompts: Sequence[str], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Scores each continuation of its prompt."""
        ...

    def label_log_probs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> list[LabelScores | Failure]:
        """Scores every label as the continuation of each prompt."""
        ...


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: Share of the probability that may be drawn.
        max_tokens: Most tokens of an answer.
        stop: Strings that end it; they are not part of it.
    """

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]


def request_key(kind: str, facts: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """Returns the name of a request: equal ones have the same answer.

    Args:
        kind: "generate", "score" or "labels".
        facts: Backend, model and revision.
        body: Rendered prompt, parameters and seed.
    """
    encoded = json.dumps([kind, facts, body], sort_keys=True, ensure_ascii=False)
    # A text may hold half of a surrogate pair, which UTF-8 proper cannot write.
    content = encoded.encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:32]


def to_record(answer: Generation | Score | LabelScores) -> dict[str, Any]:
    """Returns plain values that JSON can hold."""
    return dataclasses.asdict(answer)


def from_record(
    kind: str, record: Mapping[str, Any], body: Mapping[str, Any], key: str
) -> Any:
    """Returns the answer that `to_record` wrote.

    Args:
        kind: "generate", "score" or "labels".
        record: Checked by the log that it is from.
        body: The request.
        key: The request's, for the error.

    Raises:
        ValueError: It answers another kind of request, or other labels.
    """
    used = record["usage"]
    usage = Usage(used["prompt_tokens"], used["completion_tokens"], used["requests"])
    if kind == "generate" and "text" in record:
        text = wire.whole_characters(record["text"])
        return Generation(text, record["is_cut"], usage)
    if kind == "score" and "log_prob" in record:
        # Rounding may leave a little above 0.
        return Score(min(float(record["log_prob"]), 0.0), record["num_tokens"], usage)
    if kind == "labels" and len(record.get("log_probs", ())) == len(body["labels"]):
        return LabelScores(
            tuple(min(float(p), 0.0) for p in record["log_probs"]), usage
        )
    raise ValueError(
        f"recorded answer {key}: it has {', '.join(sorted(record))}, and is no answer "
        f"to a request of the kind {kind!r}; remove its line from the request log"
    )


class CachedModel:
    """A model behind a request log: what was answered before is not asked again."""

    def __init__(
        self,
        name: str,
        facts: dict[str, Any],
        ask: "Ask",
        close: Callable[[], None] = lambda: None,
    ):
        """Starts without a log; the stages open one for each shard.

        Args:
            name: Model and revision.
            facts: Everything that changes an answer; part of every key.
            ask: See `Ask`.
            close: Lets go of what `ask` holds.
        """
        self.name = name
        self.facts = facts
        self._ask = ask
        self.close = close
        self.log: request_log.RequestLog = request_log.RequestLog(None)

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
    ) -> list[Generation | Failure]:
        """See `LanguageModel.generate`."""
        settings = dataclasses.asdict(sampling) | {"stop": list(sampling.stop)}
        bodies = [
            {"prompt": prompt, "seed": seed, **settings}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self._answer("generate", bodies)

    def score(
        self, prompts: Sequence[str], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """See `LanguageModel.score`."""
        bodies = [
            {"prompt": prompt, "continuation": continuation}
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        return self._answer("score", bodies)

    def label_log_probs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> list[LabelScores | Failure]:
        """See `LanguageModel.label_log_probs`."""
        bodies = [{"prompt": prompt, "labels": list(labels)} for prompt in prompts]
        return self._answer("labels", bodies)

    def _answer(self, kind: str, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        keys = [request_key(kind, self.facts, body) for body in bodies]
        distinct = dict(zip(keys, bodies, strict=True))  # Equal requests are one.
        order = list(distinct)
        new = [n for n, key in enumerate(order) if self.log.get(key) is None]
        failures: dict[str, Failure] = {}

        def keep(number: int, answer: Any) -> None:
            if isinstance(answer, Failure):
                failures[order[number]] = answer
            else:
                self.log.put(order[number], to_record(answer))

        if new:
            self._ask(kind, list(distinct.values()), new, keep)
        answers = []
        for key, body in zip(keys, bodies, strict=True):
            record = self.log.get(key)
            answers.append(
                failures.get(key, Failure("not_asked"))
                if record is None
                else from_record(kind, record, body, key)
            )
        return answers


# Called with the kind, the bodies of a call's requests, the numbers of those that have
# no answer yet, and a function to call with (number, answer) as each answer comes.
Ask = Callable[
    [str, list[dict[str, Any]], Sequence[int], Callable[[int, Any], None]], None
]


def recorded(folder: str | os.PathLike) -> CachedModel:
    """Returns a model that knows only the answers of a run's request logs.

    Args:
        folder: The workdir of a run, or its folder `requests`.

    Raises:
        ValueError: No recording there.
    """
    name, facts, answers = request_log.read_recording(folder)

    def ask(
        kind: str, bodies: list[dict[str, Any]], new: Sequence[int], keep: Any
    ) -> None:
        for number in new:
            body = bodies[number]
            key = request_key(kind, facts, body)
            record = answers.get(key)
            if record is None:
                detail = body["prompt"][-80:]
                keep(number, Failure("not_recorded", f"no answer to ...{detail!r}"))
            else:
                keep(number, from_record(kind, record, body, key))

    return CachedModel(name, facts, ask)
