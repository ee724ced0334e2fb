"""Compares the counts and lengths in a GGUF header with the size of the file.

The `gguf` package trusts a file: it reads a list that claims a million million entries
until memory is full. This check runs first, allocates nothing, and stops at the first
size that the file cannot hold.
"""

import mmap
import pathlib
import struct

_VERSIONS = (2, 3)
# Far beyond any model. A header that claims more would take minutes to read.
_MAX_SETTINGS, _MAX_TENSORS, _MAX_ENTRIES = 65_536, 1 << 20, 1 << 22
_MAX_DIMENSIONS = 4
# Bytes of a value, by type. The sizes of strings and lists vary.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _LIST = 8, 9


def check(path: pathlib.Path) -> None:
    """Walks over a header; raises ValueError if it claims more than the file holds."""
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _Cursor(data).walk()
    except ValueError as error:  # Also raised for an empty file.
        problem = f"{path}: not a complete GGUF file ({error}); copy it again"
        raise ValueError(problem) from None


class _Cursor:
    """A position in the file that never moves past the end."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._place = 0
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._take(4)
        # The version is small, so its first byte reveals the byte order.
        self._order = "<" if version[0] else ">"
        (number,) = struct.unpack(f"{self._order}I", version)
        if number not in _VERSIONS:
            raise ValueError(f"unknown version {number}")

    def walk(self) -> None:
        """Skips all settings and tensor descriptions."""
        num_tensors = self._count(_MAX_TENSORS, "tensors")
        for _ in range(self._count(_MAX_SETTINGS, "settings")):
            self._skip_string()
            kind, count = self._number(), 1
            if kind == _LIST:
                kind = self._number()
                count = self._count(_MAX_ENTRIES, "entries in a list")
            if kind in _SIZES:
                self._skip(_SIZES[kind] * count)
            elif kind == _STRING:
                for _ in range(count):
                    self._skip_string()
            else:
                raise ValueError(f"a setting of the unknown type {kind}")
        for _ in range(num_tensors):
            self._skip_string()
            num_dimensions = self._number()
            if num_dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {num_dimensions:,} dimensions")
            self._skip(8 * num_dimensions + 4 + 8)  # Sizes, type and offset.

    def _skip(self, size: int) -> None:
        num_left = len(self._data) - self._place
        if size > num_left:
            raise ValueError(
                f"it claims {size:,} bytes at byte {self._place:,} and has {num_left:,}"
            )
        self._place += size

    def _take(self, size: int) -> bytes:
        start = self._place
        self._skip(size)
        return self._data[start : self._place]

    def _number(self) -> int:
        return struct.unpack(f"{self._order}I", self._take(4))[0]

    def _count(self, limit: int, noun: str) -> int:
        (number,) = struct.unpack(f"{self._order}Q", self._take(8))
        if number > limit:
            raise ValueError(f"it claims {number:,} {noun}")
        return number

    def _skip_string(self) -> None:
        self._skip(self._count(len(self._data), "bytes of text"))
