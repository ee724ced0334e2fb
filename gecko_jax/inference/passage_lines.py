"""The passages of an index: a JSON-lines file whose titles and texts stay on disk.

    {"_id": "p1", "title": "Geckos", "text": "Geckos climb walls."}

All lines have the same fields. Reading the file returns the ids, and a sequence for
each other field that reads a line when it is accessed.
"""

import json
import mmap
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gecko_jax.io import field_rules, reading

# First bytes of each line that `write` writes; the id follows.
_START = b'{"_id": "'
_FIELDS = {
    "_id": field_rules.TEXT,
    "title": field_rules.optional(field_rules.TEXT),
    "text": field_rules.optional(field_rules.TEXT),
}


def write(
    path: pathlib.Path,
    ids: Sequence[str],
    titles: Sequence[str] | None,
    texts: Sequence[str] | None,
) -> None:
    """Writes one line per passage."""
    with path.open("w", encoding="utf-8") as file:
        for row, identity in enumerate(ids):
            record = {"_id": identity}
            if titles is not None:
                record["title"] = titles[row]
            if texts is not None:
                record["text"] = texts[row]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read(
    path: pathlib.Path, *, is_verified: bool, remedy: str
) -> tuple[list[str], dict[str, "Column"]]:
    """Returns the ids, and the columns "title" and "text" if the lines have them.

    If the checksum of the file has been verified, its lines are as `write` wrote them,
    and only the first is parsed here. Otherwise, raises ValueError if a line is not a
    passage, or has other fields than the first line.
    """
    ids: list[str] = []
    starts = [0]
    names: list[str] = []
    with path.open("rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, start=1):
            starts.append(starts[-1] + len(line))
            encoded = line[len(_START) : line.find(b'"', len(_START))]
            if names and is_verified and b"\\" not in encoded:
                ids.append(encoded.decode())
                continue
            record = _parse(path, number, line, remedy)
            ids.append(record["_id"])
            names = names or list(record)
            if list(record) != names:
                raise ValueError(
                    f"{path}:{number}: damaged (its fields are {list(record)}; the "
                    f"lines before have {names}); {remedy}"
                )
        if not ids:
            return [], {}
        # The map keeps the file open: another index written over it changes nothing.
        lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.array(starts)

    def parse(row: int) -> dict[str, str]:
        start, end = offsets[row : row + 2].tolist()
        return _parse(path, row + 1, lines[start:end], remedy)

    columns = {
        name: Column(len(ids), lambda row, name=name: parse(row)[name])
        for name in names[1:]
    }
    return ids, columns


class Column(Sequence[str]):
    """One field of all passages; reads a line of the file on each access."""

    def __init__(self, count: int, read_row: Callable[[int], str]):
        self._count = count
        self._read_row = read_row

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[position] for position in range(*row.indices(len(self)))]
        return self._read_row(range(len(self))[row])


def _parse(path: pathlib.Path, number: int, line: bytes, remedy: str) -> dict[str, str]:
    """Returns the fields of a passage that are not null, the id first."""
    place = f"{path}:{number}"
    try:
        record = reading.parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place}: damaged ({error}); {remedy}") from error
    field_rules.check(place, record, _FIELDS, remedy)
    return {name: record[name] for name in _FIELDS if record.get(name) is not None}
