"""FLOPs of the full-scale recipes, and their chip-hours by a cost model.

    python benchmarks/recipe_cost.py
    python benchmarks/recipe_cost.py --chip=v5p --utilisation=0.5 --length=0.6

FLOPs are `step.model_flops`, where the length of every text is `--length` times the
maximum, times the steps of the config. Chip-hours are the FLOPs divided by the chip's
peak times `--utilisation`, which is assumed and not measured. Nothing is compiled or
run: `gecko compile` shows what one step needs on a slice. `zero_shot` costs the same as
`paper`, and mT5 the same as T5 1.1, because a token lookup has no FLOPs.
"""

import argparse
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = ("paper", "modern")


def rows(chip: str, utilisation: float, length: float) -> list[list[str]]:
    """Returns the table, with a row for each size and recipe."""
    import gecko_jax.config
    from gecko_jax.cli import flags
    from gecko_jax.parallel import chips
    from gecko_jax.training import train_step

    speed = chips.CHIPS[chip].flops_per_second * utilisation
    found = []
    for size in ("base", "large", "xl"):
        for recipe in RECIPES:
            stages = []
            for stage in ("prefinetune", "finetune"):
                config = flags.load(f"{ROOT / 'configs' / stage}.py:{size},{recipe}")
                gecko_jax.config.check(config)
                flops = train_step.model_flops(config, length)
                stages.append(flops * config.train.num_steps)
            hours = [flops / speed / 3600 for flops in stages]
            found.append(
                [
                    size,
                    recipe,
                    *(f"{flops:.2e}" for flops in stages),
                    *(f"{each:,.0f}" for each in hours),
                ]
            )
    return found


def main() -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--chip", default="v5e", help="chip of gecko_jax.parallel.chips (v5e)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="assumed share of peak (0.4)",
    )
    parser.add_argument(
        "--length",
        type=float,
        default=1.0,
        help="text length / maximum (1)",
    )
    options = parser.parse_args()
    head = ["size", "recipe", "FLOPs, stage 1", "stage 2"]
    head += [f"{options.chip} hours, stage 1", "stage 2"]
    table = [head, ["---"] * len(head)]
    table += rows(options.chip, options.utilisation, options.length)
    for row in table:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
