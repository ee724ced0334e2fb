"""`gecko compile`: compiles a train step for a TPU slice, on a CPU."""

import argparse
import dataclasses
import json
from typing import Any

from gecko_jax.cli import flags, parsing

_COMPILE = """\
Compiles the train step of a config for a TPU slice, on a CPU, and prints what each chip
needs: memory, operations, collectives, and the time that its data sheet allows. Needs
the extra "tpu". --search tries microbatch sizes, remat settings and meshes, and
recommends the fastest that fits. --results keeps each result in a file: run the same
command again to go on after an interruption.

examples:
  gecko compile --config=configs/finetune.py:xl --topology=v5e:16x16 \\
      --config.data.batch_size=8192 --config.mesh.fsdp=256 \\
      --config.train.microbatch_size=512
  gecko compile --config=configs/finetune.py:base --topology=v5litepod-16 --search \\
      --results=base.jsonl"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko compile`."""
    parser = parsing.add_verb(verbs, "gecko compile", _COMPILE, compile_step)
    add = parser.option
    parsing.add_config(parser)
    add("--topology", "TPU slice, such as v5e:4x4", "NAME", required=True)
    add("--slices", "number of slices, connected by DCN", parsing.positive, 1)
    add("--search", "compare settings, see above", bool)
    add("--results", "JSON lines of results, which are not computed again", "FILE")
    add("--json", "print JSON lines", bool)


def compile_step(options: argparse.Namespace) -> None:
    """Compiles the train step of a config for a TPU slice."""
    if options.search and options.slices > 1:
        raise ValueError("--search: supports one slice only; leave out --slices")
    config = flags.load(options.config, options.overrides, flags.TRAIN)
    from gecko_jax.compile import aot, search

    compile_candidate = aot.compile_step
    if options.results:
        compile_candidate = search.Stored(options.results).compile_step
    candidates = (
        search.search(config, options.topology, compile_candidate)
        if options.search
        else [compile_candidate(config, options.topology, options.slices)]
    )
    reports = []
    for report in candidates:
        reports.append(report)
        if options.json:
            print(json.dumps(dataclasses.asdict(report)), flush=True)
        else:
            print("\n".join(aot.describe(report)) + "\n", flush=True)
    if options.search and not options.json:
        best = search.recommend(reports)
        if best is None:
            print("No setting leaves enough memory: use more chips or a smaller batch.")
            return
        values = best.settings | {f"mesh.{k}": v for k, v in best.mesh.items()}
        choice = " ".join(f"--config.{key}={value}" for key, value in values.items())
        print(f"The fastest setting that fits: {choice}")
