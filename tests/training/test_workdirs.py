"""The workdir of a run: one run at a time."""

import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import ml_collections
import pytest

import gecko_jax.config
from gecko_jax.data import pipeline
from gecko_jax.training import workdirs

HOLD = """
import pathlib, sys
from gecko_jax.training import workdirs
with workdirs.hold(pathlib.Path(sys.argv[1]), True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_workdir_are_refused_until_the_first_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[2],
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=rf"another run.*process {other.pid} on"),
        workdirs.hold(tmp_path, True),
    ):
        pass
    # Processes of one run share its workdir; the first one holds it for all.
    with workdirs.hold(tmp_path, False):
        pass
    other.kill()
    other.wait()
    with workdirs.hold(tmp_path, True):
        assert str(os.getpid()) in (tmp_path / workdirs.LOCK).read_text()


@pytest.mark.parametrize(
    "position", [{}, {"mixture_hash": 3}, {"mixture_hash": "a", "mixture": []}]
)
def test_an_edited_position_is_reported_with_the_remedy(position):
    batches = mock.create_autospec(pipeline.Batches, instance=True, mixture_hash="a")
    with pytest.raises(ValueError, match=r"edited position.*remove that checkpoint"):
        workdirs.check_position(
            position, batches, ml_collections.ConfigDict(), loss=None
        )


def test_a_run_continues_only_with_its_own_loss():
    batches = mock.create_autospec(
        pipeline.Batches, instance=True, mixture_hash="a", facts={}
    )
    config = ml_collections.ConfigDict({"seed": 0})
    own = workdirs.position(batches, config, max)
    workdirs.check_position(own, batches, config, max)
    with pytest.raises(
        ValueError, match=r"trained with builtins.max .*not with config"
    ):
        workdirs.check_position(own, batches, config, None)
    contrastive = workdirs.position(batches, config, None)
    assert "loss" not in contrastive
    with pytest.raises(ValueError, match=r"with config.loss, not with builtins.min"):
        workdirs.check_position(contrastive, batches, config, min)


def test_a_loss_is_identified_by_its_code():
    def build(body):
        names = {"__name__": "notebook"}
        exec(f"def loss(queries, *_): return {body}", names)
        return workdirs._loss_name(names["loss"])

    assert build("queries.sum(1)") == build("queries.sum(1)")
    assert build("queries.sum(1)") != build("queries.mean(1)")
    assert build("queries + 1") != build("queries + 2")
    assert build("queries").startswith("notebook.loss (")


def test_a_run_resumes_if_a_key_was_added_since(tmp_path):
    values = {"seed": 0, "model": {"num_layers": 2}}
    (tmp_path / workdirs.CONFIG).write_text(json.dumps(values))
    now = ml_collections.ConfigDict(values)
    for key, value in gecko_jax.config.ADDED_KEYS.items():
        group, _, name = key.partition(".")
        now[group] = {**now.get(group, {}), name: value}
    workdirs.check_config(tmp_path, now)
    now.model.attention = "cudnn"
    with pytest.raises(ValueError, match=r"model\.attention: was 'xla', is 'cudnn'"):
        workdirs.check_config(tmp_path, now)
