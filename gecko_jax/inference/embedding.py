"""A trained model that turns texts into normalized vectors.

    model = embedding.load("runs/finetune")
    queries = model.encode_queries(["what is a lazy import"], task="search result")
    passages = model.encode_passages(texts, titles, dim=128)

Texts are *packed*: several texts share a row, separated by segment ids, and row widths
are powers of two. So little padding is computed and few shapes are compiled. A vector
does not depend on the other texts in its row beyond float32 rounding, because attention
stays within a segment and T5's relative bias depends only on the distance between two
tokens. Each call encodes every distinct text once, so equal texts get equal vectors.
"""

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

# Tokens per call and device. A CPU is fastest while the activations fit its caches.
TOKENS_PER_CALL = {"cpu": 2_048}
ACCELERATOR_TOKENS_PER_CALL = 65_536

# Texts that are tokenized and packed together. It bounds the memory for tokens.
TEXTS_PER_CHUNK = 16_384

DEFAULT_TASK = text_formats.DEFAULT_TASK

Side = Literal["query", "passage"]


class Gecko:
    """A trained model that turns texts into vectors.

    Attributes:
        files: Parameters, config, text format and vocabulary of the model.
        vocabulary: The tokenizer.
    """

    def __init__(
        self, model_files: model_folder.ModelFiles, tokens_per_call: int | None = None
    ):
        """Puts the parameters on the device; see `load`.

        Parameters that are sharded over a mesh stay there, and the rows of a call are
        sharded over all its devices.
        """
        self.vocabulary = model_files.build_vocabulary()
        vocab_size = model_files.encoder_config.vocab_size
        if self.vocabulary.size > vocab_size:
            raise ValueError(
                f"the vocabulary has {self.vocabulary.size:,} ids and the model has "
                f"vocab_size={vocab_size:,}; use the vocabulary of the training"
            )
        self._params, self._sharding = _place(model_files.params)
        # Drops the reference to the arrays that were read from a file.
        self.files = dataclasses.replace(model_files, params=self._params)
        self._num_devices = self._sharding.mesh.size if self._sharding else 1
        self._tokens_per_call = self._num_devices * (
            tokens_per_call
            or TOKENS_PER_CALL.get(jax.default_backend(), ACCELERATOR_TOKENS_PER_CALL)
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """Widths that the model was trained for (MRL), ascending."""
        return tuple(sorted(self.files.mrl_dims))

    @property
    def embedding_dim(self) -> int:
        """Width of the projection, the upper limit of `dims`."""
        return self.files.encoder_config.embedding_dim

    @property
    def revision(self) -> str:
        """Revision of the parameters; vectors of two revisions cannot be compared."""
        return self.files.revision

    @property
    def task_descriptions(self) -> dict[str, str]:
        """Task name -> the description or prompt that precedes a query."""
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
        """Like `encode` for queries.

        `task` is a name in `task_descriptions` or a description in plain words. A model
        with prompts uses its prompt "query" for an unknown task.
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
        """Like `encode` for passages; a title may be None or "" for no title."""
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

        Texts with the same tokens get equal vectors.

        Args:
            texts: Queries or passages, without any prefix.
            side: Format of the texts. Passages of a symmetric task get the format of
                its queries.
            task: Name or description; one for all texts, or one for each. None is
                "search result" for queries, and no task for passages.
            titles: Titles of passages, None or "" for no title.
            dim: One of `dims`; None is the largest.
            max_length: Maximum number of tokens per text; None is the training length.
            description: Label of the progress bar; None shows none.

        Raises:
            ValueError: A text is empty, `dim` was not trained, or a vector is not
                finite.
        """
        dim = self.check_dim(dim)
        texts = self.format_texts(texts, side=side, task=task, titles=titles)
        if max_length is None:
            short = side == "query"
            max_length = self.files.query_length if short else self.files.passage_length
        # One row per distinct text, by a digest of its tokens; `row_of` maps each text
        # to its row.
        projected = np.empty((len(texts), self.embedding_dim), np.float32)
        row_of = np.empty(len(texts), np.int64)
        rows: dict[bytes, int] = {}
        bar = progress.Progress(
            description or "", len(texts), enabled=bool(description)
        )
        with bar:
            for start in range(0, len(texts), TEXTS_PER_CHUNK):
                chunk = texts[start : start + TEXTS_PER_CHUNK]
                first = len(rows)
                new: list[list[int]] = []
                encoded = self.vocabulary.encode(chunk, max_length)
                for position, tokens in enumerate(encoded, start):
                    key = np.asarray(tokens, np.int32).data
                    key = hashlib.blake2b(key, digest_size=16).digest()
                    row_of[position] = rows.setdefault(key, len(rows))
                    if len(rows) > first + len(new):
                        new.append(tokens)
                done = start + len(chunk) - len(new)
                for positions, vectors in self._project(new):
                    projected[first + positions] = vectors
                    done += len(positions)
                    bar.update(done)
                bar.update(done)
        projected = projected[: len(rows)]
        finite = np.all(np.isfinite(projected), axis=1)[row_of]
        if not finite.all():
            raise ValueError(
                f"texts[{int(np.argmin(finite))}]: its vector is not finite, as the "
                "weights of the model are too large; use an earlier checkpoint"
            )
        vectors = cut(projected, dim, self.files.encoder_config.l2_epsilon)
        return vectors if len(rows) == len(texts) else vectors[row_of]

    def check_dim(self, dim: int | None) -> int:
        """Returns `dim`, or the largest for None; raises if it was not trained."""
        if dim is not None and dim not in self.dims:
            trained = ", ".join(map(str, self.dims))
            raise ValueError(
                f"dim={dim}: the model was not trained for it; choose one of {trained}"
            )
        return dim or self.dims[-1]

    def format_texts(
        self,
        texts: Sequence[str],
        *,
        side: Side,
        task: str | Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Returns the texts in the format that the encoder expects; see `encode`."""
        if isinstance(texts, str) or not isinstance(texts, Collection):
            raise ValueError(
                f"texts has type {type(texts).__name__}: pass a list, such as [text]"
            )
        if side not in ("query", "passage"):
            raise ValueError(f"side={side!r}: it must be 'query' or 'passage'")
        if titles is not None and (side == "query" or len(titles) != len(texts)):
            raise ValueError(
                f"{len(titles)} titles for {len(texts)} texts, side={side!r}: pass "
                "titles for passages only, one for each"
            )
        tasks = [task] * len(texts) if task is None or isinstance(task, str) else task
        if len(tasks) != len(texts):
            raise ValueError(
                f"{len(tasks)} tasks for {len(texts)} texts: pass one for each"
            )
        titles = [None] * len(texts) if titles is None else titles
        text_format = self.files.text_format
        formatted = []
        rows = zip(texts, titles, tasks, strict=True)
        for position, (text, title, name) in enumerate(rows):
            for field, value in (("texts", text), ("titles", title or "")):
                if not isinstance(value, str):
                    shown = f"{field}[{position}] is {value!r}"
                    raise ValueError(f"{shown}: it must be a string")
            try:
                if side == "query" or (name and text_format.is_symmetric(name)):
                    text = f"{title} {text}" if title else text
                    text = text_format.format_query(text, name or DEFAULT_TASK)
                else:
                    text = text_format.format_passage(text, title)
            except ValueError as error:
                raise ValueError(f"texts[{position}]: {error}") from error
            formatted.append(text)
        return formatted

    def _project(
        self, tokens: list[list[int]]
    ) -> Iterator[tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N D"]]]:
        """Yields (positions, projected vectors) of each call, in any order."""
        packed = packing.pack([len(ids) for ids in tokens])
        calls = packing.plan_calls(packed, self._tokens_per_call, self._num_devices)
        apply = _build_apply(self.files.encoder_config, self._sharding)
        previous: tuple[packing.Call, Array] | None = None
        for call in calls:
            width = call.rows[0].width
            rows = [row.positions for row in call.rows]
            laid_out = packing.lay_out(tokens, rows, (call.num_rows, width))
            arrays = map(self._share, laid_out)
            result = apply(self._params, *arrays, width // packing.MIN_TEXT)
            # The device computes this call while the previous result is unpacked and
            # the next rows are filled.
            if previous:
                yield _unpack(*previous)
            previous = call, result
        if previous:
            yield _unpack(*previous)

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
        source: Workdir of a training run, model folder, T5X checkpoint (path or URL),
            Hugging Face or sentence-transformers folder, or a model name on the hub.
        mesh: Mesh over which the parameters are sharded (`sharding.build_mesh`); None
            is one device.
        vocabulary: SentencePiece file or `tokenizer.json`, for a source without one
            (T5X).
        extra_ids: Number of sentinels after its pieces (T5: 100).
        tokens_per_call: Tokens per device and call; None chooses by backend.

    Raises:
        ValueError: The source is none of these, or is damaged.
    """
    numerics.check()
    opened = detection.open_model(
        os.fspath(source),
        vocabulary=None if vocabulary is None else os.fspath(vocabulary),
        extra_ids=extra_ids,
        mesh=mesh,
    )
    # Parameters go to their devices as they are read: no second copy on the host.
    one_device = sharding.build_mesh(devices=jax.local_devices()[:1])
    return Gecko(model_folder.read_params(opened, mesh or one_device), tokens_per_call)


def cut(
    embeddings: Float[np.ndarray, "N D"], dim: int, epsilon: float = 1e-12
) -> Float[np.ndarray, "N E"]:
    """Returns the first `dim` entries, normalized (MRL, section 3.1).

    The same as `dual_encoder.normalize` of a prefix, in numpy.
    """
    prefix = np.asarray(embeddings[:, :dim], np.float32)
    norms = np.sqrt(np.sum(np.square(prefix), axis=1, keepdims=True) + epsilon)
    return prefix / norms


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
    """Returns the compiled encoder, which all models of one architecture share."""

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
    # Replicate the output: every process needs every vector.
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(apply, static_argnums=3, out_shardings=replicated)


def _place(params: Any) -> tuple[Any, jax.sharding.NamedSharding | None]:
    """Returns the parameters on their devices, and the sharding of rows on a mesh."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and sharding.mesh.size > 1:
            mesh = sharding.mesh
            rows = jax.sharding.PartitionSpec(mesh.axis_names)
            return params, jax.sharding.NamedSharding(mesh, rows)
    return jax.tree.map(jnp.asarray, params), None
