"""Facts that a benchmark records about its run: commit, machine, seconds."""

import contextlib
import itertools
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterator

from gecko_jax.io import wording

ROOT = pathlib.Path(__file__).parents[1]


def commit() -> str:
    """Returns the commit, with a plus sign if the tree has changes."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + changed


def machine() -> str:
    """Returns the processor model and the number of cores that this process may use."""
    cores = wording.counted(len(os.sched_getaffinity(0)), "core")
    return f"{platform.processor() or platform.machine()}, {cores}"


@contextlib.contextmanager
def timed(workdir: pathlib.Path) -> Iterator[None]:
    """Records the start, the end and the first step of a run in its workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    saved = _saved(workdir)
    with (workdir / "times.txt").open("a") as file:
        if saved:
            file.write(f"saved {saved[-1]}\n")
        file.write(f"began {time.time()}\n")
        file.flush()
        try:
            yield
        finally:
            file.write(f"ended {time.time()}\n")


def spent(workdir: pathlib.Path) -> float:
    """Returns the seconds of all runs of a workdir.

    A run that was killed counts up to its last checkpoint, because the next run repeats
    the steps after it.
    """
    lines = [line.split() for line in (workdir / "times.txt").read_text().splitlines()]
    # Killed after the last step, so no run followed.
    lines += [["saved", str(time_)] for time_ in _saved(workdir)[-1:]]
    total = 0.0
    for (event, time_), (next_, end) in itertools.pairwise(lines):
        if event == "began" and next_ != "began":
            total += max(float(end) - float(time_), 0.0)
    return total


def _saved(workdir: pathlib.Path) -> list[float]:
    """Returns the time at which each checkpoint of a run was written."""
    return sorted(path.stat().st_mtime for path in (workdir / "checkpoints").glob("*"))
