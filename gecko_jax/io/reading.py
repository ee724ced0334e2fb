"""Reading files: lines and JSON records, with file and line in every error."""

import codecs
import gzip
import hashlib
import json
import math
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gecko_jax.io import field_rules, inputs

# What JSON calls a value.
kind = inputs.kind


# What a field of an object that this package wrote must hold.
Field = type | tuple[Any, ...] | field_rules.Kind


_KINDS = {
    int: field_rules.integer(1),
    str: field_rules.TEXT,
    dict: field_rules.OBJECT,
}


# Of JSON: the deepest of ours, a config, has three levels.
_MOST_NESTED = 50


# Reads NaN as None; built once, since json.loads would build one for each line.
_NAN_IS_NULL = json.JSONDecoder(
    parse_constant={"Infinity": math.inf, "-Infinity": -math.inf}.get
)


_CONVERT = "convert it, for example with `iconv -f UTF-16 -t UTF-8`"


# First bytes of files that are given for UTF-8 text by mistake: what they are, and
# what to do.
_OTHER_FORMATS = (
    (codecs.BOM_UTF32_LE, "UTF-32", _CONVERT.replace("16", "32")),
    (codecs.BOM_UTF32_BE, "UTF-32", _CONVERT.replace("16", "32")),
    (codecs.BOM_UTF16_LE, "UTF-16", _CONVERT),
    (codecs.BOM_UTF16_BE, "UTF-16", _CONVERT),
    (b"\x1f\x8b", "a gzip file", "give it a name that ends in .gz"),
    (b"PK\3\4", "a zip archive (.npz, .xlsx and others are)", "give the text itself"),
    (b"\x93NUMPY", "a NumPy array (.npy)", "give the text itself"),
    (b"PAR1\x15", "a Parquet file", "write its rows as JSON lines"),
)


def check_is_file(path: str | os.PathLike) -> None:
    """Refuses a folder, a pipe or a device where a file is expected.

    A pipe would block the reader, and many files are read more than once. What is not
    there passes: opening it gives the error.
    """
    try:
        mode = pathlib.Path(path).stat().st_mode
    except (OSError, ValueError):  # Missing, or in a cloud.
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: a folder, not a file; name the file in it")
    if not stat.S_ISREG(mode):
        kind_of = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ValueError(
            f"{path}: {kind_of}, not a file; write its content to a file and give "
            "that one"
        )


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Yields (place, line) of a UTF-8 text file, `.gz` or plain; see `decode_lines`."""
    opened: Any = path if hasattr(path, "open") else pathlib.Path(path)
    check_is_file(opened)
    try:
        with opened.open("rb") as raw:
            is_packed = opened.name.endswith(".gz")
            lines = gzip.GzipFile(fileobj=raw) if is_packed else raw
            yield from decode_lines(str(path), lines)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None


def decode_lines(
    source: str,
    lines: Iterable[bytes],
    skip: Callable[[ValueError], None] | None = None,
) -> Iterator[tuple[str, str]]:
    r"""Yields (place, line) of UTF-8 text, without blank lines and line breaks.

    A line ends at "\n" or "\r\n", and never at U+0085 or U+2028, which are
    characters of a text or an id like any other. A byte order mark is dropped. The
    place is `source:number`, for errors.

    Args:
        source: Path of the file, or another name of it.
        lines: The lines as bytes.
        skip: Receives the error of a line that is not UTF-8, which is then passed
            over; None raises it.

    Raises:
        ValueError: The text is not UTF-8, or not a whole gzip file.
    """
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                _check_encoding(source, line)
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                fault = ValueError(
                    f"{source}:{number}: not UTF-8 ({error.reason} at byte "
                    f"{error.start}); write it as UTF-8"
                )
                if skip is None:
                    raise fault from error
                skip(fault)
                continue
            text = text.removesuffix("\n").removesuffix("\r")
            if text.strip():
                yield f"{source}:{number}", text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{source}:{number + 1}: not a whole gzip file ({error}); copy it again"
        ) from error
    except OSError as error:  # A failing read does not name its file.
        raise OSError(error.errno, error.strerror, source) from error


def _check_encoding(source: str, line: bytes) -> None:
    """Names a file that its first bytes show to be something else than UTF-8 text."""
    for start, what, remedy in _OTHER_FORMATS:
        if line.startswith(start):
            raise ValueError(f"{source}: {what}, not UTF-8 text; {remedy}")
    first = tuple(byte != 0 for byte in line[:4])
    if first in ((True, False, True, False), (False, True, False, True)):
        raise ValueError(f"{source}: UTF-16, not UTF-8 text; {_CONVERT}")


def read_records(
    path: str | os.PathLike, *, any_characters: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of a JSON-lines file, `.gz` or plain.

    NaN, by which pandas writes a missing value, is read as null.

    Args:
        path: The file.
        any_characters: Also halves of surrogate pairs, which no file can hold: for
            those who sort out bad texts themselves.
    """
    for place, line in read_lines(path):
        try:
            record = parse_json(line, _NAN_IS_NULL.decode)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); each line "
                "must be one JSON object, unless the file's name ends in .txt"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"{place}: JSON that cannot be read ({error}); mend or drop the line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{place}: {kind(record)}; each line must be one JSON object"
            )
        if "\\u" in line and not any_characters:
            inputs.check_characters(place, record)
        yield place, record


def parse_json(content: str | bytes, decode: Callable[[Any], Any] = json.loads) -> Any:
    """Returns what JSON text holds.

    Args:
        content: The text.
        decode: Reads it; `json.loads`, or one that treats NaN otherwise.

    Raises:
        ValueError: It is not JSON, or is nested deeper than anything that is meant:
            what goes through it would run out of Python's stack.
    """
    too_deep = f"brackets are nested more than {_MOST_NESTED} deep"
    try:
        found = decode(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [found]
    for _ in range(_MOST_NESTED):
        inside = [part for part in level if isinstance(part, dict | list)]
        if not inside:
            return found
        level = [
            part
            for outer in inside
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
    raise ValueError(too_deep)


def read_object(
    path: str | os.PathLike,
    fields: Mapping[str, Field],
    *,
    remedy: str,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the JSON object of a file that this package wrote.

    Args:
        path: The file.
        fields: What the object must have: a kind of `fields`, a type, or one of some
            values. An `int` is 1 or more.
        remedy: What to do about a file that is something else.
        defaults: Fields that older files lack.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It holds something else; names every fault, and the remedy.
    """
    path = pathlib.Path(path)
    try:
        found = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {kind(found)}, not an object; {remedy}")
    found = {**(defaults or {}), **found}
    kinds = {name: _kind_of(wanted) for name, wanted in fields.items()}
    faults = field_rules.faults(found, kinds)
    if faults:
        raise ValueError(f"{path}: damaged or edited ({', '.join(faults)}); {remedy}")
    return found


def _kind_of(wanted: Field) -> field_rules.Kind:
    if isinstance(wanted, tuple):
        return field_rules.one_of(*wanted)
    return wanted if isinstance(wanted, field_rules.Kind) else _KINDS[wanted]


def find(folder: Any, *names: str) -> Any | None:
    """Returns the first file of these names in a folder, plain or `.gz`, or None.

    Args:
        folder: A `pathlib.Path`, or a path of a cloud that has the same methods.
        names: Paths below it.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    return None


def sha256(path: str | os.PathLike) -> str:
    """Returns the checksum of the file's bytes, in hex."""
    check_is_file(path)
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
