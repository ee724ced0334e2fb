"""Quantized embeddings: one byte or one bit per entry.

    int8     255 steps between the least and the greatest value of each dim
    binary   the sign of each entry, eight entries per byte

Both equal `quantize_embeddings` of sentence-transformers ("int8" and "ubinary").
Queries stay float32: a search decodes passages block by block, which loses far less
accuracy than comparing codes with codes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

FLOAT32, INT8, BINARY = "float32", "int8", "binary"
PRECISIONS = (FLOAT32, INT8, BINARY)

# Dtype of codes.
DTYPES: dict[str, type] = {FLOAT32: np.float32, INT8: np.int8, BINARY: np.uint8}


@dataclasses.dataclass(frozen=True)
class Codes:
    """Embeddings at one of `PRECISIONS`."""

    values: Shaped[np.ndarray, "P W"]  # float32 or int8, W = D; or uint8, W = ceil(D/8)
    precision: str
    dim: int  # width D of the embeddings
    ranges: Float[np.ndarray, "2 D"] | None = None  # least and greatest value; int8

    def __len__(self) -> int:
        return len(self.values)

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of one embedding."""
        return bytes_per_vector(self.precision, self.dim)

    def decode(self) -> Float[np.ndarray, "P D"]:
        """Returns the embeddings; approximate unless they are float32."""
        if self.precision == FLOAT32:
            return self.values
        return np.asarray(decode(self.values, self.precision, self.dim, self.ranges))


def check_precision(precision: str) -> None:
    """Raises ValueError unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r}: it must be one of {', '.join(PRECISIONS)}"
        )


def bytes_per_vector(precision: str, dim: int) -> int:
    """Returns the bytes of one embedding of `dim` entries."""
    return width(precision, dim) * np.dtype(DTYPES[precision]).itemsize


def width(precision: str, dim: int) -> int:
    """Returns the number of entries in a row of codes."""
    return -(-dim // 8) if precision == BINARY else dim


def encode(
    vectors: Float[np.ndarray, "P D"],
    precision: str,
    ranges: Float[np.ndarray, "2 D"] | None = None,
) -> Codes:
    """Quantizes embeddings.

    int8 clips values outside of `ranges`; None uses those of `vectors`. Raises
    ValueError if the precision is unknown, there are too few vectors for ranges, or a
    vector is not finite, which int8 and binary cannot represent.
    """
    check_precision(precision)
    vectors = np.asarray(vectors, np.float32)
    dim = vectors.shape[1]
    if precision == FLOAT32:
        return Codes(vectors, precision, dim)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"vectors[{int(np.argmin(finite))}]: not finite, so it has no {precision} "
            "code; embed the text with a model whose weights are finite"
        )
    if precision == BINARY:
        return Codes(np.packbits(vectors > 0, axis=1), precision, dim)
    if ranges is None:
        if len(vectors) < 2:
            raise ValueError(
                f"{len(vectors)} vectors: int8 needs at least 2 to find the range of "
                "each dim; embed more texts, or use float32 or binary"
            )
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
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
    """Returns the embeddings that codes represent, [P, D]; traceable.

    An int8 code represents the middle of its step. Signs are scaled to unit length.
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
