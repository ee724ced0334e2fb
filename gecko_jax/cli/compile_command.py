"""`gecko compile`: proves a config for a TPU topology."""

import argparse
import json
from typing import Any

from gecko_jax.cli import flags, parsing

_COMPILE = """\
Compiles the train step of a config for a TPU topology, on a CPU (the extra "tpu"):
memory, operations and collectives of a chip, and the time its data sheet allows.

examples:
  gecko compile --config=configs/finetune.py:xl --topology=v5e:16x16 \\
      --config.data.batch_size=8192 --config.mesh.fsdp=256 \\
      --config.train.microbatch_size=512
  gecko compile --config=configs/finetune.py:base --topology=v5litepod-16 --search"""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko compile`."""
    parser = parsing.add_verb(verbs, "gecko compile", _COMPILE, compile_step)
    parsing.add_config(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:4x4"
    )
    parser.add_argument(
        "--slices",
        type=parsing.positive,
        default=1,
        help="of the pod, joined by DCN (1)",
    )
    parser.add_argument(
        "--search", action="store_true", help="try microbatches, remat and meshes"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def compile_step(options: argparse.Namespace) -> None:
    """Compiles the train step of a config for a TPU topology."""
    if options.search and options.slices > 1:
        raise ValueError("--search: looks at one slice; leave out --slices")
    config = flags.load(options.config, options.overrides, flags.TRAIN)
    from gecko_jax.compile import aot

    reports = []
    found = (
        aot.search(config, options.topology)
        if options.search
        else [aot.compile_step(config, options.topology, options.slices)]
    )
    for report in found:
        reports.append(report)
        if options.json:
            print(json.dumps(report.to_dict()), flush=True)
        else:
            print("\n".join(aot.describe(report)) + "\n", flush=True)
    if options.search and not options.json:
        best = aot.recommend(reports)
        if best is None:
            print("None of them leaves enough memory: more chips, or a smaller batch.")
        else:
            sizes = best.settings | {f"mesh.{k}": v for k, v in best.mesh.items()}
            print(
                "The fastest that fits: "
                + " ".join(f"--config.{key}={value}" for key, value in sizes.items())
            )
