"""Flax's msgpack files, read leaf by leaf.

`flax.serialization.msgpack_restore` loads a whole file, optimizer and decoder included,
and msgpack's own streaming reader copies each array several times. This reader parses
the headers of objects, skips the unwanted ones, and reads the values of an array when
they are needed.

Files are untrusted: every count and length is compared with the bytes that are left
before anything is allocated or repeated.
"""

import io
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from gecko_jax.formats import source_files, tensors

# Flax splits an array of more than 2^30 bytes into chunks of its flat values, under
# this key.
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_CODES = (1, 3)  # Flax's extension types: an array, a NumPy scalar.

# Limits that no checkpoint reaches: T5 XXL with its optimizer has about 50,000 objects,
# nested 12 deep.
_MAX_OBJECTS = 300_000
_MAX_DEPTH = 64
# Longest string or list that is read as a value, in bytes.
_MAX_VALUE_BYTES = 2**16

_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "float16", "float32", "float64"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

_IsWanted = Callable[[tuple[str, ...]], bool]


class _Header(NamedTuple):
    """Kind of an object, and how much follows.

    The size is the number of objects in a map (keys and values) or list, and otherwise
    the number of bytes, with the code of an extension.
    """

    kind: str
    size: int


# First byte of an object -> its kind, and the width of the size that follows
# (https://github.com/msgpack/msgpack/blob/master/spec.md).
_SIZED = {
    **{0xDE: ("map", 2), 0xDF: ("map", 4), 0xDC: ("list", 2), 0xDD: ("list", 4)},
    **{first: ("bytes", 2**n) for n, first in enumerate((0xC4, 0xC5, 0xC6))},
    **{first: ("extension", 2**n) for n, first in enumerate((0xC7, 0xC8, 0xC9))},
    **{first: ("bytes", 2**n) for n, first in enumerate((0xD9, 0xDA, 0xDB))},
}
# First byte -> the complete header. Numbers are objects of 0 to 8 more bytes.
_FIXED = {
    **{first: _Header("bytes", 0) for first in range(0x100)},
    **{0x80 + n: _Header("map", 2 * n) for n in range(16)},
    **{0x90 + n: _Header("list", n) for n in range(16)},
    **{0xA0 + n: _Header("bytes", n) for n in range(32)},
    **{0xCA: _Header("bytes", 4), 0xCB: _Header("bytes", 8)},
    **{0xCC + n: _Header("bytes", 2**n) for n in range(4)},
    **{0xD0 + n: _Header("bytes", 2**n) for n in range(4)},
    **{0xD4 + n: _Header("extension", 2**n + 1) for n in range(5)},
}


class _DamageError(Exception):
    """What is wrong with the bytes at the position of the stream."""


def read(
    data: pathlib.Path | bytes, is_wanted: _IsWanted, name: str = "checkpoint"
) -> dict[str, Any]:
    """Returns the tree of a file, with its arrays as `tensors.Tensor`.

    Strings and lists that are longer than those of any checkpoint become None. Raises
    ValueError if the file is truncated, not msgpack, or claims more than it holds.

    Args:
        data: The file, or its content if the file is remote.
        is_wanted: Whether to keep the object under a path of keys; called for every
            path, parents first.
        name: The file in errors, where `data` is its content.
    """
    name = str(data) if isinstance(data, pathlib.Path) else name

    def open_data() -> Any:
        return data.open("rb") if isinstance(data, pathlib.Path) else io.BytesIO(data)

    with open_data() as stream:
        reader = _Reader(name, stream, open_data)
        try:
            tree = reader.read_tree(is_wanted, ())
            if reader.bytes_left():
                raise _DamageError(f"{reader.bytes_left():,} bytes after its end")
        except _DamageError as error:
            raise ValueError(
                f"{name}: not a whole msgpack file ({error} at byte "
                f"{stream.tell():,}); copy it again"
            ) from None
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: not a tree of parameters; copy the file again")
    return tree


class _Reader:
    """Reads and counts the objects of one file, in order."""

    def __init__(self, name: str, stream: Any, open_data: Callable[[], Any]):
        self._name = name
        self._stream = stream
        self._open_data = open_data
        self._end = stream.seek(0, io.SEEK_END)
        self._num_objects = 0
        stream.seek(0)

    def bytes_left(self) -> int:
        return self._end - self._stream.tell()

    def read_tree(self, is_wanted: _IsWanted, path: tuple[str, ...]) -> Any:
        """Reads the next object, which is under `path`."""
        if len(path) > _MAX_DEPTH:
            raise _DamageError(f"maps nested more than {_MAX_DEPTH} deep")
        begin = self._stream.tell()
        header = self._read_header()
        if header.kind == "map":
            tree = self._read_map(header.size // 2, is_wanted, path)
            if tree.get(_CHUNKED) is True:
                return _join_chunks(f"{self._name}: {'/'.join(path)}", tree)
            return tree
        if header.kind == "extension":
            end = self._stream.tell() + header.size
            code = self._take(1)[0]
            array = self._read_array(path, end) if code in _ARRAY_CODES else None
            self._stream.seek(end)
            return array
        self._stream.seek(begin)
        return self._read_value()

    def _read_map(
        self, size: int, is_wanted: _IsWanted, path: tuple[str, ...]
    ) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        keys: set[str] = set()
        for _ in range(size):
            key = self._read_value()
            if not isinstance(key, str) or key in keys:
                raise _DamageError("a key that is repeated or not a string")
            keys.add(key)
            if is_wanted((*path, key)):
                tree[key] = self.read_tree(is_wanted, (*path, key))
            else:
                self._skip()
        return tree

    def _read_header(self) -> _Header:
        self._num_objects += 1
        if self._num_objects > _MAX_OBJECTS:
            raise _DamageError(f"more than {_MAX_OBJECTS:,} objects")
        first = self._take(1)[0]
        if first == 0xC1:
            raise _DamageError(f"the unused code {first:#x}")
        header = _FIXED[first]
        if first in _SIZED:
            kind, width = _SIZED[first]
            size = int.from_bytes(self._take(width), "big")
            size = 2 * size if kind == "map" else size + (kind == "extension")
            header = _Header(kind, size)
        if header.size > self.bytes_left():  # Every object has at least one byte.
            raise _DamageError(f"{header.size:,} bytes or more, beyond the end,")
        return header

    def _take(self, size: int) -> bytes:
        content = self._stream.read(size)
        if len(content) < size:
            raise _DamageError("an unexpected end")
        return content

    def _skip(self) -> None:
        """Skips the next object. A loop, because nothing limits its nesting."""
        pending = 1
        while pending:
            header = self._read_header()
            pending -= 1
            if header.kind in ("map", "list"):
                pending += header.size
            else:
                self._stream.seek(header.size, io.SEEK_CUR)

    def _read_value(self) -> Any:
        """Reads a small object: a string, a number, or a list of them."""
        begin = self._stream.tell()
        self._skip()
        size = self._stream.tell() - begin
        if size > _MAX_VALUE_BYTES:
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
            raise _DamageError(f"no msgpack value ({type(error).__name__})") from None

    def _read_array(self, path: tuple[str, ...], end: int) -> tensors.Tensor:
        """Opens the array of [shape, dtype, values], which is how Flax writes it."""
        source = f"{self._name}: {'/'.join(path)}"
        if self._read_header() != ("list", 3):
            raise _DamageError(f"{'/'.join(path)}, not an array as Flax writes it,")
        shape, dtype_name = self._read_value(), self._read_value()
        values = self._read_header()
        begin = self._stream.tell()
        shape = tensors.parse_shape(source, shape)
        dtype = _DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
        if dtype is None:
            raise source_files.damaged(
                source, f"{str(dtype_name)[:80]!r} is not a dtype of weights"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        if values != ("bytes", nbytes) or begin + nbytes != end:
            raise source_files.damaged(
                source,
                f"an array of shape {shape} and {dtype.name} has {nbytes:,} bytes, and "
                f"{values.size:,} are stored",
            )

        def read() -> np.ndarray:
            array = np.empty(shape, dtype)
            with self._open_data() as stream:
                stream.seek(begin)
                count = stream.readinto(array.reshape(-1).view(np.uint8).data)
            if count != nbytes:
                raise ValueError(
                    f"{source}: the file has become shorter since it was opened; copy "
                    "it again"
                )
            return array

        return tensors.Tensor(shape, read, source, dtype)


def _join_chunks(source: str, tree: dict[str, Any]) -> tensors.Tensor:
    """Returns the array that Flax has split into chunks of its flat values."""
    shape = tensors.parse_shape(source, _read_list(source, tree, "shape"))
    chunks = _read_list(source, tree, "chunks")
    if not chunks or not all(isinstance(chunk, tensors.Tensor) for chunk in chunks):
        raise source_files.damaged(source, "a chunk of it is not an array")
    dtype = chunks[0].dtype
    size, stored = math.prod(shape), sum(chunk.size for chunk in chunks)
    if size != stored or any(chunk.dtype != dtype for chunk in chunks):
        dtypes = ", ".join(sorted({chunk.dtype.name for chunk in chunks}))
        raise source_files.damaged(
            source,
            f"an array of shape {shape} has {size:,} values of one dtype, and its "
            f"chunks hold {stored:,} of {dtypes}",
        )

    def read() -> np.ndarray:
        flat = np.empty(size, dtype)
        begin = 0
        for chunk in chunks:
            flat[begin : begin + chunk.size] = chunk.read().reshape(-1)
            begin += chunk.size
        return flat.reshape(shape)

    return tensors.Tensor(shape, read, source, dtype)


def _read_list(source: str, tree: dict[str, Any], name: str) -> list[Any]:
    """Returns the values of {"0": ..., "1": ...}, Flax's form of a list."""
    items = tree.get(name)
    if not isinstance(items, dict) or items.keys() != set(map(str, range(len(items)))):
        raise source_files.damaged(
            source, f"its chunks have no `{name}` as Flax writes it"
        )
    return [items[str(number)] for number in range(len(items))]
