"""Reading files: lines and JSON records, with file and line in every error."""

import codecs
import gzip
import hashlib
import itertools
import json
import math
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from gecko_jax.io import field_rules, inputs

# Type of a field that `read_object` checks.
Field = type | tuple[Any, ...] | field_rules.Kind

_KINDS = {int: field_rules.integer(1), str: field_rules.TEXT, dict: field_rules.OBJECT}

# Maximum nesting of JSON; configs, the deepest of our files, have three levels.
_MOST_NESTED = 50

# Reads NaN as None. Built once, because json.loads would build a decoder per line.
_NAN_IS_NULL = json.JSONDecoder(
    parse_constant={"Infinity": math.inf, "-Infinity": -math.inf}.get
)

_CONVERT = "convert it, for example with `iconv -f UTF-16 -t UTF-8`"

# First bytes of files that are mistaken for UTF-8 text, their format, and the remedy.
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
    """Refuses a folder, a pipe or a device.

    A pipe would block the reader, and many files are read more than once. A missing
    file passes: opening it raises the error.
    """
    try:
        mode = pathlib.Path(path).stat().st_mode
    except (OSError, ValueError):  # Missing, or a cloud path.
        return
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: a folder, not a file; name the file in it")
    if not stat.S_ISREG(mode):
        kind_of = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise ValueError(
            f"{path}: {kind_of}, not a file; write its content to a file and pass that"
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

    A line ends at "\n" or "\r\n", but not at U+0085 or U+2028, which are ordinary
    characters of texts and ids. A byte order mark is dropped. The place is
    `source:number`.

    `skip` receives the error of each line that is not UTF-8, which is then skipped;
    None raises the error. Raises ValueError also for a truncated or damaged gzip file.
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
                problem = ValueError(
                    f"{source}:{number}: not UTF-8 ({error.reason} at byte "
                    f"{error.start}); write it as UTF-8"
                )
                if skip is None:
                    raise problem from error
                skip(problem)
                continue
            text = text.removesuffix("\n").removesuffix("\r")
            if text.strip():
                yield f"{source}:{number}", text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{source}:{number + 1}: not a whole gzip file ({error}); copy it again"
        ) from error
    except OSError as error:  # The error of a failed read does not name the file.
        raise OSError(error.errno, error.strerror, source) from error


def _check_encoding(source: str, line: bytes) -> None:
    """Refuses a file whose first bytes show that it is not UTF-8 text."""
    for start, format_name, remedy in _OTHER_FORMATS:
        if line.startswith(start):
            raise ValueError(f"{source}: {format_name}, not UTF-8 text; {remedy}")
    first = tuple(byte != 0 for byte in line[:4])
    if first in ((True, False, True, False), (False, True, False, True)):
        raise ValueError(f"{source}: UTF-16, not UTF-8 text; {_CONVERT}")


def read_records(
    path: str | os.PathLike, *, any_characters: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of a JSON-lines file, `.gz` or plain.

    NaN, which pandas writes for a missing value, is read as null.
    `any_characters` allows lone surrogates, for callers that filter bad texts.
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
                f"{place}: JSON that cannot be read ({error}); fix or drop the line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{place}: {inputs.kind(record)}; each line must be one JSON object"
            )
        if "\\u" in line and not any_characters:
            inputs.check_characters(place, record)
        yield place, record


def parse_json(content: str | bytes, decode: Callable[[Any], Any] = json.loads) -> Any:
    """Returns the value of JSON text; `decode` may treat NaN differently.

    Raises ValueError if the text is not JSON, or is nested so deeply that it could
    exhaust Python's stack.
    """
    too_deep = f"brackets are nested more than {_MOST_NESTED} deep"
    try:
        value = decode(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(_MOST_NESTED):
        parts = [part for part in level if isinstance(part, dict | list)]
        if not parts:
            return value
        lists = (part.values() if isinstance(part, dict) else part for part in parts)
        level = list(itertools.chain.from_iterable(lists))
    raise ValueError(too_deep)


def read_object(
    path: str | os.PathLike,
    fields: Mapping[str, Field],
    *,
    remedy: str,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the JSON object of a file that this package wrote.

    A field has a `field_rules.Kind`, a type (`int` means 1 or more), or a tuple of
    allowed values; `defaults` has the fields that older files lack. Raises
    FileNotFoundError, or a ValueError that lists all invalid fields and the remedy.
    """
    path = pathlib.Path(path)
    try:
        values = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None
    if defaults and isinstance(values, dict):
        values = {**defaults, **values}
    kinds: dict[str, field_rules.Kind] = {}
    for name, field in fields.items():
        kind = _KINDS[field] if isinstance(field, type) else field
        kinds[name] = field_rules.one_of(*kind) if isinstance(kind, tuple) else kind
    return field_rules.check(path, values, kinds, remedy)


def find(folder: Any, *names: str) -> Any | None:
    """Returns the first existing file of these names, plain or `.gz`, or None.

    `folder` is a `pathlib.Path`, or a cloud path with the same methods.
    """
    paths = (folder / f"{name}{ending}" for name in names for ending in ("", ".gz"))
    return next((path for path in paths if path.exists()), None)


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of the file's bytes, in hex."""
    check_is_file(path)
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
