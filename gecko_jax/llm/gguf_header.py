"""The header of a GGUF file: its counts and lengths, compared with the bytes there.

The `gguf` package takes a file at its word: a header that claims a list of a million
million entries is read until memory is full. This walk over the header comes first. It
allocates nothing, and stops at the first size that the file cannot hold.
"""

import mmap
import pathlib
import struct

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Far beyond any model; a header that claims more would be read for minutes.
_MOST_SETTINGS, _MOST_TENSORS, _MOST_ENTRIES = 65_536, 1 << 20, 1 << 22
_MOST_DIMENSIONS = 4
# Bytes of a value, by its type; strings and lists have none of their own.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _LIST = 8, 9


def check(path: pathlib.Path) -> None:
    """Walks over the header of a file.

    Raises:
        ValueError: It is no GGUF file, or claims more than it holds.
    """
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _walk(_Cursor(data))
    except ValueError as error:  # Also of an empty file, which cannot be mapped.
        raise ValueError(
            f"{path}: not a whole GGUF file ({error}); copy it again"
        ) from None


class _Cursor:
    """A place in the file; it never moves past the end."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._place = 0
        if self.take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.take(4)
        # The version is small, so its bytes tell their order.
        self._order = "<" if version[0] else ">"
        found = struct.unpack(f"{self._order}I", version)[0]
        if found not in _VERSIONS:
            raise ValueError(f"version {found} is not known")

    def skip(self, size: int) -> None:
        if size > len(self._data) - self._place:
            raise ValueError(
                f"at byte {self._place:,}, {size:,} bytes are claimed and "
                f"{len(self._data) - self._place:,} are left"
            )
        self._place += size

    def take(self, size: int) -> bytes:
        start = self._place
        self.skip(size)
        return self._data[start : self._place]

    def short(self) -> int:
        return struct.unpack(f"{self._order}I", self.take(4))[0]

    def long(self, most: int, what: str) -> int:
        found = struct.unpack(f"{self._order}Q", self.take(8))[0]
        if found > most:
            raise ValueError(f"it claims {found:,} {what}")
        return found

    def skip_string(self) -> None:
        self.skip(self.long(len(self._data), "bytes of text"))


def _walk(cursor: _Cursor) -> None:
    num_tensors = cursor.long(_MOST_TENSORS, "tensors")
    for _ in range(cursor.long(_MOST_SETTINGS, "settings")):
        cursor.skip_string()
        _skip_value(cursor, cursor.short())
    for _ in range(num_tensors):
        cursor.skip_string()
        num_dimensions = cursor.short()
        if num_dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor of {num_dimensions:,} dimensions")
        cursor.skip(8 * num_dimensions + 4 + 8)  # Sizes, type and place.


def _skip_value(cursor: _Cursor, kind: int) -> None:
    if kind != _LIST:
        _skip_values(cursor, kind, 1)
        return
    inner = cursor.short()
    _skip_values(cursor, inner, cursor.long(_MOST_ENTRIES, "entries in a list"))


def _skip_values(cursor: _Cursor, kind: int, count: int) -> None:
    if kind in _SIZES:
        cursor.skip(_SIZES[kind] * count)
    elif kind == _STRING:
        for _ in range(count):
            cursor.skip_string()
    else:
        raise ValueError(f"a setting of the unknown type {kind}")
