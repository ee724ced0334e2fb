"""Files: read line by line with their place in every error, written whole or not.

Nothing here leaves half a file behind: what is written lies under a temporary name
beside its place until it is complete, and is then renamed.
"""

import codecs
import contextlib
import errno
import fnmatch
import glob
import gzip
import hashlib
import json
import math
import os
import pathlib
import secrets
import shutil
import socket
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gecko_jax import fields as fields_lib
from gecko_jax import inputs, wording
from gecko_jax import text as text_format

# What JSON calls a value.
kind = inputs.kind

# What a field of an object that this package wrote must hold.
Field = type | tuple[Any, ...] | fields_lib.Kind
_KINDS = {
    int: fields_lib.integer(1),
    str: fields_lib.TEXT,
    dict: fields_lib.OBJECT,
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
    faults = fields_lib.faults(found, kinds)
    if faults:
        raise ValueError(f"{path}: damaged or edited ({', '.join(faults)}); {remedy}")
    return found


def _kind_of(wanted: Field) -> fields_lib.Kind:
    if isinstance(wanted, tuple):
        return fields_lib.one_of(*wanted)
    return wanted if isinstance(wanted, fields_lib.Kind) else _KINDS[wanted]


class TextRecord(NamedTuple):
    """One text of a user's file: a passage, or a query."""

    place: str
    id: str
    title: str
    text: str
    task: str


def read_texts(
    path: str | os.PathLike, *, allow_empty: bool = False
) -> Iterator[TextRecord]:
    """Yields the texts of a JSON-lines file in the BEIR layout, or of a `.txt` file.

    JSON lines have `_id` (or `id`), `text` and, if they like, `title` and `task`; a
    passage with nothing but a title is its title. Of a `.txt` file each line is a
    text, and its id the line's number.

    Args:
        path: The file; `.gz` is unpacked.
        allow_empty: Yields texts without a visible character too.

    Raises:
        ValueError: A line breaks a rule, or an id comes twice; names file and line.
    """
    ids = inputs.UniqueIds()
    for place, record in read_texts_or_records(path):
        identity = inputs.id_field(place, record, "_id", "id")
        title = inputs.string_field(place, record, "title", default="").strip()
        text = inputs.string_field(place, record, "text", default="")
        if "text" not in record and not title:
            raise inputs.no_value(place, record, "text")
        text = text if text.strip() else title
        ids.add(place, identity)
        try:
            if text.strip() or not allow_empty:
                text_format.clean(text)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        task = inputs.string_field(place, record, "task", default="")
        yield TextRecord(place, identity, title, text, task)


def read_texts_or_records(
    path: str | os.PathLike, *, any_characters: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of JSON lines, or of a `.txt` file as `id` and `text`.

    The id of a line of text is its number.
    """
    name = pathlib.PurePath(path).name
    if not name.removesuffix(".gz").endswith(".txt"):
        yield from read_records(path, any_characters=any_characters)
        return
    for place, line in read_lines(path):
        yield place, {"id": place.rpartition(":")[2], "text": line}


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


@contextlib.contextmanager
def write_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary path; on a clean exit it becomes `path`, else it goes.

    Raises:
        ValueError: `path` is a folder or a device.
        OSError: The disk is full, or the place cannot be written; the message names
            `path` and the remedy.
    """
    path = _follow(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: there, but not a file; choose another name")
    temporary = _temporary(path, "tmp")
    try:
        with _explain_failure(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def member(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file of a folder, which may be missing.

    Raises:
        ValueError: It is a folder or a device, or lies outside of the folder.
    """
    path = inside(folder, name)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; put the file itself there")
    return path


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of what a folder holds, a file or a folder, or may hold.

    Raises:
        ValueError: It lies outside of the folder. A link may lead from a snapshot of
            the hub's cache into that cache.
    """
    if wording.printable(name) != name:
        raise ValueError(
            f"{folder}: it names {name!r}, which holds characters that no name of a "
            "file has; copy the folder again"
        )
    path = folder / name
    place, root = path.resolve(), folder.resolve()
    for parent in root.parents:
        if parent.name.startswith("models--") and (parent / "snapshots").is_dir():
            root = parent
    if not place.is_relative_to(root):
        raise ValueError(
            f"{path}: leads out of its folder, to {place}; put the file itself there"
        )
    return path


def check_replaceable(
    path: str | os.PathLike, markers: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Refuses a folder with anything in it that is not about to be written anew.

    Args:
        path: Where a folder is to be written.
        markers: Patterns; every folder of the same kind has a file for each.
        others: Patterns of the files it may hold besides.

    Raises:
        ValueError: `path` is a file, or a folder with files in it, but one for each
            marker is missing or there are more.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: there, but not a folder; choose another name")
    names = [
        child.relative_to(path).as_posix()
        for child in path.rglob("*")
        if child.is_symlink() or not child.is_dir()
    ]
    missing = [name for name in markers if not fnmatch.filter(names, name)]
    if names and missing:
        raise ValueError(
            f"{path}: not empty, and not an earlier export of this kind (no "
            f"{missing[0].rstrip('*')}); choose another folder"
        )
    known = (*markers, *others)
    added = [n for n in names if not any(fnmatch.fnmatch(n, k) for k in known)]
    if added:
        more = f" and {len(added) - 1:,} more" if added[1:] else ""
        raise ValueError(
            f"{path}: an earlier export that also holds {min(added)}{more}, which "
            "would be lost; move it, or choose another folder"
        )


@contextlib.contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary folder; on a clean exit it replaces `path`, else it goes.

    Raises:
        ValueError: `path` is there and is no folder.
        OSError: The disk is full, or the place cannot be written; the message names
            `path` and the remedy.
    """
    path = _follow(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: there, but not a folder; choose another name")
    temporary, old = _temporary(path, "tmp"), _temporary(path, "old")
    try:
        with _explain_failure(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            temporary.mkdir()
            yield temporary
            _replace_folder(path, temporary, old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _replace_folder(path: pathlib.Path, new: pathlib.Path, old: pathlib.Path) -> None:
    """Renames `new` to `path`, and what is there to `old`; the last writer wins."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)  # A folder cannot be renamed over a full one.
        try:
            new.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)  # Another writer came between.


def _follow(path: str | os.PathLike) -> pathlib.Path:
    """Returns where a link leads, so that writing leaves the link a link."""
    path = pathlib.Path(path)
    return path.resolve() if path.is_symlink() else path


def _temporary(path: pathlib.Path, ending: str) -> pathlib.Path:
    # Threads of a process may write the same path.
    writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{writer}.{ending}")


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes what killed processes of this machine left half-written for `path`."""
    begin = f".{path.name}.{socket.gethostname()}-"
    for ending in (".tmp", ".old"):
        for left in path.parent.glob(f"{glob.escape(begin)}*{ending}"):
            number = left.name.removeprefix(begin).partition("-")[0]
            if number.isdecimal() and not _is_alive(int(number)):
                if ending == ".old" and not path.exists():
                    left.rename(path)  # It died before the new one was in place.
                elif left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # Someone else's.
        return True
    return True


@contextlib.contextmanager
def _explain_failure(path: pathlib.Path, temporary: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no disk space left for {path}; nothing half-written was kept: free "
                "some space, or choose another place, and run the same command again",
            ) from error
        where = pathlib.Path(error.filename) if error.filename else None
        if where is None or not (
            where in path.parents or temporary in (where, *where.parents)
        ):
            raise  # About another file.
        why = "not a folder" if where.is_file() else (error.strerror or "").lower()
        raise OSError(
            error.errno,
            f"{path}: cannot be written ({where}: {why}); choose another place",
        ) from error
