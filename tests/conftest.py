"""What every test runs under: 8 CPU devices, strict shapes, right numbers."""

import atexit
import os
import shutil
import tempfile

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
# Tests that train twice compile once. The cache is new for each session.
_COMPILED = tempfile.mkdtemp(prefix="gecko_jax_compiled_")
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _COMPILED)

# Importing the package sets XLA's flag for right numbers on CPU.
from gecko_jax import numerics  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _right_numbers() -> None:
    numerics.check()


@pytest.fixture(scope="session")
def tiny_files():
    """Files of a small, untrained model with the bundled vocabulary."""
    import pathlib

    from gecko_jax import checkpoints, model, text

    quickstart = pathlib.Path(__file__).parents[1] / "gecko_jax" / "quickstart"
    config = model.EncoderConfig(
        vocab_size=8_064,
        model_dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        embedding_dim=16,
    )
    return checkpoints.ModelFiles(
        params=jax.jit(model.init_params, static_argnums=0)(config, jax.random.key(0)),
        encoder_config=config,
        text_format=text.TextFormat(
            task_descriptions={"docs": "search result", "sts": "semantic similarity"},
            symmetric_tasks=("sts",),
        ),
        vocabulary_proto=(quickstart / "vocabulary.model").read_bytes(),
        extra_ids=0,
        mrl_dims=(4, 8, 16),
        query_length=64,
        passage_length=200,
        step=7,
        revision="tiny-7",
    )


@pytest.fixture(scope="session")
def tiny_gecko(tiny_files):
    """The model of `tiny_files`, ready to encode."""
    from gecko_jax import embedding

    return embedding.Gecko(tiny_files)
