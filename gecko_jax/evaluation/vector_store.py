"""Store: vectors on disk, found again by the text they are of.

    store = Store("~/.cache/gecko_jax/vectors", gecko, max_gib=50)
    vectors = store.encode(texts, side="query", task="search result", max_length=64)

The key of a vector is the text as the encoder reads it, task description included, and
the length it is cut to; a folder holds the vectors of one model revision, dtype and
backend, at the largest dim, from which smaller ones are cut. Vectors are written chunk
by chunk, so an interrupted run goes on.

    FOLDER/REVISION-FINGERPRINT/NUMBER.vectors.npy   float32, one row per text
    FOLDER/REVISION-FINGERPRINT/NUMBER.json          their checksum
    FOLDER/REVISION-FINGERPRINT/NUMBER.keys.npy      written last: the shard is whole
"""

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
    """Vectors of one model, by content.

    Attributes:
        folder: Where they lie.
        num_encoded: Texts that had to be encoded, since the store was opened.
    """

    def __init__(
        self, root: str | os.PathLike, gecko: embedding.Gecko, max_gib: int | float
    ):
        """Reads which vectors are there.

        Args:
            root: Folder of the stores of all models.
            gecko: The model.
            max_gib: What `trim` leaves, over all models.
        """
        self._root = pathlib.Path(root).expanduser()
        self._gecko = gecko
        self._max_bytes = int(max_gib * 2**30)
        revision = re.sub(r"[^\w.-]", "_", gecko.revision)
        self.folder = self._root / f"{revision}-{_fingerprint(gecko)}"
        self.num_encoded = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._shards: list[pathlib.Path] = []
        self._open: dict[int, np.ndarray] = {}
        self._verified: set[int] = set()
        for path in sorted(self.folder.glob(f"*{_KEYS}")):
            try:
                keys = npy.open_array(path, (None, _KEY_BYTES), "u1", remedy=_REMEDY)
                self._add(path, np.array(keys))
            except (ValueError, OSError) as error:
                logging.warning(
                    "%s: left out, its texts are encoded again: %s", path, error
                )

    def __len__(self) -> int:
        return len(self._places)

    def encode(
        self,
        texts: Sequence[str],
        *,
        side: embedding.Side,
        task: str | None = None,
        titles: Sequence[str | None] | None = None,
        max_length: int,
        description: str | None = None,
    ) -> Float[np.ndarray, "N E"]:
        """Returns what `Gecko.encode` gives, encoding only what is new.

        Args:
            texts: See `Gecko.encode`; a text that comes twice is encoded once.
            side: See there.
            task: See there.
            titles: See there.
            max_length: Tokens a text is cut to.
            description: Shows progress under this name.
        """
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
                task=task,
                titles=[titles[p] for p in chunk] if titles else None,
                max_length=max_length,
                description=f"{description}{done}" if description else None,
            )
            self._write([keys[p] for p in chunk], vectors)
        return self._read(keys)

    def trim(self) -> None:
        """Removes the shards that were used longest ago, until the rest fits.

        To be called when no vector is needed any more: a task needs its own at every
        dim, so while it runs the store may be larger.
        """
        shards = []
        for path in self._root.glob(f"*/*{_KEYS}"):
            vectors = _vectors_of(path)
            size = sum(p.stat().st_size for p in (path, vectors) if p.exists())
            shards.append((path.stat().st_mtime_ns, size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self._max_bytes:
                break
            # Keys first: without them the vectors do not count as there.
            path.unlink(missing_ok=True)
            _vectors_of(path).unlink(missing_ok=True)
            _checksums_of(path).unlink(missing_ok=True)
            total -= size
            self._forget(path)

    def _write(self, keys: Sequence[bytes], vectors: Float[np.ndarray, "N E"]) -> None:
        name = f"{time.time_ns():020}-{os.getpid()}"
        array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)
        path = self.folder / f"{name}{_KEYS}"
        vectors_path = _vectors_of(path)
        _save(vectors_path, vectors)
        listed = checksums.of_files(self.folder, [vectors_path.name])
        checksums.write_object(_checksums_of(path), {checksums.FILES: listed})
        # A damaged key is found by no text, so keys need no checksum.
        _save(path, array)
        self._verified.add(len(self._shards))
        self._add(path, array)

    def _add(self, path: pathlib.Path, keys: np.ndarray) -> None:
        shape = (len(keys), self._gecko.dims[-1])
        vectors = npy.open_array(_vectors_of(path), shape, "f4", remedy=_REMEDY)
        shard = len(self._shards)
        self._shards.append(path)
        self._open[shard] = vectors
        for row, key in enumerate(keys):
            self._places[key.tobytes()] = (shard, row)

    def _verify(self, shards: set[int]) -> None:
        """Forgets those of the shards whose vectors are damaged."""
        for shard in sorted(shards - self._verified):
            self._verified.add(shard)
            path = self._shards[shard]
            try:
                checksums.read_object(_checksums_of(path), {}, remedy=_REMEDY)
            except FileNotFoundError:
                logging.info("%s: from before checksums", path)
            except ValueError as error:
                logging.warning("%s", error)
                path.unlink(missing_ok=True)
                self._forget(path)

    def _read(self, keys: Sequence[bytes]) -> Float[np.ndarray, "N E"]:
        places = np.array([self._places[key] for key in keys], np.int64).reshape(-1, 2)
        vectors = np.empty((len(keys), self._gecko.dims[-1]), np.float32)
        for shard in np.unique(places[:, 0]).tolist():
            members = np.flatnonzero(places[:, 0] == shard)
            vectors[members] = self._open[shard][places[members, 1]]
            if self._shards[shard].exists():
                self._shards[shard].touch()  # For `trim`.
        return vectors

    def _forget(self, path: pathlib.Path) -> None:
        if path in self._shards:
            gone = self._shards.index(path)
            self._open.pop(gone)
            self._places = {k: v for k, v in self._places.items() if v[0] != gone}


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with writing.write_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _checksums_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name.removesuffix(_KEYS) + _CHECKSUMS)


def _vectors_of(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name.removesuffix(_KEYS) + _VECTORS)


def _key(text: str, max_length: int) -> bytes:
    content = f"{max_length}\n{text}".encode()
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


def _fingerprint(gecko: embedding.Gecko) -> str:
    """Names all but the parameters and the text that a vector depends on."""
    facts: dict[str, Any] = {
        "dtype": gecko.files.encoder_config.dtype,
        "dim": gecko.dims[-1],
        "vocabulary": gecko.vocabulary.fingerprint,
        "backend": jax.default_backend(),
        "version": gecko_jax.__version__,
    }
    encoded = json.dumps(facts, sort_keys=True).encode()
    return hashlib.sha256(encoded).hexdigest()[:8]
