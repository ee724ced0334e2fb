"""Preparing a set of the table: its source becomes canonical triples on disk.

    <prepared_dir>/<name>/part-00000.jsonl.gz ...   lines, see `jsonl`
    <prepared_dir>/<name>/prepared.json             counts, licence, source
    <prepared_dir>/.<name>.work/                    an unfinished run

First the source is written in parts (`pairs-00000.jsonl.gz` ...). Then each part gets
its hard negatives, mined among the passages of all parts. A part is written under a
temporary name and renamed, so an interrupted run continues with the parts it has. The
content of a part depends on the source and the table alone. Memory is that of a
`mining.Corpus` if negatives are mined, and else about 100 bytes a line.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from gecko_jax.data import jsonl, mining, preprocessors, sources, task_table
from gecko_jax.io import field_rules, progress, reading, writing

# Lines of a part.
PART = 50_000

# Names of a part, before and after mining.
_PAIRS, _PART = "pairs-{:05}.jsonl.gz", "part-{:05}.jsonl.gz"

# Increased whenever the content of a part changes.
_VERSION = 2

_REMEDY = "delete the folder and prepare again"
_DROPPED = field_rules.map_of(field_rules.COUNT)
_FIELDS = {
    "facts": dict,
    "examples": int,
    "dropped": _DROPPED,
    "without_negative": field_rules.COUNT,
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """A prepared set."""

    folder: pathlib.Path
    examples: int
    dropped: dict[str, int]  # reason -> records, or parts of one, that were left out
    without_negative: int  # examples with fewer negatives than requested


def prepare(
    task: task_table.Task,
    prepared_dir: str | os.PathLike,
    *,
    source: str = "",
    accepted_licences: tuple[str, ...] = (),
    tfds_data_dir: str | None = None,
    part: int = PART,
    negatives: int = 1,
) -> Summary:
    """Turns the source of a row of the table into canonical triples.

    `source` is the source, if the table only gives its kind, `part` the lines of a
    part, and `negatives` the hard negatives of a line, if the row allows mining. Raises
    ValueError if the licence of a restricted set is not accepted, or the source is
    missing, has another schema, or has no example.
    """
    if task.restricted and task.name not in accepted_licences:
        raise ValueError(
            f"{task.name}: its licence is restricted ({task.restricted}); read it, and "
            f"if your use is covered, add --accept-licence={task.name}"
        )
    location = _location(task, source)
    target = pathlib.Path(prepared_dir).expanduser() / task.name
    note = target / "prepared.json"
    facts = {
        "version": _VERSION,
        "task": task.name,
        "source": location,
        "part": part,
        **({"negatives": negatives} if negatives != 1 else {}),
    }
    if note.exists():
        content = reading.read_object(
            note, _FIELDS, remedy=_REMEDY, defaults={"without_negative": 0}
        )
        if content["facts"] != facts:
            raise ValueError(
                f"{target}: was prepared from {content['facts'].get('source')} with "
                "other settings; delete it, or prepare into another folder"
            )
        return Summary(
            target, content["examples"], content["dropped"], content["without_negative"]
        )
    work = target.with_name(f".{task.name}.work")
    _claim(work, facts | {"files": sources.stamps(location)})
    num_parts, dropped = _write_pairs(task, location, work, tfds_data_dir, part)
    if not num_parts:
        reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items())
        raise ValueError(
            f"{task.name}: {location} gives no example"
            f"{f' (left out: {reasons})' if reasons else ''}; check the split"
        )
    examples, short = _mine(task, num_parts, work, negatives)
    content = {
        "facts": facts,
        "licence": task.licence,
        "examples": examples,
        "dropped": dropped,
        "without_negative": short,
    }
    _write_json(work / "prepared.json", content, indent=2)
    for leftover in (*work.glob("pairs-*"), work / "facts.json"):
        leftover.unlink()
    work.rename(target)
    return Summary(target, examples, dropped, short)


def _location(task: task_table.Task, source: str) -> str:
    if source or ":" in task.source:
        return source or task.source
    if not task.source:
        raise ValueError(f"{task.name}: is JSONL already; use it without preparing it")
    remedy = "docs/data.md says where to get them"
    if task.source == "canonical":
        remedy = "`gecko fret run` writes them"
    raise ValueError(
        f"{task.name}: needs the path of its {task.source} files; add --source=PATH "
        f"({remedy})"
    )


def _write_json(path: pathlib.Path, content: Any, indent: int | None = None) -> None:
    with writing.write_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent))


def _begin_again(work: pathlib.Path) -> str:
    return f"delete the folder {work} and run again"


def _claim(work: pathlib.Path, facts: dict[str, Any]) -> None:
    """Starts a working folder, or continues one with the same facts."""
    note = work / "facts.json"
    # Without a part, nothing was read yet, for example from a source that was invalid.
    if not any(work.glob("pairs-*")):
        _write_json(note, facts)
    elif reading.read_object(note, {}, remedy=_begin_again(work)) != facts:
        raise ValueError(
            f"{work}: was started from another source or with other settings, or the "
            "source has changed since; delete it and run again"
        )


def _write_pairs(
    task: task_table.Task,
    location: str,
    work: pathlib.Path,
    tfds_data_dir: str | None,
    part: int,
) -> tuple[int, dict[str, int]]:
    """Writes the missing parts; returns the number of parts, and what was dropped."""
    done = work / "pairs-done.json"
    if done.exists():
        fields = {"parts": field_rules.COUNT, "dropped": _DROPPED}
        facts = reading.read_object(done, fields, remedy=_begin_again(work))
        return facts["parts"], facts["dropped"]
    dropped = collections.Counter[str]()
    records = sources.read(location, tfds_data_dir=tfds_data_dir)
    lines = _lines(task, location, records, dropped)
    number = 0
    while block := list(itertools.islice(lines, part)):
        path = work / _PAIRS.format(number)
        if not path.exists():
            mining.write_lines(path, block)
            logging.info("%s: %d lines in %s", task.name, len(block), path.name)
        number += 1
    _write_json(done, {"parts": number, "dropped": dropped})
    return number, dict(dropped)


def _lines(
    task: task_table.Task,
    location: str,
    records: Iterator[dict[str, Any]],
    dropped: collections.Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yields checked lines without duplicates; counts the dropped ones."""
    seen: set[bytes] = set()
    lines = _preprocess(task, location, records)
    for line in progress.track(lines, f"Preparing {task.name}"):
        if isinstance(line, preprocessors.Drop):
            dropped[line.reason] += 1
            continue
        line = {**line, "task": task.name}
        try:
            examples = [
                (record, jsonl.parse(task.name, record))
                for record in jsonl.split(task.name, line)
            ]
        except ValueError as error:
            if not dropped["unfit text"]:
                logging.warning("Left out, as are all lines like it: %s", error)
            dropped["unfit text"] += 1
            continue
        for record, pair in examples:
            content = f"{pair.query}\0{pair.title}\0{pair.positive}".encode()
            digest = hashlib.blake2b(content, digest_size=12).digest()
            if digest in seen:
                dropped["duplicate"] += 1
            elif pair.query == pair.positive:
                dropped["positive equals query"] += 1
            else:
                seen.add(digest)
                yield record


def _preprocess(
    task: task_table.Task, location: str, records: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any] | preprocessors.Drop]:
    """Runs the task's preprocessor; adds the record's number to its errors."""
    if task.preprocessor is None:
        yield from records
        return
    # Number of the record in the preprocessor; 0 while the source reads the next one,
    # because the source's errors name their place.
    number = 0

    def count() -> Iterator[dict[str, Any]]:
        nonlocal number
        for place, record in enumerate(records, start=1):
            number = place
            yield record
            number = 0

    try:
        yield from task.preprocessor(count())
    except (TypeError, KeyError, ValueError) as error:
        if not number:
            raise
        raise ValueError(f"{location}, record {number:,}: {error}") from error


def _mine(
    task: task_table.Task, num_parts: int, work: pathlib.Path, num_negatives: int
) -> tuple[int, int]:
    """Mines missing negatives; returns the lines, and those with too few negatives."""
    examples = short = 0
    corpus = None
    for number in range(num_parts):
        path = work / _PART.format(number)
        is_mined = path.exists()
        source = path if is_mined else work / _PAIRS.format(number)
        read = list(jsonl.read_lines(source))
        pairs = [pair for _, _, pair in read]
        mined: list[list[mining.Mined]] = [[] for _ in pairs]
        if not is_mined:
            if task.mine and mining.count_short(pairs, mined, num_negatives):
                parts = (work / _PAIRS.format(place) for place in range(num_parts))
                every_pair = (pair for part in parts for pair in jsonl.read_pairs(part))
                corpus = corpus or mining.Corpus(every_pair)
                negatives = corpus.mine(pairs, num_negatives)
                title = f"Mining for part {number}"
                mined = list(progress.track(negatives, title, len(pairs)))
            records = [record for _, record, _ in read]
            mining.write_lines(path, map(mining.extend, records, pairs, mined))
        examples += len(pairs)
        short += mining.count_short(pairs, mined, num_negatives)
    return examples, short
