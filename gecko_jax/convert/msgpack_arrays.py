"""Flax's msgpack files, read leaf by leaf.

`flax.serialization.msgpack_restore` would bring a whole file into memory, with the
optimizer and the decoder in it, and msgpack's own streaming copies each array several
times. Here the heads of the objects are read, the numbers of arrays only when asked
for, straight into place; what nobody wants is passed over.
"""

import io
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import msgpack
import numpy as np

from gecko_jax import tensors

# Flax splits arrays of more than 2^30 bytes into a map under this mark.
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_CODES = (1, 3)  # Flax's extension types: an array, a scalar of numpy

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


class _Head(NamedTuple):
    """Kind of an object, and its number of items or of bytes after the head."""

    kind: str
    size: int


class _Place(NamedTuple):
    """An array of the file: where its numbers begin, and what they are."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def read(
    data: pathlib.Path | bytes, is_wanted: Callable[[tuple[str, ...]], bool]
) -> dict[str, Any]:
    """Returns the tree of a file, its arrays as `tensors.Tensor`.

    Args:
        data: The file, or its content where the file is not on this machine.
        is_wanted: Whether to keep what lies under a path of keys; asked for every
            path, the short ones first.

    Raises:
        ValueError: The file is truncated, or no msgpack.
    """
    name = str(data) if isinstance(data, pathlib.Path) else "checkpoint"

    def open_data() -> Any:
        return data.open("rb") if isinstance(data, pathlib.Path) else io.BytesIO(data)

    with open_data() as stream:
        try:
            tree = _walk(stream, is_wanted, ())
        except (EOFError, ValueError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(
                f"{name}: not a whole msgpack file ({type(error).__name__} at byte "
                f"{stream.tell():,}); copy it again"
            ) from error
        end = stream.tell()
        if end > stream.seek(0, io.SEEK_END):
            raise ValueError(f"{name}: not a whole msgpack file; copy it again")
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: not a tree of parameters; copy the file again")
    return _as_tensors(tree, open_data)


def _walk(
    stream: Any, is_wanted: Callable[[tuple[str, ...]], bool], path: tuple[str, ...]
) -> Any:
    begin = stream.tell()
    head = _read_head(stream)
    if head.kind == "map":
        tree = {}
        for _ in range(head.size):
            key = str(_read_value(stream))
            if is_wanted((*path, key)):
                tree[key] = _walk(stream, is_wanted, (*path, key))
            else:
                _skip(stream)
        return tree
    if head.kind == "extension":
        end = stream.tell() + 1 + head.size
        place = _find_numbers(stream) if stream.read(1)[0] in _ARRAY_CODES else None
        stream.seek(end)
        return place
    stream.seek(begin)
    return _read_value(stream)


def _read_head(stream: Any) -> _Head:
    """Reads the head of the next object."""

    def number(size: int) -> int:
        return int.from_bytes(stream.read(size), "big")

    first = stream.read(1)
    if not first:
        raise EOFError
    byte = first[0]
    if byte >> 4 == 0x8 or byte in _MAPS:
        return _Head("map", number(_MAPS[byte]) if byte in _MAPS else byte & 0xF)
    if byte >> 4 == 0x9 or byte in _LISTS:
        return _Head("list", number(_LISTS[byte]) if byte in _LISTS else byte & 0xF)
    if byte >> 5 == 0b101 or byte in _BYTES:
        return _Head("bytes", number(_BYTES[byte]) if byte in _BYTES else byte & 0x1F)
    if byte in _EXTENSIONS:
        return _Head("extension", number(_EXTENSIONS[byte]))
    if byte in _SMALL_EXTENSIONS:
        return _Head("extension", _SMALL_EXTENSIONS[byte])
    return _Head("bytes", _NUMBERS.get(byte, 0))


def _skip(stream: Any) -> None:
    head = _read_head(stream)
    if head.kind in ("map", "list"):
        for _ in range(head.size * (2 if head.kind == "map" else 1)):
            _skip(stream)
    else:
        # The code of an extension is a byte before its content.
        stream.seek(head.size + (head.kind == "extension"), io.SEEK_CUR)


def _read_value(stream: Any) -> Any:
    """Reads a small object: a text, a number, a list of them."""
    begin = stream.tell()
    _skip(stream)
    end = stream.tell()
    stream.seek(begin)
    return msgpack.unpackb(stream.read(end - begin), strict_map_key=False)


def _find_numbers(stream: Any) -> _Place:
    """Reads the head of [shape, dtype, numbers], which Flax makes of an array."""
    if _read_head(stream) != ("list", 3):
        raise ValueError("not an array as Flax writes it")
    shape, dtype = _read_value(stream), _read_value(stream)
    place_size = _read_head(stream).size
    found = _Place(stream.tell(), tuple(shape), np.dtype(dtype))
    if place_size != tensors.num_values(found.shape) * found.dtype.itemsize:
        raise ValueError("an array whose size is not that of its shape")
    return found


def _as_tensors(tree: Any, open_data: Callable[[], Any]) -> Any:
    if isinstance(tree, _Place):

        def read_place() -> np.ndarray:
            return np.asarray(_read_array(open_data, tree), np.float32)

        return tensors.Tensor(tree.shape, read_place)
    if isinstance(tree, dict) and tree.get(_CHUNKED):
        return _join(tree, open_data)
    if isinstance(tree, dict):
        return {key: _as_tensors(value, open_data) for key, value in tree.items()}
    return tree


def _join(tree: dict[str, Any], open_data: Callable[[], Any]) -> tensors.Tensor:
    shape = tuple(int(tree["shape"][str(axis)]) for axis in range(len(tree["shape"])))
    places = [tree["chunks"][str(number)] for number in range(len(tree["chunks"]))]

    def read_chunks() -> np.ndarray:
        whole = np.empty(tensors.num_values(shape), np.float32)
        begin = 0
        for place in places:
            chunk = _read_array(open_data, place).reshape(-1)
            whole[begin : begin + chunk.size] = chunk
            begin += chunk.size
        return whole.reshape(shape)

    return tensors.Tensor(shape, read_chunks)


def _read_array(open_data: Callable[[], Any], place: _Place) -> np.ndarray:
    array = np.empty(place.shape, place.dtype)
    with open_data() as stream:
        stream.seek(place.offset)
        stream.readinto(array.reshape(-1).view(np.uint8).data)
    return array
