"""`gecko evaluate`: evaluates a model on files, or on suites with mteb."""

import argparse
import pathlib
import shutil
from typing import Any

from gecko_jax.cli import flags, parsing

_EVALUATE = """\
Evaluates a model at every dimension that it was trained for, next to BM25 and untrained
bags of words.

The kind of data decides the score:
  folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels.jsonl or qrels/*.tsv):
      nDCG@10, recall@100 and MRR@10; `quickstart` is the bundled folder
  JSONL or TSV file of sentence pairs with scores: Spearman correlation
  JSONL or TSV file of texts with labels (text, label, split): accuracy of mteb's
      classification

With --config, mteb runs its own benchmarks, or files as above without network access.
Results are in mteb's format, and the same command runs what is missing.

examples:
  gecko evaluate quickstart --model=runs/finetune
  gecko evaluate scifact nfcorpus --model=runs/finetune --dims=256,768 --output=results
  gecko evaluate scifact --model=runs/finetune --task="fact checking"
  gecko evaluate scifact --model=runs/finetune --hybrid
  gecko evaluate scifact --model=runs/finetune --precision=float32,int8,binary
  gecko evaluate scifact --model=runs/finetune --beside=mini,runs/prefinetune
  gecko evaluate --config=configs/evaluate.py:v1,v2 --model=runs/finetune \\
      --output=results

--precision adds a row for each precision in which passages can be stored."""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko evaluate`."""
    parser = parsing.add_verb(verbs, "gecko evaluate", _EVALUATE, evaluate)
    add = parser.option
    add("folders", "data, as described above", "FOLDER", nargs="*")
    parsing.add_config(parser, required=False)
    parsing.add_model(parser)
    text = "dimensions, such as 256,768 (default: all that were trained)"
    add("--dims", text, parsing.positives, metavar="N,...")
    text = "task of queries without one (default: search result)"
    add("--task", text, str, metavar="TASK")
    text = "precisions of passages: float32, int8, binary"
    add("--precision", text, parsing.words, "float32", metavar="NAME,...")
    text = "other models to add to the tables"
    add("--beside", text, parsing.words, (), metavar="DIR,...")
    add("--untrained", "add the model before training", bool)
    add("--hybrid", "add the model fused with BM25", bool)
    add("--no-baselines", "omit BM25 and bags of words", bool)
    add("--output", "folder for the tables and the plot", "DIR")


def evaluate(options: argparse.Namespace) -> None:
    """Evaluates a model on folders or a config, and prints the tables."""
    if options.config:
        _evaluate_suites(options)
        return
    if options.overrides:
        options.parser.error(f"{options.overrides[0]} needs a --config")
    if not options.folders:
        options.parser.error("give at least one FOLDER, or a --config")
    from gecko_jax import evaluation
    from gecko_jax.inference import embedding

    results = evaluation.evaluate(
        embedding.load(options.model),
        options.folders,
        dims=options.dims,
        task=options.task,
        precisions=options.precision,
        baselines=not options.no_baselines,
        untrained=options.untrained,
        hybrid=options.hybrid,
        beside={name: embedding.load(name) for name in options.beside},
    )
    width = shutil.get_terminal_size((120, 24)).columns
    parsing.say(evaluation.format_table(results, max(width, 80)))
    if options.output:
        for path in evaluation.save(results, options.output):
            parsing.say(path)


def _evaluate_suites(options: argparse.Namespace) -> None:
    """Runs the suites of a config; raises at the end if a task failed."""
    names = "folders dims task beside untrained hybrid no_baselines"
    for name in names.split():
        if getattr(options, name):
            option = "FOLDER" if name == "folders" else f"--{name.replace('_', '-')}"
            options.parser.error(
                f"{option} cannot be combined with --config; set keys of the config, "
                "such as --config.folders and --config.dims"
            )
    if not options.output:
        options.parser.error("--config needs --output, the folder for the results")
    config = flags.load_checked(options, flags.EVALUATE)
    from gecko_jax.evaluation import mteb_suites, scoreboard
    from gecko_jax.inference import embedding

    model = embedding.load(options.model)
    name = pathlib.Path(options.model).resolve().name
    board = mteb_suites.run(model, config, options.output, name)
    parsing.say(scoreboard.format_board(board))
    for path in scoreboard.save(board, options.output):
        parsing.say(path)
    if board.failures:
        count = len({task.name for tasks in board.suites.values() for task in tasks})
        raise ValueError(
            f"{len(board.failures)} of {count} tasks did not run, see above; run the "
            "same command again to run only those"
        )
