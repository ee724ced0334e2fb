"""Kills a training run at random points and compares the final state.

    python benchmarks/kills.py --kills=20

A run that is killed repeatedly, by SIGKILL and SIGTERM in turn, and resumed each time
must end with the same bytes as an uninterrupted run: parameters, optimizer state and
metrics, on CPU. The script exits with 1 if they differ.
"""

import argparse
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import small_runs

STEPS = 60
SETTINGS = {
    "data.batch_size": 8,
    "data.query_length": 16,
    "data.passage_length": 32,
    "train.num_steps": STEPS,
    "train.microbatch_size": 4,
    "checkpoint.every_steps": 7,
    "checkpoint.keep": 2,
}


def start(workdir: pathlib.Path, shared: pathlib.Path) -> subprocess.Popen:
    """Starts or resumes the run. The compilation cache is kept between starts."""
    settings = SETTINGS | {
        "data.cache_dir": shared / "data",
        "train.compilation_cache": shared / "compiled",
    }
    keep_all = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return small_runs.start(workdir, settings, devices=1, variables=keep_all)


def newest_step(workdir: pathlib.Path) -> int:
    from gecko_jax.training import metrics

    lines = metrics.read(workdir / metrics.METRICS)
    return max((int(line["step"]) for line in lines), default=0)


def kill(workdir: pathlib.Path, shared: pathlib.Path, number: int, step: int) -> None:
    """Sends a signal when the run has logged `step`, or shortly after."""
    process = start(workdir, shared)
    while process.poll() is None and newest_step(workdir) < step:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(number)
    # The run may finish before a late signal arrives.
    expected = {-signal.SIGKILL} if number == signal.SIGKILL else {143, -signal.SIGTERM}
    status = small_runs.finish(process, expected | {0})
    name = signal.Signals(number).name
    print(f"{name} at step {newest_step(workdir)}: {status}", flush=True)


def state(workdir: pathlib.Path) -> dict[str, bytes]:
    """Returns the final state of a run, by name."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from gecko_jax.training import metrics

    contents = {}
    for item in ("params", "opt_state"):
        folder = workdir.absolute() / "checkpoints" / str(STEPS) / item
        tree = ocp.PyTreeCheckpointHandler().restore(folder)
        for path, leaf in jax.tree.leaves_with_path(tree):
            contents[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    for line in metrics.read(workdir / metrics.METRICS):
        reproducible = {
            name: value
            for name, value in line.items()
            if not name.startswith("time/") and not name.endswith("_per_second")
        }
        content = repr(sorted(reproducible.items()))
        contents[f"metrics {line['step']}"] = content.encode()
    return contents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(small_runs.ROOT))
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        shared = pathlib.Path(folder)
        uninterrupted, killed = shared / "whole", shared / "killed"
        small_runs.finish(start(uninterrupted, shared))
        # Ascending steps: a killed run resumes from an earlier checkpoint.
        steps = sorted(random.randrange(1, STEPS - 1) for _ in range(options.kills))
        for turn, step in enumerate(steps):
            number = (signal.SIGKILL, signal.SIGTERM)[turn % 2]
            kill(killed, shared, number, step)
        small_runs.finish(start(killed, shared))
        expected, resumed = state(uninterrupted), state(killed)
    differing = [
        name
        for name in expected.keys() | resumed.keys()
        if expected.get(name) != resumed.get(name)
    ]
    print(
        f"{len(expected)} arrays and lines after {options.kills} kills: "
        + (f"differing: {sorted(differing)}" if differing else "the same, bit for bit")
    )
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
