"""Runs two workers in turns, each in a separate process, and compares them.

A worker is the benchmark's own script with `--worker NAME`. After its setup it answers
each line on its input with a JSON line, `{"seconds": ..., "items": ...}`. The workers
take turns, so a machine whose speed drifts favours neither.
"""

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable


def host_peak() -> float:
    """Returns the peak memory of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(
    work: Callable[[], tuple[float, int]], peak: Callable[[], float] = host_peak
) -> None:
    """Answers each request with the seconds and items of one round of work."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # Text that libraries print must not be read as an answer.
    for _ in sys.stdin:
        seconds, items = work()
        answer = {"seconds": seconds, "items": items, "peak_gib": peak()}
        print(json.dumps(answer), file=answers, flush=True)


def compare(
    script: str,
    names: tuple[str, str],
    rounds: int,
    unit: str,
    arguments: list[str],
    warmed: Callable[[], None] = lambda: None,
) -> None:
    """Runs a warm-up round, then `rounds` rounds in turns, and prints a table.

    Args:
        script: File of the benchmark.
        names: Names of the workers, ours first.
        rounds: Number of counted rounds of each.
        unit: Unit of `items`.
        arguments: Further arguments of the workers.
        warmed: Called after the warm-up round.
    """
    workers = {
        name: subprocess.Popen(
            [sys.executable, script, "--worker", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name in names
    }
    rates: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for turn in range(rounds + 1):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise SystemExit(
                    f"{name}: failed; run {script} --worker {name} to see why"
                )
            answer = json.loads(line)
            peaks[name] = answer["peak_gib"]
            if turn:  # The first round compiles and warms caches.
                rates[name].append(answer["items"] / answer["seconds"])
                print(f"round {turn}/{rounds}  {name}: {rates[name][-1]:.1f} {unit}/s")
        if not turn:
            warmed()
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    ours, theirs = (rates[name] for name in names)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"\n{'':24}{unit + '/s':>12}{'min':>9}{'max':>9}{'peak GiB':>10}")
    for name in names:
        values = rates[name]
        print(
            f"{name:24}{statistics.median(values):12.1f}{min(values):9.1f}"
            f"{max(values):9.1f}{peaks[name]:10.2f}"
        )
    print(
        f"\nratio, round by round: median {statistics.median(ratios):.2f} "
        f"(min {min(ratios):.2f}, max {max(ratios):.2f})"
    )
    rounded = {name: round(statistics.median(rates[name]), 2) for name in names}
    ratio = round(statistics.median(ratios), 3)
    print(
        json.dumps({f"{unit}_per_second": rounded, "peak_gib": peaks, "ratio": ratio})
    )
