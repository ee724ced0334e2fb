"""Vectors: a file of texts, embedded into a folder shard by shard.

vectors/embeddings.json   what they were made with
vectors/shard-00000.npz   ids and vectors (or codes) of the first `shard_rows` texts
vectors/shard-00001.npz   ...
"""

import itertools
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float

from gecko_jax.inference import embedding, quantization
from gecko_jax.io import checksums, progress, reading, writing
from gecko_jax.text import text_files

_SETTINGS = "embeddings.json"
_FIELDS = {
    "revision": str,
    "dim": int,
    "precision": quantization.PRECISIONS,
    "shard_rows": int,
    "num_texts": int,
    "source_sha256": str,
    "source": str,
}


def embed_file(
    gecko: embedding.Gecko,
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    side: embedding.Side = "passage",
    task: str | None = None,
    dim: int | None = None,
    max_length: int | None = None,
    precision: str = quantization.FLOAT32,
    shard_rows: int = 8_192,
) -> pathlib.Path:
    """Embeds a file of texts into a folder, shard by shard; a rerun goes on.

    The folder holds `shard-00000.npz` and so on, each with `ids` and `vectors`, in the
    order of the file, and `embeddings.json`, which says what they were made with.

    Args:
        gecko: The model.
        source: JSON lines in the BEIR layout or a `.txt` file (`files.read_texts`).
        folder: Made if need be. One that was made with other settings, or from
            another file, is refused.
        side: How the texts are written, "query" or "passage".
        task: Name or description of the task.
        dim: One of the model's dims; None is the largest.
        max_length: Tokens a text is cut to; None is the length of training.
        precision: How the vectors are stored, see `quantization`. The ranges of int8
            are those of the first shard.
        shard_rows: Texts per shard: what an interruption may lose.

    Raises:
        ValueError: The file has a bad line (named), or the folder other settings.
        OSError: The disk is full. Finished shards stay.
    """
    folder = pathlib.Path(folder)
    quantization.check_precision(precision)
    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows}: it must be at least 1")
    # A bad line should be known before hours of work, so all are read first.
    num_texts = sum(1 for _ in text_files.read_texts(source))
    if not num_texts:
        raise ValueError(f"{source}: no texts; it needs at least one line")
    _write_settings(
        folder,
        {
            "format": 1,
            "revision": gecko.revision,
            "dim": gecko.check_dim(dim),
            "side": side,
            "task": task,
            "max_length": max_length,
            "precision": precision,
            "shard_rows": shard_rows,
            "num_texts": num_texts,
            "source_sha256": reading.sha256(source),
            "source": str(pathlib.Path(source).absolute()),
        },
    )
    texts = text_files.read_texts(source)
    num_shards = -(-num_texts // shard_rows)
    ranges = None
    with progress.Progress(f"Embedding {source}", num_texts) as bar:
        done = 0
        for shard in range(num_shards):
            records = list(itertools.islice(texts, shard_rows))
            path = _shard_path(folder, shard)
            done += len(records)
            whole = _load_whole(path, [record.id for record in records], ranges)
            if whole is not None:
                ranges = whole.ranges
                bar.skip(done)
                continue
            titles = [record.title for record in records] if side == "passage" else None
            vectors = gecko.encode(
                [record.text for record in records],
                side=side,
                task=task,
                titles=titles,
                dim=dim,
                max_length=max_length,
            )
            codes = quantization.encode(vectors, precision, ranges)
            ranges = codes.ranges
            arrays: dict[str, Any] = {
                "ids": np.array([r.id for r in records]),
                "vectors": codes.values,
            }
            if ranges is not None:
                arrays["ranges"] = ranges
            with writing.write_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
            bar.update(done)
    return folder


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns what `embed_file` wrote about the vectors of `folder`."""
    try:
        return checksums.read_object(
            writing.member(pathlib.Path(folder), _SETTINGS),
            _FIELDS,
            remedy="remove the folder and embed again",
            # Folders made before there was a choice do not name it.
            defaults={"precision": quantization.FLOAT32},
        )
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no {_SETTINGS}, so not a folder of `gecko embed`; check it"
        ) from None


def read_shards(
    folder: str | os.PathLike,
) -> tuple[list[str], Float[np.ndarray, "P E"]]:
    """Returns the ids and vectors of a finished `embed_file`, in the file's order.

    Raises:
        ValueError: A shard is missing or damaged.
    """
    ids, codes = read_codes(folder)
    return ids, codes.decode()


def read_codes(folder: str | os.PathLike) -> tuple[list[str], quantization.Codes]:
    """The same as `read_shards`, with the vectors as they are stored."""
    folder = pathlib.Path(folder)
    settings = read_settings(folder)
    num_texts, dim = settings["num_texts"], settings["dim"]
    precision = settings["precision"]
    width = quantization.width(precision, dim)
    num_shards = -(-num_texts // settings["shard_rows"])
    num_bytes = num_texts * width * np.dtype(quantization.dtype(precision)).itemsize
    # Before anything of the size that the settings claim is allocated.
    for shard in range(num_shards):
        path = _shard_path(folder, shard)
        if not path.exists():
            raise _lost(path, shard, num_shards)
        num_bytes -= path.stat().st_size
    if num_bytes > 0:
        raise ValueError(
            f"{folder}: its shards hold less than the {num_texts:,} texts that "
            f"{_SETTINGS} names; remove the folder and embed again"
        )
    values = np.empty((num_texts, width), quantization.dtype(precision))
    ranges = None
    ids: list[str] = []
    for shard in range(num_shards):
        path = _shard_path(folder, shard)
        expected = min(settings["shard_rows"], num_texts - len(ids))
        loaded = _load_shard(path)
        if (
            loaded is None
            or len(loaded.ids) != expected
            or (loaded.vectors.dtype, loaded.vectors.shape)
            != (values.dtype, (expected, width))
            or (loaded.ranges is None) == (precision == quantization.INT8)
            or not (shard == 0 or _are_equal(loaded.ranges, ranges))
        ):
            raise _lost(path, shard, num_shards)
        values[len(ids) : len(ids) + expected] = loaded.vectors
        ranges = loaded.ranges
        ids.extend(loaded.ids)
    return ids, quantization.Codes(values, precision, dim, ranges)


def _write_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    path = folder / _SETTINGS
    if path.exists():
        before = read_settings(folder)
        differences = [
            f"{key} was {before.get(key)!r} and is now {value!r}"
            for key, value in settings.items()
            if key != "source" and before.get(key) != value
        ]
        if differences:
            raise ValueError(
                f"{folder}: made with other settings ({'; '.join(differences)}); "
                "choose another folder, or remove this one"
            )
        return
    if folder.is_dir() and any(folder.glob("shard-*")):
        raise ValueError(f"{folder}: shards without {_SETTINGS}; choose another folder")
    checksums.write_object(path, settings)


def _lost(path: pathlib.Path, shard: int, num_shards: int) -> ValueError:
    return ValueError(
        f"{path}: missing or damaged (shard {shard + 1} of {num_shards}); run the same "
        "`gecko embed` again, which makes only what is missing"
    )


def _shard_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return writing.member(folder, f"shard-{shard:05}.npz")


class _Shard(NamedTuple):
    """The arrays of one file."""

    ids: list[str]
    vectors: np.ndarray
    ranges: np.ndarray | None


def _load_whole(
    path: pathlib.Path, ids: list[str], ranges: np.ndarray | None
) -> _Shard | None:
    """Returns a shard that need not be made again, else None."""
    if not path.exists():
        return None
    loaded = _load_shard(path)
    is_first = ranges is None
    if (
        loaded is None
        or loaded.ids != ids
        or not (is_first or _are_equal(loaded.ranges, ranges))
    ):
        logging.warning("%s is damaged and is made again", path)
        return None
    return loaded


def _are_equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None and b is None) or np.array_equal(np.array(a), np.array(b))


def _load_shard(path: pathlib.Path) -> _Shard | None:
    try:
        # numpy leaves a damaged file open that it opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as shard:
            # What `embed_file` writes is not compressed, so that no array is larger
            # than the file.
            sizes = [member.file_size for member in shard.zip.infolist()]
            if sum(sizes) > path.stat().st_size:
                return None
            ids, vectors, ranges = (
                shard.get(name) for name in ("ids", "vectors", "ranges")
            )
            if ids.ndim != 1 or ids.dtype.kind != "U":
                return None
            # A member that is no array comes as its bytes.
            if not isinstance(vectors, np.ndarray) or isinstance(ranges, bytes):
                return None
            return _Shard(ids.tolist(), vectors, ranges)
    except Exception:  # Of a damaged file, numpy and zipfile raise many kinds.
        return None
