"""Reads arrays from .npy files after checking their headers.

A header only claims a shape and a dtype. Nothing of the claimed size is allocated
before the file is known to be large enough.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gecko_jax.io import wording

# XLA:CPU reads an array in place if its address is a multiple of this number of bytes,
# and copies it otherwise.
ALIGNMENT = 64


def open_array(
    path: pathlib.Path, shape: Sequence[int | None], kinds: str, *, remedy: str
) -> Shaped[np.memmap, "..."]:
    """Maps the array of a file into memory.

    A size of None allows any. `kinds` lists the allowed dtypes in numpy's notation
    without byte order, such as "f2 f4 f8". Raises OSError if the file cannot be read,
    and ValueError if it is not a whole .npy file or holds another array.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy raises many types for a damaged header.
        problem = wording.first_line(error)
        raise ValueError(f"{path}: damaged ({problem}); {remedy}") from error
    fits = len(array.shape) == len(shape) and all(
        expected in (None, size)
        for expected, size in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.str[1:] not in kinds.split():
        sizes = ", ".join("any" if size is None else f"{size:,}" for size in shape)
        raise ValueError(
            f"{path}: damaged (it holds {array.dtype} {array.shape}, not {kinds} "
            f"[{sizes}]); {remedy}"
        )
    return array


def read_aligned(
    path: pathlib.Path, shape: tuple[int, ...], dtype: type, *, remedy: str
) -> Shaped[np.ndarray, "..."]:
    """Reads the array of a file into memory that XLA:CPU can use in place."""
    mapped = open_array(path, shape, np.dtype(dtype).str[1:], remedy=remedy)
    if not mapped.flags.c_contiguous:
        return align(mapped)
    array = _empty_aligned(shape, dtype)
    # Unlike a copy of the map, reading leaves no pages of the map in memory.
    with path.open("rb") as file:
        file.seek(mapped.offset)
        if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise ValueError(f"{path}: damaged (it is too short); {remedy}")
    return array


def align(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Returns the array, copied if XLA:CPU could not read it in place."""
    if values.flags.c_contiguous and values.ctypes.data % ALIGNMENT == 0:
        return values
    aligned = _empty_aligned(values.shape, values.dtype)
    aligned[...] = values
    return aligned


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
