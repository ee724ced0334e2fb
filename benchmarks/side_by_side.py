"""Runs two workers in turn, each in a process of its own, and compares them.

A worker is this benchmark's file with `--worker NAME`: it sets itself up, then answers
each line on its input with one line of JSON, `{"seconds": ..., "items": ...}`. Taking
turns keeps a machine whose speed drifts from favouring either.
"""

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable


def host_peak() -> float:
    """Returns the most memory that this process ever held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def serve(
    work: Callable[[], tuple[float, int]], peak: Callable[[], float] = host_peak
) -> None:
    """Answers every request with one round of work: seconds, and items done."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print must not be taken for an answer
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
    """Lets both workers warm up, takes turns for `rounds`, and prints a table.

    Args:
        script: The benchmark's file.
        names: Ours first.
        rounds: Counted rounds of each.
        unit: What `items` counts.
        arguments: Passed on to the workers.
        warmed: Called after the first round, which is not counted.
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
                    f"{name} ended; run {script} --worker {name} to see why"
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
