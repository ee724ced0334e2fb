r"""Resumes a run with another number of processes and compares the final states.

    python benchmarks/resume.py                      the bundled pairs
    python benchmarks/resume.py --files=pairs.jsonl --vocabulary=t5.model \
        --extra-ids=100 --vocab-size=32128

The reference run trains to the end in one process. A second run trains in two
processes, which are killed after the checkpoint of step 137, and resumes in four. Both
runs always use four devices and the same batches, so their results may differ only by
the order of sums. The script prints how much parameters and losses differ, and exits
with 1 if the difference is larger than rounding explains.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

import small_runs

DEVICES = 4
STEPS = 200
SETTINGS = {
    "data.batch_size": 32,
    "data.query_length": 32,
    "data.passage_length": 64,
    "mesh.fsdp": 2,
    "train.num_steps": STEPS,
    "checkpoint.every_minutes": 0,
    "checkpoint.keep": 1,
}
# Rounding of sums over devices in another order, over two hundred steps.
TOLERANCE = 1e-4


def start(
    workdir: pathlib.Path, options: argparse.Namespace, processes: int
) -> list[subprocess.Popen]:
    """Starts or resumes a run in several processes on this machine."""
    settings = SETTINGS | {
        "data.cache_dir": options.cache_dir,
        "data.vocabulary": options.vocabulary,
        "data.extra_ids": options.extra_ids,
        "model.vocab_size": options.vocab_size,
        "checkpoint.every_steps": options.stop,
        "train.compilation_cache": "",
    }
    if options.files:
        settings["data.files"] = repr(tuple(options.files))
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    group = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
    return [
        small_runs.start(
            workdir,
            settings,
            devices=DEVICES // processes,
            peers=[*group, f"--process={number}"] if processes > 1 else [],
        )
        for number in range(processes)
    ]


def finish(running: list[subprocess.Popen], expected: int = 0) -> None:
    for process in running:
        small_runs.finish(process, {expected})


def losses(workdir: pathlib.Path) -> dict[int, float]:
    from gecko_jax.training import metrics

    return {
        int(line["step"]): float(line["loss"])
        for line in metrics.read(workdir / metrics.METRICS)
        if "loss" in line
    }


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="append", default=[], help="JSONL of pairs")
    parser.add_argument("--vocabulary", default="quickstart")
    parser.add_argument("--extra-ids", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=8_064)
    parser.add_argument("--stop", type=int, default=137, help="step to stop at")
    cache = pathlib.Path("~/.cache/gecko_jax").expanduser()
    parser.add_argument("--cache-dir", default=str(cache))
    options = parser.parse_args()
    sys.path.insert(0, str(small_runs.ROOT))
    import numpy as np

    from gecko_jax.formats import checkpoints

    with tempfile.TemporaryDirectory() as folder:
        uninterrupted, stopped = (
            pathlib.Path(folder) / "whole",
            pathlib.Path(folder) / "stopped",
        )
        finish(start(uninterrupted, options, 1))
        print(f"1 process: {STEPS} steps", flush=True)
        pair = start(stopped, options, 2)
        while not (stopped / "checkpoints" / str(options.stop)).exists():
            if any(process.poll() is not None for process in pair):
                break
            time.sleep(0.01)
        for process in pair:
            os.killpg(process.pid, signal.SIGKILL)
        finish(pair, -signal.SIGKILL)
        at = checkpoints.latest_step(stopped)
        print(f"2 processes: killed after the checkpoint of step {at}", flush=True)
        finish(start(stopped, options, 4))
        params = [
            {
                name: leaf.read()
                for name, leaf in checkpoints.open_params(run, STEPS).items()
            }
            for run in (uninterrupted, stopped)
        ]
        curves = [losses(run) for run in (uninterrupted, stopped)]
    worst = max(
        float(np.abs(leaf - params[1][name]).max()) for name, leaf in params[0].items()
    )
    largest = max(float(np.abs(leaf).max()) for leaf in params[0].values())
    loss = max(abs(curves[0][step] - curves[1][step]) for step in curves[0])
    print(
        f"4 processes: resumed to step {STEPS}; parameters differ by at most "
        f"{worst:.2g} (the largest is {largest:.2g}), the losses of {len(curves[1])} "
        f"steps by {loss:.2g}"
    )
    raise SystemExit(worst > TOLERANCE or loss > TOLERANCE)


if __name__ == "__main__":
    main()
