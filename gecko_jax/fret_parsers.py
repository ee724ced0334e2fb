"""The command line of `gecko fret`: its verbs, their help and their options."""

import argparse
from typing import Any

DESCRIPTION = """\
Makes training data with a language model (FRet): it reads passages, writes a task and a
query for each, and judges which passage answers the query and which only seems to.

  gecko fret plan       prices a run from a few requests
  gecko fret calibrate  measures whether the model's judgements can be trusted
  gecko fret run        makes the triples
  gecko fret bootstrap  trains the initial retriever on the queries
  gecko fret report     shows a run as one page"""

PLAN = """\
Says what a run will take: requests, tokens, money and hours, from a few requests about
passages that are held out of the run.

example:
  gecko fret plan --config=configs/fret.py:local --workdir=runs/fret
  gecko fret plan --config=configs/fret.py --workdir=runs/fret --sample=32 \\
      --config.passages.files=corpus.jsonl --config.llm.model=google/gemma-3-27b-it \\
      --config.llm.price_input=0.1 --config.llm.price_output=0.4"""

RUN = """\
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

CALIBRATE = """\
Measures, on passages held out of the run, how often each judge and their fusion put the
seed passage first (MRR), and warns when fusing hurts. See docs/fret.md.

example:
  gecko fret calibrate --config=configs/fret.py:local --workdir=runs/fret"""

BOOTSTRAP = """\
Trains the initial retriever on (query, seed passage), in-batch negatives only.

example:
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret --until=generate
  gecko fret bootstrap --config=configs/fret.py:local --workdir=runs/fret \\
      --train-config=configs/prefinetune.py:local --output=runs/initial
  gecko fret run --config=configs/fret.py:local --workdir=runs/fret \\
      --config.retrieve.model=runs/initial"""

REPORT = """\
Writes WORKDIR/report.html: what was dropped and why, how the judges agree, how far
positives moved, tasks, lengths, cost, and random rows with their candidates.

example:
  gecko fret report --config=configs/fret.py:local --workdir=runs/fret"""

STAGES = (
    "passages",
    "generate",
    "retrieve",
    "likelihood",
    "relevance",
    "fuse",
    "export",
)


def add_parsers(parent: Any, add_verb: Any, add_config: Any, types: Any) -> None:
    """Adds the verbs of `gecko fret` to the parser of the command.

    Args:
        parent: The parser of `gecko fret`.
        add_verb: Of `cli`: makes the parser of a verb.
        add_config: Of `cli`: adds `--config`.
        types: Name -> what reads an option's value: count, positive.
    """
    verbs = parent.add_subparsers(metavar="VERB", required=True)
    parsers = {}
    for name, text in (
        ("plan", PLAN),
        ("calibrate", CALIBRATE),
        ("run", RUN),
        ("bootstrap", BOOTSTRAP),
        ("report", REPORT),
    ):
        parser = parsers[name] = add_verb(
            verbs, f"gecko fret {name}", text, f"fret_{name}"
        )
        add_config(parser)
        parser.add_argument(
            "--workdir", required=True, metavar="DIR", help="of the run"
        )
    parsers["plan"].add_argument(
        "--sample", type=types["positive"], default=8, help="requests of each kind (8)"
    )
    for name in ("run", "calibrate"):
        parsers[name].add_argument(
            "--max-requests", type=types["positive"], help="that this call may send"
        )
        parsers[name].add_argument(
            "--max-cost", type=_money, help="that this call may spend"
        )
    parsers["run"].add_argument(
        "--until",
        choices=STAGES,
        metavar="STAGE",
        default="export",
        help=f"the last to run, of {', '.join(STAGES)}",
    )
    parsers["run"].add_argument(
        "--worker", type=_worker, default=(0, 1), metavar="I/N", help="see above"
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
        "--batch-size", type=types["positive"], help="if not the train config's"
    )
    parsers["bootstrap"].add_argument(
        "--steps", type=types["positive"], help="of training, if not the train config's"
    )
    parsers["report"].add_argument(
        "--rows", type=types["count"], default=12, help="random rows to show (12)"
    )


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
