"""Index: the passages nearest to a query by exact inner product.

    built = index.Index(vectors, ids, texts=texts, revision=model.revision)
    built.save("index")
    scores, ids = index.load("index").search(model.encode_queries(queries), k=5)

The search goes through the corpus block by block and keeps the best k so far, so its
memory grows with queries times k, never with queries times passages. Of equal scores
the earlier passage wins. Codes are decoded block by block, and compared with float32
queries.

    index/index.json      number, dim, model revision
    index/vectors.npy     one row per passage: float32, or codes (see `quantization`)
    index/ranges.npy      of int8 codes
    index/passages.jsonl  id, title and text of each row
"""

import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gecko_jax import checksums, embedding, files, quantization, wording
from gecko_jax import vectors as vectors_lib

# 1 had float32 only.
FORMAT_VERSION = 2

# Passages and queries that are compared at once; their scores take 64 MiB.
BLOCK_ROWS = 65_536
BLOCK_QUERIES = 256

_ABOUT, _VECTORS, _PASSAGES = "index.json", "vectors.npy", "passages.jsonl"
_RANGES = "ranges.npy"
_REMEDY = "make the index again with `gecko index`"
_FIELDS = {
    "format_version": int,
    "num_passages": int,
    "dim": int,
    "precision": quantization.PRECISIONS,
    "revision": str,
}


class Index:
    """Vectors of passages with their ids and, if known, titles and texts."""

    def __init__(
        self,
        vectors: Float[np.ndarray, "P D"] | quantization.Codes,
        ids: Sequence[str],
        *,
        titles: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        revision: str = "",
    ):
        """Checks that the parts fit each other; copies nothing.

        Args:
            vectors: One per passage. Normalized ones make the scores cosines, which
                those of codes only come near.
            ids: Unique names of the passages.
            titles: Titles, empty where there is none.
            texts: What `text` gives back.
            revision: The model that made the vectors; "" if unknown.

        Raises:
            ValueError: No passages, parts of different lengths, or a vector that is
                not finite.
        """
        if not len(vectors):
            raise ValueError("an empty corpus: an index needs at least one passage")
        for name, part in (("ids", ids), ("titles", titles), ("texts", texts)):
            if part is not None and len(part) != len(vectors):
                raise ValueError(
                    f"{len(part):,} {name} for {len(vectors):,} vectors: one each"
                )
        if not isinstance(vectors, quantization.Codes):
            vectors = quantization.encode(vectors, quantization.FLOAT32)
        self.codes = vectors
        self.ids = list(ids)
        self.titles = list(titles) if titles is not None else None
        self.texts = list(texts) if texts is not None else None
        self.revision = revision
        self._rows = {identity: row for row, identity in enumerate(self.ids)}
        if len(self._rows) != len(self.ids):
            twice = next(i for r, i in enumerate(self.ids) if self._rows[i] != r)
            raise ValueError(f"id {twice!r} comes twice; ids must differ")
        finite = np.isfinite(self.codes.values).all(axis=1)
        if not finite.all():
            bad = self.ids[int(np.argmin(finite))]
            raise ValueError(
                f"the vector of {bad!r} is not finite; embed the passages again with "
                "a model whose weights are finite"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Width of the vectors; queries must have the same."""
        return self.codes.dim

    def text(self, identity: str) -> str | None:
        """Returns title and text of a passage, None when the index holds no texts."""
        if self.texts is None:
            return None
        row = self._rows[identity]
        title = self.titles[row] if self.titles else ""
        text = self.texts[row]
        return f"{title}: {text}" if title and title != text else text

    def check_model(self, gecko: embedding.Gecko) -> None:
        """Raises ValueError unless `gecko` made the vectors."""
        if self.revision and self.revision != gecko.revision:
            raise ValueError(
                f"the index was made with model revision {self.revision}, not with "
                f"{gecko.revision}: their vectors cannot be compared; search with that "
                "model, or embed and index again with this one"
            )
        gecko.check_dim(self.dim)

    def search(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q T"], list[list[str]]]:
        """Returns scores and ids of the k best passages per query, best first.

        A smaller corpus gives fewer. Scores are exact float32 inner products.
        """
        scores, positions = self.search_positions(queries, k)
        ids = np.array(self.ids, dtype=object)
        return scores, [ids[row].tolist() for row in positions]

    def search_positions(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float[np.ndarray, "Q T"], Int[np.ndarray, "Q T"]]:
        """The same as `search`, with positions in the corpus instead of ids."""
        if queries.ndim != 2:
            raise ValueError(
                f"queries of shape {queries.shape}: give one row for each query, "
                "[queries, dims]"
            )
        if queries.shape[1] != self.dim:
            raise ValueError(
                f"queries of {queries.shape[1]} dims in an index of {self.dim}: encode "
                f"them with dim={self.dim}"
            )
        if not np.isfinite(queries).all():
            raise ValueError(
                "a query's vector is not finite; encode it again with a model whose "
                "weights are finite"
            )
        if k < 1:
            raise ValueError(f"k={k}: it must be at least 1")
        k = min(k, len(self))
        parts = [
            self._search_block(np.asarray(queries[start : start + BLOCK_QUERIES]), k)
            for start in range(0, len(queries), BLOCK_QUERIES)
        ]
        if not parts:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int32)
        scores, positions = zip(*parts, strict=True)
        return np.concatenate(scores), np.concatenate(positions)

    def _search_block(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q T"], Int[np.ndarray, "Q T"]]:
        count = len(queries)
        # One query, or a full block: two shapes to compile.
        rows = 1 if count == 1 else BLOCK_QUERIES
        padded = jnp.asarray(np.pad(queries, ((0, rows - count), (0, 0))), jnp.float32)
        scores = jnp.full((rows, k), -jnp.inf, jnp.float32)
        positions = jnp.zeros((rows, k), jnp.int32)
        block_rows = min(BLOCK_ROWS, len(self))
        for start in range(0, len(self), block_rows):
            block = self.codes.values[start : start + block_rows]
            num_valid = len(block)
            if num_valid < block_rows:
                block = np.pad(block, ((0, block_rows - num_valid), (0, 0)))
            scores, positions = _best_so_far(
                scores,
                positions,
                padded,
                block,
                self.codes.ranges,
                np.int32(start),
                np.int32(num_valid),
                precision=self.codes.precision,
            )
        return np.asarray(scores)[:count], np.asarray(positions)[:count]

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the index, whole or not at all; an index that is there is replaced.

        Raises:
            ValueError: `folder` holds something else than an index.
            OSError: The disk is full.
        """
        path = pathlib.Path(folder)
        is_free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
        if not is_free and not (path / _ABOUT).exists():
            raise ValueError(f"{path}: there, but not an index; choose another folder")
        with files.write_folder(path) as temporary:
            np.save(temporary / _VECTORS, self.codes.values)
            if self.codes.ranges is not None:
                np.save(temporary / _RANGES, self.codes.ranges)
            with (temporary / _PASSAGES).open("w", encoding="utf-8") as passages:
                for row, identity in enumerate(self.ids):
                    record = {"_id": identity}
                    if self.titles is not None:
                        record["title"] = self.titles[row]
                    if self.texts is not None:
                        record["text"] = self.texts[row]
                    passages.write(json.dumps(record, ensure_ascii=False) + "\n")
            about = {
                "format_version": FORMAT_VERSION,
                "num_passages": len(self),
                "dim": self.dim,
                "precision": self.codes.precision,
                "revision": self.revision,
                checksums.FILES: checksums.of_files(
                    temporary, [path.name for path in temporary.iterdir()]
                ),
            }
            checksums.write_object(temporary / _ABOUT, about)


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="precision")
def _best_so_far(
    scores: Float[Array, "Q T"],
    positions: Int[Array, "Q T"],
    queries: Float[Array, "Q D"],
    block: Shaped[Array, "P W"],
    ranges: Float[Array, "2 D"] | None,
    start: Int[Array, ""],
    num_valid: Int[Array, ""],
    *,
    precision: str,
) -> tuple[Float[Array, "Q T"], Int[Array, "Q T"]]:
    """Merges the scores of a block into the best of the blocks before it."""
    block = quantization.decode(block, precision, queries.shape[1], ranges)
    # Accelerators round float32 products unless they are told not to.
    fresh = jnp.einsum("qd,pd->qp", queries, block, precision=jax.lax.Precision.HIGHEST)
    row = jnp.arange(block.shape[0], dtype=jnp.int32)
    fresh = jnp.where((row < num_valid)[None, :], fresh, -jnp.inf)
    # top_k prefers the first of equals: earlier blocks stand first, and each block is
    # in the order of the corpus.
    fresh, chosen = jax.lax.top_k(fresh, min(scores.shape[1], block.shape[0]))
    scores, order = jax.lax.top_k(
        jnp.concatenate([scores, fresh], axis=1), scores.shape[1]
    )
    positions = jnp.concatenate([positions, chosen + start], axis=1)
    return scores, jnp.take_along_axis(positions, order, axis=1)


def load(folder: str | os.PathLike) -> Index:
    """Reads what `Index.save` wrote.

    Raises:
        ValueError: No index there, or files that are missing, cut off or do not fit
            each other.
    """
    path = pathlib.Path(folder)
    try:
        about = checksums.read_object(
            path / _ABOUT,
            _FIELDS,
            remedy=_REMEDY,
            defaults={"precision": quantization.FLOAT32},
        )
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no {_ABOUT} here, so not an index; make one with `gecko index`"
        ) from None
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {about['format_version']}, this gecko_jax reads "
            f"up to {FORMAT_VERSION}; upgrade gecko-jax"
        )
    precision, dim = about["precision"], about["dim"]
    shape = (about["num_passages"], quantization.width(precision, dim))
    values = _open_array(path / _VECTORS, shape, quantization.dtype(precision))
    ranges = None
    if precision == quantization.INT8:
        ranges = np.array(_open_array(path / _RANGES, (2, dim), np.float32))
    records = list(files.read_records(path / _PASSAGES))
    if len(records) != shape[0]:
        lines = wording.counted(len(records), "line")
        raise _damaged(path / _PASSAGES, f"{lines}, not {shape[0]:,}")
    ids, titles, texts = (_column(records, name) for name in ("_id", "title", "text"))
    if ids is None:
        raise _damaged(path / _PASSAGES, "a line without _id")
    try:
        return Index(
            quantization.Codes(np.array(values), precision, dim, ranges),
            ids,
            titles=titles,
            texts=texts,
            revision=about["revision"],
        )
    except ValueError as error:
        raise _damaged(path, error) from error


def _open_array(path: pathlib.Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # Of a damaged header, numpy raises many kinds.
        raise _damaged(path, error) from error
    if found.shape != shape or found.dtype != dtype:
        raise _damaged(path, f"{found.dtype}{found.shape}, not {shape}")
    return found


def _column(
    records: Sequence[tuple[str, dict[str, Any]]], name: str
) -> list[str] | None:
    """Returns a field of all passages; None where no passage has it."""
    if not any(name in record for _, record in records):
        return None
    for place, record in records:
        if not isinstance(record.get(name), str):
            raise _damaged(place, f"{name} is {files.kind(record.get(name))}")
    return [record[name] for _, record in records]


def from_embeddings(
    folder: str | os.PathLike, source: str | os.PathLike | None = None
) -> Index:
    """Builds an index from a finished folder of `gecko embed`.

    Args:
        folder: The shards.
        source: The file of texts they were made from; None looks for it where it was,
            and leaves titles and texts out if it is gone or has changed.

    Raises:
        ValueError: A shard is missing or damaged, or `source` is another file.
    """
    settings = vectors_lib.read_settings(folder)
    ids, codes = vectors_lib.read_codes(folder)
    path = pathlib.Path(source or settings["source"])
    titles = texts = None
    if path.exists() and files.sha256(path) == settings["source_sha256"]:
        records = list(files.read_texts(path))
        titles = [record.title for record in records]
        texts = [record.text for record in records]
    elif source is not None:
        raise ValueError(
            f"{source}: missing, or not the file that {folder} was made from; give "
            "that one, or embed again"
        )
    try:
        return Index(
            codes, ids, titles=titles, texts=texts, revision=settings["revision"]
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _damaged(path: pathlib.Path | str, fault: object) -> ValueError:
    return ValueError(f"{path}: missing or damaged ({fault}); {_REMEDY}")
