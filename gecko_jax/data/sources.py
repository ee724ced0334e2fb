"""Sources: records of TFDS, Parquet, JSON lines, TFRecord, ArrayRecord, BEIR folders.

    tfds:snli:train          a TFDS builder (name/config) and its split
    jsonl:a.jsonl.gz         or parquet:, tfrecord:, arrayrecord:, beir:
    data/*.parquet           files alone: their ending says what they are

A path may be local or on Google Cloud Storage (gs://), and may hold `*`. Records come
in the order of the files' names and are dicts of plain Python values and numpy arrays.
A record of a file may have an id, `_id` or `id`; no two records may have the same.
"""

import contextlib
import errno
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gecko_jax import files, wording
from gecko_jax.data import load_seqio

_ENDINGS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".tfrecord": "tfrecord",
    ".array_record": "arrayrecord",
}
KINDS = ("tfds", "beir", *sorted(set(_ENDINGS.values())))

# Yields the number of each record in its file (of its line, for JSONL) and the record.
_Reader = Callable[[Any], Iterator[tuple[int, dict[str, Any]]]]


def read(source: str, *, tfds_data_dir: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a source.

    Args:
        source: See above.
        tfds_data_dir: Where TFDS keeps its sets; its own default if None.

    Raises:
        ValueError: There is no such source, it cannot be read as what it is, or two
            records have the same id.
    """
    with _cloud_errors(source):
        kind, _, rest = source.partition(":")
        if kind not in KINDS:
            kind, rest = _kind_of(source), source
        if kind == "tfds":
            yield from _read_tfds(rest, tfds_data_dir)
        elif kind == "beir":
            yield from _read_beir(rest)
        else:
            yield from _chain(kind, _paths(rest))


@contextlib.contextmanager
def _cloud_errors(source: str) -> Iterator[None]:
    """Turns TensorFlow's errors, by which gs:// is read, into one that names it."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow."):
            raise
        reason = str(error).partition("\n")[0]
        raise OSError(
            errno.EIO,
            f"cannot be read ({reason}); check the path, the network and your access",
            source,
        ) from error


def stamps(source: str) -> dict[str, list[int]]:
    """Returns bytes and time of each file of a source; TFDS has versions of its own.

    Raises:
        ValueError: There is no such source.
    """
    with _cloud_errors(source):
        kind, _, rest = source.partition(":")
        if kind not in KINDS:
            kind, rest = _kind_of(source), source
        if kind == "tfds":
            return {}
        if kind == "beir":
            names = ("corpus.jsonl*", "queries.jsonl*", "qrels/train.tsv")
            paths = [path for name in names for path in _paths(f"{rest}/{name}")]
        else:
            paths = _paths(rest)
        found = {str(path): path.stat() for path in paths}
    return {path: [int(stat.length), int(stat.mtime)] for path, stat in found.items()}


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


def _chain(kind: str, paths: Sequence[Any]) -> Iterator[dict[str, Any]]:
    return (record for _, record in _chain_placed(kind, paths))


def _chain_placed(
    kind: str, paths: Sequence[Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of all files; refuses an id that was given before."""
    # Digest of an id -> its file and line: some 150 bytes for each record with an id.
    seen: dict[bytes, tuple[int, int]] = {}
    for file, path in enumerate(paths):
        for number, record in _READERS[kind](path):
            place = f"{path}:{number}"
            name = next((n for n in _IDS if record.get(n) is not None), None)
            if name is not None:
                key = f"{name}:{record[name]}".encode(errors="surrogatepass")
                key = hashlib.blake2b(key, digest_size=12).digest()
                if key in seen:
                    earlier, line = seen[key]
                    raise ValueError(
                        f"{place}: {name} {record[name]!r} was given before, at "
                        f"{paths[earlier]}:{line}; ids must differ: drop one of the "
                        "two, or the field"
                    )
                seen[key] = file, number
            yield place, record


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


def _read_jsonl(path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with path.open("rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse_json(f"{path}:{number}", line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}:{number + 1}: not a whole gzip file ({error}); copy it again"
        ) from None


def _parse_json(place: str, line: bytes) -> dict[str, Any]:
    try:
        record = files.parse_json(line)
    except ValueError as error:
        raise ValueError(
            f"{place}: not JSON ({error}); each line must be one object"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(
            f"{place}: {files.kind(record)}; each line must be one JSON object"
        )
    return record


def _read_parquet(path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
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
        rows = (row for block in table.iter_batches() for row in block.to_pylist())
        yield from enumerate(rows, start=1)


def _read_tfrecord(path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    load_seqio()
    import tensorflow as tf

    number = 0
    try:
        for number, record in enumerate(
            tf.data.TFRecordDataset(os.fspath(path)), start=1
        ):
            yield number, _parse_example(f"{path}:{number}", bytes(record.numpy()))
    except tf.errors.DataLossError:
        raise ValueError(
            f"{path}: not a whole TFRecord file (damaged after record {number:,}); "
            "copy it again"
        ) from None


def _read_arrayrecord(path: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    from array_record.python import (
        array_record_module,  # pyright: ignore[reportAttributeAccessIssue] - C++
    )

    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    number = 0
    try:
        if not reader.ok():  # It takes a cut file for one without records.
            raise RuntimeError("no footer")
        for number in range(reader.num_records()):
            (record,) = reader.read([number])
            yield number + 1, _parse_example(f"{path}:{number + 1}", record)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not a whole ArrayRecord file ({error}, at record {number + 1:,});"
            " copy it again"
        ) from None


def _parse_example(place: str, record: bytes) -> dict[str, Any]:
    """Reads a tf.Example: one value is a scalar, several are a list."""
    load_seqio()
    import tensorflow as tf
    from google.protobuf import message

    try:
        features = tf.train.Example.FromString(record).features.feature
    except message.DecodeError as error:
        raise ValueError(f"{place}: not a tf.Example ({error})") from None
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
    wanted = _read_judgements(judgements)
    used = {passage for found in wanted.values() for passage in found}
    passages = {}
    for place, record in _chain_placed("jsonl", _paths(f"{folder}/corpus.jsonl*")):
        if (identity := _beir_field(place, record, "_id")) in used:
            passages[identity] = {
                "docid": identity,
                "title": record.get("title"),
                "text": _beir_field(place, record, "text"),
            }
    for place, query in _chain_placed("jsonl", _paths(f"{folder}/queries.jsonl*")):
        identity = _beir_field(place, query, "_id")
        lists: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for passage, (judged_at, score) in wanted.get(identity, {}).items():
            if passage not in passages:
                raise ValueError(
                    f"{judged_at}: passage {passage!r} is not in the corpus"
                )
            lists[score > 0].append(passages[passage])
        if identity in wanted:
            yield {
                "query_id": identity,
                "query": _beir_field(place, query, "text"),
                "positive_passages": lists[True],
                "negative_passages": lists[False],
            }


def _read_judgements(path: Any) -> dict[str, dict[str, tuple[str, float]]]:
    """Returns query -> passage -> (place, score)."""
    wanted: dict[str, dict[str, tuple[str, float]]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        place = f"{path}:{number}"
        parts = line.split("\t")
        if number == 1 and parts == ["query-id", "corpus-id", "score"]:
            continue
        if len(parts) != 3:
            raise ValueError(
                f"{place}: {wording.counted(len(parts), 'column')}; it must have "
                "query, passage and score"
            )
        query, passage, score = parts
        judged = wanted.setdefault(query, {})
        if passage in judged:
            raise ValueError(
                f"{place}: query {query!r} and passage {passage!r} were judged before, "
                f"at {judged[passage][0]}; keep one line"
            )
        try:
            judged[passage] = place, float(score)
        except ValueError:
            raise ValueError(f"{place}: score {score!r} is not a number") from None
    return wanted


def _beir_field(place: str, record: dict[str, Any], name: str) -> str:
    """Returns a field that every line of a BEIR folder has, as a string."""
    if record.get(name) is None:
        raise ValueError(
            f"{place}: no field {name!r} (it has {', '.join(sorted(record))}); every "
            "line of a BEIR folder needs it"
        )
    return str(record[name])


_READERS: dict[str, _Reader] = {
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "tfrecord": _read_tfrecord,
    "arrayrecord": _read_arrayrecord,
}
# Fields by which records are told apart, the first that a record has.
_IDS = ("_id", "id")
