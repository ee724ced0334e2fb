"""`gecko fret`: makes training data with a language model."""

import argparse
import contextlib
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import ml_collections

from gecko_jax.cli import flags, parsing
from gecko_jax.io import wording

_DESCRIPTION = """\
Makes training data with a language model (FRet): it reads passages, writes a task and a
query for each, and judges which passage answers the query and which only seems to.

  gecko fret plan       prices a run from a few requests
  gecko fret calibrate  measures whether the model's judgements can be trusted
  gecko fret run        makes the triples
  gecko fret bootstrap  trains the initial retriever on the queries
  gecko fret report     shows a run as one page"""

_PLAN = """\
Says what a run will take: requests, tokens, money and hours, from a few requests about
passages that are held out of the run.

example:
  gecko fret plan --config=configs/fret.py:local --workdir=runs/fret
  gecko fret plan --config=configs/fret.py --workdir=runs/fret --sample=32 \\
      --config.passages.files=corpus.jsonl --config.llm.model=google/gemma-3-27b-it \\
      --config.llm.price_input=0.1 --config.llm.price_output=0.4"""

_RUN = """\
Runs every stage that is missing: passages, generate, retrieve, likelihood, relevance,
fuse, export. The triples are in WORKDIR/export/fret.jsonl, for `gecko train
--config.data.files=...`. Stopped at any moment, the same command goes on, and what the
model answered is not asked again.

examples:
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret
  gecko fret run --config=configs/fret.py --workdir=/shared/fret --max-cost=50 \\
      --config.passages.files=corpus.jsonl --config.llm.url=http://host:8000 \\
      --config.llm.model=google/gemma-3-27b-it

Several processes or machines may run it in one workdir, and share the shards. Where the
folder has no locks, as a mounted bucket, give each its part: --worker=1/4 ... 4/4, and
once all are through, the command without --worker, which closes the run."""

_CALIBRATE = """\
Measures, on passages held out of the run, how often each judge and their fusion put the
seed passage first (MRR), and warns when fusing hurts. See docs/fret.md.

example:
  gecko fret calibrate --config=configs/fret.py:local --workdir=runs/fret"""

_BOOTSTRAP = """\
Trains the initial retriever on (query, seed passage), in-batch negatives only.

example:
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret --until=generate
  gecko fret bootstrap --config=configs/fret.py:local --workdir=runs/fret \\
      --train-config=configs/prefinetune.py:local --output=runs/initial --batch-size=16
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret \\
      --config.retrieve.model=runs/initial"""

_REPORT = """\
Writes WORKDIR/report.html: what was dropped and why, how the judges agree, how far
positives moved, tasks, lengths, cost, and random rows with their candidates.

example:
  gecko fret report --config=configs/fret.py:local --workdir=runs/fret"""

_STAGES = (
    "passages",
    "generate",
    "retrieve",
    "likelihood",
    "relevance",
    "fuse",
    "export",
)


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko fret`."""
    parent = parsing.add_verb(verbs, "gecko fret", _DESCRIPTION)
    fret_verbs = parent.add_subparsers(metavar="VERB", required=True)
    parsers = {}
    for text, verb in (
        (_PLAN, plan),
        (_CALIBRATE, calibrate),
        (_RUN, run),
        (_BOOTSTRAP, bootstrap),
        (_REPORT, report),
    ):
        name = verb.__name__
        parser = parsers[name] = parsing.add_verb(
            fret_verbs, f"gecko fret {name}", text, verb
        )
        parsing.add_config(parser)
        parser.add_argument(
            "--workdir", required=True, metavar="DIR", help="of the run"
        )
    parsers["plan"].add_argument(
        "--sample", type=parsing.positive, default=8, help="requests of each kind (8)"
    )
    for name in ("run", "calibrate"):
        parsers[name].add_argument(
            "--max-requests", type=parsing.positive, help="that this call may send"
        )
        parsers[name].add_argument(
            "--max-cost", type=_money, help="that this call may spend"
        )
    parsers["run"].add_argument(
        "--until",
        choices=_STAGES,
        metavar="STAGE",
        default="export",
        help=f"the last to run, of {', '.join(_STAGES)}",
    )
    parsers["run"].add_argument(
        "--worker", type=_worker, default=(0, 1), metavar="I/N", help="see above"
    )
    parsers["run"].add_argument(
        "--beam",
        type=parsing.words,
        metavar="OPTION,...",
        help="makes the passages with Apache Beam, say --beam=--runner=DirectRunner",
    )
    parsers["bootstrap"].add_argument(
        "--train-config",
        required=True,
        metavar="FILE.py:ARG",
        help="such as configs/prefinetune.py:local",
    )
    parsers["bootstrap"].add_argument(
        "--output", required=True, metavar="DIR", help="workdir of the retriever"
    )
    parsers["bootstrap"].add_argument(
        "--batch-size", type=parsing.positive, help="if not the train config's"
    )
    parsers["bootstrap"].add_argument(
        "--steps", type=parsing.positive, help="of training, if not the train config's"
    )
    parsers["report"].add_argument(
        "--rows", type=parsing.count, default=12, help="random rows to show (12)"
    )


def _load(options: argparse.Namespace) -> ml_collections.ConfigDict:
    return flags.load(options.config, options.overrides, flags.FRET)


def plan(options: argparse.Namespace) -> None:
    """Prices a run."""
    config = _load(options)
    from gecko_jax.fret import measure

    found = measure.plan(config, pathlib.Path(options.workdir), options.sample)
    parsing.say(
        f"{wording.counted(found.passages, 'passage')}; {found.kept:.0%} of the sample "
        f"gave a query ({wording.counted(found.sample, 'request')} sent to find out)\n"
    )
    parsing.say(
        f"{'':12}{'requests':>14}{'tokens in':>16}{'tokens out':>14}{'hours':>10}"
    )
    for kind in found.kinds:
        parsing.say(
            f"{kind.name:12}{kind.requests:>14,}"
            f"{kind.requests * kind.prompt_tokens:>16,.0f}"
            f"{kind.requests * kind.completion_tokens:>14,.0f}"
            f"{kind.requests * kind.seconds / 3600:>10,.2f}"
        )
    total = sum(kind.requests for kind in found.kinds)
    parsing.say(
        f"\n{wording.counted(total, 'request')}, {found.hours:,.2f} hours, cost "
        f"{found.cost:,.2f}"
    )
    if not config.llm.price_input and not config.llm.price_output:
        parsing.say("Without prices: set llm.price_input, llm.price_output for a cost")


def run(options: argparse.Namespace) -> None:
    """Runs the missing stages."""
    config = _load(options)
    from gecko_jax.fret import runs

    budget = runs.open_budget(config, options.max_requests, options.max_cost)
    with _stop_at_termination():
        summary = runs.run(
            config,
            pathlib.Path(options.workdir),
            budget=budget,
            worker=options.worker,
            until=options.until,
            beam_options=options.beam,
        )
    _print_stages(summary.stages)
    parsing.say(
        f"\nThis call: {wording.counted(budget.requests, 'request')}, "
        f"{wording.counted(budget.prompt_tokens, 'token')} read, "
        f"{budget.completion_tokens:,} written, cost {budget.cost:,.4f}"
    )
    if summary.stopped:
        parsing.say(f"Stopped: {summary.stopped}. The same command goes on")
    elif summary.output:
        parsing.say(
            f"{summary.output}: train on it with --config.data.files={summary.output}"
        )
    else:
        parsing.say("The stages asked for are made, or in the hands of other workers")


def calibrate(options: argparse.Namespace) -> None:
    """Measures the judges on held-out seeds."""
    config = _load(options)
    from gecko_jax.fret import measure, runs

    budget = runs.open_budget(config, options.max_requests, options.max_cost)
    with _stop_at_termination():
        found = measure.calibrate(config, pathlib.Path(options.workdir), budget=budget)
    parsing.say(
        f"{found.seeds} held-out seeds, {found.candidates:.1f} candidates each\n"
    )
    for name, value in found.mrr.items():
        error = found.standard_error.get(name)
        spread = f" ± {error:.3f}" if error is not None else ""
        parsing.say(f"{name:10} MRR {value:.3f}{spread}")
    for warning in found.warnings:
        parsing.say(f"\nwarning: {warning}")


def bootstrap(options: argparse.Namespace) -> None:
    """Trains the initial retriever."""
    config = _load(options)
    training = flags.load(options.train_config, kind=flags.TRAIN)
    import gecko_jax.config
    from gecko_jax.fret import bootstrapping
    from gecko_jax.training import loop

    pairs, count = bootstrapping.write_pairs(config, pathlib.Path(options.workdir))
    training = bootstrapping.training_config(
        training,
        pairs,
        count,
        batch_size=options.batch_size,
        num_steps=options.steps,
    )
    gecko_jax.config.check(training)
    loop.train(training, options.output)
    parsing.say(
        f"{options.output}: trained on {wording.counted(count, 'pair')}; retrieve with "
        f"--config.retrieve.model={options.output}"
    )


def report(options: argparse.Namespace) -> None:
    """Writes the page of a run."""
    config = _load(options)
    from gecko_jax.fret import html_report

    parsing.say(html_report.write(config, pathlib.Path(options.workdir), options.rows))


def _print_stages(found: dict[str, dict[str, Any]]) -> None:
    for name, done in found.items():
        if done["records"]:
            why = ", ".join(
                f"{count:,} {why}" for why, count in done["dropped"].items()
            )
            parsing.say(
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


def _money(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a sum above 0")
    return value


def _worker(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal()) or not (
        1 <= int(number) <= int(total)
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be such as 1/4, from 1/4 to 4/4"
        )
    return int(number) - 1, int(total)
