"""Runs of two processes with four devices each, and the death of one of them."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gecko_jax.cli import multi_process
from gecko_jax.formats import checkpoints
from gecko_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = {
    "data.batch_size": 16,
    "data.query_length": 16,
    "data.passage_length": 16,
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 16,
    "model.embedding_dim": 8,
    "loss.mrl_dims": "(8,)",
    "loss.mrl_weights": "(1.0,)",
    "init.token_weights": "none",
    "init.align_steps": 0,
    "mesh.fsdp": 2,
    "optimizer.warmup_steps": 1,
    "optimizer.token_rate": 1.0,
    "train.num_steps": 60,
    "checkpoint.every_steps": 5,
    "checkpoint.keep": 2,
    "evaluation.every_steps": 0,
    "evaluation.folder": "",
}


def _free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def _assert_same_params(first, second):
    # Devices sum in another order, over sixty steps. The optimizer divides by the size
    # of past gradients, so rounding counts more where a gradient is near 0.
    others = _read_params(second)
    for name, leaf in _read_params(first).items():
        apart = np.abs(leaf - others[name])
        assert apart.max() < 1e-3, name
        assert np.mean(apart > 1e-4) < 1e-4, name


def _start(workdir, cache, num_devices, *options):
    keys = SETTINGS | {"data.cache_dir": cache}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "gecko_jax",
            "train",
            f"--config={ROOT / 'configs/prefinetune.py'}:local",
            f"--workdir={workdir}",
            *options,
            *(f"--config.{key}={value}" for key, value in keys.items()),
        ],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(num_devices),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def _start_pair(workdir, cache):
    return _start_some(workdir, cache, 2)


def _start_some(workdir, cache, processes):
    """Starts one run of several processes with eight devices in total."""
    port = _free_port()
    return [
        _start(
            workdir,
            cache,
            8 // processes,
            f"--coordinator=localhost:{port}",
            f"--processes={processes}",
            f"--process={process}",
            "--peer-timeout=20",
            "--config.train.log_every_steps=1",
        )
        for process in range(processes)
    ]


def _wait_for(folder, seconds=400):
    until = time.monotonic() + seconds
    while not folder.exists():
        assert time.monotonic() < until, f"{folder} did not come"
        time.sleep(0.01)


def _child_of(parent):
    children = pathlib.Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    return int(children.read_text().split()[0])


def _read_params(workdir):
    opened = checkpoints.open_params(workdir, 60)
    return {name: leaf.read() for name, leaf in opened.items()}


@pytest.mark.slow
def test_two_processes_train_are_killed_and_resume_as_one(tmp_path):
    cache = tmp_path / "cache"
    whole = _start(tmp_path / "whole", cache, 8)
    assert whole.wait(600) == 0, whole.stderr.read()

    pair = _start_pair(tmp_path / "killed", cache)
    _wait_for(tmp_path / "killed" / "checkpoints" / "5")
    os.kill(_child_of(pair[1]), signal.SIGKILL)
    died = time.monotonic()
    told = [process.communicate(timeout=120)[1] for process in pair]
    assert time.monotonic() - died < 60
    assert [process.returncode for process in pair] == [1, 1]
    assert "process 1 was ended by SIGKILL" in told[1]
    assert "Its checkpoints are complete" in told[0], told[0]
    step = checkpoints.latest_step(tmp_path / "killed")
    assert step is not None
    assert step < 60

    alone = _start(tmp_path / "killed", cache, 8)
    notes = alone.communicate(timeout=600)[1]
    assert alone.returncode == 0, notes
    assert f"continuing from step {step}" in notes
    _assert_same_params(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_four_processes_resume_a_killed_run_of_two(tmp_path):
    """Any number of processes reads the same global batches, as the losses show.

    `benchmarks/resume.py` does the same at step 137 of a larger mixture.
    """
    cache = tmp_path / "cache"
    whole = _start(tmp_path / "whole", cache, 8, "--config.train.log_every_steps=1")
    pair = _start_some(tmp_path / "killed", cache, 2)
    _wait_for(tmp_path / "killed" / "checkpoints" / "15")
    for process in pair:
        os.kill(_child_of(process), signal.SIGKILL)
    for process in (whole, *pair):
        process.communicate(timeout=600)
    assert whole.returncode == 0
    step = checkpoints.latest_step(tmp_path / "killed")
    assert 15 <= step < 60

    told = [
        process.communicate(timeout=600)[1]
        for process in _start_some(tmp_path / "killed", cache, 4)
    ]
    assert f"continuing from step {step}" in told[0], told[0]
    runs = [tmp_path / name for name in ("whole", "killed")]
    losses = [
        [line["loss"] for line in metrics.read(run / metrics.METRICS)] for run in runs
    ]
    assert len(losses[0]) == 60
    np.testing.assert_allclose(*losses, atol=1e-4)
    _assert_same_params(*runs)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_after_one_signal(tmp_path):
    pair = _start_pair(tmp_path / "run", tmp_path / "cache")
    _wait_for(tmp_path / "run" / "checkpoints" / "5")
    pair[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], told
    step = checkpoints.latest_step(tmp_path / "run")
    assert f"SIGTERM after step {step} of 60: saved in" in told[0]


@pytest.mark.parametrize(
    ("peers", "message"),
    [
        (("localhost:1", None, None), "--processes, --process: missing"),
        (("localhost:1", 2, 2), "must be below --processes=2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(peers, message):
    with pytest.raises(ValueError, match=message):
        multi_process.check(multi_process.Peers(*peers, 10))
