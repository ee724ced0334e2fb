"""Vectors on disk, looked up by text.

    store = Store("~/.cache/gecko_jax/vectors", gecko, max_gib=50)
    vectors = store.encode(texts, side="query", task="search result", max_length=64)

The key of a vector is a digest of the formatted text, task description included, and
of the maximum length. A folder holds the vectors of one model revision, dtype and
backend at the largest dim, from which smaller ones are cut. Each chunk of texts is
written as a shard, so an interrupted run resumes.

    FOLDER/REVISION-FINGERPRINT/NUMBER.vectors.npy   float32, one row per text
    FOLDER/REVISION-FINGERPRINT/NUMBER.json          their checksum
    FOLDER/REVISION-FINGERPRINT/NUMBER.keys.npy      written last: the shard is whole
"""

import collections
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import Float

import gecko_jax
from gecko_jax.inference import embedding
from gecko_jax.io import checksums, npy, writing

_KEY_BYTES = 16
_REMEDY = "its texts are encoded again"
_KEYS, _VECTORS, _CHECKSUMS = ".keys.npy", ".vectors.npy", ".json"


class Store:
    """Vectors of one model, in `folder`; `num_encoded` texts since it was opened.

    `root` holds the stores of all models, and `trim` limits it to `max_gib`.
    """

    def __init__(
        self, root: str | os.PathLike, gecko: embedding.Gecko, max_gib: int | float
    ):
        self._root = pathlib.Path(root).expanduser()
        self._gecko = gecko
        self._max_bytes = int(max_gib * 2**30)
        revision = re.sub(r"[^\w.-]", "_", gecko.revision)
        self.folder = self._root / f"{revision}-{_fingerprint(gecko)}"
        self.num_encoded = 0
        # A shard is named by the path of its keys.
        self._shards: dict[pathlib.Path, np.ndarray] = {}
        self._places: dict[bytes, tuple[pathlib.Path, int]] = {}
        self._verified: set[pathlib.Path] = set()
        for path in sorted(self.folder.glob(f"*{_KEYS}")):
            try:
                keys = npy.open_array(path, (None, _KEY_BYTES), "u1", remedy=_REMEDY)
                self._add(path, np.array(keys))
            except (ValueError, OSError) as error:
                logging.warning("%s: skipped; %s: %s", path, _REMEDY, error)

    def __len__(self) -> int:
        return len(self._places)

    def encode(
        self,
        texts: Sequence[str],
        *,
        side: embedding.Side,
        task: str | Sequence[str] | None = None,
        titles: Sequence[str | None] | None = None,
        max_length: int,
        description: str | None = None,
    ) -> Float[np.ndarray, "N E"]:
        """Like `Gecko.encode`, but encodes only texts without a stored vector."""
        formatted = self._gecko.format_texts(texts, side=side, task=task, titles=titles)
        keys = [_key(text, max_length) for text in formatted]
        self._verify({self._places[key][0] for key in keys if key in self._places})
        new = {key: n for n, key in enumerate(keys) if key not in self._places}
        positions = sorted(new.values())
        self.num_encoded += len(positions)
        for start in range(0, len(positions), embedding.TEXTS_PER_CHUNK):
            chunk = positions[start : start + embedding.TEXTS_PER_CHUNK]
            done = f" ({start:,} of {len(positions):,} done)" if start else ""
            vectors = self._gecko.encode(
                [texts[p] for p in chunk],
                side=side,
                task=task if isinstance(task, str | None) else [task[p] for p in chunk],
                titles=[titles[p] for p in chunk] if titles else None,
                max_length=max_length,
                description=f"{description}{done}" if description else None,
            )
            self._write([keys[p] for p in chunk], vectors)
        return self._read(keys)

    def trim(self) -> None:
        """Removes the least recently used shards until the rest fits `max_gib`.

        Call it between tasks: a running task needs its vectors at every dim, so the
        store may be larger meanwhile.
        """
        shards = []
        for path in self._root.glob(f"*/*{_KEYS}"):
            parts = (path, _part(path, _VECTORS))
            size = sum(part.stat().st_size for part in parts if part.exists())
            shards.append((path.stat().st_mtime_ns, size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self._max_bytes:
                break
            # Keys first: a shard without keys is ignored.
            for part in (path, _part(path, _VECTORS), _part(path, _CHECKSUMS)):
                part.unlink(missing_ok=True)
            total -= size
            self._forget(path)

    def _write(self, keys: Sequence[bytes], vectors: Float[np.ndarray, "N E"]) -> None:
        path = self.folder / f"{time.time_ns():020}-{os.getpid()}{_KEYS}"
        array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)
        vectors_path = _part(path, _VECTORS)
        _save(vectors_path, vectors)
        listed = checksums.of_files(self.folder, [vectors_path.name])
        checksums.write_object(_part(path, _CHECKSUMS), {checksums.FILES: listed})
        # Keys need no checksum: no text has a damaged key.
        _save(path, array)
        self._verified.add(path)
        self._add(path, array)

    def _add(self, path: pathlib.Path, keys: np.ndarray) -> None:
        shape = (len(keys), self._gecko.dims[-1])
        vectors_path = _part(path, _VECTORS)
        self._shards[path] = npy.open_array(vectors_path, shape, "f4", remedy=_REMEDY)
        for row, key in enumerate(keys):
            self._places[key.tobytes()] = (path, row)

    def _verify(self, paths: set[pathlib.Path]) -> None:
        """Forgets the shards whose vectors are damaged."""
        for path in sorted(paths - self._verified):
            self._verified.add(path)
            try:
                checksums.read_object(_part(path, _CHECKSUMS), {}, remedy=_REMEDY)
            except FileNotFoundError:
                logging.info("%s: written before there were checksums", path)
            except ValueError as error:
                logging.warning("%s", error)
                path.unlink(missing_ok=True)
                self._forget(path)

    def _read(self, keys: Sequence[bytes]) -> Float[np.ndarray, "N E"]:
        vectors = np.empty((len(keys), self._gecko.dims[-1]), np.float32)
        members: dict[pathlib.Path, list[int]] = collections.defaultdict(list)
        for position, key in enumerate(keys):
            members[self._places[key][0]].append(position)
        for path, positions in members.items():
            rows = [self._places[keys[position]][1] for position in positions]
            vectors[positions] = self._shards[path][rows]
            if path.exists():
                path.touch()  # Marks the shard as used, for `trim`.
        return vectors

    def _forget(self, path: pathlib.Path) -> None:
        if self._shards.pop(path, None) is not None:
            self._places = {k: v for k, v in self._places.items() if v[0] != path}


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with writing.write_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _part(keys_path: pathlib.Path, ending: str) -> pathlib.Path:
    return keys_path.with_name(keys_path.name.removesuffix(_KEYS) + ending)


def _key(text: str, max_length: int) -> bytes:
    content = f"{max_length}\n{text}".encode()
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def _fingerprint(gecko: embedding.Gecko) -> str:
    """Names everything that a vector depends on except parameters and text."""
    facts: dict[str, Any] = {
        "dtype": gecko.files.encoder_config.dtype,
        "dim": gecko.dims[-1],
        "vocabulary": gecko.vocabulary.fingerprint,
        "backend": jax.default_backend(),
        "version": gecko_jax.__version__,
    }
    encoded = json.dumps(facts, sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:8]
