"""Flax's msgpack files, read leaf by leaf.

`flax.serialization.msgpack_restore` would bring a whole file into memory, with the
optimizer and the decoder in it. Here the file is walked once: what nobody wants is
passed over, and of each array only shape and place are kept.
"""

import functools
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
_NDARRAY, _SCALAR = 1, 3  # Flax's extension types


class _Array(NamedTuple):
    shape: tuple[int, ...]


class _Place(NamedTuple):
    """An array of the file: where it begins, and its shape."""

    offset: int
    shape: tuple[int, ...]


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

    with open_data() as stream, open_data() as ahead:
        unpacker = _unpacker(stream, _measure)
        try:
            tree = _walk(unpacker, ahead, is_wanted, ())
        except (msgpack.UnpackException, ValueError, TypeError) as error:
            raise ValueError(
                f"{name}: not a whole msgpack file ({type(error).__name__} at byte "
                f"{unpacker.tell():,}); copy it again"
            ) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{name}: not a tree of parameters; copy the file again")
    return _as_tensors(tree, open_data, name)


def _unpacker(stream: Any, hook: Callable[[int, bytes], Any]) -> msgpack.Unpacker:
    # 0 lifts the limit on the size of one object to that of the format.
    return msgpack.Unpacker(
        stream, raw=False, max_buffer_size=0, strict_map_key=False, ext_hook=hook
    )


def _walk(
    unpacker: msgpack.Unpacker,
    ahead: Any,
    is_wanted: Callable[[tuple[str, ...]], bool],
    path: tuple[str, ...],
) -> Any:
    offset = unpacker.tell()
    ahead.seek(offset)
    first = ahead.read(1)
    is_map = bool(first) and (first[0] >> 4 == 0x8 or first[0] in (0xDE, 0xDF))
    if not is_map:
        value = unpacker.unpack()
        return _Place(offset, value.shape) if isinstance(value, _Array) else value
    tree = {}
    for _ in range(unpacker.read_map_header()):
        key = str(unpacker.unpack())
        if is_wanted((*path, key)):
            tree[key] = _walk(unpacker, ahead, is_wanted, (*path, key))
        else:
            unpacker.skip()
    return tree


def _measure(code: int, data: bytes) -> Any:
    if code not in (_NDARRAY, _SCALAR):
        return None
    parts = msgpack.Unpacker(max_buffer_size=0)
    parts.feed(memoryview(data)[:1024])  # the numbers come last
    parts.read_array_header()
    shape = parts.unpack()
    return _Array(tuple(shape))


def _as_tensors(tree: Any, open_data: Callable[[], Any], source: str) -> Any:
    if isinstance(tree, _Place):
        read_one = functools.partial(_read_array, open_data, tree.offset)
        return tensors.Tensor(tree.shape, lambda: np.asarray(read_one(), np.float32))
    if isinstance(tree, dict) and tree.get(_CHUNKED):
        return _join(tree, open_data)
    if isinstance(tree, dict):
        return {key: _as_tensors(v, open_data, source) for key, v in tree.items()}
    return tree


def _join(tree: dict[str, Any], open_data: Callable[[], Any]) -> tensors.Tensor:
    shape = tuple(int(tree["shape"][str(axis)]) for axis in range(len(tree["shape"])))
    places = [tree["chunks"][str(number)] for number in range(len(tree["chunks"]))]

    def read_chunks() -> np.ndarray:
        whole = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
        begin = 0
        for place in places:
            chunk = _read_array(open_data, place.offset).reshape(-1)
            whole[begin : begin + chunk.size] = chunk
            begin += chunk.size
        return whole.reshape(shape)

    return tensors.Tensor(shape, read_chunks)


def _read_array(open_data: Callable[[], Any], offset: int) -> np.ndarray:
    with open_data() as stream:
        stream.seek(offset)
        return _unpacker(stream, _restore).unpack()


def _restore(code: int, data: bytes) -> np.ndarray:
    del code
    # Unpacked without a copy of the numbers but the one that msgpack itself makes.
    shape, dtype, buffer = msgpack.unpackb(
        memoryview(data), raw=True, max_bin_len=2**32
    )
    return np.frombuffer(buffer, np.dtype(dtype.decode())).reshape(shape)
