"""A file of texts, embedded shard by shard into a folder of vectors.

vectors/embeddings.json   what the vectors were made with
vectors/shard-00000.npz   ids and vectors (or codes) of the first `shard_rows` texts
vectors/shard-00001.npz   ...
"""

import itertools
import os
import pathlib
from typing import Any

import numpy as np
from absl import logging

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
    """Embeds a file of texts into a folder; a rerun resumes after the last whole shard.

    `source` is JSON lines in the BEIR layout or a `.txt` file (`text_files`). `side`,
    `task`, `dim` and `max_length` are those of `Gecko.encode`, and `precision` is one
    of `quantization.PRECISIONS`; all int8 shards use the ranges of the first. An
    interruption loses the work of `shard_rows` texts at most.

    Raises ValueError if the file has a bad line, or the folder was made from another
    source or with other settings, and OSError if the disk is full.
    """
    folder = pathlib.Path(folder)
    quantization.check_precision(precision)
    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows}: it must be at least 1")
    dim = gecko.check_dim(dim)
    # Read the whole file first: a bad line must not surface after hours of work.
    num_texts = sum(1 for _ in text_files.read_texts(source))
    if not num_texts:
        raise ValueError(f"{source}: no texts; it needs at least one line")
    settings = {
        "format": 1,
        "revision": gecko.revision,
        "dim": dim,
        "side": side,
        "task": task,
        "max_length": max_length,
        "precision": precision,
        "shard_rows": shard_rows,
        "num_texts": num_texts,
        "source_sha256": reading.sha256(source),
        "source": str(pathlib.Path(source).absolute()),
    }
    _write_settings(folder, settings)
    texts = text_files.read_texts(source)
    ranges = None
    done = 0
    with progress.Progress(f"Embedding {source}", num_texts) as bar:
        for shard in range(-(-num_texts // shard_rows)):
            records = list(itertools.islice(texts, shard_rows))
            done += len(records)
            path = _shard_path(folder, shard)
            ids = [record.id for record in records]
            loaded = _load_shard(path, precision, dim, ranges)
            if loaded is not None and loaded[0] == ids:
                ranges = loaded[1].ranges
                bar.skip(done)
                continue
            if path.exists():
                logging.warning("%s: damaged; its texts are embedded again", path)
            vectors = gecko.encode(
                [record.text for record in records],
                side=side,
                task=task,
                titles=[r.title for r in records] if side == "passage" else None,
                dim=dim,
                max_length=max_length,
            )
            codes = quantization.encode(vectors, precision, ranges)
            ranges = codes.ranges
            arrays: dict[str, Any] = {"ids": np.array(ids), "vectors": codes.values}
            if ranges is not None:
                arrays["ranges"] = ranges
            with writing.write_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
            bar.update(done)
    return folder


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the settings that `embed_file` wrote into `folder`."""
    try:
        return checksums.read_object(
            writing.member(pathlib.Path(folder), _SETTINGS),
            _FIELDS,
            remedy="remove the folder and embed again",
            # Folders of earlier versions hold float32 and do not say so.
            defaults={"precision": quantization.FLOAT32},
        )
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no {_SETTINGS}; pass a folder of `gecko embed`"
        ) from None


def read_codes(folder: str | os.PathLike) -> tuple[list[str], quantization.Codes]:
    """Returns ids and vectors of a finished `embed_file`, in the order of the file.

    Raises ValueError if a shard is missing or damaged.
    """
    folder = pathlib.Path(folder)
    settings = read_settings(folder)
    num_texts, shard_rows = settings["num_texts"], settings["shard_rows"]
    precision, dim = settings["precision"], settings["dim"]
    paths = [_shard_path(folder, n) for n in range(-(-num_texts // shard_rows))]

    def damaged(shard: int) -> ValueError:
        return ValueError(
            f"{paths[shard]}: missing or damaged (shard {shard + 1} of {len(paths)}); "
            "run the same `gecko embed` again, which embeds only what is missing"
        )

    # Check the sizes before allocating what the settings claim.
    for shard, path in enumerate(paths):
        if not path.exists():
            raise damaged(shard)
    num_bytes = sum(path.stat().st_size for path in paths)
    if num_bytes < num_texts * quantization.bytes_per_vector(precision, dim):
        raise ValueError(
            f"{folder}: the shards are too small for the {num_texts:,} texts that "
            f"{_SETTINGS} names; remove the folder and embed again"
        )
    width = quantization.width(precision, dim)
    values = np.empty((num_texts, width), quantization.DTYPES[precision])
    ranges = None
    ids: list[str] = []
    for shard, path in enumerate(paths):
        rows = values[len(ids) : len(ids) + shard_rows]
        loaded = _load_shard(path, precision, dim, ranges)
        if loaded is None or len(loaded[0]) != len(rows):
            raise damaged(shard)
        rows[...] = loaded[1].values
        ranges = loaded[1].ranges
        ids += loaded[0]
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


def _shard_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return writing.member(folder, f"shard-{shard:05}.npz")


def _load_shard(
    path: pathlib.Path, precision: str, dim: int, ranges: np.ndarray | None
) -> tuple[list[str], quantization.Codes] | None:
    """Returns ids and codes, None if the shard is missing, damaged or of another kind.

    `ranges` are those of the shards before it.
    """
    try:
        # If numpy opened a damaged file itself, it would leave the file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as shard:
            # `embed_file` does not compress: larger arrays than the file are not its.
            sizes = [member.file_size for member in shard.zip.infolist()]
            if sum(sizes) > path.stat().st_size:
                return None
            arrays: list[Any] = [shard.get(n) for n in ("ids", "vectors", "ranges")]
        ids, values, own = arrays
        is_valid = (
            ids.ndim == 1
            and ids.dtype.kind == "U"
            and values.dtype == quantization.DTYPES[precision]
            and values.shape == (len(ids), quantization.width(precision, dim))
            and (own is None) == (precision != quantization.INT8)
            and (own is None or (own.dtype, own.shape) == (np.float32, (2, dim)))
            and (ranges is None or np.array_equal(np.array(own), ranges))
        )
    except Exception:  # numpy and zipfile raise many types for a damaged file.
        return None
    if not is_valid:
        return None
    return ids.tolist(), quantization.Codes(values, precision, dim, own)
