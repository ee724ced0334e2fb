"""Preparing a set of the table: its source becomes canonical triples on disk.

    <prepared_dir>/<name>/part-00000.jsonl.gz ...   lines as `jsonl` reads them
    <prepared_dir>/<name>/prepared.json             counts, licence, source
    <prepared_dir>/.<name>.work/                    while it is not finished

The source is read into parts (`pairs-00000.jsonl.gz` ...), then each part gets its hard
negatives, mined among the passages of all parts. A part is written under a temporary
name and renamed, and the folder gets its name when it is whole: an interrupted run goes
on with the parts it has, and builds the index of passages again. What a part holds
depends on the source and the table alone. Memory is that of `mining.Corpus` where
negatives are mined, and some 100 bytes a line where they are not.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging

from gecko_jax.data import jsonl, mining, preprocessors, sources, task_table
from gecko_jax.io import field_rules, progress, reading, writing

# Lines of a part.
PART = 50_000

# Names of a part: as read, and with its negatives.
_PAIRS, _PART = "pairs-{:05}.jsonl.gz", "part-{:05}.jsonl.gz"

# Raised whenever what a part holds changes.
_VERSION = 2

_DROPPED = field_rules.map_of(field_rules.COUNT)
_FIELDS = {
    "facts": dict,
    "examples": int,
    "dropped": _DROPPED,
    "without_negative": field_rules.COUNT,
}
_COUNTS = field_rules.list_of(field_rules.COUNT)
_BEGIN_AGAIN = "delete the folder {} and run again"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was prepared.

    Attributes:
        folder: Where the set lies.
        examples: Lines written.
        dropped: Reason -> number of records, or parts of one, left out.
        without_negative: Lines that have fewer than asked for, with those mined.
    """

    folder: pathlib.Path
    examples: int
    dropped: dict[str, int]
    without_negative: int


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

    Args:
        task: The row.
        prepared_dir: Folder of all prepared sets.
        source: Where the source lies, when the table gives only its kind.
        accepted_licences: Names of restricted sets whose licence the user accepts.
        tfds_data_dir: Where TFDS keeps its sets.
        part: Lines of a part.
        negatives: Hard negatives a line should have, where the row lets them be mined.

    Raises:
        ValueError: The licence is not accepted, the source is missing or has another
            schema, or gives no example.
    """
    if task.restricted and task.name not in accepted_licences:
        raise ValueError(
            f"{task.name}: its licence is restricted ({task.restricted}); read it, and "
            f"if your use is covered, add --accept-licence={task.name}"
        )
    location = _location(task, source)
    target = pathlib.Path(prepared_dir).expanduser() / task.name
    note = target / "prepared.json"
    facts = _facts(task, location, part)
    if negatives != 1:
        facts["negatives"] = negatives
    if note.exists():
        found = reading.read_object(
            note,
            _FIELDS,
            remedy="delete the folder and prepare again",
            defaults={"without_negative": 0},
        )
        if found["facts"] != facts:
            raise ValueError(
                f"{target}: was prepared from {found['facts'].get('source')} by other "
                "settings; delete it, or prepare into another folder"
            )
        return Summary(
            target, found["examples"], found["dropped"], found["without_negative"]
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
    with writing.write_file(work / "prepared.json") as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "facts": facts,
                    "licence": task.licence,
                    "examples": examples,
                    "dropped": dropped,
                    "without_negative": short,
                },
                indent=2,
            )
        )
    for leftover in work.glob("pairs-*"):
        leftover.unlink()
    (work / "facts.json").unlink()
    work.rename(target)
    return Summary(target, examples, dropped, short)


def _location(task: task_table.Task, source: str) -> str:
    if source or ":" in task.source:
        return source or task.source
    if not task.source:
        raise ValueError(f"{task.name}: lies ready as JSONL; nothing is to be prepared")
    made = (
        "`gecko fret run` makes them"
        if task.source == "canonical"
        else ("docs/data.md says where they come from")
    )
    raise ValueError(
        f"{task.name}: give its files, as {task.source}, with --source=PATH; {made}"
    )


def _facts(task: task_table.Task, location: str, part: int) -> dict[str, Any]:
    return {"version": _VERSION, "task": task.name, "source": location, "part": part}


def _claim(work: pathlib.Path, facts: dict[str, Any]) -> None:
    """Begins a working folder, or goes on with one of the same facts."""
    note = work / "facts.json"
    # Where nothing was read yet, as of a source that has been mended, all is open.
    if any(work.glob("pairs-*")):
        if reading.read_object(note, {}, remedy=_BEGIN_AGAIN.format(work)) != facts:
            raise ValueError(
                f"{work}: was begun from another source, or by other settings, or the "
                "source has changed since; delete it and run again"
            )
        return
    with writing.write_file(note) as temporary:
        temporary.write_text(json.dumps(facts))


def _write_pairs(
    task: task_table.Task,
    location: str,
    work: pathlib.Path,
    tfds_data_dir: str | None,
    part: int,
) -> tuple[int, dict[str, int]]:
    """Writes the lines in parts, those that are not there already.

    Returns:
        The number of parts, and what was left out.
    """
    done = work / "pairs-done.json"
    if done.exists():
        facts = reading.read_object(
            done,
            {"parts": field_rules.COUNT, "dropped": _DROPPED},
            remedy=_BEGIN_AGAIN.format(work),
        )
        return facts["parts"], facts["dropped"]
    dropped: collections.Counter[str] = collections.Counter()
    records = sources.read(location, tfds_data_dir=tfds_data_dir)
    lines = _lines(task, location, records, dropped)
    number = 0
    while block := list(itertools.islice(lines, part)):
        path = work / _PAIRS.format(number)
        if not path.exists():
            mining.write_lines(path, block)
            logging.info("%s: %d lines in %s", task.name, len(block), path.name)
        number += 1
    with writing.write_file(done) as temporary:
        temporary.write_text(json.dumps({"parts": number, "dropped": dropped}))
    return number, dict(dropped)


def _lines(
    task: task_table.Task,
    location: str,
    records: Iterator[dict[str, Any]],
    dropped: collections.Counter[str],
) -> Iterator[dict[str, Any]]:
    """Yields checked lines without duplicates; counts what is left out."""
    assert task.preprocessor is not None or task.source == "canonical"
    found = _preprocess(task, location, records)
    seen: set[bytes] = set()
    for line in progress.track(found, f"Preparing {task.name}"):
        if isinstance(line, preprocessors.Drop):
            dropped[line.reason] += 1
            continue
        line = {**line, "task": task.name}
        try:
            pair = jsonl.parse(task.name, line)
        except ValueError as error:
            if not dropped["unfit text"]:
                logging.warning("Left out, and others like it: %s", error)
            dropped["unfit text"] += 1
            continue
        content = f"{pair.query}\0{pair.title}\0{pair.positive}".encode()
        digest = hashlib.blake2b(content, digest_size=12).digest()
        if digest in seen:
            dropped["duplicate"] += 1
        elif pair.query == pair.positive:
            dropped["positive equals query"] += 1
        else:
            seen.add(digest)
            yield line


def _preprocess(
    task: task_table.Task, location: str, records: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any] | preprocessors.Drop]:
    """Runs the task's preprocessor; its errors name the record they are about."""
    if task.preprocessor is None:
        yield from records
        return
    number = 0

    def count() -> Iterator[dict[str, Any]]:
        nonlocal number
        for place, record in enumerate(records, start=1):
            number = place
            yield record
            number = 0  # What is wrong with the next or after the last names itself.

    try:
        yield from task.preprocessor(count())
    except (TypeError, KeyError, ValueError) as error:
        if not number:
            raise
        raise ValueError(f"{location}, record {number:,}: {error}") from error


def _mine(
    task: task_table.Task, num_parts: int, work: pathlib.Path, wanted: int
) -> tuple[int, int]:
    """Mines the negatives that lines lack; returns all lines and those left short."""
    counts = []
    corpus = None
    for number in range(num_parts):
        note = work / f"pairs-{number:05}-counts.json"
        if not note.exists():
            read = list(jsonl.read_lines(work / _PAIRS.format(number)))
            records = [record for _, record, _ in read]
            pairs = [pair for _, _, pair in read]
            mined: Sequence[list[mining.Mined]] = [[] for _ in pairs]
            if task.mine and any(len(pair.negatives) < wanted for pair in pairs):
                corpus = corpus or mining.Corpus(_all_pairs(num_parts, work))
                mined = list(
                    progress.track(
                        corpus.mine(pairs, wanted),
                        f"Mining for part {number}",
                        len(pairs),
                    )
                )
            mining.write_lines(
                work / _PART.format(number), map(mining.extend, records, pairs, mined)
            )
            bare = sum(
                len(pair.negatives) + len(found) < wanted
                for pair, found in zip(pairs, mined, strict=True)
            )
            with writing.write_file(note) as temporary:
                temporary.write_text(json.dumps([len(pairs), bare]))
        counts.append(_read_counts(note))
    examples, short = zip(*counts, strict=True)
    return sum(examples), sum(short)


def _read_counts(note: pathlib.Path) -> list[int]:
    counts: Any = None
    with contextlib.suppress(ValueError):
        counts = reading.parse_json(note.read_text("utf-8"))
    if not _COUNTS.holds(counts) or len(counts) != 2:
        raise ValueError(
            f"{note}: not two numbers of lines; {_BEGIN_AGAIN.format(note.parent)}"
        )
    return counts


def _all_pairs(num_parts: int, work: pathlib.Path) -> Iterator[jsonl.Pair]:
    for number in range(num_parts):
        yield from jsonl.read_pairs(work / _PAIRS.format(number))
