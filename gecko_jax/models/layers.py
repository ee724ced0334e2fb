"""Layers that every encoder family uses: dense, norm, dropout, activations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

Initializer = Callable[..., Array]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),  # T5 1.1 and Gemma use tanh
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}

# Below any real logit and far from overflow in bfloat16; its exp is 0.
MASKED_LOGIT = -1e9


def param(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
) -> Any:
    """Declares a float32 parameter with logical axes, and returns its value."""
    return module.param(
        name, nn.with_logical_partitioning(init, axes), shape, jnp.float32
    )


def dropout(
    x: Float[Array, "R ..."], rate: float, keys: Key[Array, " R"] | None
) -> Float[Array, "R ..."]:
    """Drops entries with probability `rate`; without keys, drops nothing.

    All positions of a row (axis -2) share one mask, as in T5X: drawing random bits for
    every token would take longer than the layer. Each row has its own key, so its masks
    depend on neither the mesh nor the microbatch. The keys are an argument because a
    Flax rng stream folds in the module's path, which would give a scanned stack other
    masks than an unrolled one.
    """
    if keys is None or rate == 0.0:
        return x
    shape = (*x.shape[1:-2], 1, x.shape[-1])
    # The remaining entries are scaled up, so the expectation does not change.
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def norm(
    inputs: Float[Array, "*rows M"], weight: Float[Array, " M"] | None, epsilon: float
) -> Float[Array, "*rows M"]:
    """RMS norm: divides by the root mean square in float32, then scales."""
    wide = inputs.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scaled = wide * jax.lax.rsqrt(mean_square + epsilon)
    if weight is not None:
        scaled = scaled * jnp.broadcast_to(weight.astype(jnp.float32), scaled.shape)
    return scaled.astype(inputs.dtype)


class Dense(nn.Module):
    """A matrix product without bias."""

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... X"]) -> Float[Array, "... Y"]:
        """Multiplies the last axis, in `dtype`."""
        shape = (x.shape[-1], self.features)
        kernel = param(self, "kernel", self.kernel_init, self.axes, shape)
        # Flatten to two dimensions: XLA:CPU sums a gradient over two leading axes with
        # a transpose, which made the training step a third slower.
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = jnp.einsum("xm,mf->xf", flat, kernel.astype(self.dtype))
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """RMS norm: no centering, no bias; `offset` is added to the stored scale."""

    dtype: jnp.dtype
    epsilon: float = 1e-6
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "... M"]) -> Float[Array, "... M"]:
        """Normalizes the last axis; takes any dtype and returns `dtype`."""
        init = nn.initializers.constant(1.0 - self.offset)
        scale = param(self, "scale", init, ("embed",), (x.shape[-1],))
        scale = scale + self.offset if self.offset else scale
        # Two dimensions, as in `Dense`, for the gradient of the scale.
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(flat), axis=-1, keepdims=True)
        normed = flat * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * scale[None]).astype(self.dtype).reshape(x.shape)
