"""What the verbs of `gecko fret` do: options in, calls into `fret`, results printed."""

import argparse
import contextlib
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

from gecko_jax import flags


def plan(options: argparse.Namespace) -> None:
    """Prices a run."""
    config = flags.load(options.config, options.overrides)
    from gecko_jax.fret import measure

    found = measure.plan(config, pathlib.Path(options.workdir), options.sample)
    print(
        f"{found.passages:,} passages; {found.kept:.0%} of the sample gave a query "
        f"({found.sample} requests sent to find out)\n"
    )
    print(f"{'':12}{'requests':>14}{'tokens in':>16}{'tokens out':>14}{'hours':>10}")
    for kind in found.kinds:
        print(
            f"{kind.name:12}{kind.requests:>14,}"
            f"{kind.requests * kind.prompt_tokens:>16,.0f}"
            f"{kind.requests * kind.completion_tokens:>14,.0f}"
            f"{kind.requests * kind.seconds / 3600:>10,.2f}"
        )
    total = sum(kind.requests for kind in found.kinds)
    print(f"\n{total:,} requests, {found.hours:,.2f} hours, cost {found.cost:,.2f}")
    if not config.llm.price_input and not config.llm.price_output:
        print("Without prices: set llm.price_input, llm.price_output for a cost")


def run(options: argparse.Namespace) -> None:
    """Runs the missing stages."""
    config = flags.load(options.config, options.overrides)
    from gecko_jax.fret import run as run_lib

    budget = run_lib.open_budget(config, options.max_requests, options.max_cost)
    with _stop_at_termination():
        summary = run_lib.run(
            config,
            pathlib.Path(options.workdir),
            budget=budget,
            worker=options.worker,
            until=options.until,
        )
    _print_stages(summary.stages)
    print(
        f"\nThis call: {budget.requests:,} requests, {budget.prompt_tokens:,} tokens "
        f"read, {budget.completion_tokens:,} written, cost {budget.cost:,.4f}"
    )
    if summary.stopped:
        print(f"Stopped: {summary.stopped}. The same command goes on")
    elif summary.output:
        print(
            f"{summary.output}: train on it with --config.data.files={summary.output}"
        )
    else:
        print("The stages asked for are made, or in the hands of other workers")


def calibrate(options: argparse.Namespace) -> None:
    """Measures the judges on held-out seeds."""
    config = flags.load(options.config, options.overrides)
    from gecko_jax.fret import measure
    from gecko_jax.fret import run as run_lib

    budget = run_lib.open_budget(config, options.max_requests, options.max_cost)
    with _stop_at_termination():
        found = measure.calibrate(config, pathlib.Path(options.workdir), budget=budget)
    print(f"{found.seeds} held-out seeds, {found.candidates:.1f} candidates each\n")
    for name, value in found.mrr.items():
        error = found.standard_error.get(name)
        spread = f" ± {error:.3f}" if error is not None else ""
        print(f"{name:10} MRR {value:.3f}{spread}")
    for warning in found.warnings:
        print(f"\nwarning: {warning}")


def bootstrap(options: argparse.Namespace) -> None:
    """Trains the initial retriever."""
    config = flags.load(options.config, options.overrides)
    training = flags.load(options.train_config)
    from gecko_jax import config as config_lib
    from gecko_jax import train
    from gecko_jax.fret import bootstrap as bootstrap_lib

    pairs, count = bootstrap_lib.write_pairs(config, pathlib.Path(options.workdir))
    training = bootstrap_lib.training_config(
        training,
        pairs,
        count,
        batch_size=options.batch_size,
        num_steps=options.steps,
    )
    config_lib.check(training)
    train.train(training, options.output)
    print(
        f"{options.output}: trained on {count:,} pairs; retrieve with "
        f"--config.retrieve.model={options.output}"
    )


def report(options: argparse.Namespace) -> None:
    """Writes the page of a run."""
    config = flags.load(options.config, options.overrides)
    from gecko_jax.fret import report as report_lib

    print(report_lib.write(config, pathlib.Path(options.workdir), options.rows))


def _print_stages(found: dict[str, dict[str, Any]]) -> None:
    for name, done in found.items():
        if done["records"]:
            why = ", ".join(
                f"{count:,} {why}" for why, count in done["dropped"].items()
            )
            print(
                f"{name:11}{done['kept']:>10,} of {done['records']:,}"
                f"{f'; dropped: {why}' if why else ''}"
            )


@contextlib.contextmanager
def _stop_at_termination() -> Iterator[None]:
    """Ends as at Ctrl-C when the system asks: what is on its way is waited for."""

    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
