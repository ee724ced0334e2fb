"""Index: the passages nearest to a query by exact inner product.

    built = index.Index(vectors, ids, texts=texts, revision=model.revision)
    built.save("index")
    scores, ids = index.load("index").search(model.encode_queries(queries), k=5)

The search goes through the corpus block by block and keeps the best k so far, so its
memory grows with queries times k, never with queries times passages. Of equal scores
the earlier passage wins. Codes are decoded block by block, and compared with float32
queries. Blocks stay on the device from one search to the next: a CPU reads them where
they lie, an accelerator keeps a copy if the corpus takes at most half of its free
memory.

    index/index.json      number, dim, model revision
    index/vectors.npy     one row per passage: float32, or codes (see `quantization`)
    index/ranges.npy      of int8 codes
    index/passages.jsonl  id, title and text of each row

A loaded index holds the vectors and the ids in memory. Titles and texts stay in their
file, and are read for the passages that are shown.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gecko_jax.inference import embedding, quantization, vector_files
from gecko_jax.io import checksums, inputs, npy, reading, wording, writing
from gecko_jax.text import text_files

# 1 had float32 only.
FORMAT_VERSION = 2

# Passages and queries that are compared at once; their scores take 64 MiB. On a CPU a
# decoded block and its scores stay in the cache. Both are multiples of `_ALIGNMENT`.
BLOCK_ROWS = 65_536
CPU_BLOCK_ROWS = 8_192
BLOCK_QUERIES = 256
# Fewer queries are padded to one of these: each shape is compiled once.
_FEW_QUERIES = (1, 16)

# XLA:CPU reads arrays that begin at a multiple of these bytes in place, and copies
# others.
_ALIGNMENT = 64

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
# How `Index.save` writes a line: what is before and after the id, before the text that
# comes after a title, and at the end.
_BEGIN = b'{"_id": "'
_AFTER_ID = (
    ((), b'"}\n'),
    (("text",), b'", "text": "'),
    (("title",), b'", "title": "'),
)
_BETWEEN, _END = b'", "text": "', b'"}\n'
# Bytes of lines that are looked at together.
_READ_BYTES = 1 << 18


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
        """Checks that the parts fit each other; copies the ids alone.

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
        self.titles = titles
        self.texts = texts
        self.revision = revision
        if len(set(self.ids)) != len(self.ids):
            twice = next(i for r, i in enumerate(self.ids) if self._rows[i] != r)
            raise ValueError(f"id {twice!r} comes twice; ids must differ")
        row = _first_not_finite(self.codes.values)
        if row is not None:
            raise ValueError(
                f"the vector of {self.ids[row]!r} is not finite; embed the passages "
                "again with a model whose weights are finite"
            )
        self._resident: list[Array] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {identity: row for row, identity in enumerate(self.ids)}

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
        return scores, [[self.ids[p] for p in row] for row in positions.tolist()]

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
        rows = next((few for few in _FEW_QUERIES if few >= count), BLOCK_QUERIES)
        padded = jnp.asarray(np.pad(queries, ((0, rows - count), (0, 0))), jnp.float32)
        scores = jnp.full((rows, k), -jnp.inf, jnp.float32)
        positions = jnp.zeros((rows, k), jnp.int32)
        block_rows = self._block_rows()
        for number, block in enumerate(self._blocks(block_rows)):
            start = _block_start(number, block_rows, len(self))
            scores, positions = _best_so_far(
                scores,
                positions,
                padded,
                block,
                self.codes.ranges,
                np.int32(start),
                np.int32(number * block_rows - start),
                precision=self.codes.precision,
            )
        return np.asarray(scores)[:count], np.asarray(positions)[:count]

    def _block_rows(self) -> int:
        is_cpu = jax.default_backend() == "cpu"
        return min(CPU_BLOCK_ROWS if is_cpu else BLOCK_ROWS, len(self))

    def _blocks(self, block_rows: int) -> Iterator[Shaped[Array | np.ndarray, "B W"]]:
        """Yields the blocks in order, all of `block_rows`: the last may overlap."""
        if self._resident is not None:
            yield from self._resident
            return
        stays = _fits_on_device(self.codes.values.nbytes)
        if stays and jax.default_backend() == "cpu":
            # Replaces the vectors, so that no second copy is kept.
            aligned = _align(self.codes.values)
            self.codes = dataclasses.replace(self.codes, values=aligned)
        resident = []
        for number in range(-(-len(self) // block_rows)):
            start = _block_start(number, block_rows, len(self))
            block = self.codes.values[start : start + block_rows]
            if stays:
                block = jax.device_put(block)
                resident.append(block)
            yield block
        if stays:
            self._resident = resident

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
        with writing.write_folder(path) as temporary:
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
    num_seen: Int[Array, ""],
    *,
    precision: str,
) -> tuple[Float[Array, "Q T"], Int[Array, "Q T"]]:
    """Merges the scores of a block into the best of the blocks before it.

    The first `num_seen` rows of the block belong to the block before it, too.
    """
    block = quantization.decode(block, precision, queries.shape[1], ranges)
    # Accelerators round float32 products unless they are told not to.
    fresh = jnp.einsum("qd,pd->qp", queries, block, precision=jax.lax.Precision.HIGHEST)
    row = jnp.arange(block.shape[0], dtype=jnp.int32)
    fresh = jnp.where((row >= num_seen)[None, :], fresh, -jnp.inf)
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
            writing.member(path, _ABOUT),
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
    values = _read_array(
        writing.member(path, _VECTORS), shape, quantization.dtype(precision)
    )
    ranges = None
    if precision == quantization.INT8:
        ranges = _read_array(writing.member(path, _RANGES), (2, dim), np.float32)
    with _paused_collector():
        ids, fields, lines = _read_passages(writing.member(path, _PASSAGES))
    if len(ids) != shape[0]:
        counted = wording.counted(len(ids), "line")
        raise _damaged(path / _PASSAGES, f"{counted}, not {shape[0]:,}")
    try:
        return Index(
            quantization.Codes(values, precision, dim, ranges),
            ids,
            titles=_Column(lines, "title") if "title" in fields else None,
            texts=_Column(lines, "text") if "text" in fields else None,
            revision=about["revision"],
        )
    except ValueError as error:
        raise _damaged(path, error) from error


@contextlib.contextmanager
def _paused_collector() -> Iterator[None]:
    """Keeps Python's collector from walking all objects again for each thousand ids."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_array(path: pathlib.Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Reads an array of the folder into memory that XLA:CPU can use in place."""
    try:
        kind = np.dtype(dtype).str[1:]
        found = npy.open_array(path, shape, kind, remedy=_REMEDY)
    except OSError as error:
        raise _damaged(path, error) from error
    if not found.flags.c_contiguous:
        return _align(found)
    array = _empty_aligned(shape, dtype)
    # Reading, unlike a copy of the map, leaves no pages of the map in memory.
    with path.open("rb") as file:
        file.seek(found.offset)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise _damaged(path, "it is too short")
    return array


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _align(values: Shaped[np.ndarray, "P W"]) -> Shaped[np.ndarray, "P W"]:
    """Returns the array, copied where XLA:CPU could not read it in place."""
    if values.flags.c_contiguous and values.ctypes.data % _ALIGNMENT == 0:
        return values
    aligned = _empty_aligned(values.shape, values.dtype)
    aligned[...] = values
    return aligned


def _block_start(number: int, block_rows: int, size: int) -> int:
    """Returns the first row of a block; the last block ends with the corpus."""
    return min(number * block_rows, size - block_rows)


def _fits_on_device(num_bytes: int) -> bool:
    """Whether the vectors may stay on the device between searches."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is None:  # A CPU, which needs no copy.
        return True
    free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    return 2 * num_bytes <= free


def _first_not_finite(values: Shaped[np.ndarray, "P W"]) -> int | None:
    if values.dtype != np.float32:
        return None  # Every code is finite.
    # Block by block: a mask of the whole array would take a quarter of its memory.
    for start in range(0, len(values), CPU_BLOCK_ROWS):
        finite = np.isfinite(values[start : start + CPU_BLOCK_ROWS])
        if not finite.all():
            return start + int(np.argmin(finite.all(axis=1)))
    return None


def _read_passages(
    path: pathlib.Path,
) -> tuple[list[str], tuple[str, ...], "_Lines"]:
    """Returns the ids, the names of the other fields, and the lines of the passages.

    A line that begins and ends as `Index.save` writes it is parsed when its passage is
    shown; any other line is parsed and checked here.
    """
    ids: list[str] = []
    sizes = [0]
    fields: tuple[str, ...] | None = None
    try:
        file = path.open("rb", buffering=1 << 20)
    except OSError as error:
        raise _damaged(path, error) from error
    with file:
        while lines := file.readlines(_READ_BYTES):
            for number, (found, names) in enumerate(_heads(path, len(ids), lines)):
                if names != fields and fields is not None:
                    raise _damaged(
                        f"{path}:{len(sizes) + number}",
                        f"fields {names}, where lines before have {fields}",
                    )
                fields = names
                ids += found
            sizes += map(len, lines)
        return ids, fields or (), _Lines(path, file, np.cumsum(sizes))


def _heads(
    path: pathlib.Path, before: int, lines: Sequence[bytes]
) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """Yields ids and the names of the other fields: of all lines, or line by line."""
    ends = [line.find(b'"', len(_BEGIN)) for line in lines]
    names, after = next(
        ((n, a) for n, a in _AFTER_ID if lines[0].startswith(a, ends[0])), ((), b"")
    )
    have_text = {False}
    if names == ("title",):
        have_text = set(map(bytes.__contains__, lines, itertools.repeat(_BETWEEN)))
    ids = b"\n".join(
        [line[len(_BEGIN) : end] for line, end in zip(lines, ends, strict=True)]
    )
    if (
        after
        and len(have_text) == 1
        and all(map(bytes.startswith, lines, itertools.repeat(_BEGIN)))
        and all(map(bytes.startswith, lines, itertools.repeat(after), ends))
        and all(map(bytes.endswith, lines, itertools.repeat(_END)))
        and b"\\" not in ids
    ):
        yield ids.decode().split("\n"), (*names, "text") if True in have_text else names
        return
    for number, line in enumerate(lines, start=before + 1):
        try:
            record = reading.parse_json(line)
            if not isinstance(record, dict):
                raise ValueError(f"{inputs.kind(record)}, not an object")
            names = tuple(name for name in ("title", "text") if name in record)
            for name in ("_id", *names):
                if not isinstance(record.get(name), str):
                    raise ValueError(f"{name} is {inputs.kind(record.get(name))}")
        except ValueError as error:
            raise _damaged(f"{path}:{number}", error) from error
        yield [record["_id"]], names


class _Lines:
    """The lines of an open file of passages, read one at a time.

    The file stays open: an index that is written over it leaves it as it is.
    """

    def __init__(
        self, path: pathlib.Path, file: IO[bytes], starts: Int[np.ndarray, " S"]
    ):
        self._path = path
        self._starts = starts
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, row: int, name: str) -> str:
        """Returns a field of one line."""
        start, end = self._starts[row : row + 2].tolist()
        try:
            value = reading.parse_json(os.pread(self._descriptor, end - start, start))
            if not isinstance(value[name], str):
                raise ValueError(f"{name} is {inputs.kind(value[name])}")
        except (ValueError, KeyError) as error:
            raise _damaged(f"{self._path}:{row + 1}", error) from error
        return value[name]


class _Column(Sequence[str]):
    """A field of all passages, read from the file when it is asked for."""

    def __init__(self, lines: _Lines, name: str):
        self._lines = lines
        self._name = name

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[one] for one in range(*row.indices(len(self)))]
        return self._lines.read(range(len(self))[row], self._name)


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
