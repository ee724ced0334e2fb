"""The decoder of this process behind the request log, like a server's model.

Requests are answered in blocks of like length, and a block is always computed whole,
even where some of its answers are known: rounding differs between shapes of batches,
so this is what lets a run that was stopped end with the bytes of one that was not.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gecko_jax.llm import decoder_files, local, protocol, request_log
from gecko_jax.parallel import sharding

# Of a block on CPU: what an interruption may lose.
_REQUESTS = 128

# The same where a call reads more tokens: a block is some calls.
_TOKENS_PER_REQUEST = 32

# Digits after the point: those below are rounding.
_DECIMALS = 4


def facts(weights: str, dtype: str) -> dict[str, Any]:
    """Returns what decides an answer, without loading the model.

    Args:
        weights: A `.gguf` file, a model folder, or "smollm2".
        dtype: Of the products.
    """
    name = decoder_files.name(decoder_files.find(weights), dtype)
    return {"backend": "in_process", "model": name}


def open_model(
    weights: str,
    dtype: str,
    tensor: int,
    compilation_cache: str,
    budget: request_log.Budget,
) -> protocol.LanguageModel:
    """Loads the model.

    Args:
        weights: A `.gguf` file, a model folder, or "smollm2".
        dtype: Of the products.
        tensor: Devices that it is split over; rows go to the rest.
        compilation_cache: Folder of what was compiled before; "" for none.
        budget: What may be asked.

    Raises:
        ImportError: A package or the model is not installed (names it).
        ValueError: No such model, a damaged file, or another family.
    """
    if compilation_cache:
        cache = pathlib.Path(compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache))
    model = local.load(weights, mesh=sharding.build_mesh(tensor=tensor), dtype=dtype)
    found = {"backend": "in_process", "model": model.name}
    return protocol.LanguageModel(model.name, found, _Asker(model, budget).ask)


class _Asker:
    """Answers requests, block by block."""

    def __init__(self, model: local.LocalModel, budget: request_log.Budget):
        self._model = model
        self._budget = budget
        self._size = max(_REQUESTS, model.tokens_per_call // _TOKENS_PER_REQUEST)

    def ask(
        self,
        kind: str,
        bodies: list[dict[str, Any]],
        new: Sequence[int],
        keep: Callable[[int, Any], None],
    ) -> None:
        """Answers the new requests; see `llm.Ask`."""
        answer = {
            "generate": self._generate,
            "score": self._score,
            "labels": self._labels,
        }[kind]
        faults = {n: fault for n, b in enumerate(bodies) if (fault := self._fault(b))}
        unanswered = set(new)
        for number in unanswered & faults.keys():
            keep(number, faults[number])
        # Like beside like: a row is padded to the longest of its batch.
        order = sorted(
            set(range(len(bodies))) - faults.keys(),
            key=lambda number: (len(bodies[number]["prompt"]), number),
        )
        for start in range(0, len(order), self._size):
            block = order[start : start + self._size]
            wanted = [number for number in block if number in unanswered]
            if not wanted:
                continue
            stopped, reserved = None, []
            try:
                for number in wanted:
                    reserved.append(self._budget.reserve(*self._price(bodies[number])))
            except request_log.BudgetError as error:
                stopped = error
            answers = {}
            if reserved:
                found = answer([bodies[number] for number in block])
                answers = dict(zip(block, found, strict=True))
            for number, price in zip(wanted, reserved, strict=False):
                usage = answers[number].usage
                self._budget.settle(price, usage.prompt_tokens, usage.completion_tokens)
                keep(number, answers[number])
            if stopped is not None:
                raise stopped

    def _price(self, body: dict[str, Any]) -> tuple[int, int]:
        read = body["prompt"] + body.get("continuation", "")
        return self._model.num_tokens(read) + 1, body.get("max_tokens", 1)

    def _fault(self, body: dict[str, Any]) -> protocol.Failure | None:
        texts = [body["prompt"], *body.get("labels", ())]
        texts += [body["continuation"]] if "continuation" in body else []
        if not all(texts):
            return protocol.Failure("empty", "a prompt or what shall follow it")
        try:
            lengths = [len(self._model.tokenizer.encode(t, begin=True)) for t in texts]
        except ValueError as error:
            return protocol.Failure("not_unicode", str(error))
        most = self._model.config.context_length
        length = lengths[0] + max(*lengths[1:], body.get("max_tokens", 0), 0)
        if length > most:
            return protocol.Failure(
                "too_long", f"{length:,} tokens; the model reads {most}"
            )
        return None

    def _generate(self, bodies: Sequence[dict[str, Any]]) -> list[protocol.Generation]:
        first = bodies[0]  # They differ in prompt and seed alone.
        sampling = protocol.Sampling(
            first["temperature"],
            first["top_p"],
            first["max_tokens"],
            tuple(first["stop"]),
        )
        found = self._model.complete(
            [body["prompt"] for body in bodies],
            [body["seed"] for body in bodies],
            sampling,
        )
        return [
            protocol.Generation(
                one.text, one.is_cut, self._usage(body["prompt"], one.num_tokens)
            )
            for body, one in zip(bodies, found, strict=True)
        ]

    def _score(self, bodies: Sequence[dict[str, Any]]) -> list[protocol.Score]:
        found = self._model.score_tokens(
            [body["prompt"] for body in bodies],
            [body["continuation"] for body in bodies],
        )
        return [
            protocol.Score(
                round(sum(values), _DECIMALS),
                len(values),
                self._usage(body["prompt"] + body["continuation"], 0),
            )
            for body, values in zip(bodies, found, strict=True)
        ]

    def _labels(self, bodies: Sequence[dict[str, Any]]) -> list[protocol.LabelScores]:
        # A prompt ends in a colon, so a label begins with a space, as a query does.
        labels = [f" {label}" for label in bodies[0]["labels"]]
        found = self._model.label_log_probs([body["prompt"] for body in bodies], labels)
        return [
            protocol.LabelScores(
                tuple(round(values[label], _DECIMALS) for label in labels),
                self._usage(body["prompt"], 1),
            )
            for body, values in zip(bodies, found, strict=True)
        ]

    def _usage(self, read: str, written: int) -> protocol.Usage:
        return protocol.Usage(self._model.num_tokens(read), written)
