"""Sums over the rows of a similarity matrix that is never whole in memory.

A row's denominator runs over every key of the global batch. Both passes compute the
similarities one block of keys at a time, so memory grows with the number of rows, not
with its square. The only residual besides the inputs is each row's log-sum-exp.

Inside a `shard_map` a device has its own rows and its own keys. A block takes equally
many keys from each device. The forward pass gathers the block where it is used; the
backward pass scatters the keys' cotangents right after computing them. No device ever
holds the keys of the whole batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

# Keys per block, over all devices. It does not affect results beyond rounding.
BLOCK_SIZE = 1024
# With many rows a block has fewer keys, so that its similarities fit a TPU's fast
# memory, but never fewer than fill its matrix unit.
_MAX_SIMILARITIES = 2**21
_MIN_BLOCK_SIZE = 128

# Checkpoint name for these sums: cheap to store, expensive to recompute.
SUMS = "blockwise_sums"

# Six bfloat16 passes on a TPU: at a temperature of 0.01 an error of 0.004 in a cosine
# is 0.4 nats. The loss costs far less than 1% of the encoder.
_PRECISION = jax.lax.Precision.HIGHEST


class Rows(NamedTuple):
    """The mask of a row: which keys count for it."""

    row: Int[Array, " B"]  # index in the global batch; never its own negative
    group: Int[Array, " B"]  # a key counts only if its group is equal
    # Content ids, one for each of E reasons. A key is dropped if its own content id for
    # the same reason is equal.
    excluded: UInt32[Array, "B E 2"]


class Keys(NamedTuple):
    """The mask of a key, as in `Rows`."""

    row: Int[Array, " C"]
    group: Int[Array, " C"]
    excluded: UInt32[Array, "C E 2"]
    mask: Bool[Array, " C"]  # False for padding


class Sums(NamedTuple):
    """Sums of a row over its keys. "Other keys" are all that count but its own.

    Only `log_sum_exp` and `squares` have a gradient. Without a key, `log_sum_exp` and
    `best` are minus infinity.
    """

    log_sum_exp: Float[Array, " B"]  # of similarity / temperature
    squares: Float[Array, " B"]  # sum of squared similarities with the other keys
    best: Float[Array, " B"]  # largest similarity with another key
    total: Float[Array, " B"]  # sum of similarities with the other keys
    number: Float[Array, " B"]  # number of other keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def sums(
    left: Float[Array, "B D"],
    right: Float[Array, "C D"],
    rows: Rows,
    keys: Keys,
    temperature: float,
    with_self: bool,
    axis_names: Sequence[str],
    block_size: int,
) -> Sums:
    """Sums each row's similarities over the keys that count.

    Args:
        left: Vector of each row.
        right: Vector of each key of this device.
        rows: See `Rows`.
        keys: See `Keys`.
        temperature: Divides the similarities in the log-sum-exp.
        with_self: Whether the key with the row's own index counts in the log-sum-exp.
        axis_names: Mesh axes over which rows and keys are split; empty for none.
        block_size: Keys per block, fewer if there are many rows.
    """

    def add(so_far: Sums, block: tuple[Array, Keys]) -> tuple[Sums, None]:
        others, keep = _masks(rows, block[1], with_self)
        similarity = _similarity(left, _gather(block[0], axis_names))
        logits = jnp.where(keep, similarity / temperature, -jnp.inf)
        best = jnp.max(jnp.where(others, similarity, -jnp.inf), axis=1)
        return Sums(
            jnp.logaddexp(so_far.log_sum_exp, jax.nn.logsumexp(logits, axis=1)),
            so_far.squares + jnp.sum(jnp.where(others, similarity**2, 0.0), axis=1),
            jnp.maximum(so_far.best, best),
            so_far.total + jnp.sum(jnp.where(others, similarity, 0.0), axis=1),
            so_far.number + jnp.sum(others.astype(jnp.float32), axis=1),
        ), None

    # Derived from an argument, so that inside a `shard_map` they vary over its axes.
    zero = jnp.zeros_like(left[:, 0])
    nothing = jnp.full_like(zero, -jnp.inf)
    start = Sums(nothing, zero, nothing, zero, zero)
    size = _block_keys(left.shape[0], block_size)
    return jax.lax.scan(add, start, _split(right, keys, axis_names, size))[0]


def _forward(left, right, rows, keys, temperature, with_self, axis_names, block_size):
    result: Any = sums(
        left, right, rows, keys, temperature, with_self, axis_names, block_size
    )
    result = jax.tree.map(
        lambda leaf: ad_checkpoint.checkpoint_name(leaf, SUMS), result
    )
    return result, (left, right, rows, keys, result.log_sum_exp)


def _backward(temperature, with_self, axis_names, block_size, residuals, cotangents):
    left, right, rows, keys, log_sum_exp = residuals
    lse_cotangent = (cotangents.log_sum_exp / temperature)[:, None]
    squares_cotangent = cotangents.squares[:, None]

    def add(left_cotangent: Array, block: tuple[Array, Keys]) -> tuple[Array, Array]:
        # Recompute the block's similarities.
        others, keep = _masks(rows, block[1], with_self)
        block_keys = _gather(block[0], axis_names)
        similarity = _similarity(left, block_keys)
        # The derivative of a log-sum-exp is the softmax. A row without keys has a
        # log-sum-exp of minus infinity, but there `keep` is False.
        softmax = jnp.exp(similarity / temperature - log_sum_exp[:, None])
        cotangent = jnp.where(keep, softmax, 0.0) * lse_cotangent
        cotangent += jnp.where(others, 2.0 * similarity, 0.0) * squares_cotangent
        # Through the product: rows accumulate over blocks, keys go to their device.
        left_cotangent += jnp.einsum(
            "bc,cd->bd", cotangent, block_keys, precision=_PRECISION
        )
        to_keys = jnp.einsum("bc,bd->cd", cotangent, left, precision=_PRECISION)
        return left_cotangent, _scatter(to_keys, axis_names)

    size = _block_keys(left.shape[0], block_size)
    blocks = _split(right, keys, axis_names, size)
    left_cotangent, key_blocks = jax.lax.scan(add, jnp.zeros_like(left), blocks)
    right_cotangent = key_blocks.reshape(-1, right.shape[1])[: right.shape[0]]
    return left_cotangent, right_cotangent, None, None


sums.defvjp(_forward, _backward)


def _block_keys(num_rows: int, block_size: int) -> int:
    return min(block_size, max(_MAX_SIMILARITIES // num_rows, _MIN_BLOCK_SIZE))


def _similarity(
    left: Float[Array, "B D"], right: Float[Array, "C D"]
) -> Float[Array, "B C"]:
    return jnp.einsum("bd,cd->bc", left, right, precision=_PRECISION)


def _masks(
    rows: Rows, keys: Keys, with_self: bool
) -> tuple[Bool[Array, "B C"], Bool[Array, "B C"]]:
    """Returns which keys count: the other ones, and those of the log-sum-exp."""
    # Rows and keys carry their index in the global batch, on every device.
    is_self = rows.row[:, None] == keys.row[None]
    others = (rows.group[:, None] == keys.group[None]) & keys.mask[None] & ~is_self
    for reason in range(rows.excluded.shape[1]):
        # Equal ids are equal in both words.
        row, key = rows.excluded[:, reason], keys.excluded[:, reason]
        others &= (row[:, :1] != key[:, :1].T) | (row[:, 1:] != key[:, 1:].T)
    return others, others | is_self if with_self else others


def _split(
    right: Float[Array, "C D"],
    keys: Keys,
    axis_names: Sequence[str],
    block_size: int,
) -> tuple[Float[Array, "N c D"], Keys]:
    """Cuts the keys into blocks of equal size; padding never counts.

    Returns this device's vectors of each block, and the masks of all devices' keys.
    """
    num_devices = math.prod(jax.lax.axis_size(name) for name in axis_names)
    num_keys = right.shape[0]
    num_blocks = -(-num_keys // max(block_size // num_devices, 1))
    size = -(-num_keys // num_blocks)
    padding = num_blocks * size - num_keys

    def cut(leaf: Array, fill: int = 0) -> Array:
        widths = [(0, padding)] + [(0, 0)] * (leaf.ndim - 1)
        padded = jnp.pad(leaf, widths, constant_values=fill)
        return padded.reshape(num_blocks, size, *leaf.shape[1:])

    row, group, excluded, mask = keys
    # Padding has the index -1, which no row has, so it is no row's own key either.
    blocks = Keys(cut(row, -1), cut(group), cut(excluded), cut(mask))
    return cut(right), Keys(*(_gather(leaf, axis_names, axis=1) for leaf in blocks))


def _gather(
    leaf: Shaped[Array, "..."], axis_names: Sequence[str], axis: int = 0
) -> Shaped[Array, "..."]:
    if not axis_names:
        return leaf
    return jax.lax.all_gather(leaf, axis_names, axis=axis, tiled=True)


def _scatter(
    leaf: Float[Array, "C D"], axis_names: Sequence[str]
) -> Float[Array, "c D"]:
    return jax.lax.psum_scatter(leaf, axis_names, tiled=True) if axis_names else leaf
