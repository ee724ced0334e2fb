"""Makes the passages with Apache Beam: `passages.read` on many workers.

The output is byte for byte that of `passages.read`. Equal texts are grouped by hash,
near duplicates by a band of their signature. Of two similar passages the later is
dropped, unless the earlier was dropped itself; one worker decides this over the similar
pairs. A passage is identified by its *place*, (file, line), the order of that function.
"""

import functools
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.evaluation import set_texts
from gecko_jax.fret import minhash, passages, records
from gecko_jax.text import text_formats

_COUNTS = ".counts.json"
_KEPT = "kept"

_Place = tuple[int, int]  # File and line.
_Signed = tuple[_Place, bytes]  # A place and its signature.
_Judged = tuple[_Place, tuple[dict[str, Any], str | None]]  # Record, reason to drop.


def write(
    paths: Sequence[str | pathlib.Path],
    rules: passages.Rules,
    decontaminate: Sequence[str],
    stage: records.Stage,
    shard_rows: int,
    options: Sequence[str],
) -> None:
    """Writes the shards of the passages and closes their stage; see `passages.read`.

    Every worker needs access to the files and to the folder of the stage. `options` are
    those of Apache Beam, such as ("--runner=DirectRunner",). Raises ValueError if
    `rules` has a limit, which needs an order.
    """
    try:
        import apache_beam as beam
    except ModuleNotFoundError:
        raise ImportError(
            "passages by Beam need it, in an environment of its own: "
            'pip install "gecko-jax[beam]"'
        ) from None
    if rules.limit:
        raise ValueError(
            f"passages.limit={rules.limit}: Beam reads all files at once; set it to 0, "
            "or run without Beam"
        )
    # Beam would derive the types of its collections from annotations, and reject them.
    options = [*options, "--no_pipeline_type_check"]
    parsed = beam.options.pipeline_options.PipelineOptions(options)
    files, sets = list(map(str, paths)), tuple(decontaminate)
    with beam.Pipeline(options=parsed) as pipeline:
        _build(pipeline, beam, files, rules, sets, stage, shard_rows)
    path = stage.folder / _COUNTS
    dropped = dict(sorted(json.loads(path.read_text()).items()))
    path.unlink()
    num_kept = dropped.pop(_KEPT, 0)
    if not num_kept:
        raise passages.none_left(paths, dropped)
    total = num_kept + sum(dropped.values())
    stage.finish(-(-num_kept // shard_rows), records=total, dropped=dropped)


def _build(
    pipeline: Any,
    beam: Any,
    paths: list[str],
    rules: passages.Rules,
    decontaminate: tuple[str, ...],
    stage: records.Stage,
    shard_rows: int,
) -> None:
    judged = (
        pipeline
        | beam.Create(list(enumerate(paths)))
        | beam.Reshuffle()
        | "Read" >> beam.FlatMap(_read, rules, decontaminate)
    )
    first = (
        judged
        | "Good" >> beam.Filter(lambda entry: entry[1][1] is None)
        | "ByText" >> beam.Map(_by_text, bool(rules.near_duplicate))
        | "First" >> beam.CombinePerKey(min)
        | beam.Values()
    )
    joined = {
        "judged": judged,
        "first": first | "FirstPlaces" >> beam.Map(lambda signed: (signed[0], True)),
    }
    if rules.near_duplicate:
        joined["near"] = (
            first
            | beam.FlatMap(_by_band)
            | "Bands" >> beam.GroupByKey()
            | beam.FlatMap(_similar, rules.near_duplicate)
            | beam.combiners.ToList()
            | beam.FlatMap(later_of_the_kept)
            | beam.Map(lambda place: (place, True))
        )
    settled = joined | beam.CoGroupByKey() | beam.Map(_settle)
    _ = (
        settled
        | "Fates" >> beam.Map(lambda entry: entry[2])
        | "Count" >> beam.combiners.Count.PerElement()
        | "AllCounts" >> beam.combiners.ToList()
        | beam.Map(_write_counts, stage)
    )
    kept = settled | "Kept" >> beam.Filter(lambda entry: entry[2] == _KEPT)
    sizes = (
        kept
        | "Files" >> beam.Map(lambda entry: entry[0][0])
        | "CountFiles" >> beam.combiners.Count.PerElement()
    )
    _ = (
        kept
        | "ByFile" >> beam.Map(lambda entry: (entry[0][0], (entry[0][1], entry[1])))
        | "FileGroups" >> beam.GroupByKey()
        | beam.FlatMap(_number, beam.pvalue.AsDict(sizes), shard_rows)
        | "ShardGroups" >> beam.GroupByKey()
        | "Write" >> beam.Map(_write_shard, stage)
    )


@functools.cache
def _known(decontaminate: tuple[str, ...]) -> Any:
    """Reads the evaluation sets once per worker."""
    return set_texts.read(decontaminate)


def _read(
    numbered: tuple[int, str], rules: passages.Rules, decontaminate: tuple[str, ...]
) -> Iterator[_Judged]:
    file, path = numbered
    for line, record in enumerate(passages.read_file(path)):
        reason = passages.clean(record, rules, _known(decontaminate))
        yield (file, line), (record if reason is None else {}, reason)


def _by_text(judged: _Judged, is_signed: bool) -> tuple[tuple[int, int], _Signed]:
    place, (record, _) = judged
    body = record["text"]
    signature = minhash.text_signature(body).tobytes() if is_signed else b""
    return text_formats.content_id(body), (place, signature)


def _by_band(signed: _Signed) -> list[tuple[bytes, _Signed]]:
    return [(band, signed) for band in minhash.bands(_entries(signed))]


def _similar(
    band: tuple[bytes, Iterable[_Signed]], threshold: float
) -> Iterator[tuple[_Place, _Place]]:
    """Yields (earlier, later) of the near duplicates in a band."""
    signed = sorted(band[1])
    for number, later in enumerate(signed):
        for earlier in signed[:number]:
            same = minhash.resemblance(_entries(earlier), _entries(later))
            if same >= threshold:
                yield earlier[0], later[0]


def later_of_the_kept(pairs: Iterable[tuple[_Place, _Place]]) -> list[_Place]:
    """Returns, in order, the places that resemble an earlier place that is kept.

    `pairs` are the (earlier, later) of each similar pair, in any order.
    """
    dropped: set[_Place] = set()
    for earlier, later in sorted(set(pairs), key=lambda pair: (pair[1], pair[0])):
        if earlier not in dropped:
            dropped.add(later)
    return sorted(dropped)


def _settle(
    group: tuple[_Place, Mapping[str, Iterable[Any]]],
) -> tuple[_Place, dict[str, Any], str]:
    """Returns place, record, and "kept" or the reason to drop it."""
    place, parts = group
    ((record, reason),) = parts["judged"]
    if reason is None and not parts["first"]:
        reason = "duplicate"
    elif reason is None and parts.get("near"):
        reason = "near_duplicate"
    return place, record, reason or _KEPT


def _number(
    group: tuple[int, Iterable[tuple[int, dict[str, Any]]]],
    sizes: Mapping[int, int],
    shard_rows: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (shard, record) of a file's passages, numbered over all files."""
    file, lines = group
    before = sum(count for other, count in sizes.items() if other < file)
    ordered = sorted(lines, key=lambda entry: entry[0])
    for number, (_, record) in enumerate(ordered, start=before):
        yield number // shard_rows, {"id": number, **record}


def _write_shard(
    group: tuple[int, Iterable[dict[str, Any]]], stage: records.Stage
) -> None:
    shard, rows = group
    stage.write(shard, sorted(rows, key=lambda record: record["id"]))


def _write_counts(counts: list[tuple[str, int]], stage: records.Stage) -> None:
    (stage.folder / _COUNTS).write_text(json.dumps(dict(counts)))


def _entries(signed: _Signed) -> Any:
    return np.frombuffer(signed[1], np.uint32)
