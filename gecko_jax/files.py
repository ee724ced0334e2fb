"""Files: read line by line with their place in every error, written whole or not.

Nothing here leaves half a file behind: what is written lies under a temporary name
beside its place until it is complete, and is then renamed.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from gecko_jax import text as text_format


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """Yields (place, line) of a UTF-8 text file, `.gz` or plain, without blank lines.

    The place is `path:number`, for errors.
    """
    path = pathlib.Path(path)
    number = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", text.rstrip("\r\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start}); "
            "convert the file to UTF-8"
        ) from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}:{number + 1}: not a whole gzip file ({error}); copy it again"
        ) from error


def read_records(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) of a JSON-lines file, `.gz` or plain."""
    for place, line in read_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}: not JSON ({error.msg} at column {error.colno}); each line "
                "must be one JSON object"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f"{place}: a {type(record).__name__}; each line must be one JSON object"
            )
        yield place, record


def string_field(
    place: str, record: dict[str, Any], *names: str, default: str | None = None
) -> str:
    """Returns the first of the named fields that the record has, as a string.

    A number is turned into its digits, so that integer ids work. Without a default
    the field must be there and hold more than whitespace.
    """
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(
                f"{place}: field {name!r} is a {type(value).__name__}; it must be text"
            )
        if default is None and not str(value).strip():
            raise ValueError(
                f"{place}: field {name!r} is empty; give it text or drop the line"
            )
        return str(value)
    if default is None:
        has = ", ".join(sorted(record)) or "no fields"
        wanted = " or ".join(repr(name) for name in names)
        raise ValueError(f"{place}: no field {wanted} (it has {has})")
    return default


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
    path = pathlib.Path(path)
    seen: dict[str, str] = {}
    plain = path.name.removesuffix(".gz").endswith(".txt")
    for place, record in read_lines(path) if plain else read_records(path):
        if isinstance(record, str):
            record = {"id": place.rpartition(":")[2], "text": record}
        identity = string_field(place, record, "_id", "id")
        title = string_field(place, record, "title", default="").strip()
        text = string_field(place, record, "text", default="")
        if "text" not in record and not title:
            string_field(place, record, "text")
        text = text if text.strip() else title
        if identity in seen:
            raise ValueError(
                f"{place}: id {identity!r} was given before, at {seen[identity]}; ids "
                "must differ"
            )
        seen[identity] = place
        try:
            (title + text + identity).encode()
            if text.strip() or not allow_empty:
                text_format.clean(text)
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair.
            raise ValueError(
                f"{place}: a lone surrogate, which is no character; write the line "
                "again as UTF-8"
            ) from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        task = string_field(place, record, "task", default="")
        yield TextRecord(place, identity, title, text, task)


def sha256(path: str | os.PathLike) -> str:
    """Returns the checksum of the file's bytes, in hex."""
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def write_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary path; on a clean exit it becomes `path`, else it goes.

    Raises:
        OSError: The disk is full; the message names `path` and the remedy.
    """
    path = pathlib.Path(path)
    # Machines that share a folder may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with _explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def write_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Gives a temporary folder; on a clean exit it replaces `path`, else it goes.

    Raises:
        OSError: The disk is full; the message names `path` and the remedy.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with _explain_full_disk(path):
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():  # A folder cannot be renamed over a full one.
                path.rename(old)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _explain_full_disk(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no disk space left for {path}; nothing half-written was kept: free some "
            "space, or choose another place, and run the same command again",
        ) from error
