"""Quantization: embeddings of a byte, or of a bit, per entry.

    int8     255 steps between the least and the greatest value of each dim
    binary   the sign of each entry, eight to a byte

Both are those of sentence-transformers (`quantize_embeddings` with "int8" and
"ubinary"). Queries stay float32: a search decodes passages block by block, which loses
far less than comparing codes with codes, and costs no memory that matters.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

FLOAT32, INT8, BINARY = "float32", "int8", "binary"
PRECISIONS = (FLOAT32, INT8, BINARY)

_DTYPES = {FLOAT32: np.float32, INT8: np.int8, BINARY: np.uint8}


@dataclasses.dataclass(frozen=True)
class Codes:
    """Embeddings at some precision.

    Attributes:
        values: float32 or int8 [P, D], or uint8 [P, D / 8, rounded up].
        precision: One of `PRECISIONS`.
        dim: Entries of an embedding, D.
        ranges: Least and greatest value of each dim, [2, D]; int8 only.
    """

    values: Shaped[np.ndarray, "P W"]
    precision: str
    dim: int
    ranges: Float[np.ndarray, "2 D"] | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def bytes_per_vector(self) -> int:
        """Memory of one embedding."""
        return bytes_per_vector(self.precision, self.dim)

    def decode(self) -> Float[np.ndarray, "P D"]:
        """Returns the embeddings that the codes stand for."""
        if self.precision == FLOAT32:
            return self.values
        return np.asarray(decode(self.values, self.precision, self.dim, self.ranges))


def check_precision(precision: str) -> str:
    """Returns `precision`; raises ValueError unless it is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r}: it must be one of {', '.join(PRECISIONS)}"
        )
    return precision


def bytes_per_vector(precision: str, dim: int) -> int:
    """Returns the memory of one embedding of `dim` entries."""
    return {FLOAT32: 4 * dim, INT8: dim, BINARY: -(-dim // 8)}[precision]


def width(precision: str, dim: int) -> int:
    """Returns the entries of a row of codes."""
    return -(-dim // 8) if precision == BINARY else dim


def dtype(precision: str) -> type:
    """Returns the type of the codes' entries."""
    return _DTYPES[precision]


def calibrate(vectors: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "2 D"]:
    """Returns the least and the greatest value of each dim, for int8.

    Raises:
        ValueError: Fewer than two vectors, which span no range.
    """
    if len(vectors) < 2:
        raise ValueError(
            f"{len(vectors)} vectors to set the ranges of int8 by: at least 2 are "
            "needed; embed more texts, or use float32 or binary"
        )
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)


def encode(
    vectors: Float[np.ndarray, "P D"],
    precision: str,
    ranges: Float[np.ndarray, "2 D"] | None = None,
) -> Codes:
    """Quantizes embeddings.

    Args:
        vectors: The embeddings.
        precision: One of `PRECISIONS`.
        ranges: For int8, see `calibrate`; values beyond them are clipped. None takes
            those of `vectors`.

    Raises:
        ValueError: An unknown precision, too few vectors to find ranges by, or a vector
            that is not finite, which a code of fewer bits could not show.
    """
    check_precision(precision)
    vectors = np.asarray(vectors, np.float32)
    dim = vectors.shape[1]
    if precision == FLOAT32:
        return Codes(vectors, precision, dim)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"vectors[{int(np.argmin(finite))}]: the vector is not finite and has no "
            f"{precision} code; embed the text again with a model whose weights are "
            "finite"
        )
    if precision == BINARY:
        return Codes(np.packbits(vectors > 0, axis=1), precision, dim)
    ranges = calibrate(vectors) if ranges is None else ranges
    start, step = _steps(ranges)
    step = np.where(step == 0, np.float32(1), step)
    levels = np.clip(np.floor((vectors - start) / step), 0, 255)
    return Codes((levels - 128).astype(np.int8), precision, dim, ranges)


def decode(
    values: Shaped[np.ndarray | Array, "P W"],
    precision: str,
    dim: int,
    ranges: Float[np.ndarray | Array, "2 D"] | None = None,
) -> Any:
    """Returns what codes stand for, [P, D]; traceable.

    An int8 code stands for the middle of its step; the signs are scaled to length 1.
    """
    if precision == BINARY:
        bits = jnp.unpackbits(jnp.asarray(values), axis=1, count=dim)
        return (2.0 * bits.astype(jnp.float32) - 1.0) * dim**-0.5
    values = jnp.asarray(values, jnp.float32)
    if precision == FLOAT32:
        return values
    assert ranges is not None
    start, step = _steps(ranges)
    return (values + 128.5) * step[None] + start[None]


def _steps(ranges: Any) -> tuple[Any, Any]:
    return ranges[0], (ranges[1] - ranges[0]) / 255
