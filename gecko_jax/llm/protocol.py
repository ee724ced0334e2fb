"""The language model interface of the FRet stages, and recorded answers.

    model.generate(prompts, seeds, sampling)  texts that continue the prompts
    model.score(prompts, continuations)       log LLM(continuation | prompt), in nats
    model.label_log_probs(prompts, labels)    log LLM(label | prompt) of every label

An answer is a number or text from the model. Where the model gave none, the answer is a
`Failure` with a reason, never a constant.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gecko_jax.llm import request_log, wire


@dataclasses.dataclass(frozen=True)
class Usage:
    """Cost of an answer."""

    prompt_tokens: int = 0  # tokens read
    completion_tokens: int = 0  # tokens written
    requests: int = 1  # successful requests

    def __add__(self, other: "Usage") -> "Usage":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Usage(*map(sum, pairs))


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generated text; `is_cut` if the token limit ended it."""

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
    """A missing answer."""

    reason: str  # one of a few categories, by which failures are counted
    detail: str = ""  # what arrived instead, for messages


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings."""

    temperature: float  # divisor of the logits; 0 is greedy
    top_p: float  # probability mass of the nucleus, in (0, 1]
    max_tokens: int  # token limit of an answer
    stop: tuple[str, ...]  # strings that end an answer and are not part of it


@dataclasses.dataclass(frozen=True)
class Call:
    """Requests; among those of the kind "score", ones with labels are of "labels"."""

    kind: str  # "generate", "score" or "labels"
    bodies: list[dict[str, Any]]  # of all requests
    new: Sequence[int]  # indices of the requests to answer
    keep: Callable[[int, Any], None]  # takes the index of a request and its answer


class LanguageModel:
    """A language model behind a request log: no request is answered twice."""

    def __init__(
        self,
        name: str,  # model and revision, written into every record
        facts: dict[str, Any],  # everything that changes an answer
        ask: Callable[[Call], None],  # answers the requests of a call
        close: Callable[[], None] = lambda: None,  # releases the model's resources
        *,
        reads_ahead: bool = False,  # whether `score` answers the questions, too
    ):
        self.name = name
        self.facts = facts
        self.close = close
        self.reads_ahead = reads_ahead
        self.log = request_log.RequestLog(None)  # The stages open one per shard.
        # Called with the answered share of a call's requests, in [0, 1].
        self.report: Callable[[float], None] = lambda share: None
        self._ask = ask

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
    ) -> list[Generation | Failure]:
        """Continues each prompt, with its own seed."""
        settings = dataclasses.asdict(sampling) | {"stop": list(sampling.stop)}
        pairs = zip(prompts, seeds, strict=True)
        bodies = [{"prompt": p, "seed": seed, **settings} for p, seed in pairs]
        return self._answer("generate", bodies)

    def score(
        self,
        prompts: Sequence[str],
        continuations: Sequence[str],
        questions: Sequence[str] = (),
        labels: Sequence[str] = (),
    ) -> list[Score | Failure]:
        """Scores each continuation of its prompt.

        If `reads_ahead`, the log then also has the answers of `label_log_probs` to the
        questions, which begin with prompts and continuations that are read anyway.
        """
        bodies: list[dict[str, Any]] = [
            {"prompt": prompt, "continuation": continuation}
            for prompt, continuation in zip(prompts, continuations, strict=True)
        ]
        if self.reads_ahead:
            bodies += [{"prompt": text, "labels": list(labels)} for text in questions]
        return self._answer("score", bodies)[: len(prompts)]

    def label_log_probs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> list[LabelScores | Failure]:
        """Scores every label as the continuation of each prompt."""
        bodies = [{"prompt": prompt, "labels": list(labels)} for prompt in prompts]
        return self._answer("labels", bodies)

    def _answer(self, kind: str, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        kinds = ["labels" if "labels" in body else kind for body in bodies]
        requests = zip(kinds, bodies, strict=True)
        keys = [request_key(kind, self.facts, body) for kind, body in requests]
        distinct = dict(zip(keys, bodies, strict=True))
        order = list(distinct)
        new = [n for n, key in enumerate(order) if self.log.get(key) is None]
        failures: dict[str, Failure] = {}
        finished = itertools.count(len(order) - len(new) + 1)

        def keep(number: int, answer: Any) -> None:
            if isinstance(answer, Failure):
                failures[order[number]] = answer
            else:
                self.log.put(order[number], dataclasses.asdict(answer))
            self.report(next(finished) / len(order))

        if new:
            self._ask(Call(kind, list(distinct.values()), new, keep))
        answers = []
        for kind, key, body in zip(kinds, keys, bodies, strict=True):
            if record := self.log.get(key):
                answers.append(from_record(kind, record, body, key))
            else:
                answers.append(failures.get(key, Failure("not_asked")))
        return answers


def request_key(kind: str, facts: Mapping[str, Any], body: Mapping[str, Any]) -> str:
    """Returns the key of a request; equal requests have the same answer."""
    encoded = json.dumps([kind, facts, body], sort_keys=True, ensure_ascii=False)
    # A text may hold a lone surrogate, which strict UTF-8 cannot encode.
    content = encoded.encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()[:32]


def from_record(
    kind: str, record: Mapping[str, Any], body: Mapping[str, Any], key: str
) -> Generation | Score | LabelScores:
    """Returns the answer of a checked record, if it is one to this request."""
    usage = Usage(**record["usage"])
    # Rounding may leave a log-probability slightly above 0.
    if kind == "generate" and "text" in record:
        text = wire.whole_characters(record["text"])
        return Generation(text, record["is_cut"], usage)
    if kind == "score" and "log_prob" in record:
        return Score(min(float(record["log_prob"]), 0.0), record["num_tokens"], usage)
    if kind == "labels" and len(record.get("log_probs", ())) == len(body["labels"]):
        log_probs = tuple(min(float(p), 0.0) for p in record["log_probs"])
        return LabelScores(log_probs, usage)
    raise ValueError(
        f"recorded answer {key}: it has {', '.join(sorted(record))}, which does not "
        f"answer a request of kind {kind!r}; remove its line from the request log"
    )


def recorded(folder: str | os.PathLike) -> LanguageModel:
    """Returns a model that replays the answers in a workdir, or in its `requests`."""
    name, facts, answers = request_log.read_recording(folder)

    def ask(call: Call) -> None:
        for number in call.new:
            body = call.bodies[number]
            key = request_key(call.kind, facts, body)
            if key in answers:
                call.keep(number, from_record(call.kind, answers[key], body, key))
            else:
                detail = f"no answer to ...{body['prompt'][-80:]!r}"
                call.keep(number, Failure("not_recorded", detail))

    return LanguageModel(name, facts, ask)
