"""What every test runs under: 8 CPU devices, strict shapes, right numbers."""

import os

# TensorFlow's C++ notes would drown pytest's own output.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Before any import of the package: shapes and types are checked at run time.
jaxtyping.install_import_hook("gecko_jax", "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Importing the package sets XLA's flag for right numbers on CPU.
from gecko_jax import numerics  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _right_numbers() -> None:
    numerics.check()
