"""Memory-maps arrays in .npy files after checking their headers.

A header only claims a shape and a dtype. Nothing of the claimed size is allocated: a
file that is shorter than its header claims cannot be mapped.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped


def open_array(
    path: pathlib.Path,
    shape: Sequence[int | None],
    kinds: str,
    *,
    remedy: str,
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
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged ({first}); {remedy}") from error
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
