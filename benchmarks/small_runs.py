"""Small training runs in separate processes, which a benchmark can kill."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SETTINGS = {
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.head_dim": 16,
    "model.mlp_dim": 32,
    "model.embedding_dim": 16,
    "model.dropout_rate": 0.1,
    "loss.mrl_dims": "(8,16)",
    "loss.mrl_weights": "(1.0,1.0)",
    "init.token_weights": "none",
    "init.align_steps": 0,
    "optimizer.warmup_steps": 5,
    "train.log_every_steps": 1,
    "evaluation.every_steps": 0,
    "evaluation.folder": "",
}


def start(
    workdir: pathlib.Path,
    settings: Mapping[str, Any],
    *,
    devices: int,
    peers: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """Starts or resumes one process of a run.

    Args:
        workdir: Workdir of the run.
        settings: Config keys in addition to `SETTINGS`.
        devices: Number of devices of this process.
        peers: Flags that name the other processes.
        variables: Environment variables in addition to those set here.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "gecko_jax",
            "train",
            f"--config={ROOT / 'configs/prefinetune.py'}:local",
            f"--workdir={workdir}",
            *peers,
            *(f"--config.{k}={v}" for k, v in (SETTINGS | dict(settings)).items()),
        ],
        env=environment | dict(variables or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a signal to the group reaches the training child
    )


def finish(process: subprocess.Popen, expected: Collection[int] = (0,)) -> int:
    """Waits for the end of a process and returns its exit status.

    Raises:
        SystemExit: The status is not an expected one. The message has the run's output.
    """
    _, notes = process.communicate(timeout=1_800)
    if process.returncode not in expected:
        raise SystemExit(f"a run exited with status {process.returncode}:\n{notes}")
    return process.returncode
