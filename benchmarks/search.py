"""Time of exact search compared with faiss, and time and memory of loading an index.

    python benchmarks/search.py                     1,000,000 x 256, top 10
    python benchmarks/search.py --top=100 --rounds=9

All run in turns in one process. The first round compiles and is not counted. A ratio is
the median over rounds of another's time divided by the time of `gecko_jax.index` in the
same round, because other work on the machine slows both. The index is then saved with
ids and texts, and loaded in a separate process, whose peak memory is compared with the
size of the vectors. Needs `faiss-cpu`.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import faiss
import jax
import measured
import numpy as np

from gecko_jax.inference import quantization, vector_index

OURS, FAISS = "gecko_jax.index", "faiss-cpu IndexFlatIP"

_LOAD = r"""
import json, re, sys, time
from gecko_jax.inference import vector_index as index
def peak():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) * 1024
before, began = peak(), time.perf_counter()
loaded = index.load(sys.argv[1])
seconds = time.perf_counter() - began
held = peak() - before
loaded.search(loaded.codes.decode()[:1], 10)
print(json.dumps({"seconds": seconds, "loaded": held, "searched": peak() - before}))
"""


def take_turns(
    name: str, contestants: dict[str, Callable[[], object]], rounds: int
) -> None:
    """Prints the median time of each, absolute and relative to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for contestant, work in contestants.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[contestant].append(time.perf_counter() - began)
    first = next(iter(seconds.values()))
    print(f"\n{name:32}{'median s':>10}{'min':>8}{'max':>8}{'ratio':>8}")
    for contestant, times in seconds.items():
        ratio = statistics.median(t / f for t, f in zip(times, first, strict=True))
        print(
            f"{contestant:32}{statistics.median(times):10.3f}{min(times):8.3f}"
            f"{max(times):8.3f}{ratio:8.2f}",
            flush=True,
        )


def load(built: vector_index.Index, rounds: int) -> None:
    """Saves the index and prints time and memory of loading it in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "index"
        built.save(path)
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", _LOAD, str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(rounds)
        ]
    size = built.codes.values.nbytes
    seconds = sorted(run["seconds"] for run in runs)
    memory = (max(run[name] for run in runs) / size for name in ("loaded", "searched"))
    loaded, searched = memory
    print(
        f"\nloading: median {statistics.median(seconds):.2f} s, min {seconds[0]:.2f}, "
        f"max {seconds[-1]:.2f}; peak memory {loaded:.2f} times the vectors, "
        f"{searched:.2f} after a search"
    )


def main() -> None:
    """Parses the command line and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((options.passages, options.dim), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = rng.standard_normal((options.queries, options.dim), np.float32)
    queries += 3 * vectors[: options.queries]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    ids = [f"passage-{row}" for row in range(options.passages)]
    texts = [f"The text of passage {row}. " * 8 for row in range(options.passages)]
    ours = {
        precision: vector_index.Index(
            quantization.encode(vectors, precision), ids, texts=texts
        )
        for precision in quantization.PRECISIONS
    }
    theirs = faiss.IndexFlatIP(options.dim)
    theirs.add(vectors)
    own_scores, positions = ours[quantization.FLOAT32].search_positions(
        queries, options.top
    )
    scores, expected = theirs.search(queries, options.top)
    print(
        f"{options.passages:,} x {options.dim}, top {options.top}; "
        f"{measured.machine()}, {jax.default_backend()}, jax {jax.__version__}, "
        f"faiss {faiss.__version__}, "
        f"{faiss.omp_get_max_threads()} threads; commit {measured.commit()}\n"
        f"{np.mean(positions == expected):.3%} of the positions are faiss's, scores "
        f"differ by at most {np.abs(own_scores - scores).max():.1e}"
    )
    for some in (queries[:1], queries):
        contestants: dict[str, Callable[[], object]] = {
            OURS: lambda some=some: ours[quantization.FLOAT32].search(
                some, options.top
            ),
            FAISS: lambda some=some: theirs.search(some, options.top),
        }
        for precision in (quantization.INT8, quantization.BINARY):
            contestants[f"{OURS}, {precision}"] = lambda some=some, p=precision: ours[
                p
            ].search(some, options.top)
        take_turns(f"{len(some)} queries", contestants, options.rounds)
    load(ours[quantization.FLOAT32], 3)


if __name__ == "__main__":
    main()
