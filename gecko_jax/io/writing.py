"""Atomic writes of files and folders.

Output goes to a temporary path next to its destination, which is renamed when complete.
An interrupted run leaves no partial file.
"""

import contextlib
import errno
import fnmatch
import glob
import os
import pathlib
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence

from gecko_jax.io import wording


def write_file(
    path: str | os.PathLike,
) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Yields a temporary path, which replaces `path` unless an error is raised.

    Raises ValueError if `path` is a folder or a device, and OSError if the disk is full
    or the location is not writable.
    """
    return _write(path, is_folder=False)


@contextlib.contextmanager
def _write(path: str | os.PathLike, is_folder: bool) -> Iterator[pathlib.Path]:
    path = pathlib.Path(path)
    path = path.resolve() if path.is_symlink() else path  # The link stays a link.
    kind = "folder" if is_folder else "file"
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        raise ValueError(f"{path}: exists and is not a {kind}; choose another name")
    # The token keeps threads apart that write the same path.
    writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    old = path.with_name(f".{path.name}.{writer}.old")
    try:
        with _explain_failure(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            if is_folder:
                temporary.mkdir()
            yield temporary
            if is_folder:
                _replace_folder(path, temporary, old)
            else:
                temporary.replace(path)
    finally:
        _remove(temporary)
        _remove(old)


def write_folder(
    path: str | os.PathLike,
) -> contextlib.AbstractContextManager[pathlib.Path]:
    """Like `write_file` for a folder."""
    return _write(path, is_folder=True)


def member(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file in a folder; the file may be missing.

    Raises ValueError if it is not a file, or is outside of the folder.
    """
    path = inside(folder, name)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file; put the file itself there")
    return path


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file or folder in a folder; it may be missing.

    Raises ValueError if it is outside of the folder. Links from a snapshot in the cache
    of the Hugging Face hub into the same cache are allowed.
    """
    if wording.printable(name) != name:
        raise ValueError(
            f"{folder}: the file name {name!r} has invalid characters; copy the folder "
            "again"
        )
    path = folder / name
    target, root = path.resolve(), folder.resolve()
    for parent in root.parents:
        if parent.name.startswith("models--") and (parent / "snapshots").is_dir():
            root = parent
    if not target.is_relative_to(root):
        raise ValueError(
            f"{path}: leads out of its folder, to {target}; put the file itself there"
        )
    return path


def check_replaceable(
    path: str | os.PathLike, markers: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Refuses a folder whose files would not all be written again.

    A folder with files must be an earlier export: it has a match for each pattern in
    `markers`, and all its files match a pattern in `markers` or `others`. Otherwise,
    raises ValueError.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path}: exists and is not a folder; choose another name")
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


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def _replace_folder(path: pathlib.Path, new: pathlib.Path, old: pathlib.Path) -> None:
    """Renames `path` to `old` and `new` to `path`; the last writer wins."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.rename(old)  # A rename cannot replace a folder with files.
        try:
            new.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)  # Another writer was faster.


def _remove_leftovers(path: pathlib.Path) -> None:
    """Removes temporary files for `path` of killed processes on this machine."""
    begin = f".{path.name}.{socket.gethostname()}-"
    for ending in (".tmp", ".old"):
        for left in path.parent.glob(f"{glob.escape(begin)}*{ending}"):
            number = left.name.removeprefix(begin).partition("-")[0]
            if not number.isdecimal() or _is_alive(int(number)):
                continue
            if ending == ".old" and not path.exists():
                left.rename(path)  # Killed before the new folder was in place.
            else:
                _remove(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # A process of another user.
        pass
    return True


@contextlib.contextmanager
def _explain_failure(path: pathlib.Path, temporary: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"no disk space left for {path}; free some space or choose another "
                "place, and run the same command again (partial output was removed)",
            ) from error
        where = pathlib.Path(error.filename) if error.filename else None
        if where is None or not (
            where in path.parents or temporary in (where, *where.parents)
        ):
            raise  # The error concerns another file.
        why = "not a folder" if where.is_file() else (error.strerror or "").lower()
        raise OSError(
            error.errno,
            f"{path}: cannot be written ({where}: {why}); choose another location",
        ) from error
