"""Runs of t5x with the gin files of configs/t5x: train, import, export, continue."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from gecko_jax.cli import entry
from gecko_jax.formats import detection, model_folder, parameters

pytestmark = pytest.mark.t5x

ROOT = pathlib.Path(__file__).parents[2]

SHORT = """
from __gin__ import dynamic_registration

import __main__ as train_script
from t5x import utils

include "t5x/quickstart.gin"

TRAIN_STEPS = 2
BATCH_SIZE = 8
RANDOM_SEED = 0
train_script.train.eval_period = 2
train_script.train.eval_steps = 1
utils.SaveCheckpointConfig.period = 2
"""

AGAIN = """
from __gin__ import dynamic_registration

import __main__ as train_script

include "short.gin"
include "t5x/start.gin"

TRAIN_STEPS = 4
MIXTURE_OR_TASK_NAME = "quickstart_term"
train_script.train.train_eval_dataset_cfg = None
"""


def _train(folder, gin_file, **macros):
    (folder / "short.gin").write_text(SHORT)
    (folder / "again.gin").write_text(AGAIN)
    settings = [f'--gin.{name}="{value}"' for name, value in macros.items()]
    command = [
        *(sys.executable, "-m", "t5x.train", f"--gin_file={gin_file}"),
        f"--gin_search_paths={ROOT / 'configs'},{folder}",
        *settings,
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    done = subprocess.run(
        command,
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def _flat(source):
    opened = model_folder.read_params(detection.open_model(source))
    return opened, parameters.flatten(opened.params)


def test_t5x_trains_what_gecko_imports_exports_and_t5x_trains_on(tmp_path):
    log = _train(tmp_path, "short.gin", MODEL_DIR=tmp_path / "run")
    # The mixture and each of its tasks are evaluated on their validation split.
    for name in ("quickstart", "quickstart_docs", "quickstart_term"):
        assert f"training_eval/{name} " in log

    # The settings that a T5X checkpoint does not store are in a folder next to it.
    trained, flat = _flat(tmp_path / "run")
    assert trained.step == 2
    assert trained.mrl_dims == (16, 32)
    assert (trained.query_length, trained.passage_length) == (32, 64)
    assert trained.encoder_config.l2_epsilon == 1e-12
    assert trained.encoder_config.num_heads == 8
    assert trained.text_format.task_descriptions["quickstart_term"]
    assert trained.text_format.passage == "title: {title} | text: {text}"
    before, _ = _flat(tmp_path / "run" / "checkpoint_0")
    assert before.step == 0
    assert before.revision != trained.revision

    export = tmp_path / "export"
    assert entry.main(["export", *_folders(tmp_path, export), "--to=t5x"]) == 0
    _train(
        tmp_path,
        "again.gin",
        MODEL_DIR=tmp_path / "next",
        INITIAL_CHECKPOINT_PATH=export / "checkpoint_2",
    )
    # t5x saves its initial state.
    start, restored = _flat(tmp_path / "next" / "checkpoint_2")
    assert start.step == 2
    for name, leaf in flat.items():
        np.testing.assert_array_equal(restored[name], leaf, err_msg=name)
    end, changed = _flat(tmp_path / "next")
    assert end.step == 4
    assert any((changed[name] != leaf).any() for name, leaf in flat.items())


def _folders(tmp_path, export):
    folder = tmp_path / "imported"
    assert entry.main(["import", str(tmp_path / "run"), f"--output={folder}"]) == 0
    assert json.loads((folder / "gecko.json").read_text())["step"] == 2
    return [str(folder), f"--output={export}"]
