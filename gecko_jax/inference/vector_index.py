"""Exact nearest-passage search by inner product.

    built = index.Index(vectors, ids, texts=texts, revision=model.revision)
    built.save("index")
    scores, ids = index.load("index").search(model.encode_queries(queries), k=5)

A search compares the queries with the corpus block by block and keeps the best k
passages so far, so its memory grows with queries times k, not with queries times
passages. The earlier of two passages with equal scores wins. Quantized passages are
decoded block by block and compared with float32 queries. Blocks stay on the device
between searches: XLA:CPU reads them in place, and an accelerator keeps a copy if the
corpus takes at most half of its free memory.

    index/index.json      number of passages, dim, precision, model revision, checksums
    index/vectors.npy     one row per passage: float32, or codes (see `quantization`)
    index/ranges.npy      least and greatest value of each dim; int8 only
    index/passages.jsonl  id, title and text of each row (see `passage_lines`)

A loaded index holds the vectors and ids in memory; titles and texts stay on disk.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gecko_jax.inference import embedding, passage_lines, quantization, vector_files
from gecko_jax.io import checksums, npy, reading, writing
from gecko_jax.text import text_files

# Version 1 had float32 vectors only.
FORMAT_VERSION = 2

# Passages and queries per block; the scores of a block take 64 MiB. On a CPU a decoded
# block and its scores stay in the cache. Row counts are multiples of
# `npy.ALIGNMENT`.
BLOCK_ROWS = 65_536
CPU_BLOCK_ROWS = 8_192
BLOCK_QUERIES = 256
# Smaller batches of queries are padded to one of these sizes, so that few shapes are
# compiled.
_QUERY_SIZES = (1, 16)

_ABOUT, _VECTORS, _PASSAGES = "index.json", "vectors.npy", "passages.jsonl"
_RANGES = "ranges.npy"
_REMEDY = "build the index again with `gecko index`"
_FIELDS = {
    "format_version": int,
    "num_passages": int,
    "dim": int,
    "precision": quantization.PRECISIONS,
    "revision": str,
}


class Index:
    """Vectors of passages with their ids and, optionally, titles and texts."""

    def __init__(
        self,
        vectors: Float[np.ndarray, "P D"] | quantization.Codes,
        ids: Sequence[str],
        *,
        titles: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        revision: str = "",
    ):
        """Builds an index of passages; copies only the ids, which must be unique.

        Scores are cosines if the vectors are normalized, and approximate cosines if
        they are quantized. `revision` is that of the model that made the vectors.
        Raises ValueError if there are no passages, the parts differ in length, or a
        vector is not finite.
        """
        if not len(vectors):
            raise ValueError("empty corpus: an index needs at least one passage")
        for name, part in (("ids", ids), ("titles", titles), ("texts", texts)):
            if part is not None and len(part) != len(vectors):
                raise ValueError(
                    f"{len(part):,} {name} for {len(vectors):,} vectors: pass one each"
                )
        if not isinstance(vectors, quantization.Codes):
            vectors = quantization.encode(vectors, quantization.FLOAT32)
        self.codes = vectors
        self.ids = list(ids)
        self.titles = titles
        self.texts = texts
        self.revision = revision
        if len(set(self.ids)) != len(self.ids):
            twice = next(i for r, i in enumerate(self.ids) if self._rows[i] != r)
            raise ValueError(f"duplicate id {twice!r}: ids must be unique")
        row = _first_not_finite(self.codes.values)
        if row is not None:
            raise ValueError(
                f"the vector of {self.ids[row]!r} is not finite; use another model"
            )
        self._resident: list[Array] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {identity: row for row, identity in enumerate(self.ids)}

    @property
    def dim(self) -> int:
        """Width of the vectors, which queries must have too."""
        return self.codes.dim

    def text(self, identity: str) -> str | None:
        """Returns the title and text of a passage, None if the index has no texts."""
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
                f"the index was built with model revision {self.revision}, not "
                f"{gecko.revision}; search with that model, or build the index again"
            )
        gecko.check_dim(self.dim)

    def search(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q T"], list[list[str]]]:
        """Returns scores and ids of the k best passages per query, best first.

        A corpus of fewer than k passages gives fewer. Scores are exact float32 inner
        products.
        """
        scores, positions = self.search_positions(queries, k)
        return scores, [[self.ids[p] for p in row] for row in positions.tolist()]

    def search_positions(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float[np.ndarray, "Q T"], Int[np.ndarray, "Q T"]]:
        """Like `search`, with positions in the corpus instead of ids."""
        if queries.ndim != 2:
            raise ValueError(
                f"queries have shape {queries.shape}: it must be [queries, dims]"
            )
        if queries.shape[1] != self.dim:
            raise ValueError(
                f"queries have {queries.shape[1]} dims and the index has {self.dim}; "
                f"encode them with dim={self.dim}"
            )
        if not np.isfinite(queries).all():
            raise ValueError("a query vector is not finite; use another model")
        if k < 1:
            raise ValueError(f"k={k}: it must be at least 1")
        k = min(k, len(self))
        scores = np.empty((len(queries), k), np.float32)
        positions = np.empty((len(queries), k), np.int32)
        for start in range(0, len(queries), BLOCK_QUERIES):
            batch = slice(start, start + BLOCK_QUERIES)
            scores[batch], positions[batch] = self._search_batch(queries[batch], k)
        return scores, positions

    def _search_batch(
        self, queries: Float[np.ndarray, "Q D"], k: int
    ) -> tuple[Float[np.ndarray, "Q T"], Int[np.ndarray, "Q T"]]:
        count = len(queries)
        rows = next((size for size in _QUERY_SIZES if size >= count), BLOCK_QUERIES)
        padded = jnp.asarray(np.pad(queries, ((0, rows - count), (0, 0))), jnp.float32)
        scores = jnp.full((rows, k), -jnp.inf, jnp.float32)
        positions = jnp.zeros((rows, k), jnp.int32)
        for start, overlap, block in self._blocks():
            place = np.int32(start), np.int32(overlap)
            arrays = (scores, positions, padded, block, self.codes.ranges, *place)
            scores, positions = _merge_block(*arrays, precision=self.codes.precision)
        return np.asarray(scores)[:count], np.asarray(positions)[:count]

    def _blocks(self) -> Iterable[tuple[int, int, Shaped[Array | np.ndarray, "B W"]]]:
        """Yields (first row, rows that belong to the block before, block).

        All blocks have the same size. The last one ends with the corpus, so it may
        overlap the block before it.
        """
        is_cpu = jax.default_backend() == "cpu"
        size = min(CPU_BLOCK_ROWS if is_cpu else BLOCK_ROWS, len(self))
        starts = [min(row, len(self) - size) for row in range(0, len(self), size)]
        overlaps = [number * size - start for number, start in enumerate(starts)]
        if self._resident is None and _fits_on_device(self.codes.values.nbytes):
            if is_cpu:
                # Replaces the vectors, so that no second copy stays in memory.
                aligned = npy.align(self.codes.values)
                self.codes = dataclasses.replace(self.codes, values=aligned)
            self._resident = [
                jax.device_put(self.codes.values[start : start + size])
                for start in starts
            ]
        blocks = self._resident or (
            self.codes.values[start : start + size] for start in starts
        )
        return zip(starts, overlaps, blocks, strict=True)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the index atomically; replaces an index that is already there.

        Raises ValueError if `folder` holds something other than an index, and OSError
        if the disk is full.
        """
        writing.check_replaceable(folder, [_ABOUT], ["*"])
        with writing.write_folder(folder) as temporary:
            np.save(temporary / _VECTORS, self.codes.values)
            if self.codes.ranges is not None:
                np.save(temporary / _RANGES, self.codes.ranges)
            lines = temporary / _PASSAGES
            passage_lines.write(lines, self.ids, self.titles, self.texts)
            files = [path.name for path in temporary.iterdir()]
            about = {
                "format_version": FORMAT_VERSION,
                "num_passages": len(self),
                "dim": self.dim,
                "precision": self.codes.precision,
                "revision": self.revision,
                checksums.FILES: checksums.of_files(temporary, files),
            }
            checksums.write_object(temporary / _ABOUT, about)


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="precision")
def _merge_block(
    scores: Float[Array, "Q T"],
    positions: Int[Array, "Q T"],
    queries: Float[Array, "Q D"],
    block: Shaped[Array, "P W"],
    ranges: Float[Array, "2 D"] | None,
    start: Int[Array, ""],
    overlap: Int[Array, ""],
    *,
    precision: str,
) -> tuple[Float[Array, "Q T"], Int[Array, "Q T"]]:
    """Merges the scores of a block into the best scores of the blocks before it.

    The first `overlap` rows of the block belong to the block before it and are masked.
    """
    block = quantization.decode(block, precision, queries.shape[1], ranges)
    # By default, accelerators round the inputs of float32 products.
    fresh = jnp.einsum("qd,pd->qp", queries, block, precision=jax.lax.Precision.HIGHEST)
    row = jnp.arange(block.shape[0], dtype=jnp.int32)
    fresh = jnp.where((row >= overlap)[None, :], fresh, -jnp.inf)
    # top_k prefers the first of equal values: earlier blocks come first, and the rows
    # of a block are in the order of the corpus.
    fresh, chosen = jax.lax.top_k(fresh, min(scores.shape[1], block.shape[0]))
    k = scores.shape[1]
    scores, order = jax.lax.top_k(jnp.concatenate([scores, fresh], axis=1), k)
    positions = jnp.concatenate([positions, chosen + start], axis=1)
    return scores, jnp.take_along_axis(positions, order, axis=1)


def load(folder: str | os.PathLike) -> Index:
    """Reads an index that `Index.save` wrote.

    Raises ValueError if there is no index, or files are missing, truncated or do not
    belong together.
    """
    path = pathlib.Path(folder)
    try:
        about = checksums.read_object(
            writing.member(path, _ABOUT),
            _FIELDS,
            remedy=_REMEDY,
            defaults={"precision": quantization.FLOAT32},
        )
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not an index (no {_ABOUT}); create one with `gecko index`"
        ) from None
    if about["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version is {about['format_version']} and this gecko_jax "
            f"reads up to {FORMAT_VERSION}; upgrade gecko-jax"
        )
    precision, dim, count = about["precision"], about["dim"], about["num_passages"]
    values = npy.read_aligned(
        writing.member(path, _VECTORS),
        (count, quantization.width(precision, dim)),
        quantization.DTYPES[precision],
        remedy=_REMEDY,
    )
    ranges = None
    if precision == quantization.INT8:
        path_of_ranges = writing.member(path, _RANGES)
        ranges = npy.read_aligned(path_of_ranges, (2, dim), np.float32, remedy=_REMEDY)
    ids, columns = passage_lines.read(
        writing.member(path, _PASSAGES),
        is_verified=_PASSAGES in about.get(checksums.FILES, {}),
        remedy=_REMEDY,
    )
    try:
        return Index(
            quantization.Codes(values, precision, dim, ranges),
            ids,
            titles=columns.get("title"),
            texts=columns.get("text"),
            revision=about["revision"],
        )
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); {_REMEDY}") from error


def _fits_on_device(num_bytes: int) -> bool:
    """Whether the vectors may stay on the device between searches."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:  # A CPU, which needs no copy.
        return True
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return 2 * num_bytes <= free


def _first_not_finite(values: Shaped[np.ndarray, "P W"]) -> int | None:
    """Returns the first row of `values` with NaN or infinity, None if there is none."""
    if values.dtype != np.float32:
        return None  # Codes are always finite.
    # Block by block: a mask of the whole array would take a quarter of its memory.
    for start in range(0, len(values), CPU_BLOCK_ROWS):
        finite = np.isfinite(values[start : start + CPU_BLOCK_ROWS])
        if not finite.all():
            return start + int(np.argmin(finite.all(axis=1)))
    return None


def from_embeddings(
    folder: str | os.PathLike, source: str | os.PathLike | None = None
) -> Index:
    """Builds an index from a finished folder of `gecko embed`.

    Titles and texts come from `source`, the file that was embedded. If it is None, they
    come from its original path, and are left out if the file is gone or has changed.
    Raises ValueError if a shard is missing or damaged, or `source` is another file.
    """
    settings = vector_files.read_settings(folder)
    ids, codes = vector_files.read_codes(folder)
    path = pathlib.Path(source or settings["source"])
    titles = texts = None
    if path.exists() and reading.sha256(path) == settings["source_sha256"]:
        records = list(text_files.read_texts(path))
        titles = [record.title for record in records]
        texts = [record.text for record in records]
    elif source is not None:
        raise ValueError(
            f"{source}: missing, or not the file that {folder} was made from; pass "
            "that file, or embed again"
        )
    try:
        return Index(
            codes, ids, titles=titles, texts=texts, revision=settings["revision"]
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
