"""Tensors that are read one at a time, when they are needed.

A `Tensor` knows its shape and dtype and reads its values later, so a checkpoint of many
gigabytes is converted with one tensor in memory. Readers of untrusted files check what
a file claims before they allocate memory for it: `parse_shape` and `check_size`.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from gecko_jax.formats import source_files

# Stored dtypes of weights. float64 is rounded, as in T5X's own conversions.
_FLOAT32 = np.dtype(np.float32)
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array that is read when it is needed."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    # Location of the values, for errors. Tensors cut from one array share it, and are
    # best read one after another (`in_reading_order`).
    source: str = ""
    dtype: np.dtype = _FLOAT32  # that of model parameters

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return self.size * self.dtype.itemsize

    def round(self, dtype: str) -> "Tensor":
        """Returns the tensor with float32 values rounded to another dtype.

        `read` raises a ValueError for values beyond the range of the dtype.
        """

        def read() -> np.ndarray:
            array = self.read()
            with np.errstate(over="ignore"):
                rounded = array.astype(dtype).astype(np.float32)
            if not np.array_equal(np.isfinite(rounded), np.isfinite(array)):
                raise ValueError(
                    f"the largest weight, {np.abs(array).max():g}, is beyond what "
                    f"{dtype} holds; write float32"
                )
            return rounded

        return dataclasses.replace(self, read=read)

    def transpose(self) -> "Tensor":
        """Returns the matrix with its two axes swapped."""
        return dataclasses.replace(
            self, shape=self.shape[::-1], read=lambda: self.read().T
        )

    def require_finite(self, name: str) -> "Tensor":
        """Returns the tensor, whose `read` raises a ValueError if it is not finite."""

        def read() -> np.ndarray:
            array = self.read()
            if not is_finite(array):
                count = int(np.count_nonzero(~np.isfinite(array)))
                place = f" ({self.source})" if self.source else ""
                raise ValueError(
                    f"{name}{place}: {count:,} of {array.size:,} weights are NaN or "
                    "infinite; the model is damaged or its training diverged, copy it "
                    "again or take an earlier checkpoint"
                )
            return array

        return dataclasses.replace(self, read=read)

    def as_weights(self, *, bits_are_bfloat16: bool = False) -> "Tensor":
        """Returns the stored values as float32 weights, or raises a ValueError.

        With `bits_are_bfloat16`, uint16 values are the bits of bfloat16 values, as in
        the zarr arrays of version 2 of T5X's format.
        """
        is_bits = bits_are_bfloat16 and self.dtype == np.uint16
        if not is_bits and self.dtype.name not in _FLOATS:
            raise ValueError(
                f"{self.source}: holds {self.dtype.name}, and weights must be floats; "
                "take the unquantized checkpoint, or copy it again if it is damaged"
            )

        def read() -> np.ndarray:
            values = self.read()
            if is_bits:
                values = values.view(ml_dtypes.bfloat16)
            return np.asarray(values, np.float32)

        return Tensor(self.shape, read, self.source)


def as_tensor(leaf: Any) -> Tensor:
    """Returns a NumPy or JAX array as a `Tensor`; a `Tensor` is returned as it is."""
    if isinstance(leaf, Tensor):
        return leaf
    return Tensor(leaf.shape, lambda: np.asarray(leaf, np.float32))


def in_reading_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Returns the items sorted so that tensors of one source follow each other."""
    return sorted(tensors.items(), key=lambda item: item[1].source)


def is_finite(array: Float[np.ndarray, "..."]) -> bool:
    """Whether no value of an array is NaN or infinite."""
    # min and max need no memory, where `isfinite` allocates a byte for each value. NaN
    # propagates through both.
    return not array.size or bool(np.isfinite(array.min()) and np.isfinite(array.max()))


def parse_shape(source: str, shape: Any) -> tuple[int, ...]:
    """Returns a shape that a file claims, if it is a list of positive integers."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else None
    # isinstance(True, int) is true.
    if sizes is None or any(type(size) is not int or size < 1 for size in sizes):
        raise source_files.damaged(
            source, f"its shape is {shape!r:.80}, and must be whole numbers above 0"
        )
    return sizes


def check_size(
    source: str, shape: tuple[int, ...], dtype: np.dtype, stored_bytes: int | None
) -> None:
    """Refuses an array that its stored bytes or the memory cannot hold.

    `stored_bytes` is the size of the array's files, compressed; None if unknown.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    claim = f"an array of shape {shape} has {nbytes:,} bytes"
    # zstd keeps a run of 128 KiB in 4 bytes, and the other compressors of T5X and Orbax
    # pack less densely.
    if stored_bytes is not None and nbytes > stored_bytes * 2**15:
        raise source_files.damaged(
            source, f"{claim}, which the {stored_bytes:,} stored bytes cannot hold"
        )
    if nbytes > _memory():
        raise ValueError(
            f"{source}: {claim}, more than the {_memory():,} bytes of memory of this "
            "machine; use a larger machine, or copy the file again if it is damaged"
        )


@functools.cache
def _memory() -> int:
    """Returns the bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**40  # The machine does not report it.
