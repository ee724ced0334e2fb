"""Passages: reads and cleans them, and drops duplicates and texts of evaluation sets.

    {"_id": "d1", "title": "Lizards", "text": "Geckos ...", "licence": "CC0-1.0"}
 -> {"id": 0, "source": "corpus.jsonl", "source_id": "d1", "title": "Lizards",
     "text": "Geckos ...", "licence": "CC0-1.0"}

A passage that breaks a rule is counted under its reason; a file that cannot be read is
an error. `gecko_jax.text.overlap` defines what counts as a text of an evaluation set.
"""

import dataclasses
import itertools
import os
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.fret import minhash
from gecko_jax.io import inputs, progress, wording
from gecko_jax.text import overlap, text_files, text_formats, word_rule

_KEPT_FIELDS = ("licence", "license", "src", "url")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Limits of a passage: keys `passages` of `configs/fret.py`."""

    min_words: int
    max_characters: int
    near_duplicate: float
    limit: int


def read(
    paths: Sequence[str | os.PathLike],
    rules: Rules,
    known: overlap.Contamination,
    of_pairs: Iterable[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Returns the kept passages, numbered, and the counts of the others by reason.

    Files are JSON lines or `.txt`, see `text_files.read_texts_or_records`. In a file of
    pairs, the field `positive` or `passage` is the text. Passages `of_pairs` that are
    to be relabelled come first. They may be short, resemble each other, and do not
    count towards `rules.limit`. Raises ValueError if a file is malformed, or no passage
    is left.
    """
    dropped: Counter[str] = Counter()
    kept: list[dict[str, Any]] = []
    seen: set[tuple[int, int]] = set()
    near = minhash.NearDuplicates(rules.near_duplicate or 1.0)
    from_files = itertools.chain.from_iterable(map(read_file, paths))
    records = itertools.chain(
        zip(of_pairs, itertools.repeat(dataclasses.replace(rules, min_words=0))),
        zip(from_files, itertools.repeat(rules)),
    )
    num_limited = 0
    for record, own in progress.track(records, "Reading passages"):
        is_limited = own is rules
        if is_limited and rules.limit and num_limited == rules.limit:
            break
        if (reason := clean(record, own, known)) is None:
            # Titles are ignored: an equal text would be a doubtful negative.
            content = text_formats.content_id(record["text"])
            if content in seen:
                reason = "duplicate"
            elif rules.near_duplicate:
                resembles = near.add(record["text"]) is not None
                reason = "near_duplicate" if resembles and is_limited else None
            seen.add(content)
        if reason is None:
            kept.append({"id": len(kept), **record})
            num_limited += is_limited
        else:
            dropped[reason] += 1
    if not kept:
        raise none_left(paths, dropped)
    return kept, dict(sorted(dropped.items()))


def none_left(
    paths: Sequence[str | os.PathLike], dropped: Mapping[str, int]
) -> ValueError:
    """Returns the error for files of which no passage is kept."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    names = ", ".join(map(str, paths)) or "passages.files=()"
    return ValueError(
        f"{names}: no passage is left ({reasons or 'there was none'}); give files "
        "with passages, or relax the rules under passages"
    )


def read_file(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yields the passages of a file, with their source and licence."""
    name = wording.file_name(pathlib.Path(path).name)
    ids = inputs.UniqueIds()
    for place, record in text_files.read_texts_or_records(path, any_characters=True):
        identity = inputs.id_field(place, record, "_id", "id", default="")
        if identity:
            ids.add(place, identity)
        known = {"source": name, "source_id": identity or place.rpartition(":")[2]}
        for field in _KEPT_FIELDS:
            if isinstance(record.get(field), str):
                known[field] = record[field]
        inputs.check_characters(place, known)
        title = record.get("title")
        values = (record.get(field) for field in ("text", "positive", "passage"))
        body = next((value for value in values if value is not None), None)
        yield {**known, "title": "" if title is None else title, "text": body}


def clean(
    record: dict[str, Any], rules: Rules, known: overlap.Contamination
) -> str | None:
    """Cleans title and text in place; returns why the passage is dropped, or None.

    Duplicates are left to the caller.
    """
    title, body = record["title"], record["text"]
    if not isinstance(body, str):
        return "no_text"
    if not isinstance(title, str):
        return "bad_title"
    if not body.strip():
        return "empty"
    if len(title) + len(body) > rules.max_characters:
        return "too_long"
    if _is_binary(title + body):
        return "binary"
    record["text"] = text_formats.clean(body)
    record["title"] = text_formats.clean(title) if title.strip() else ""
    if word_rule.count(word_rule.words(record["text"])) < rules.min_words:
        return "too_short"
    if known.holds(f"{record['title']} {record['text']}"):
        return "evaluation_set"
    return None


def _is_binary(content: str) -> bool:
    """Whether over 2% of the characters do not belong in text."""
    kinds = Counter(unicodedata.category(c) for c in content if c not in "\t\n\r\f")
    if "\x00" in content or kinds["Cs"]:  # A lone surrogate cannot be written.
        return True
    strange = kinds["Cc"] + kinds["Co"] + kinds["Cn"]
    return 50 * (strange + content.count("\ufffd")) > len(content)
