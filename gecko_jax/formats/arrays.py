"""Arrays of a checkpoint, as its files hold them, before they become weights.

What a file claims is checked before memory is allocated for it: the size of an array
against the bytes that are stored and the memory of this machine, its dtype by name.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from gecko_jax.formats import tensors

# Most bytes that one stored byte can stand for: zstd keeps a run of 128 KiB in 4 bytes,
# and the other compressors of T5X and Orbax pack less densely.
_MOST_PACKED = 2**15

# Largest array on a machine that does not say how much memory it has.
_MOST_BYTES = 2**40

# float64 loses digits in float32, as all of T5X's own conversions do.
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that is read when it is needed.

    Attributes:
        source: Where it lies, for errors.
        shape: Its shape, already checked against the bytes that are stored.
        dtype: Type of its numbers in the file.
        read: Returns the numbers in that type.
    """

    source: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def parse_shape(source: str, shape: Any) -> tuple[int, ...]:
    """Checks a shape that a file claims.

    Raises:
        ValueError: It is no list of whole numbers above 0.
    """
    sizes = list(shape) if isinstance(shape, list | tuple) else None
    # True is an int to Python.
    if sizes is None or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            f"{source}: its shape is {_brief(shape)}, and must be whole numbers above "
            "0; the file is damaged, copy it again"
        )
    return tuple(sizes)


def check_size(
    source: str, shape: tuple[int, ...], dtype: np.dtype, stored_bytes: int | None
) -> None:
    """Refuses an array that cannot be what its file claims, or fit into memory.

    Args:
        source: Where it lies, for errors.
        shape: Its shape.
        dtype: Type of its numbers.
        stored_bytes: Bytes that hold it, compressed; None where they are not known.

    Raises:
        ValueError: Names the claim and what is there.
    """
    claimed = math.prod(shape) * dtype.itemsize
    if stored_bytes is not None and claimed > stored_bytes * _MOST_PACKED:
        raise ValueError(
            f"{source}: an array of shape {shape} has {claimed:,} bytes, which the "
            f"{stored_bytes:,} bytes there cannot hold; the file is damaged, copy it "
            "again"
        )
    if claimed > _memory():
        raise ValueError(
            f"{source}: an array of shape {shape} has {claimed:,} bytes, more than the "
            f"{_memory():,} bytes of memory of this machine; use a larger machine, or "
            "copy the file again if it is damaged"
        )


def as_weights(array: Array, *, bits_are_bfloat16: bool = False) -> tensors.Tensor:
    """Returns the array as float32 weights, to be read later.

    Args:
        array: What a file holds.
        bits_are_bfloat16: Whether uint16 stands for bfloat16, as in the zarr arrays of
            T5X's second age.

    Raises:
        ValueError: It does not hold floats.
    """
    is_bits = bits_are_bfloat16 and array.dtype == np.uint16
    if not is_bits and array.dtype.name not in _FLOATS:
        raise ValueError(
            f"{array.source}: holds {array.dtype.name}, and weights must be floats; "
            "take the unquantized checkpoint, or copy it again if it is damaged"
        )

    def read() -> np.ndarray:
        numbers = array.read()
        if is_bits:
            numbers = numbers.view(ml_dtypes.bfloat16)
        return np.asarray(numbers, np.float32)

    return tensors.Tensor(array.shape, read, array.source)


@functools.cache
def _memory() -> int:
    """Returns the bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return _MOST_BYTES


def _brief(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
