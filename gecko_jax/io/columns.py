r"""Files of rows with named columns, as JSON lines or as TSV.

    scores.jsonl    {"sentence1": "a", "sentence2": "b", "score": 0.5, "source": "x"}
    scores.tsv      score\tsentence1\tsentence2
                    0.5\ta\tb
 -> ("scores.tsv:2", {"sentence1": "a", "sentence2": "b", "score": "0.5"})

The first line of a TSV file may name the columns, in any order and with other columns
between them, which are ignored. Otherwise a row has exactly these columns. Names match
regardless of case, "-", "_" and spaces. Empty columns at the end of a row are dropped.
Every column needs a value in every row.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.io import inputs, reading, wording

# (place, cells) of a row in a file without a header -> the cells of the columns.
Layout = Callable[[str, list[str]], list[str]]


def read(
    path: str | os.PathLike,
    names: Sequence[str],
    *,
    other_names: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of a file, `.gz` or plain.

    Raises ValueError if a column is missing, named twice or has no value.

    Args:
        path: JSON lines if its name ends in `.jsonl` or `.jsonl.gz`, else TSV.
        names: Columns of a row, in the order of a TSV file without a header.
        other_names: Alternative name -> column.
        layout: Picks the columns of a row in a TSV file without a header.
    """
    known = {_simple(name): name for name in names}
    known |= {_simple(o): name for o, name in (other_names or {}).items()}
    if is_json_lines(path):
        for place, record in reading.read_records(path):
            keys = _match_names(place, list(record), known)
            for name in names:
                if record.get(keys.get(name, name)) is None:
                    raise inputs.no_value(place, record, keys.get(name, name))
            yield place, {name: record[keys[name]] for name in names}
        return
    header: dict[str, int] = {}
    width = 0
    for number, (place, cells) in enumerate(_read_cells(path)):
        if number == 0 and (header := _read_header(place, cells, names, known)):
            width = len(cells)
            continue
        if not header:
            cells = layout(place, cells) if layout else cells
            if len(cells) != len(names):
                raise ValueError(
                    f"{place}: {wording.counted(len(cells), 'column')}; it must hold "
                    f"{', '.join(names)}, separated by tabs"
                )
            row = dict(zip(names, cells, strict=True))
        elif len(cells) > width:
            raise ValueError(
                f"{place}: {wording.counted(len(cells), 'column')}, and the header "
                f"names {width}; name or drop the others"
            )
        else:
            cells += [""] * (width - len(cells))
            row = {name: cells[header[name]] for name in names}
        for name, cell in row.items():
            if not cell.strip():
                raise ValueError(
                    f"{place}: column {name!r} is empty; give it a value or drop the "
                    "line"
                )
        yield place, row


def has(path: str | os.PathLike, names: Sequence[str]) -> bool:
    """Whether the first line of a file names all these columns."""
    rows = reading.read_records(path) if is_json_lines(path) else _read_cells(path)
    _, first = next(iter(rows), ("", ()))
    return {_simple(name) for name in names} <= {_simple(name) for name in first}


def is_json_lines(path: str | os.PathLike) -> bool:
    """Whether the name of a file ends in `.jsonl` or `.jsonl.gz`."""
    return pathlib.PurePath(path).name.removesuffix(".gz").endswith(".jsonl")


def _read_cells(path: str | os.PathLike) -> Iterator[tuple[str, list[str]]]:
    for place, line in reading.read_lines(path):
        cells = line.split("\t")
        while not cells[-1].strip():  # Spreadsheets write empty columns at the end.
            cells.pop()
        yield place, cells


def _read_header(
    place: str, cells: list[str], names: Sequence[str], known: Mapping[str, str]
) -> dict[str, int]:
    """Returns the number of each column, or {} if the cells are values."""
    matches = _match_names(place, cells, known)
    if len(matches) < 2:  # A single name may be a value.
        return {}
    for name in names:
        if name not in matches:
            raise ValueError(
                f"{place}: the header names no column {name!r} (it has "
                f"{', '.join(cells)}); the columns are {', '.join(names)}"
            )
    return {name: cells.index(cell) for name, cell in matches.items()}


def _match_names(
    place: str, keys: Sequence[str], known: Mapping[str, str]
) -> dict[str, str]:
    """Returns column -> its name in the file; alternative names are second choice."""
    matches: dict[str, str] = {}
    for key in keys:
        name = known.get(_simple(key))
        if name is None:
            continue
        is_own = _simple(key) == _simple(name)
        was_own = name in matches and _simple(matches[name]) == _simple(name)
        if name in matches and is_own == was_own:
            raise ValueError(
                f"{place}: {matches[name]!r} and {key!r} are both the column {name!r}; "
                "keep one"
            )
        if not was_own:
            matches[name] = key
    return matches


@functools.lru_cache(maxsize=1024)
def _simple(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).casefold()
