"""Random parameters for tests that do not compile the model's initializers."""

import numpy as np

from gecko_jax.formats import parameters
from gecko_jax.models import dual_encoder


def random_params(config, seed):
    """Returns float32 NumPy arrays: kernels of usual size, and scales near 1."""
    rng = np.random.default_rng(seed)
    shapes = parameters.flatten(dual_encoder.abstract_params(config)[0])
    flat = {}
    for name, leaf in shapes.items():
        values = rng.standard_normal(leaf.shape, np.float32)
        is_scale = name.endswith("/scale")
        flat[name] = 1 + 0.1 * values if is_scale else values / leaf.shape[-1] ** 0.5
    return parameters.unflatten(flat)
