"""Sources: records of TFDS, Parquet, JSON lines and BEIR folders.

    tfds:snli:train          a TFDS builder (name/config) and its split
    jsonl:a.jsonl.gz         or parquet:, beir:
    data/*.parquet           the ending of a file gives its kind

A path may be local or on Google Cloud Storage (gs://), and may hold `*`. Files are read
in the order of their names. Records are dicts of plain Python values, with None for
null and NaN. A record may have an id, `_id` or `id`, which must be unique.
"""

import contextlib
import errno
import math
import os
from collections.abc import Iterator
from typing import Any

from gecko_jax.data import load_seqio
from gecko_jax.io import inputs, qrels, reading
from gecko_jax.text import text_files

_ENDINGS = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}
KINDS = ("tfds", "beir", "jsonl", "parquet")


def read(source: str, *, tfds_data_dir: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a source; `tfds_data_dir` is None for TFDS's default.

    Raises ValueError if the source does not exist or cannot be read as its kind, or two
    records have the same id.
    """
    with _cloud_errors(source):
        kind, location = _split(source)
        if kind == "tfds":
            yield from _read_tfds(location, tfds_data_dir)
        elif kind == "beir":
            yield from _read_beir(location)
        else:
            ids = inputs.UniqueIds()
            for path in _paths(location):
                is_jsonl = kind == "jsonl"
                records = reading.read_records(path) if is_jsonl else _parquet(path)
                for place, record in records:
                    identity = inputs.id_field(place, record, "_id", "id", default="")
                    if identity:
                        ids.add(place, identity)
                    yield record


@contextlib.contextmanager
def _cloud_errors(source: str) -> Iterator[None]:
    """Turns errors of TensorFlow, which reads gs://, into one that names the source."""
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
    """Returns size and modification time of each file; none for TFDS.

    Raises ValueError if the source does not exist.
    """
    with _cloud_errors(source):
        kind, location = _split(source)
        if kind == "tfds":  # TFDS has versions of its own.
            return {}
        paths = _beir_files(location) if kind == "beir" else _paths(location)
        stats = {str(path): path.stat() for path in paths}
    return {path: [int(stat.length), int(stat.mtime)] for path, stat in stats.items()}


def _split(source: str) -> tuple[str, str]:
    """Returns the kind of a source, and its location."""
    kind, _, location = source.partition(":")
    if kind in KINDS:
        return kind, location
    for ending, kind in _ENDINGS.items():
        if source.endswith(ending):
            return kind, source
    if _path(source).is_dir():
        return "beir", source
    raise ValueError(
        f"{source}: cannot tell its kind; write one of "
        f"{', '.join(f'{kind}:' for kind in KINDS)} before it"
    )


def _path(path: str | os.PathLike) -> Any:
    from etils import epath

    return epath.Path(path)


def _paths(pattern: str) -> list[Any]:
    path = _path(pattern)
    if "*" in path.name:
        paths = sorted(path.parent.glob(path.name))
    else:
        paths = [path] if path.exists() else []
    if not paths:
        raise ValueError(f"{pattern}: no such file; check the path of the source")
    for path in paths:
        reading.check_is_file(path)
    return paths


def _read_tfds(name: str, data_dir: str | None) -> Iterator[dict[str, Any]]:
    load_seqio()
    import tensorflow_datasets as tfds

    builder_name, _, split = name.rpartition(":")
    try:
        dataset = tfds.load(
            builder_name, split=split, data_dir=data_dir, shuffle_files=False
        )
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"tfds:{name}: TFDS has no such set ({error}); check its name"
        ) from None
    for record in tfds.as_numpy(dataset):
        yield _plain(record)


def _plain(value: Any) -> Any:
    """Returns a value with bytes as text, arrays as lists and NaN as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _parquet(path: Any) -> Iterator[tuple[str, dict[str, Any]]]:
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
            raise ValueError(
                f"{path}: not a whole Parquet file ({error}); copy it again"
            ) from None
        rows = (row for block in table.iter_batches() for row in block.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}:{number}", _plain(row)


def _read_beir(folder: str) -> Iterator[dict[str, Any]]:
    """Joins a BEIR folder into records for `preprocessors.passage_lists`.

    Passages that the training split judges with 0 become hard negatives.
    """
    corpus, queries_path, judgements_path = _beir_files(folder)
    judgements = qrels.load(judgements_path)
    # Texts without a visible character pass, because `passage_lists` counts them.
    queries = {q.id: q for q in text_files.read_texts(queries_path, allow_empty=True)}
    for query, judged in judgements.items():
        if query not in queries:
            place = next(iter(judged.values())).place
            qrels.check_spelling(place, query, queries)
            raise ValueError(
                f"{place}: query {query!r} is not in {queries_path.name}; add it there "
                "or drop the line"
            )
    judged_ids = {passage for judged in judgements.values() for passage in judged}
    # The corpus may be large: keep judged passages, and ids for spelling errors.
    other_spellings = {qrels.other_spelling(passage) for passage in judged_ids}
    passages: dict[str, dict[str, Any]] = {}
    similar_ids: set[str] = set()
    for passage in text_files.read_texts(corpus, allow_empty=True):
        if passage.id in judged_ids:
            content = {"title": passage.title, "text": passage.text}
            passages[passage.id] = {"docid": passage.id, **content}
        elif passage.id in other_spellings:
            similar_ids.add(passage.id)
    for query in queries.values():
        lists: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for passage, (place, grade) in judgements.get(query.id, {}).items():
            if passage not in passages:
                qrels.check_spelling(place, passage, similar_ids)
                raise ValueError(
                    f"{place}: passage {passage!r} is not in the corpus; add it there "
                    "or drop the line"
                )
            lists[grade > 0].append(passages[passage])
        if query.id in judgements:
            yield {
                "query_id": query.id,
                "query": query.text,
                "positive_passages": lists[True],
                "negative_passages": lists[False],
            }


def _beir_files(folder: str) -> tuple[Any, Any, Any]:
    """Returns the corpus, the queries and the training judgements of a BEIR folder."""
    root = _path(folder)

    def find(*names: str) -> Any:
        path = reading.find(root, *names)
        if path is None:
            raise ValueError(
                f"{root / names[0]}: no such file; a BEIR folder for training needs "
                "corpus.jsonl, queries.jsonl and qrels/train.tsv"
            )
        return path

    corpus, queries = find("corpus.jsonl"), find("queries.jsonl")
    return corpus, queries, find("qrels/train.tsv", "qrels/train.jsonl")
