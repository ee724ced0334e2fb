"""The decoder of this process behind the request log, like a server's model.

Requests are answered in blocks of similar length. A block is always computed whole,
even if some answers are known: rounding differs between batch shapes, and a resumed run
must end with the bytes of an uninterrupted one.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from gecko_jax.llm import decoder_files, local, protocol, request_log
from gecko_jax.parallel import sharding

# Requests of a block on CPU: what an interruption may lose.
_REQUESTS = 128
# On accelerators a block has one request per this many tokens of a call.
_TOKENS_PER_REQUEST = 32
# Decimals of a recorded log-probability; further digits are rounding.
_DECIMALS = 4


def facts(weights: str, dtype: str) -> dict[str, Any]:
    """Returns what changes an answer, without loading the model; see `open_model`."""
    name = decoder_files.name(decoder_files.find(weights), dtype)
    return {"backend": "in_process", "model": name}


def open_model(
    weights: str,
    dtype: str,
    tensor: int,
    compilation_cache: str,
    budget: request_log.Budget,
) -> protocol.LanguageModel:
    """Loads the model by the keys `llm` of `configs/fret.py`; see `local.load`."""
    if compilation_cache:
        cache = pathlib.Path(compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    model = local.load(weights, mesh=sharding.build_mesh(tensor=tensor), dtype=dtype)
    about = {"backend": "in_process", "model": model.name}
    ask = _Asker(model, budget).ask
    return protocol.LanguageModel(model.name, about, ask, reads_ahead=True)


class _Asker:
    """Answers requests block by block."""

    def __init__(self, model: local.LocalModel, budget: request_log.Budget):
        self._model = model
        self._budget = budget
        self._size = max(_REQUESTS, model.tokens_per_call // _TOKENS_PER_REQUEST)

    def ask(self, call: protocol.Call) -> None:
        """Answers the new requests of a call."""
        answer = self._generate if call.kind == "generate" else self._judge
        bodies, keep, unanswered = call.bodies, call.keep, set(call.new)
        reasons = dict(enumerate(map(self._find_failure, bodies)))
        failures = {number: reason for number, reason in reasons.items() if reason}
        for number in unanswered & failures.keys():
            keep(number, failures[number])
        # Similar lengths side by side need little padding. A question that begins with
        # a prompt and its continuation, and adds a line, follows them.
        scored = {
            body["prompt"] + body["continuation"]: number
            for number, body in enumerate(bodies)
            if "continuation" in body
        }

        def place(number: int) -> tuple[int, int, int]:
            first, body = number, bodies[number]
            if "labels" in body:
                first = scored.get(body["prompt"].rpartition("\n")[0], number)
            return len(bodies[first]["prompt"]), first, number

        order = sorted(set(range(len(bodies))) - failures.keys(), key=place)
        for start in range(0, len(order), self._size):
            block = order[start : start + self._size]
            missing = [number for number in block if number in unanswered]
            stopped, prices = None, {}
            try:
                for number in missing:
                    prices[number] = self._budget.reserve(*self._cost(bodies[number]))
            except request_log.BudgetError as error:
                stopped = error
            if prices:
                answers = answer([bodies[number] for number in block])
                for number, reply in zip(block, answers, strict=True):
                    if number in prices:
                        used = reply.usage.prompt_tokens, reply.usage.completion_tokens
                        self._budget.settle(prices[number], *used)
                        keep(number, reply)
            if stopped is not None:
                raise stopped

    def _cost(self, body: dict[str, Any]) -> tuple[int, int]:
        read = body["prompt"] + body.get("continuation", "")
        return self._model.num_tokens(read) + 1, body.get("max_tokens", 1)

    def _find_failure(self, body: dict[str, Any]) -> protocol.Failure | None:
        """Returns why the model cannot answer a request, if so."""
        texts = [body["prompt"], *body.get("labels", ())]
        texts += [body["continuation"]] if "continuation" in body else []
        if not all(texts):
            return protocol.Failure("empty", "an empty prompt or continuation")
        try:
            lengths = [len(self._model.tokenizer.encode(t, begin=True)) for t in texts]
        except ValueError as error:
            return protocol.Failure("not_unicode", str(error))
        limit = self._model.config.context_length
        length = lengths[0] + max(*lengths[1:], body.get("max_tokens", 0), 0)
        if length > limit:
            detail = f"{length:,} tokens; the model reads {limit}"
            return protocol.Failure("too_long", detail)
        return None

    def _generate(self, bodies: Sequence[dict[str, Any]]) -> list[protocol.Generation]:
        first = bodies[0]  # The bodies of a call differ in prompt and seed only.
        numbers = (first[name] for name in ("temperature", "top_p", "max_tokens"))
        sampling = protocol.Sampling(*numbers, stop=tuple(first["stop"]))
        prompts = [body["prompt"] for body in bodies]
        seeds = [body["seed"] for body in bodies]
        completions = self._model.complete(prompts, seeds, sampling)
        pairs = zip(prompts, completions, strict=True)
        return [
            protocol.Generation(text, is_cut, self._usage(prompt, num_tokens))
            for prompt, (text, is_cut, num_tokens) in pairs
        ]

    def _judge(
        self, bodies: Sequence[dict[str, Any]]
    ) -> list[protocol.Score | protocol.LabelScores]:
        """Answers requests for scores and for labels, the latter all of one list."""
        labelled = [body for body in bodies if "labels" in body]
        scored = [body for body in bodies if "labels" not in body]
        # A prompt ends in a colon, so a label begins with a space, as a query does.
        labels = [f" {label}" for label in (labelled[0]["labels"] if labelled else ())]
        scores, label_scores = self._model.judge(
            [body["prompt"] for body in scored],
            [body["continuation"] for body in scored],
            [body["prompt"] for body in labelled],
            labels,
        )
        of_scored, of_labelled = iter(scores), iter(label_scores)
        answers: list[protocol.Score | protocol.LabelScores] = []
        for body in bodies:
            if "labels" in body:
                values = next(of_labelled)
                rounded = tuple(round(values[label], _DECIMALS) for label in labels)
                usage = self._usage(body["prompt"], 1)
                answers.append(protocol.LabelScores(rounded, usage))
            else:
                tokens = next(of_scored)
                usage = self._usage(body["prompt"] + body["continuation"], 0)
                total = round(sum(tokens), _DECIMALS)
                answers.append(protocol.Score(total, len(tokens), usage))
        return answers

    def _usage(self, read: str, written: int) -> protocol.Usage:
        return protocol.Usage(self._model.num_tokens(read), written)
