"""Without TensorFlow and seqio, everything but tokenizing training data works."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from gecko_jax.cli import flags
from gecko_jax.text import text_formats
from gecko_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = ("seqio", "tensorflow", "tensorflow_datasets")

# Hides the packages from all finders, then runs the command lines of a JSON list until
# one fails. A list that begins with "remove" names a folder to delete.
LIGHT = f"""
import json, shutil, sys

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
for words in json.loads(sys.argv[1]):
    if words[0] == "remove":
        shutil.rmtree(words[1])
    elif status := entry.main(words):
        sys.exit(status)
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


def light(*commands):
    """Runs command lines in one new process, which imports JAX only once."""
    lines = [[str(word) for word in words] for words in commands]
    run = subprocess.run(
        [sys.executable, "-c", LIGHT, json.dumps(lines)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    return run.returncode, run.stdout + run.stderr


def test_training_resumes_and_embeds_from_a_cache_without_tensorflow(folder):
    (folder / "texts.txt").write_text("the word a\nthe word b\n")
    config = f"--config={ROOT / 'configs/prefinetune.py'}:local"
    train = ("train", config, f"--workdir={folder / 'run'}", *arguments(folder))
    model = f"--model={folder / 'run'}"
    status, output = light(
        train,
        ("remove", folder / "run" / "checkpoints" / "4"),
        train,
        ("embed", folder / "texts.txt", f"--output={folder / 'vectors'}", model),
        ("index", folder / "vectors", f"--output={folder / 'index'}"),
        ("search", "word a", f"--index={folder / 'index'}", model),
    )
    assert status == 0, output
    assert "continuing from step 2" in output
    assert "the word a" in output


def test_tokenizing_without_tensorflow_says_how_to_install_it(folder, tmp_path):
    train = (
        "train",
        f"--config={ROOT / 'configs/prefinetune.py'}:local",
        f"--workdir={tmp_path / 'run'}",
        *arguments(folder),
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    )
    status, output = light(train)
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
