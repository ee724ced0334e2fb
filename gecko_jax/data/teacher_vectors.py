"""A teacher's vectors of the training texts, for embedding matching.

The vectors are in a folder, which any encoder can fill and every run maps into memory:

    teacher.json   name of the teacher, number and width of the vectors
    keys.npy       uint64 [N], sorted: hashes of side, task and content of a text
    rows.npy       int64 [N], the row of each key in
    vectors.npy    float16 [N, T], normalized

A teacher may read the task, so a text has one vector for each side and task it occurs
with. `list_texts` yields the texts of JSONL files in a fixed order:

    {"_id": "00b1...", "side": "query", "task": "docs", "text": "sort a list", ...}

`read_vectors` reads their vectors, in that order or by `_id`, and `write` stores them.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt32, UInt64

from gecko_jax.data import features, jsonl
from gecko_jax.io import checksums, inputs, npy, reading, writing

SETTINGS = "teacher.json"
_ARRAYS, _DTYPES = ("keys", "rows", "vectors"), ("u8", "i8", "f2")
_REMEDY = "make the folder again with `gecko data teach`"

# Vectors in memory at once.
_BLOCK = 4096

# A vector shorter than this cannot be normalized.
_LEAST_LENGTH = 1e-6


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to embed, with the side and task it occurs with."""

    key: int
    side: str
    task: str
    text: str
    title: str

    @property
    def id(self) -> str:
        """The key in hex, the `_id` in files."""
        return f"{self.key:016x}"

    def to_dict(self) -> dict[str, str]:
        """Returns a line of `gecko data teach --texts`."""
        fields = dataclasses.asdict(self)
        del fields["key"]
        return {"_id": self.id, **fields}


def keys_of(
    side: str, task: str, ids: UInt32[np.ndarray, "N 2"]
) -> UInt64[np.ndarray, " N"]:
    """Returns the keys of texts, given their content ids."""
    salt = hashlib.blake2b(f"{side}\n{task}".encode(), digest_size=8).digest()
    words = ids.astype(np.uint64)
    return (words[:, 0] << np.uint64(32) | words[:, 1]) ^ np.frombuffer(salt, np.uint64)


def list_texts(paths: Sequence[str | os.PathLike]) -> Iterator[Text]:
    """Yields each text of JSONL files once for each side and task.

    Raises ValueError if a file or a line of it is invalid.
    """
    seen: set[int] = set()
    for path in paths:
        for pair in jsonl.read_pairs(path):
            texts = [("query", pair.query, "", pair.query_id)]
            texts += [("passage", *passage) for passage in pair.passages]
            for side, text, title, content_id in texts:
                ids = np.asarray([content_id], np.uint32)
                key = int(keys_of(side, pair.task, ids)[0])
                if key not in seen:
                    seen.add(key)
                    yield Text(key, side, pair.task, text, title)


def read_vectors(
    path: str | os.PathLike, texts: Sequence[Text]
) -> Iterator[Float[np.ndarray, "_ T"]]:
    """Yields the vectors of texts from `list_texts`, in their order, in blocks.

    `path` is an .npy with a row for each text, or JSON lines with `_id` and `vector`.
    Raises ValueError if the file does not fit the texts.
    """
    reading.check_is_file(path)
    if str(path).endswith(".npy"):
        try:
            vectors = npy.open_array(
                pathlib.Path(path),
                (len(texts), None),
                "f2 f4 f8 i1 i2 i4 i8",
                remedy="it needs a row of numbers for each line of --texts, written "
                "with numpy.save",
            )
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file; check the path") from None
        for first in range(0, len(vectors), _BLOCK):
            yield vectors[first : first + _BLOCK]
        return
    ids = {text.id for text in texts}
    by_id: dict[str, np.ndarray] = {}
    width = 0
    for place, record in reading.read_records(path):
        identity = inputs.id_field(place, record, "_id")
        if identity not in ids:
            raise ValueError(
                f"{place}: `_id` {record['_id']!r} is not an id of these files' texts; "
                "drop the line, or list the texts again"
            )
        try:
            vector = np.asarray(record.get("vector"), np.float32)
        except (TypeError, ValueError, OverflowError):
            vector = np.zeros(0, np.float32)
        width = width or vector.size
        if vector.shape != (width,) or not width:
            raise ValueError(
                f"{place}: field 'vector' must be a list of numbers, as many as on the "
                "other lines; embed the text again"
            )
        by_id[identity] = vector
    if missing := [text.id for text in texts if text.id not in by_id]:
        raise ValueError(
            f"{path}: no vector for {len(missing):,} of {len(texts):,} texts, such as "
            f"`_id` {missing[0]!r}; embed all texts"
        )
    for first in range(0, len(texts), _BLOCK):
        block = texts[first : first + _BLOCK]
        yield np.stack([by_id[text.id] for text in block])


def write(
    folder: str | os.PathLike,
    keys: Sequence[int],
    blocks: Iterable[Float[np.ndarray, "_ T"]],
    *,
    made_by: str,
    dim: int = 0,
) -> dict[str, Any]:
    """Writes the folder, whole or not at all, and returns the content of its JSON file.

    An earlier folder is replaced. `blocks` has the vectors, which need not be
    normalized, in the order of `keys`. `dim` is the width to project to, on the leading
    right singular vectors, which preserve the inner products best; 0 keeps all dims.
    Raises ValueError if vectors are missing, too many, zero or not finite.
    """
    writing.check_replaceable(folder, [SETTINGS], ["*.npy"])
    with writing.write_folder(folder) as temporary:
        path = temporary / "vectors.npy"
        width, moment = _write_vectors(path, blocks, len(keys))
        if dim > width:
            raise ValueError(
                f"dim={dim}: the teacher's vectors have {width}; give at most that"
            )
        if dim and dim < width:
            _project(path, moment, dim)
        order = np.argsort(np.asarray(keys, np.uint64), kind="stable")
        np.save(temporary / "keys.npy", np.asarray(keys, np.uint64)[order])
        np.save(temporary / "rows.npy", order.astype(np.int64))
        settings = {
            "format_version": 1,
            "made_by": made_by,
            "dim": dim or width,
            "made_from_dim": width,
            "num_texts": len(keys),
            "sha256": reading.sha256(path),
            checksums.FILES: checksums.of_files(
                temporary, [f"{name}.npy" for name in _ARRAYS]
            ),
        }
        checksums.write_object(temporary / SETTINGS, settings)
    return settings


def _write_vectors(
    path: pathlib.Path, blocks: Iterable[Any], number: int
) -> tuple[int, Float[np.ndarray, "T T"]]:
    """Writes the vectors; returns their width and the sum of their outer products."""
    vectors, moment, done = None, None, 0
    for block in blocks:
        block = np.asarray(block, np.float32)
        lengths = np.linalg.norm(block, axis=1, keepdims=True)
        is_invalid = ~np.isfinite(lengths[:, 0]) | (lengths[:, 0] < _LEAST_LENGTH)
        if is_invalid.any():
            raise ValueError(
                f"vector {done + int(np.argmax(is_invalid)):,} of the teacher is zero "
                "or not finite; embed that text again"
            )
        if vectors is None or moment is None:
            width = block.shape[1]
            vectors = np.lib.format.open_memmap(path, "w+", np.float16, (number, width))
            moment = np.zeros((width, width))
        if done + len(block) > number:
            raise ValueError(
                f"more vectors than the {number:,} texts; embed those texts alone"
            )
        unit = block / lengths
        vectors[done : done + len(block)] = unit
        moment += unit.T.astype(np.float64) @ unit
        done += len(block)
    if done < number or vectors is None or moment is None:
        raise ValueError(f"{done:,} vectors for {number:,} texts; embed all texts")
    vectors.flush()
    return vectors.shape[1], moment


def _project(path: pathlib.Path, moment: Float[np.ndarray, "T T"], dim: int) -> None:
    # The right singular vectors of the vectors are the eigenvectors of their moment.
    leading = np.linalg.eigh(moment)[1][:, ::-1][:, :dim].astype(np.float32)
    wide = np.load(path, mmap_mode="r")
    narrow = path.with_name("narrow.npy")
    vectors = np.lib.format.open_memmap(narrow, "w+", np.float16, (len(wide), dim))
    for first in range(0, len(wide), _BLOCK):
        part = np.asarray(wide[first : first + _BLOCK], np.float32) @ leading
        lengths = np.linalg.norm(part, axis=1, keepdims=True)
        vectors[first : first + _BLOCK] = part / np.maximum(lengths, _LEAST_LENGTH)
    vectors.flush()
    narrow.replace(path)


class Teacher:
    """The vectors of a folder; `facts` is the content of its JSON file."""

    def __init__(self, folder: str | os.PathLike, dim: int):
        """Maps a folder that `write` wrote into memory.

        Raises ValueError if the folder is missing, damaged, or its vectors have another
        width than `dim`.
        """
        path = self._folder = pathlib.Path(folder)
        try:
            settings = writing.member(path, SETTINGS)
            fields = {"dim": int, "sha256": str}
            self.facts = checksums.read_object(settings, fields, remedy=_REMEDY)
            self.dim = self.facts["dim"]  # width of the vectors
            shapes = ((None,), (None,), (None, self.dim))
            files = [writing.member(path, f"{name}.npy") for name in _ARRAYS]
            self._keys, self._rows, self._vectors = (
                npy.open_array(file, shape, kind, remedy=_REMEDY)
                for file, shape, kind in zip(files, shapes, _DTYPES, strict=True)
            )
        except FileNotFoundError:
            raise ValueError(
                f"data.teacher={folder}: no vectors of a teacher here; make them with "
                "`gecko data teach`"
            ) from None
        sizes = {len(self._keys), len(self._rows), len(self._vectors)}
        if len(sizes) > 1 or 0 in sizes:
            raise self._damage("its arrays do not fit each other")
        if self.dim != dim:
            raise ValueError(
                f"data.teacher={folder}: its vectors have {self.dim} dims, and "
                f"data.teacher_dim={dim}; set that to {self.dim}, or make others with "
                f"--dim={dim}"
            )

    def look_up(self, keys: UInt64[np.ndarray, " N"]) -> Float[np.ndarray, "N T"]:
        """Returns the vector of each key, zeros for unknown keys."""
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        is_known = self._keys[places] == keys
        vectors = np.zeros((len(keys), self.dim), np.float16)
        rows = self._rows[places[is_known]]
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._vectors):
            raise self._damage("an index in rows.npy is out of range")
        vectors[is_known] = self._vectors[rows]
        return vectors

    def _damage(self, problem: str) -> ValueError:
        return ValueError(
            f"data.teacher={self._folder}: damaged ({problem}); {_REMEDY}"
        )

    def features(
        self,
        examples: Sequence[features.Example],
        source_tasks: Sequence[str],
        choices: Sequence[Sequence[int]],
        num_negatives: int,
    ) -> dict[str, np.ndarray]:
        """Returns the batch features named in `losses.contrastive.TeacherVectors`.

        Each example has the field `task` of its line and the indices of its negatives
        in use, at most G; vectors of missing negatives are zeros.
        """
        queries, passages, negatives = [], [], []
        for example, task, chosen in zip(examples, source_tasks, choices, strict=True):
            queries.append(keys_of("query", task, example.query_id[None]))
            passages.append(keys_of("passage", task, example.passage_id[None]))
            ids = example.negative_ids[list(chosen)]
            negatives.append(keys_of("passage", task, ids))
        size = len(examples)
        negative_vectors = np.zeros((size, num_negatives, self.dim), np.float16)
        if num_negatives:
            rows = np.repeat(np.arange(size), [len(keys) for keys in negatives])
            columns = np.concatenate([np.arange(len(keys)) for keys in negatives])
            vectors = self.look_up(np.concatenate(negatives))
            negative_vectors[rows, columns] = vectors
        return {
            "query_teacher": self.look_up(np.concatenate(queries)),
            "passage_teacher": self.look_up(np.concatenate(passages)),
            "negative_teacher": negative_vectors,
        }
