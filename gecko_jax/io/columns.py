r"""Columns: files of rows with named columns, as JSON lines or as TSV.

    scores.jsonl    {"sentence1": "a", "sentence2": "b", "score": 0.5, "source": "x"}
    scores.tsv      score\tsentence1\tsentence2
                    0.5\ta\tb
 -> ("scores.tsv:2", {"sentence1": "a", "sentence2": "b", "score": "0.5"})

The first line of a TSV file may name the columns; then they may stand in any order, and
other columns are passed over. Without it a row has these columns and no others. Case,
"-", "_" and spaces do not count in a name. Empty columns at the end of a row are
dropped. Every column that is read needs a value in every row.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.io import inputs, reading, wording

# Picks the columns out of (place, cells) of a TSV file that does not name them.
Layout = Callable[[str, list[str]], list[str]]


def read(
    path: str | os.PathLike,
    names: Sequence[str],
    *,
    other_names: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, row) of a file, `.gz` or plain.

    Args:
        path: JSON lines if its name ends in `.jsonl` or `.jsonl.gz`, else TSV.
        names: The columns of a row, in the order of a TSV file without a header.
        other_names: Another name of a column -> its name.
        layout: Reads the rows of a TSV file without a header; None takes a cell for
            each name.

    Raises:
        ValueError: A column is missing, named twice or without a value.
    """
    known = {_simple(name): name for name in names}
    known |= {_simple(o): name for o, name in (other_names or {}).items()}
    if is_json_lines(path):
        for place, record in reading.read_records(path):
            keys = _find(place, list(record), known)
            for name in names:
                if record.get(keys.get(name, name)) is None:
                    raise inputs.no_value(place, record, keys.get(name, name))
            yield place, {name: record[keys[name]] for name in names}
        return
    layout = layout or functools.partial(_check_number, names)
    header: dict[str, int] = {}
    width = 0
    for number, (place, cells) in enumerate(_read_cells(path)):
        if number == 0 and (header := _read_header(place, cells, names, known)):
            width = len(cells)
            continue
        if not header:
            row = dict(zip(names, layout(place, cells), strict=True))
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
    """Whether a file's name says that it is JSON lines."""
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
    """Returns the number of each column, or nothing for a row of values."""
    found = _find(place, cells, known)
    if len(found) < 2:  # One name may be a value by chance; two are a header.
        return {}
    for name in names:
        if name not in found:
            raise ValueError(
                f"{place}: the header names no column {name!r} (it has "
                f"{', '.join(cells)}); the columns are {', '.join(names)}"
            )
    return {name: cells.index(cell) for name, cell in found.items()}


def _find(place: str, given: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """Returns column -> the name that is given for it, its own before another."""
    found: dict[str, str] = {}
    for key in given:
        name = known.get(_simple(key))
        if name is None:
            continue
        is_own = _simple(key) == _simple(name)
        was_own = name in found and _simple(found[name]) == _simple(name)
        if name in found and is_own == was_own:
            raise ValueError(
                f"{place}: {found[name]!r} and {key!r} are both the column {name!r}; "
                "keep one"
            )
        if not was_own:
            found[name] = key
    return found


@functools.lru_cache(maxsize=1024)
def _simple(name: str) -> str:
    return re.sub(r"[-_\s]", "", name).casefold()


def _check_number(names: Sequence[str], place: str, cells: list[str]) -> list[str]:
    if len(cells) != len(names):
        raise ValueError(
            f"{place}: {wording.counted(len(cells), 'column')}; it must hold "
            f"{', '.join(names)}, with tabs between"
        )
    return cells
