"""Cost of training on TPU slices, from what the TPU's compiler says of a train step.

    python benchmarks/recipe_cost.py prices      one pass over ten million triples
    python benchmarks/recipe_cost.py recipes     the full-scale recipes
    python benchmarks/recipe_cost.py compile     compiles the steps that both need
    python benchmarks/recipe_cost.py compile --presets=xl --topologies=v5e:4x4

`prices` fine-tunes each preset with eq. 3 (one hard negative, same-tower negatives,
MRL) on each slice. The roofline of a step is the longest of its operations, its memory
traffic and its collectives at the rates of the chip's data sheet. `recipes` divides the
model FLOPs of both stages of docs/recipes.md by the utilisation that the roofline of
the size allows on `--topology`, for texts of `--length` of their longest. Nothing is
timed.

`compile` needs the extra "tpu" and takes minutes for each step. It adds each result to
benchmarks/compiled_steps.jsonl, and compiles only what that file lacks: remove a line
to compile its step again.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
COMPILED = pathlib.Path(__file__).with_name("compiled_steps.jsonl")
TRIPLES = 10_000_000
SHARES = (1.0, 0.5)  # of the roofline's speed; the second is assumed
RECIPES = ("paper", "modern")
SIZES = ("base", "large", "xl")  # of the recipes
PRESETS = ("embeddinggemma", "embeddinggemma-2", "t5gemma2-270m", "qwen3-0.6b", *SIZES)
# Slice -> examples per step, and rows that each chip encodes at a time.
SLICES = {
    "v5e:2x4": (256, 2),
    "v5e:4x4": (512, 2),
    "v6e:4x4": (512, 2),
    "v5p:4x4x4": (8_192, 8),
}


def num_chips(topology: str) -> int:
    """Returns the chips of a slice such as "v5e:4x4"."""
    return math.prod(map(int, topology.partition(":")[2].split("x")))


def load(stage: str, words: str) -> Any:
    """Returns a checked config of `configs/`."""
    import gecko_jax.config
    from gecko_jax.cli import flags

    config = flags.load(f"{ROOT / 'configs' / stage}.py:{words}")
    gecko_jax.config.check(config)
    return config


def load_step(preset: str, topology: str) -> Any:
    """Returns the config of a preset's step on a slice: the defaults are eq. 3."""
    import gecko_jax.config

    batch_size, rows = SLICES[topology]
    config = gecko_jax.config.training(preset)
    config.data.batch_size = batch_size
    config.data.packing = False
    config.mesh.data = 1
    config.mesh.fsdp = num_chips(topology)
    config.model.remat = "full"
    config.train.microbatch_size = rows * num_chips(topology)
    gecko_jax.config.check(config)
    return config


def read() -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the compiled steps by preset and slice."""
    lines = COMPILED.read_text().splitlines() if COMPILED.exists() else []
    steps = map(json.loads, lines)
    return {(step["preset"], step["topology"]): step for step in steps}


def compile_steps(presets: list[str], topologies: list[str]) -> None:
    """Compiles the steps that the file lacks, and adds them to it."""
    from gecko_jax.compile import aot

    for topology in topologies:
        for preset in presets:
            if (preset, topology) in read():
                continue
            versions = {
                name: importlib.metadata.version(name) for name in ("jax", "libtpu")
            }
            step: dict[str, Any] = {"preset": preset, "topology": topology, **versions}
            try:
                report = aot.compile_step(load_step(preset, topology), topology)
                step |= dataclasses.asdict(report)
            except (MemoryError, ValueError) as error:
                step["failed"] = str(error)
            with COMPILED.open("a") as file:
                file.write(json.dumps(step) + "\n")
            print(step.get("failed") or f"{preset} on {topology}: compiled", flush=True)


def price_rows(presets: list[str], topologies: list[str]) -> list[list[str]]:
    """Returns a row for each preset and slice."""
    table = [
        [
            *("preset", "slice", "batch", "peak GiB", "free"),
            *("collectives in the loop", "limit", "utilisation"),
            *(f"examples per chip-second, {share:.0%}" for share in SHARES),
            *(f"hours, {share:.0%}" for share in SHARES),
            *(f"chip-hours, {share:.0%}" for share in SHARES),
        ]
    ]
    steps = read()
    for topology in topologies:
        for preset in presets:
            step = steps.get((preset, topology))
            if step is None or "failed" in step:
                why = step["failed"] if step else "not compiled"
                table.append([preset, topology, why, *[""] * (len(table[0]) - 3)])
                continue
            seconds = step["roofline_seconds"]
            chips = step["num_devices"]
            limits = ("compute", "memory", "link")
            speeds = [share * step["batch_size"] / seconds for share in SHARES]
            hours = [TRIPLES / speed / 3600 for speed in speeds]
            table.append(
                [
                    *(preset, topology, f"{step['batch_size']:,}"),
                    f"{step['peak_bytes'] / 2**30:.2f}",
                    f"{step['spare_share']:.0%}",
                    str(step["in_microbatch_loop"]),
                    max(limits, key=lambda limit: step[f"{limit}_seconds"]),
                    f"{step['model_flops_utilisation']:.0%}",
                    *(f"{speed / chips:.3g}" for speed in speeds),
                    *(f"{each:,.1f}" for each in hours),
                    *(f"{each * chips:,.0f}" for each in hours),
                ]
            )
    return table


def recipe_rows(topology: str, length: float) -> list[list[str]]:
    """Returns a row for each size and recipe."""
    from gecko_jax.parallel import chips
    from gecko_jax.training import train_step

    kind = topology.partition(":")[0]
    head = ["size", "recipe", "FLOPs, stage 1", "stage 2", "utilisation"]
    for share in SHARES:
        head += [f"{kind} hours at {share:.0%}, stage 1", "stage 2"]
    table = [head]
    steps = read()
    for size in SIZES:
        step = steps.get((size, topology), {})
        utilisation = step.get("model_flops_utilisation")
        for recipe in RECIPES:
            flops = []
            for stage in ("prefinetune", "finetune"):
                config = load(stage, f"{size},{recipe}")
                step_flops = train_step.model_flops(config, length)
                flops.append(step_flops * config.train.num_steps)
            row = [size, recipe, *(f"{each:.2e}" for each in flops)]
            if utilisation is None:
                row += ["not compiled", *[""] * (len(head) - len(row) - 1)]
            else:
                row.append(f"{utilisation:.0%}")
                for share in SHARES:
                    speed = chips.CHIPS[kind].flops_per_second * utilisation * share
                    row += [f"{each / speed / 3600:,.0f}" for each in flops]
            table.append(row)
    return table


def main() -> None:
    """Parses the command line and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("prices", "compile"):
        command = commands.add_parser(name)
        command.add_argument("--presets", nargs="+", default=list(PRESETS))
        command.add_argument("--topologies", nargs="+", default=list(SLICES))
    command = commands.add_parser("recipes")
    command.add_argument("--topology", default="v5e:4x4", help="(v5e:4x4)")
    command.add_argument(
        "--length", type=float, default=1.0, help="of texts, as a share of most (1)"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.what == "compile":
        compile_steps(options.presets, options.topologies)
        return
    if options.what == "prices":
        table = price_rows(options.presets, options.topologies)
    else:
        table = recipe_rows(options.topology, options.length)
    for row in (table[0], ["---"] * len(table[0]), *table[1:]):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
