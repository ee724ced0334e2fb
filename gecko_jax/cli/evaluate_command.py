"""`gecko evaluate`: judges a model."""

import argparse
import pathlib
import shutil
from typing import Any

from gecko_jax.cli import flags, parsing

_EVALUATE = """\
Judges a model at every dimension it was trained for, beside BM25 and bags of words
that learned nothing.

A folder in the BEIR layout (corpus.jsonl, queries.jsonl, qrels.jsonl or qrels/*.tsv)
gives nDCG@10, recall@100 and MRR@10; a file of sentence pairs with scores (JSONL or
TSV) gives the Spearman correlation; a file of texts with labels (text, label, split)
gives the accuracy of mteb's classification. `quickstart` is the bundled folder.

With a config, mteb runs its own benchmarks, or files like these without network; the
results are in mteb's format, and the same command goes on with what is missing.

examples:
  gecko evaluate quickstart --model=runs/finetune
  gecko evaluate scifact nfcorpus --model=runs/finetune --dims=256,768 --output=results
  gecko evaluate scifact --model=runs/finetune --task="fact checking"
  gecko evaluate scifact --model=runs/finetune --precision=float32,int8,binary
  gecko evaluate scifact --model=runs/finetune --beside=mini,runs/prefinetune
  gecko evaluate --config=configs/evaluate.py:v1,v2 --model=runs/finetune \\
      --output=results

With --precision, passages are stored in fewer bits and a row shows what that costs."""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko evaluate`."""
    parser = parsing.add_verb(verbs, "gecko evaluate", _EVALUATE, evaluate)
    parser.add_argument(
        "folders",
        nargs="*",
        type=parsing.path,
        metavar="FOLDER",
        help="BEIR, or a file",
    )
    parsing.add_config(parser, required=False)
    parsing.add_model(parser)
    parser.add_argument(
        "--dims", type=parsing.dims, help="such as 256,768; all that were trained"
    )
    parser.add_argument("--task", help="task of queries that name none (search result)")
    parser.add_argument(
        "--precision",
        type=parsing.words,
        default=("float32",),
        help="of passages: float32, int8, binary or several (float32)",
    )
    parser.add_argument(
        "--beside",
        type=parsing.words,
        default=(),
        metavar="DIR",
        help="other models, for the same tables; several with commas between them",
    )
    parser.add_argument(
        "--untrained", action="store_true", help="add the same model before training"
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out BM25 and bags of words"
    )
    parser.add_argument(
        "--output", type=parsing.path, metavar="DIR", help="for the tables and the plot"
    )


def evaluate(options: argparse.Namespace) -> None:
    """Judges a model on folders, or runs a config, and prints every dimension."""
    if options.config:
        _evaluate_suites(options)
        return
    if options.overrides:
        options.parser.error(f"{options.overrides[0]} needs a --config")
    if not options.folders:
        options.parser.error("name folders to judge on, or a --config")
    from gecko_jax import evaluation
    from gecko_jax.inference import embedding

    model = embedding.load(options.model)
    results = evaluation.evaluate(
        model,
        options.folders,
        dims=options.dims,
        task=options.task,
        precisions=options.precision,
        baselines=not options.no_baselines,
        untrained=options.untrained,
        beside={name: embedding.load(name) for name in options.beside},
    )
    width = shutil.get_terminal_size((120, 24)).columns
    parsing.say(evaluation.format_table(results, max(width, 80)))
    if options.output:
        for path in evaluation.save(results, options.output):
            parsing.say(path)


def _evaluate_suites(options: argparse.Namespace) -> None:
    """Runs the suites of a config; raises at the end if a task did not run."""
    unused = {
        "folders": options.folders,
        "--dims": options.dims,
        "--task": options.task,
        "--beside": options.beside,
        "--untrained": options.untrained,
        "--no-baselines": options.no_baselines,
    }
    for name, value in unused.items():
        if value:
            options.parser.error(
                f"{name} does not go with --config, which has keys of its own, such as "
                "--config.folders and --config.dims"
            )
    if not options.output:
        options.parser.error("--config needs --output, the folder of the results")
    config = flags.load(options.config, options.overrides, flags.EVALUATE)
    import gecko_jax.config

    gecko_jax.config.check_evaluation(config)
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
            f"{len(board.failures)} of {count} tasks did not run, as told above; the "
            "same command runs them and nothing else"
        )
