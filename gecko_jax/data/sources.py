"""Sources: records of TFDS, Parquet, JSON lines, TFRecord, ArrayRecord, BEIR folders.

    tfds:snli:train          a TFDS builder (name/config) and its split
    jsonl:a.jsonl.gz         or parquet:, tfrecord:, arrayrecord:, beir:
    data/*.parquet           files alone: their ending says what they are

A path may be local or on Google Cloud Storage (gs://), and may hold `*`. Records come
in the order of the files' names and are dicts of plain Python values and numpy arrays.
A record of a file may have an id, `_id` or `id`; no two records may have the same. A
value of NaN, or null, is None.
"""

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gecko_jax.data import load_seqio
from gecko_jax.io import inputs, qrels, reading
from gecko_jax.text import text_files

_ENDINGS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".tfrecord": "tfrecord",
    ".array_record": "arrayrecord",
}
KINDS = ("tfds", "beir", *sorted(set(_ENDINGS.values())))

# Yields (place, record); the place is `file:number`, of the line for JSON lines.
_Reader = Callable[[Any], Iterator[tuple[str, dict[str, Any]]]]


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
        paths = _beir_files(rest) if kind == "beir" else _paths(rest)
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
    for path in found:
        reading.check_is_file(path)
    return found


def _chain(kind: str, paths: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yields the records of all files; refuses an id that was given before."""
    ids = inputs.UniqueIds()
    for path in paths:
        for place, record in _READERS[kind](path):
            if identity := inputs.id_field(place, record, *_IDS, default=""):
                ids.add(place, identity)
            yield record


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
    """Turns bytes into text and NaN into None, all the way down."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _read_parquet(path: Any) -> Iterator[tuple[str, dict[str, Any]]]:
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
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", _plain(row)


def _read_tfrecord(path: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    load_seqio()
    import tensorflow as tf

    number = 0
    try:
        for number, record in enumerate(
            tf.data.TFRecordDataset(os.fspath(path)), start=1
        ):
            place = f"{path}:{number}"
            yield place, _parse_example(place, bytes(record.numpy()))
    except tf.errors.DataLossError:
        raise ValueError(
            f"{path}: not a whole TFRecord file (damaged after record {number:,}); "
            "copy it again"
        ) from None


def _read_arrayrecord(path: Any) -> Iterator[tuple[str, dict[str, Any]]]:
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
            place = f"{path}:{number + 1}"
            yield place, _parse_example(place, record)
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
    corpus, questions, judged_path = _beir_files(folder)
    wanted = qrels.load(judged_path)
    # Texts without a visible character pass here: `passage_lists` counts them.
    queries = {q.id: q for q in text_files.read_texts(questions, allow_empty=True)}
    for query, judged in wanted.items():
        if query not in queries:
            place = next(iter(judged.values())).place
            qrels.check_spelling(place, query, queries)
            raise ValueError(
                f"{place}: query {query!r} is not in {questions.name}; add it there or "
                "drop the line"
            )
    used = {passage for judged in wanted.values() for passage in judged}
    # The corpus may be large: only what is looked for is kept.
    near = {qrels.other_spelling(passage) for passage in used}
    passages: dict[str, dict[str, Any]] = {}
    others: set[str] = set()
    for passage in text_files.read_texts(corpus, allow_empty=True):
        if passage.id in used:
            passages[passage.id] = {
                "docid": passage.id,
                "title": passage.title,
                "text": passage.text,
            }
        elif passage.id in near:
            others.add(passage.id)
    for query in queries.values():
        lists: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for passage, (place, grade) in wanted.get(query.id, {}).items():
            if passage not in passages:
                qrels.check_spelling(place, passage, others)
                raise ValueError(f"{place}: passage {passage!r} is not in the corpus")
            lists[grade > 0].append(passages[passage])
        if query.id in wanted:
            yield {
                "query_id": query.id,
                "query": query.text,
                "positive_passages": lists[True],
                "negative_passages": lists[False],
            }


def _beir_files(folder: str) -> tuple[Any, Any, Any]:
    """Returns the corpus, the queries and the training judgements of a BEIR folder."""
    root = _path(folder)
    names = (
        ("corpus.jsonl",),
        ("queries.jsonl",),
        ("qrels/train.tsv", "qrels/train.jsonl"),
    )
    found = [reading.find(root, *either) for either in names]
    for path, either in zip(found, names, strict=True):
        if path is None:
            raise ValueError(
                f"{root / either[0]}: no such file; a BEIR folder that is trained on "
                "has corpus.jsonl, queries.jsonl and qrels/train.tsv"
            )
    return found[0], found[1], found[2]


_READERS: dict[str, _Reader] = {
    "jsonl": reading.read_records,
    "parquet": _read_parquet,
    "tfrecord": _read_tfrecord,
    "arrayrecord": _read_arrayrecord,
}
# Fields by which records are told apart, the first that a record has.
_IDS = ("_id", "id")
