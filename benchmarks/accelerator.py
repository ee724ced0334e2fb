"""Runs the benchmarks and comparisons for an accelerator, most important first.

    python benchmarks/accelerator.py --output=DIR            at most nine minutes
    python benchmarks/accelerator.py --output=DIR --tiny     tiny sizes, on a CPU

Each stage is a benchmark in a separate process with a time limit. The JSON lines that
it prints are appended to DIR/results.jsonl at once, with the name of the stage, and all
other output to DIR/log.txt, so an interrupted run keeps its results. Stages that
results.jsonl marks as finished are not run again: copy the file to DIR to continue.
`--only` selects stages.

accelerator.sh installs the packages needed in addition to JAX, PyTorch and
sentence-transformers. TensorFlow and seqio are not needed.
"""

import argparse
import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
LIMIT = 540  # seconds, for all stages
KERNELS = 40  # kernels of a trace that are kept as results
GECKO, SBERT = "--only=gecko", "--only=sbert"
BASE = ["--batch=256", "--steps=8", "--microbatch=64"]
XL = ["--size=xl", "--batch=128", "--steps=3", "--microbatch=32"]
TINY = ("--size=mini", "--batch=4", "--steps=1", "--microbatch=2")

# XLA times dozens of kernels for each matrix product, which takes minutes for one step.
# With these flags the libraries choose. Their effect on speed is not measured.
FLAGS = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"


class Stage(NamedTuple):
    """One benchmark.

    Attributes:
        name: Unique name, which is stored with the results.
        seconds: Time limit.
        command: Script and arguments.
        tiny: Arguments that `--tiny` adds; they override earlier ones.
    """

    name: str
    seconds: int
    command: list[str]
    tiny: tuple[str, ...] = ()


def step(name: str, seconds: int, *arguments: str) -> Stage:
    """Returns a stage that times a training step."""
    return Stage(name, seconds, ["train_gpu.py", "--here", *arguments], TINY)


def stages(output: pathlib.Path) -> list[Stage]:
    """Returns the stages, most important first."""
    trace = f"--profile={output / 'trace'}"
    variants = ("--variants", "none:xla", "none:cudnn")
    return [
        step("base", 200, GECKO, *BASE, trace, *variants),
        step("base sbert", 100, SBERT, *BASE),
        Stage("parity", 90, ["parity.py"]),
        step("xl", 120, GECKO, *XL, "--variants", "full:cudnn", "full:xla"),
        Stage(
            "encode",
            90,
            [
                *("encode_cpu.py", "--size=base", "--dtype=bfloat16"),
                *("--texts=3828", "--rounds=3"),
            ],
            ("--size=mini", "--texts=16", "--rounds=1"),
        ),
        Stage("train", 90, ["train_light.py"], ("--steps=4",)),
        Stage(
            "loss",
            45,
            ["kernels.py", "loss", "--batches", "8192", "32768", "65536"],
            ("--batches", "256", "512"),
        ),
        Stage(
            "search",
            60,
            ["kernels.py", "search", "--passages", "1000000", "10000000"],
            ("--passages", "1000", "10000"),
        ),
        step("xl sbert", 75, SBERT, *XL),
    ]


class Results:
    """The file of results and the log."""

    def __init__(self, output: pathlib.Path):
        """Reads the results of an earlier run."""
        output.mkdir(parents=True, exist_ok=True)
        self._path, self._log = output / "results.jsonl", output / "log.txt"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        records = [json.loads(line) for line in lines]
        self.finished = {r["stage"] for r in records if r.get("finished")}

    def add(self, stage: str, **values: Any) -> None:
        """Stores and prints a result."""
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": stage, **values}) + "\n")
        shown = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in values.items()
        )
        self.log(f"[{stage}] {shown}")
        print(f"[{stage}] {shown}", flush=True)

    def log(self, line: str) -> None:
        """Adds a line to the log."""
        with self._log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line.rstrip()}\n")


def end_with_parent() -> None:
    """Asks Linux to end this process when its parent does: a rerun needs the device."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def run(stage: Stage, results: Results, seconds: float, is_tiny: bool) -> None:
    """Runs a stage and stores each line of its output as it comes."""
    arguments = stage.command + (list(stage.tiny) if is_tiny else [])
    command = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
    began = time.monotonic()
    # Two processes share the GPU if sentence-transformers runs at the same time.
    settings = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    # The variants of a step share the compiled initialization.
    cache = HERE.parent / ".carry" / "compiled"
    settings["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    paths = (str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    settings["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    process = subprocess.Popen(
        ["timeout", "--kill-after=5", f"{seconds:.0f}", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | settings,
        preexec_fn=end_with_parent,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            results.add(stage.name, **json.loads(line))
        else:
            results.log(line)
    status = process.wait()
    wall = round(time.monotonic() - began, 1)
    results.add(stage.name, finished=status == 0, status=status, wall=wall)


def summarize_traces(folder: pathlib.Path, results: Results) -> None:
    """Stores the kernels that took the most time and packs the traces."""
    import jax

    with tarfile.open(folder.with_suffix(".tar.gz"), "w:gz") as archive:
        for path in sorted(folder.rglob("*.xplane.pb")):
            variant = path.relative_to(folder).parts[0]
            archive.add(path, arcname=f"{variant}.xplane.pb")
            totals: dict[str, float] = {}
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if not plane.name.startswith("/device:"):
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        total = totals.get(event.name, 0.0) + event.duration_ns
                        totals[event.name] = total
            overall = sum(totals.values())
            ranked = sorted(totals.items(), key=lambda item: -item[1])
            for name, total in ranked[:KERNELS]:
                results.add(
                    "profile",
                    variant=variant,
                    kernel=name[:120],
                    share=total / overall,
                    ms=total / 1e6,
                )
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--limit", type=float, default=LIMIT, help="total seconds")
    parser.add_argument("--only", nargs="+", help="stages to run")
    options = parser.parse_args()
    results = Results(options.output)
    began = time.monotonic()
    # A new machine reads libraries from a slow disk: load PyTorch's files into the page
    # cache while our step compiles.
    warm = "import torch, sentence_transformers; torch.ones(1).to('cuda').sum().item()"
    warming = subprocess.Popen(
        [sys.executable, "-c", warm],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for stage in stages(options.output.absolute()):
        if stage.name in results.finished:
            continue
        if options.only and stage.name not in options.only:
            continue
        left = options.limit - (time.monotonic() - began)
        if left < 20:
            results.log(f"[{stage.name}] skipped: only {left:.0f} s left")
            continue
        seconds = left if options.tiny else min(stage.seconds, left)
        run(stage, results, seconds, options.tiny)
        if (options.output / "trace").exists():
            summarize_traces(options.output / "trace", results)
    warming.kill()


if __name__ == "__main__":
    main()
