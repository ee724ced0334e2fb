"""Sources: records of TFDS, Parquet, JSON lines, TFRecord, ArrayRecord, BEIR folders.

    tfds:snli:train          a TFDS builder (name/config) and its split
    jsonl:a.jsonl.gz         or parquet:, tfrecord:, arrayrecord:, beir:
    data/*.parquet           files alone: their ending says what they are

A path may be local or on Google Cloud Storage (gs://), and may hold `*`. Records come
in the order of the files' names and are dicts of plain Python values and numpy arrays.
"""

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

from gecko_jax.data import load_seqio

_ENDINGS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".tfrecord": "tfrecord",
    ".array_record": "arrayrecord",
}
KINDS = ("tfds", "beir", *sorted(set(_ENDINGS.values())))


def read(source: str, *, tfds_data_dir: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a source.

    Args:
        source: See above.
        tfds_data_dir: Where TFDS keeps its sets; its own default if None.

    Raises:
        ValueError: There is no such source, or it cannot be read as what it is.
    """
    kind, _, rest = source.partition(":")
    if kind not in KINDS:
        kind, rest = _kind_of(source), source
    if kind == "tfds":
        return _read_tfds(rest, tfds_data_dir)
    if kind == "beir":
        return _read_beir(rest)
    readers = {
        "jsonl": _read_jsonl,
        "parquet": _read_parquet,
        "tfrecord": _read_tfrecord,
        "arrayrecord": _read_arrayrecord,
    }
    return _chain(readers[kind], _paths(rest))


def _kind_of(path: str) -> str:
    for ending, kind in _ENDINGS.items():
        if path.endswith(ending):
            return kind
    if _path(path).is_dir():
        return "beir"
    raise ValueError(
        f"{path}: cannot tell what it is; write one of "
        f"{', '.join(f'{kind}:' for kind in KINDS)} before it"
    )


def _path(path: str | os.PathLike) -> Any:
    from etils import epath

    return epath.Path(path)


def _paths(pattern: str) -> list[Any]:
    path = _path(pattern)
    if "*" in path.name:
        found = sorted(path.parent.glob(path.name))
    else:
        found = [path] if path.exists() else []
    if not found:
        raise ValueError(f"{pattern}: no such file; check the path of the source")
    return found


def _chain(reader: Any, paths: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from reader(path)


def _read_tfds(name: str, data_dir: str | None) -> Iterator[dict[str, Any]]:
    load_seqio()
    import tensorflow_datasets as tfds

    builder_name, _, split = name.rpartition(":")
    try:
        dataset = tfds.load(
            builder_name, split=split, data_dir=data_dir, shuffle_files=False
        )
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"tfds:{name}: TFDS has no such set: {error}") from None
    for record in tfds.as_numpy(dataset):
        yield _plain(record)


def _plain(value: Any) -> Any:
    """Turns TFDS's bytes into text, all the way down."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _read_jsonl(path: Any) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.name.endswith(".gz") else (lambda file, mode: file)
    with path.open("rb") as raw, opener(raw, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error}); each line must be one object"
                ) from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}:{number}: a {type(record).__name__}; each line must be "
                    "one JSON object"
                )
            yield record


def _read_parquet(path: Any) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ImportError(
            'Parquet files need pyarrow: pip install "gecko-jax[data]"'
        ) from None
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a whole Parquet file ({error})") from None
        for block in table.iter_batches():
            yield from block.to_pylist()


def _read_tfrecord(path: Any) -> Iterator[dict[str, Any]]:
    load_seqio()
    import tensorflow as tf

    for record in tf.data.TFRecordDataset(os.fspath(path)):
        yield _parse_example(bytes(record.numpy()))


def _read_arrayrecord(path: Any) -> Iterator[dict[str, Any]]:
    from array_record.python import (
        array_record_module,  # pyright: ignore[reportAttributeAccessIssue] - C++
    )

    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    for number in range(reader.num_records()):
        (record,) = reader.read([number])
        yield _parse_example(record)


def _parse_example(record: bytes) -> dict[str, Any]:
    """Reads a tf.Example: one value is a scalar, several are a list."""
    load_seqio()
    import tensorflow as tf

    features = tf.train.Example.FromString(record).features.feature
    values = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        found = _plain(list(getattr(feature, kind).value)) if kind else []
        values[name] = found[0] if len(found) == 1 else found
    return values


def _read_beir(folder: str) -> Iterator[dict[str, Any]]:
    """Joins a BEIR folder: records in the layout of `preprocessors.passage_lists`.

    Judgements of the training split are read; those of 0 become hard negatives.
    """
    root = _path(folder)
    judgements = root / "qrels" / "train.tsv"
    if not judgements.exists():
        raise ValueError(
            f"{judgements}: no such file; a BEIR folder that is trained on has "
            "corpus.jsonl, queries.jsonl and qrels/train.tsv"
        )
    wanted: dict[str, list[tuple[str, float]]] = {}
    lines = judgements.read_text().splitlines()
    for number, line in enumerate(lines[1:], start=2):
        parts = line.split("\t")
        if len(parts) != 3:
            raise ValueError(
                f"{judgements}:{number}: {len(parts)} columns; it must have query, "
                "passage and score"
            )
        wanted.setdefault(parts[0], []).append((parts[1], float(parts[2])))
    used = {passage for found in wanted.values() for passage, _ in found}
    passages = {
        str(record["_id"]): record
        for record in _chain(_read_jsonl, _paths(f"{folder}/corpus.jsonl*"))
        if str(record.get("_id")) in used
    }
    for query in _chain(_read_jsonl, _paths(f"{folder}/queries.jsonl*")):
        found = wanted.get(str(query.get("_id")), [])
        if not found:
            continue
        lists: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for passage, score in found:
            if passage not in passages:
                raise ValueError(
                    f"{judgements}: passage {passage!r} is not in the corpus"
                )
            record = passages[passage]
            lists[score > 0].append(
                {"docid": passage, "title": record.get("title"), "text": record["text"]}
            )
        yield {
            "query_id": str(query["_id"]),
            "query": query["text"],
            "positive_passages": lists[True],
            "negative_passages": lists[False],
        }
