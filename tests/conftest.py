"""Settings of all tests: 8 CPU devices, strict shapes, correct numbers."""

import atexit
import dataclasses
import os
import pathlib
import shutil
import signal
import tempfile

# Hide TensorFlow's C++ log lines.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

# Before any import of the package: shapes and types are checked at run time.
jaxtyping.install_import_hook("gecko_jax", "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Files whose tests take longest, in this order: they run first, so that the last files
# are short and all processes end at about the same time.
LONGEST = (
    "training/test_gradients.py",
    "models/test_dual_encoder.py",
    "llm/test_local.py",
    "losses/test_contrastive.py",
    "test_mutations.py",
    "training/test_loop.py",
    "llm/test_hostile_servers.py",
    "training/test_t5x_adapter.py",
    "formats/test_checkpoints.py",
    "data/test_registration.py",
    "training/test_light.py",
    "benchmarks/test_distil.py",
    "llm/test_in_process.py",
    "formats/test_averaging.py",
    "models/test_transformer.py",
    "test_config.py",
    "data/test_pipeline.py",
    "models/test_t5.py",
    "formats/test_round_trip.py",
    "benchmarks/test_fret_proof.py",
    "fret/test_runs.py",
    "data/test_prepare.py",
)

# Tests that train twice compile once. The cache is new for each session.
_COMPILED = tempfile.mkdtemp(prefix="gecko_jax_compiled_")
atexit.register(shutil.rmtree, _COMPILED, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", _COMPILED)

# Importing the package sets XLA's flag for correct numbers on CPU.
from gecko_jax.parallel import numerics  # noqa: E402

# A shell ignores Ctrl-C in its background processes, and the processes that tests start
# would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {pathlib.Path(__file__).parent / name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def _correct_numbers() -> None:
    numerics.check()


@pytest.fixture(scope="session")
def tiny_files():
    """Files of a small, untrained model with the bundled vocabulary."""
    from gecko_jax.formats import model_folder
    from gecko_jax.models import dual_encoder
    from gecko_jax.text import text_formats

    quickstart = pathlib.Path(__file__).parents[1] / "gecko_jax" / "quickstart"
    config = dual_encoder.EncoderConfig(
        vocab_size=8_064,
        model_dim=16,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        embedding_dim=16,
    )
    return model_folder.ModelFiles(
        params=jax.jit(dual_encoder.init_params, static_argnums=0)(
            config, jax.random.key(0)
        ),
        encoder_config=config,
        text_format=text_formats.TextFormat(
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
    from gecko_jax.inference import embedding

    return embedding.Gecko(tiny_files)


@pytest.fixture(scope="session")
def tiny_folder(tiny_files, tmp_path_factory):
    """A folder with `tiny_files`. Tests must not change it."""
    from gecko_jax.formats import model_folder

    folder = tmp_path_factory.mktemp("model") / "tiny"
    model_folder.save_model(folder, tiny_files)
    return str(folder)


@pytest.fixture
def gecko(capsys):
    """Runs a command line in this process; returns its status, output and errors."""
    from gecko_jax.cli import entry

    def run(*arguments):
        status = entry.main(list(map(str, arguments)))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def small_files(tiny_files):
    """A model that is fast to write, of another size than `tiny_files`."""
    import jax

    from gecko_jax.models import dual_encoder

    config = dual_encoder.EncoderConfig(
        vocab_size=32,
        model_dim=8,
        num_layers=1,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        embedding_dim=8,
    )
    params = jax.jit(dual_encoder.init_params, static_argnums=0)(
        config, jax.random.key(1)
    )
    return dataclasses.replace(
        tiny_files, params=params, encoder_config=config, mrl_dims=(4, 8)
    )


@pytest.fixture
def workdir(small_files, tmp_path):
    """A workdir with checkpoints of steps 2 and 4, whose parameters differ."""
    import jax
    import numpy as np

    from gecko_jax.formats import checkpoints, model_folder

    path = tmp_path / "run"
    path.mkdir()
    model_folder.write_model_json(path, small_files)
    checkpointer = checkpoints.Checkpointer(path, keep=3, keep_every_steps=0)
    for step in (2, 4):
        params = jax.tree.map(lambda leaf, step=step: leaf + step, small_files.params)
        checkpointer.save(step, params, {"count": np.int32(step)}, {"seed": step})
    checkpointer.close()
    return path
