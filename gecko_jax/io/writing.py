"""Writing files and folders whole or not at all.

Output is written under a temporary name beside its destination and renamed when it is
complete, so an interrupted run leaves no partial file.
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
