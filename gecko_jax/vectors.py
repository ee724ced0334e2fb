"""Vectors: a file of texts, embedded into a folder shard by shard.

vectors/embeddings.json   what they were made with
vectors/shard-00000.npz   ids and vectors of the first `shard_rows` texts
vectors/shard-00001.npz   ...
"""

import itertools
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from gecko_jax import embedding, files, progress

_SETTINGS = "embeddings.json"


def embed_file(
    gecko: embedding.Gecko,
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    side: embedding.Side = "passage",
    task: str | None = None,
    dim: int | None = None,
    max_length: int | None = None,
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
        shard_rows: Texts per shard: what an interruption may lose.

    Raises:
        ValueError: The file has a bad line (named), or the folder other settings.
        OSError: The disk is full. Finished shards stay.
    """
    folder = pathlib.Path(folder)
    if shard_rows < 1:
        raise ValueError(f"shard_rows={shard_rows}: it must be at least 1")
    # A bad line should be known before hours of work, so all are read first.
    num_texts = sum(1 for _ in files.read_texts(source))
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
            "shard_rows": shard_rows,
            "num_texts": num_texts,
            "source_sha256": files.sha256(source),
            "source": str(pathlib.Path(source).absolute()),
        },
    )
    texts = files.read_texts(source)
    num_shards = -(-num_texts // shard_rows)
    with progress.Progress(f"Embedding {source}", num_texts) as bar:
        done = 0
        for shard in range(num_shards):
            records = list(itertools.islice(texts, shard_rows))
            path = _shard_path(folder, shard)
            done += len(records)
            if _is_whole(path, [record.id for record in records]):
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
            with files.write_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, ids=np.array([r.id for r in records]), vectors=vectors)
            bar.update(done)
    return folder


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns what `embed_file` wrote about the vectors of `folder`."""
    path = pathlib.Path(folder) / _SETTINGS
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder}: no {_SETTINGS}, so not a folder of `gecko embed`; check it"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not JSON ({error}); remove the folder and embed again"
        ) from error


def read_shards(
    folder: str | os.PathLike,
) -> tuple[list[str], Float[np.ndarray, "P E"]]:
    """Returns the ids and vectors of a finished `embed_file`, in the file's order.

    Raises:
        ValueError: A shard is missing or damaged.
    """
    folder = pathlib.Path(folder)
    settings = read_settings(folder)
    vectors = np.empty((settings["num_texts"], settings["dim"]), np.float32)
    ids: list[str] = []
    num_shards = -(-settings["num_texts"] // settings["shard_rows"])
    for shard in range(num_shards):
        path = _shard_path(folder, shard)
        loaded = _load_shard(path)
        expected = min(settings["shard_rows"], len(vectors) - len(ids))
        if loaded is None or loaded[1].shape != (expected, settings["dim"]):
            raise ValueError(
                f"{path}: missing or damaged (shard {shard + 1} of {num_shards}); run "
                "the same `gecko embed` again, which makes only what is missing"
            )
        vectors[len(ids) : len(ids) + expected] = loaded[1]
        ids.extend(loaded[0])
    return ids, vectors


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
    with files.write_file(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")


def _shard_path(folder: pathlib.Path, shard: int) -> pathlib.Path:
    return folder / f"shard-{shard:05}.npz"


def _is_whole(path: pathlib.Path, ids: list[str]) -> bool:
    if not path.exists():
        return False
    loaded = _load_shard(path)
    if loaded is None or loaded[0] != ids:
        logging.warning("%s is damaged and is made again", path)
        return False
    return True


def _load_shard(
    path: pathlib.Path,
) -> tuple[list[str], Float[np.ndarray, "P E"]] | None:
    try:
        # numpy leaves a damaged file open that it opened itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as shard:
            return shard["ids"].tolist(), shard["vectors"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
