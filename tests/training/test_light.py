"""Without TensorFlow and seqio: what needs no tokenizing of training data works."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from gecko_jax.cli import flags
from gecko_jax.text import text_formats
from gecko_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = ("seqio", "tensorflow", "tensorflow_datasets")

# Hides the packages from every way of looking for them.
LIGHT = f"""
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from gecko_jax.cli import entry
sys.exit(entry.main(sys.argv[1:]))
"""
OVERRIDES = {
    "data.batch_size": 8,
    "data.passage_length": 32,
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.mlp_dim": 32,
    "model.embedding_dim": 16,
    "loss.mrl_dims": "(8,16)",
    "loss.mrl_weights": "(1.0,1.0)",
    "init.align_steps": 1,
    "optimizer.warmup_steps": 1,
    "train.num_steps": 4,
    "checkpoint.every_steps": 2,
    "evaluation.folder": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with pairs and the cache of their tokens."""
    path = tmp_path_factory.mktemp("light")
    with (path / "pairs.jsonl").open("w") as file:
        for i in range(32):
            pair = {"query": f"number {i}", "positive": f"the word {chr(97 + i)} {i}"}
            file.write(json.dumps({"task": "numbers", **pair}) + "\n")
    config = flags.load(f"{ROOT / 'configs/prefinetune.py'}:local", arguments(path))
    loop.build_batches(config, text_format=text_formats.TextFormat())
    return path


def arguments(folder):
    values = OVERRIDES | {
        "data.files": f"('{folder / 'pairs.jsonl'}',)",
        "data.cache_dir": str(folder / "cache"),
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def light(*words):
    run = subprocess.run(
        [sys.executable, "-c", LIGHT, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return run.returncode, run.stdout + run.stderr


def train_light(folder):
    config = f"--config={ROOT / 'configs/prefinetune.py'}:local"
    workdir = f"--workdir={folder / 'run'}"
    return light("train", config, workdir, *arguments(folder))


def test_training_resumes_and_embeds_from_a_cache_without_tensorflow(folder):
    status, output = train_light(folder)
    assert status == 0, output
    shutil.rmtree(folder / "run" / "checkpoints" / "4")
    status, output = train_light(folder)
    assert status == 0, output
    assert "continuing from step 2" in output
    (folder / "texts.txt").write_text("the word a\nthe word b\n")
    steps = (
        ("embed", folder / "texts.txt", f"--output={folder / 'vectors'}"),
        ("index", folder / "vectors", f"--output={folder / 'index'}"),
        ("search", "word a", f"--index={folder / 'index'}"),
    )
    for words in steps:
        model = [] if words[0] == "index" else [f"--model={folder / 'run'}"]
        status, output = light(*words, *model)
        assert status == 0, output
    assert "the word a" in output


def test_tokenizing_without_tensorflow_says_how_to_install_it(folder, tmp_path):
    status, output = light(
        "train",
        f"--config={ROOT / 'configs/prefinetune.py'}:local",
        f"--workdir={tmp_path / 'run'}",
        *arguments(folder),
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    assert status == 1
    assert "Traceback" not in output
    assert re.search(r"needs TensorFlow and seqio.*pip install gecko-jax", output)


def test_light_requirements_are_all_but_tensorflow_and_seqio():
    names = [
        re.split(r"[>=\[]", line)[0]
        for line in (ROOT / "requirements-light.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(names) == len(set(names))
    assert not {"tensorflow", "seqio", "tensorflow-datasets"} & set(names)
