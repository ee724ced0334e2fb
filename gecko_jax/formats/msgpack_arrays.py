"""Flax's msgpack files, read leaf by leaf.

`flax.serialization.msgpack_restore` would bring a whole file into memory, with the
optimizer and the decoder in it, and msgpack's own streaming copies each array several
times. Here the heads of objects are read, and the numbers of an array only when they
are needed, straight into place; what is not wanted is passed over.

A file is untrusted: every count and length is compared with the bytes that are left
before anything is allocated or repeated.
"""

import dataclasses
import io
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from gecko_jax.formats import arrays

# Flax splits arrays of more than 2^30 bytes into a map under this mark.
_CHUNKED = "__msgpack_chunked_array__"
_CHUNKED_PARTS = ("shape", "chunks")
_ARRAY_CODES = (1, 3)  # Flax's extension types: an array, a scalar of numpy

# Limits beyond any checkpoint: the tree of T5 XXL with its optimizer has some 50,000
# objects, 12 levels deep.
_MOST_OBJECTS = 300_000
_MOST_NESTED = 64
# Longest text or list that is read as a value, in bytes.
_LONGEST_VALUE = 2**16

_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "float16", "float32", "float64"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

# First byte of an object -> bytes of its size, which follow it
# (https://github.com/msgpack/msgpack/blob/master/spec.md).
_MAPS = {0xDE: 2, 0xDF: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
# First byte -> bytes that follow, of numbers; all others are a byte alone.
_NUMBERS = {0xCA: 4, 0xCB: 8} | {0xCC + n: 2**n for n in range(4)}
_NUMBERS |= {0xD0 + n: 2**n for n in range(4)}
_SMALL_EXTENSIONS = {0xD4 + n: 2**n for n in range(5)}
_UNUSED = 0xC1


class _Damage(Exception):
    """What is wrong with the bytes at the position of the stream."""


class _Head(NamedTuple):
    """Kind of an object, and its number of items or of bytes after the head."""

    kind: str
    size: int


def read(
    data: pathlib.Path | bytes,
    is_wanted: Callable[[tuple[str, ...]], bool],
    name: str = "checkpoint",
) -> dict[str, Any]:
    """Returns the tree of a file, its arrays as `arrays.Array`.

    Texts and lists that are longer than any of a checkpoint become None.

    Args:
        data: The file, or its content where the file is not on this machine.
        is_wanted: Whether to keep what lies under a path of keys; called for every
            path, the short ones first.
        name: The file in errors, where `data` is its content.

    Raises:
        ValueError: The file is truncated, no msgpack, or claims more than it holds.
    """
    name = str(data) if isinstance(data, pathlib.Path) else name

    def open_data() -> Any:
        return data.open("rb") if isinstance(data, pathlib.Path) else io.BytesIO(data)

    with open_data() as stream:
        reader = _Reader(name, stream, open_data)
        try:
            tree = reader.read_tree(is_wanted, ())
            if reader.left():
                raise _Damage(f"{reader.left():,} bytes after its end")
        except _Damage as error:
            raise ValueError(
                f"{name}: not a whole msgpack file ({error} at byte "
                f"{stream.tell():,}); copy it again"
            ) from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: not a tree of parameters; copy the file again")
    return tree


class _Reader:
    """Reads the objects of one file in order, and counts them."""

    def __init__(self, name: str, stream: Any, open_data: Callable[[], Any]):
        self._name = name
        self._stream = stream
        self._open_data = open_data
        self._end = stream.seek(0, io.SEEK_END)
        self._num_objects = 0
        stream.seek(0)

    def left(self) -> int:
        """Returns how many bytes follow."""
        return self._end - self._stream.tell()

    def read_tree(
        self, is_wanted: Callable[[tuple[str, ...]], bool], path: tuple[str, ...]
    ) -> Any:
        """Reads the next object, whose path of keys is `path`."""
        if len(path) > _MOST_NESTED:
            raise _Damage(f"maps nested more than {_MOST_NESTED} deep")
        begin = self._stream.tell()
        head = self._read_head()
        if head.kind == "map":
            tree = self._read_map(head.size, is_wanted, path)
            is_chunked = tree.get(_CHUNKED) is True
            return (
                _join(f"{self._name}: {'/'.join(path)}", tree) if is_chunked else tree
            )
        if head.kind == "extension":
            end = self._stream.tell() + 1 + head.size
            code = self._take(1)[0]
            array = self._read_array(path, end) if code in _ARRAY_CODES else None
            self._stream.seek(end)
            return array
        self._stream.seek(begin)
        return self._read_value()

    def _read_map(
        self,
        size: int,
        is_wanted: Callable[[tuple[str, ...]], bool],
        path: tuple[str, ...],
    ) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        keys: set[str] = set()
        for _ in range(size):
            key = self._read_value()
            if not isinstance(key, str):
                raise _Damage("a key that is no text")
            if key in keys:
                raise _Damage(f"the key {key[:80]!r} for the second time")
            keys.add(key)
            if is_wanted((*path, key)):
                tree[key] = self.read_tree(is_wanted, (*path, key))
            else:
                self._skip()
        return tree

    def _read_head(self) -> _Head:
        self._num_objects += 1
        if self._num_objects > _MOST_OBJECTS:
            raise _Damage(f"more than {_MOST_OBJECTS:,} objects")
        byte = self._take(1)[0]
        if byte == _UNUSED:
            raise _Damage(f"the byte {byte:#x}, which begins nothing,")
        head = self._parse_head(byte)
        # Every item takes a byte at least, an extension one more than its content.
        least = head.size * (2 if head.kind == "map" else 1)
        least += head.kind == "extension"
        if least > self.left():
            raise _Damage(
                f"{least:,} bytes or more are to follow, and {self.left():,} do,"
            )
        return head

    def _parse_head(self, byte: int) -> _Head:
        if byte >> 4 == 0x8 or byte in _MAPS:
            return _Head(
                "map", self._take_size(_MAPS[byte]) if byte in _MAPS else byte & 0xF
            )
        if byte >> 4 == 0x9 or byte in _LISTS:
            return _Head(
                "list", self._take_size(_LISTS[byte]) if byte in _LISTS else byte & 0xF
            )
        if byte >> 5 == 0b101 or byte in _BYTES:
            return _Head(
                "bytes",
                self._take_size(_BYTES[byte]) if byte in _BYTES else byte & 0x1F,
            )
        if byte in _EXTENSIONS:
            return _Head("extension", self._take_size(_EXTENSIONS[byte]))
        if byte in _SMALL_EXTENSIONS:
            return _Head("extension", _SMALL_EXTENSIONS[byte])
        return _Head("bytes", _NUMBERS.get(byte, 0))

    def _take_size(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _take(self, size: int) -> bytes:
        taken = self._stream.read(size)
        if len(taken) < size:
            raise _Damage("its end")
        return taken

    def _skip(self) -> None:
        """Passes over the next object. A loop, for nothing bounds how deep it nests."""
        pending = 1
        while pending:
            head = self._read_head()
            pending -= 1
            if head.kind in ("map", "list"):
                pending += head.size * (2 if head.kind == "map" else 1)
            else:
                # The code of an extension is a byte before its content.
                self._stream.seek(head.size + (head.kind == "extension"), io.SEEK_CUR)

    def _read_value(self) -> Any:
        """Reads a small object: a text, a number, a list of them."""
        begin = self._stream.tell()
        self._skip()
        size = self._stream.tell() - begin
        if size > _LONGEST_VALUE:
            return None
        self._stream.seek(begin)
        try:
            return msgpack.unpackb(self._take(size), strict_map_key=False)
        except (
            ValueError,
            TypeError,
            RecursionError,
            msgpack.UnpackException,
        ) as error:
            raise _Damage(f"no value of msgpack ({type(error).__name__})") from None

    def _read_array(self, path: tuple[str, ...], end: int) -> arrays.Array:
        """Reads the head of [shape, dtype, numbers], which Flax makes of an array."""
        source = f"{self._name}: {'/'.join(path)}"
        if self._read_head() != ("list", 3):
            raise _Damage(f"{'/'.join(path)}, no array as Flax writes it,")
        shape, kind = self._read_value(), self._read_value()
        numbers = self._read_head()
        begin = self._stream.tell()
        shape = arrays.parse_shape(source, shape)
        dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise ValueError(
                f"{source}: holds {str(kind)[:80]!r}, which is no type of weights; the "
                "file is damaged, copy it again"
            )
        wanted = math.prod(shape) * dtype.itemsize
        if numbers != ("bytes", wanted) or begin + wanted != end:
            raise ValueError(
                f"{source}: an array of shape {shape} and {dtype.name} has {wanted:,} "
                f"bytes, and {numbers.size:,} are there; the file is damaged, copy it "
                "again"
            )
        part = _Part(self._open_data, begin, source)
        return _Inline(source, shape, dtype, lambda: _read([part], shape, dtype), part)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Where numbers lie in a file."""

    open_data: Callable[[], Any]
    offset: int
    source: str

    def read_into(self, numbers: np.ndarray) -> None:
        with self.open_data() as stream:
            stream.seek(self.offset)
            count = stream.readinto(numbers.view(np.uint8).data)
        if count != numbers.nbytes:
            raise ValueError(
                f"{self.source}: its numbers end early; the file has changed, copy it "
                "again"
            )


@dataclasses.dataclass(frozen=True)
class _Inline(arrays.Array):
    part: _Part


def _read(
    parts: list[_Part], shape: tuple[int, ...], dtype: np.dtype, sizes: Any = None
) -> np.ndarray:
    """Reads parts, of `sizes` numbers each, one after another into one array."""
    flat = np.empty(math.prod(shape), dtype)
    begin = 0
    for part, size in zip(parts, sizes or [flat.size], strict=True):
        part.read_into(flat[begin : begin + size])
        begin += size
    return flat.reshape(shape)


def _join(source: str, tree: dict[str, Any]) -> arrays.Array:
    """Returns the array that Flax has split into chunks of its flat numbers."""
    sizes, chunks = (_numbered(source, name, tree.get(name)) for name in _CHUNKED_PARTS)
    shape = arrays.parse_shape(source, sizes)
    if not chunks or not all(isinstance(chunk, _Inline) for chunk in chunks):
        raise ValueError(
            f"{source}: a chunk of it is no array; the file is damaged, copy it again"
        )
    dtype = chunks[0].dtype
    counts = [math.prod(chunk.shape) for chunk in chunks]
    if any(chunk.dtype != dtype for chunk in chunks) or sum(counts) != math.prod(shape):
        kinds = ", ".join(sorted({chunk.dtype.name for chunk in chunks}))
        raise ValueError(
            f"{source}: an array of shape {shape} has {math.prod(shape):,} numbers of "
            f"one type, and its chunks hold {sum(counts):,} of {kinds}; the file is "
            "damaged, copy it again"
        )
    parts = [chunk.part for chunk in chunks]
    return arrays.Array(
        source, shape, dtype, lambda: _read(parts, shape, dtype, counts)
    )


def _numbered(source: str, name: str, items: Any) -> list[Any]:
    """Returns the values of {"0": ..., "1": ...}, which Flax makes of a list."""
    size = len(items) if isinstance(items, dict) else 0
    keys = [str(number) for number in range(size)]
    if not isinstance(items, dict) or items.keys() != set(keys):
        raise ValueError(
            f"{source}: its chunks have no `{name}` as Flax writes it; the file is "
            "damaged, copy it again"
        )
    return [items[key] for key in keys]
