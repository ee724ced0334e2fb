"""Embedding: texts in, normalized vectors out; the one door to a trained model.

    model = embedding.load("runs/finetune")
    queries = model.encode_queries(["what is a lazy import"], task="search result")
    passages = model.encode_passages(texts, titles, dim=128)

Texts are *packed*: several share a row, kept apart by segment ids, and rows come in a
few widths, each a power of two. So hardly any padding is computed and hardly any shape
compiled, and no vector depends on what else is in its row (`layers`: attention stays
in a segment, and T5's relative bias knows only the distance of two tokens) beyond the
rounding of float32. A call encodes each distinct text once, so that equal texts have
equal vectors.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gecko_jax.formats import detection, model_folder
from gecko_jax.io import progress
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import numerics, sharding
from gecko_jax.text import packing, text_formats

# Tokens per call. A CPU is fastest while the activations stay in its caches.
TOKENS_PER_CALL = {"cpu": 2_048}
ACCELERATOR_TOKENS_PER_CALL = 65_536

# Texts that are tokenized and packed together; bounds the memory of long inputs.
TEXTS_PER_CHUNK = 16_384

DEFAULT_TASK = text_formats.DEFAULT_TASK

Side = Literal["query", "passage"]


class Gecko:
    """A trained model that turns texts into vectors.

    Attributes:
        files: What the model is made of.
        vocabulary: Cuts texts into tokens.
    """

    def __init__(
        self, model_files: model_folder.ModelFiles, tokens_per_call: int | None = None
    ):
        """Puts the parameters on the device.

        Args:
            model_files: Parameters, text format and vocabulary; see `load`. Parameters
                that lie on a mesh stay there, and the work is shared over it.
            tokens_per_call: Tokens per device and call; None fits the backend.
        """
        self.vocabulary = model_files.build_vocabulary()
        vocab_size = model_files.encoder_config.vocab_size
        if self.vocabulary.size > vocab_size:
            raise ValueError(
                f"the vocabulary has {self.vocabulary.size:,} ids but the model "
                f"vocab_size={vocab_size:,}: they do not belong together; use the "
                "vocabulary that the model was trained with"
            )
        self._params, self._sharding = _place(model_files.params)
        # Not twice in memory: what came from a file gives way to what was placed.
        self.files = dataclasses.replace(model_files, params=self._params)
        devices = self._sharding.mesh.size if self._sharding else 1
        self._row_multiple = devices
        self._tokens_per_call = devices * (
            tokens_per_call
            or TOKENS_PER_CALL.get(jax.default_backend(), ACCELERATOR_TOKENS_PER_CALL)
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims that were trained (MRL), ascending."""
        return tuple(sorted(self.files.mrl_dims))

    @property
    def embedding_dim(self) -> int:
        """Width of the projection; no dim exceeds it."""
        return self.files.encoder_config.embedding_dim

    @property
    def revision(self) -> str:
        """Names the parameters; vectors of two revisions must not be compared."""
        return self.files.revision

    @property
    def task_descriptions(self) -> dict[str, str]:
        """Task names the model knows, and the text each puts before a query."""
        text_format = self.files.text_format
        return {**text_format.task_descriptions, **text_format.prompts}

    def encode_queries(
        self,
        texts: Sequence[str],
        task: str | Sequence[str] = DEFAULT_TASK,
        *,
        dim: int | None = None,
        description: str | None = None,
    ) -> Float[np.ndarray, "Q E"]:
        """Returns one normalized vector per query, in order.

        Args:
            texts: The queries, without any prefix.
            task: A name in `task_descriptions`, or a description in plain words; one
                for all queries, or one for each. A model with prompts writes its
                prompt "query" before the queries of a task it does not know.
            dim: One of `dims`; None is the largest.
            description: Shows progress under this name.
        """
        return self.encode(
            texts, side="query", task=task, dim=dim, description=description
        )

    def encode_passages(
        self,
        texts: Sequence[str],
        titles: Sequence[str | None] | None = None,
        *,
        dim: int | None = None,
        description: str | None = None,
    ) -> Float[np.ndarray, "P E"]:
        """Returns one normalized vector per passage, in order.

        Args:
            texts: The passages, without any prefix.
            titles: One per passage; None, or an empty one, stands for no title.
            dim: One of `dims`; None is the largest.
            description: Shows progress under this name.
        """
        return self.encode(
            texts, side="passage", titles=titles, dim=dim, description=description
        )

    def encode(
        self,
        texts: Sequence[str],
        *,
        side: Side,
        task: str | Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        dim: int | None = None,
        max_length: int | None = None,
        description: str | None = None,
    ) -> Float[np.ndarray, "N E"]:
        """Returns one normalized float32 vector per text, in order.

        Texts that the encoder reads as the same tokens have equal vectors.

        Args:
            texts: Queries or passages, without any prefix.
            side: How the texts are written. The passages of a symmetric task are
                written as its queries.
            task: Name or description, of all or of each; None is "search result" for
                queries, and no task for passages.
            titles: Titles of passages.
            dim: One of `dims`; None is the largest.
            max_length: Tokens a text is cut to; None is the length of training.
            description: Shows progress under this name.

        Raises:
            ValueError: A text is empty (names its index), `dim` is not trained, or a
                vector is not finite.
        """
        dim = self.check_dim(dim)
        texts = self.format_texts(texts, side=side, task=task, titles=titles)
        if max_length is None:
            short = side == "query"
            max_length = self.files.query_length if short else self.files.passage_length
        # The first rows are those of the distinct texts; `row_of` finds a text's own.
        projected = np.empty((len(texts), self.embedding_dim), np.float32)
        row_of = np.empty(len(texts), np.int64)
        rows: dict[bytes, int] = {}
        total = len(texts) if description else 0
        with progress.Progress(
            description or "", total, enabled=bool(description)
        ) as bar:
            for start in range(0, len(texts), TEXTS_PER_CHUNK):
                chunk = texts[start : start + TEXTS_PER_CHUNK]
                first = len(rows)
                new: list[list[int]] = []
                for place, tokens in enumerate(
                    self.vocabulary.encode(chunk, max_length), start
                ):
                    row = rows.setdefault(_key(tokens), len(rows))
                    if row == first + len(new):
                        new.append(tokens)
                    row_of[place] = row
                done = start + len(chunk) - len(new)
                if not new:
                    bar.update(done)
                    continue
                for positions, vectors in self._project(new):
                    projected[first + positions] = vectors
                    done += len(positions)
                    bar.update(done)
        projected = projected[: len(rows)]
        finite = np.all(np.isfinite(projected), axis=1)[row_of]
        if not finite.all():
            raise ValueError(
                f"texts[{int(np.argmin(finite))}]: its vector is not finite; the "
                f"weights of model {self.revision} are too large, take an earlier "
                "checkpoint"
            )
        vectors = cut(projected, dim, self.files.encoder_config.l2_epsilon)
        return vectors if len(rows) == len(texts) else vectors[row_of]

    def check_dim(self, dim: int | None) -> int:
        """Returns `dim`, or the largest for None; raises unless it was trained."""
        if dim is None:
            return self.dims[-1]
        if dim not in self.dims:
            trained = ", ".join(map(str, self.dims))
            raise ValueError(
                f"dim={dim} is not one the model was trained for: choose one of "
                f"{trained}"
            )
        return dim

    def format_texts(
        self,
        texts: Sequence[str],
        *,
        side: Side,
        task: str | Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Returns the texts as the encoder reads them; see `encode`."""
        if isinstance(texts, str) or not isinstance(texts, Collection):
            raise ValueError(
                f"texts is one {type(texts).__name__}: pass a list, such as [text]"
            )
        if side not in ("query", "passage"):
            raise ValueError(f"side={side!r}: it must be 'query' or 'passage'")
        if titles is not None and (side == "query" or len(titles) != len(texts)):
            raise ValueError(
                f"{len(titles)} titles for {len(texts)} texts, side={side!r}: titles "
                "belong to passages, one each"
            )
        tasks = [task] * len(texts) if task is None or isinstance(task, str) else task
        if len(tasks) != len(texts):
            raise ValueError(f"{len(tasks)} tasks for {len(texts)} texts: one each")
        text_format = self.files.text_format
        formatted = []
        for position, (text, task) in enumerate(zip(texts, tasks, strict=True)):
            title = None if titles is None else titles[position]
            for name, value in (("texts", text), ("titles", title or "")):
                if not isinstance(value, str):
                    raise ValueError(
                        f"{name}[{position}] is {value!r}: it must be a string"
                    )
            as_query = side == "query" or (task and text_format.is_symmetric(task))
            try:
                if not as_query:
                    formatted.append(text_format.format_passage(text, title))
                else:
                    text = f"{title} {text}" if title else text
                    formatted.append(
                        text_format.format_query(text, task or DEFAULT_TASK)
                    )
            except ValueError as error:
                raise ValueError(f"texts[{position}]: {error}") from error
        return formatted

    def _project(
        self, tokens: list[list[int]]
    ) -> Iterator[tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N D"]]]:
        """Yields (positions, projected vectors), call by call, in any order."""
        rows = packing.pack([len(ids) for ids in tokens])
        calls = packing.plan_calls(rows, self._tokens_per_call, self._row_multiple)
        apply = _build_apply(self.files.encoder_config, self._sharding)
        waiting: collections.deque[tuple[packing.Call, Array]] = collections.deque()
        for call in calls:
            width = call.rows[0].width
            ids = np.zeros((call.num_rows, width), np.int32)
            segments = np.zeros((call.num_rows, width), np.int32)
            for r, row in enumerate(call.rows):
                begin = 0
                for segment, position in enumerate(row.positions, start=1):
                    end = begin + len(tokens[position])
                    ids[r, begin:end] = tokens[position]
                    segments[r, begin:end] = segment
                    begin = end
            result = apply(
                self._params,
                self._share(ids),
                self._share(segments),
                width // packing.MIN_TEXT,
            )
            waiting.append((call, result))
            if len(waiting) > 1:  # Fill the next rows while the device works.
                yield _unpack(*waiting.popleft())
        while waiting:
            yield _unpack(*waiting.popleft())

    def _share(self, rows: Int[np.ndarray, "R L"]) -> Any:
        if self._sharding is None:
            return rows
        return jax.make_array_from_callback(
            rows.shape, self._sharding, lambda index: rows[index]
        )


def load(
    source: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    *,
    vocabulary: str | os.PathLike | None = None,
    extra_ids: int = 0,
    tokens_per_call: int | None = None,
) -> Gecko:
    """Loads a model of any format.

    Args:
        source: The workdir of a training run, a model folder, or what `gecko import`
            takes: a T5X checkpoint (a path or a URL), a Hugging Face or
            sentence-transformers folder, or one of their names on the hub.
        mesh: Where the parameters go as they are read (`sharding.build_mesh`); None is
            one device.
        vocabulary: The SentencePiece file of a source that holds none (T5X).
        extra_ids: Sentinels after its pieces (T5: 100).
        tokens_per_call: Tokens per device and call; None fits the backend.

    Raises:
        ValueError: The source is none of these, or damaged; says what it is.
    """
    numerics.check()
    opened = detection.open_model(
        os.fspath(source),
        vocabulary=None if vocabulary is None else os.fspath(vocabulary),
        extra_ids=extra_ids,
        mesh=mesh,
    )
    # Placed as they are read, so that they are never in memory twice.
    one_device = sharding.build_mesh(devices=jax.local_devices()[:1])
    return Gecko(model_folder.read_params(opened, mesh or one_device), tokens_per_call)


def cut(
    embeddings: Float[np.ndarray, "N D"], dim: int, epsilon: float = 1e-12
) -> Float[np.ndarray, "N E"]:
    """Returns the first `dim` entries, normalized again (MRL, section 3.1).

    The same as `dual_encoder.normalize` of a prefix, on the host.
    """
    prefix = np.asarray(embeddings[:, :dim], np.float32)
    norms = np.sqrt(np.sum(np.square(prefix), axis=1, keepdims=True) + epsilon)
    return prefix / norms


def _key(tokens: Sequence[int]) -> bytes:
    """Names a sequence of tokens in 16 bytes."""
    content = np.asarray(tokens, np.int32).data
    return hashlib.blake2b(content, digest_size=16).digest()


def _unpack(
    call: packing.Call, result: Float[Array, "R S D"]
) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N D"]]:
    vectors = np.asarray(result)
    positions = np.concatenate([row.positions for row in call.rows])
    counts = [len(row.positions) for row in call.rows]
    row_index = np.repeat(np.arange(len(call.rows)), counts)
    segment_index = np.concatenate([np.arange(count) for count in counts])
    return positions, vectors[row_index, segment_index]


@functools.cache
def _build_apply(
    config: dual_encoder.EncoderConfig, sharding: jax.sharding.NamedSharding | None
) -> Callable[..., Array]:
    """Returns the compiled encoder; all models of one architecture share it."""

    def apply(
        params: Any,
        tokens: Int[Array, "R L"],
        segment_ids: Int[Array, "R L"],
        num_segments: int,
    ) -> Float[Array, "R S D"]:
        projected = dual_encoder.DualEncoder(config).apply(
            {"params": params}, tokens, segment_ids, num_segments=num_segments
        )
        return typing.cast(Array, projected)

    if sharding is None:
        return jax.jit(apply, static_argnums=3)
    # Every process gets every vector.
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(apply, static_argnums=3, out_shardings=whole)


def _place(params: Any) -> tuple[Any, jax.sharding.NamedSharding | None]:
    """Returns the parameters on their devices, and how rows are shared over a mesh."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            mesh = sharding.mesh
            rows = jax.sharding.PartitionSpec(mesh.axis_names)
            return params, jax.sharding.NamedSharding(mesh, rows)
    return jax.tree.map(jnp.asarray, params), None
