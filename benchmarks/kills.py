"""Kills a training run at random points and compares what it ends with.

    python benchmarks/kills.py --kills=20

A run that is killed again and again, by SIGKILL and SIGTERM in turn, and taken up again
each time must end with the bytes of one that was left alone: parameters, optimizer
state and metrics, on CPU. It exits with 1 if they differ.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 60
SETTINGS = {
    "data.batch_size": 8,
    "data.query_length": 16,
    "data.passage_length": 32,
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
    "train.num_steps": STEPS,
    "train.microbatch_size": 4,
    "train.log_every_steps": 1,
    "checkpoint.every_steps": 7,
    "checkpoint.keep": 2,
    "evaluation.every_steps": 0,
    "evaluation.folder": "",
}


def start(workdir: pathlib.Path, shared: pathlib.Path) -> subprocess.Popen:
    """Starts the run, or goes on with it; what XLA compiles is kept between starts."""
    keys = SETTINGS | {
        "data.cache_dir": shared / "data",
        "train.compilation_cache": shared / "compiled",
    }
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
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
            *(f"--config.{key}={value}" for key, value in keys.items()),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, notes = process.communicate(timeout=900)
    if process.returncode:
        raise SystemExit(f"the run failed ({process.returncode}):\n{notes}")


def newest_step(workdir: pathlib.Path) -> int:
    from gecko_jax import metrics

    lines = metrics.read(workdir / metrics.METRICS)
    return max((int(line["step"]) for line in lines), default=0)


def kill(workdir: pathlib.Path, shared: pathlib.Path, number: int, step: int) -> None:
    """Sends a signal once the run has logged `step`, or a little later."""
    process = start(workdir, shared)
    while process.poll() is None and newest_step(workdir) < step:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)
    process.communicate(timeout=900)
    name = signal.Signals(number).name
    print(f"{name} at step {newest_step(workdir)}: {process.returncode}", flush=True)
    expected = {-signal.SIGKILL} if number == signal.SIGKILL else {143, -signal.SIGTERM}
    # One that comes in the last moments finds the run at its end.
    if process.returncode not in expected | {0}:
        raise SystemExit(f"{name} ended the run with {process.returncode}")


def state(workdir: pathlib.Path) -> dict[str, bytes]:
    """Returns all that a run ends with, by name."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from gecko_jax import metrics

    found = {}
    for item in ("params", "opt_state"):
        folder = workdir.absolute() / "checkpoints" / str(STEPS) / item
        tree = ocp.PyTreeCheckpointHandler().restore(folder)
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    for line in metrics.read(workdir / metrics.METRICS):
        kept = {
            name: value
            for name, value in line.items()
            if not name.startswith("time/") and not name.endswith("_per_second")
        }
        found[f"metrics {line['step']}"] = repr(sorted(kept.items())).encode()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        shared = pathlib.Path(folder)
        whole, killed = shared / "whole", shared / "killed"
        finish(start(whole, shared))
        # Rising points: after a kill the run goes on from a checkpoint before it.
        steps = sorted(random.randrange(1, STEPS - 1) for _ in range(options.kills))
        for turn, step in enumerate(steps):
            number = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
            kill(killed, shared, number, step)
        finish(start(killed, shared))
        left_alone, taken_up = state(whole), state(killed)
    differing = [
        name
        for name in left_alone.keys() | taken_up.keys()
        if left_alone.get(name) != taken_up.get(name)
    ]
    print(
        f"{len(left_alone)} arrays and lines after {options.kills} kills: "
        + (f"differing: {sorted(differing)}" if differing else "the same, bit for bit")
    )
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
