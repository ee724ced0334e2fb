"""The command `gecko`: its verbs, their options, and how errors are told.

The parsers are built here, with the help that teaches each verb; what a verb does is
in `verbs`, which is imported when one runs, so that `gecko --help` needs no JAX.
"""

import argparse
import contextlib
import importlib
import logging as standard_logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import logging

import gecko_jax
from gecko_jax import fret_parsers

# Faults of the input or of the machine: told in one line, without a traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError)

# What a shell reports of a process that Ctrl-C has ended.
_INTERRUPTED = 130

_DESCRIPTION = """\
Gecko text embeddings in JAX: train a dual encoder, judge it, search with it.

  gecko train       trains a model from a config file
  gecko compile     proves a config for a TPU topology, on a CPU
  gecko data        shows the data, makes hard negatives or a vocabulary
  gecko evaluate    judges a model on retrieval and similarity, beside BM25
  gecko embed       turns a file of texts into vectors
  gecko index       builds an index from vectors
  gecko search      answers queries from an index
  gecko import      turns a checkpoint of another library into a model folder
  gecko export      writes a trained model into a folder of its own
  gecko fret        makes training data with a language model

`gecko VERB --help` explains a verb with examples.
"""

_TRAIN = """\
Trains a model, or goes on where an earlier run in the same workdir stopped.

examples:
  gecko train --config=configs/prefinetune.py:local --workdir=runs/prefinetune
  gecko train --config=configs/finetune.py:base --workdir=runs/finetune \\
      --config.init.checkpoint=runs/prefinetune \\
      --config.data.files=pairs.jsonl --config.data.batch_size=512

What follows the colon is the config's own argument, such as `local` (a laptop) or a
size. Every key of the config can be set: --config.GROUP.KEY=VALUE; tuples in quotes,
--config.loss.mrl_dims='(256,768)'. The workdir gets the resolved config, checkpoints,
metrics.jsonl and TensorBoard files, and can be used as a model at any time. After
SIGTERM everything is saved and the status is 143; the same command goes on.

several hosts, each with the same workdir:
  gecko train --distributed --config=... --workdir=...        TPU slices, srun, mpirun
  gecko train --coordinator=HOST:1234 --processes=2 --process=0 --config=..."""

_COMPILE = """\
Compiles the train step of a config for a TPU topology, on a CPU (the extra "tpu"):
memory, operations and collectives of a chip, and the time its data sheet allows.

examples:
  gecko compile --config=configs/finetune.py:xl --topology=v5e:16x16 \\
      --config.data.batch_size=8192 --config.mesh.fsdp=256 \\
      --config.train.microbatch_size=512
  gecko compile --config=configs/finetune.py:base --topology=v5litepod-16 --search"""

_SHOW = """\
Shows the examples of a config as the model sees them: the formatted texts, their
tokens, and how much of a batch is padding. With a mixture's name it shows the table:
rates, sizes, licences, and what has been prepared.

examples:
  gecko data show gecko_finetune
  gecko data show --config=configs/finetune.py:local
  gecko data show --config=configs/finetune.py:local --count=5 \\
      --config.data.files=mine.jsonl"""

_VOCABULARY = """\
Trains a SentencePiece vocabulary on the texts of JSONL files. Any existing `.model`,
such as T5's, works as well: name it as --config.data.vocabulary.

example:
  gecko data vocabulary pairs.jsonl more.jsonl.gz --output=pairs.model --size=32000"""

_PREPARE = """\
Adds hard negatives to pairs: passages of the same files that BM25 ranks high for the
query and that are not its positive. The result is a file of triples to fine-tune on.
With the name of a set of the table it turns the set's source into such triples.

examples:
  gecko data prepare snli
  gecko data prepare hotpotqa --source='hotpotqa/distractor/train-*.parquet'
  gecko data prepare pairs.jsonl --output=triples.jsonl --negatives=1

Each line of the input is an object with `task`, `query` and `positive` (or `passage`),
and maybe `title` and ids."""

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
  gecko evaluate --config=configs/evaluate.py:v1,v2 --model=runs/finetune \\
      --output=results

With --precision, passages are stored in fewer bits and a row shows what that costs."""

_EMBED = """\
Embeds a file of texts into a folder of shards; an interrupted run goes on.

The file is JSON lines (`_id`, `text`, maybe `title`) or plain text, a text a line.

examples:
  gecko embed corpus.jsonl --model=runs/finetune --output=vectors
  gecko embed questions.txt --model=runs/finetune --output=vectors --side=query \\
      --task="question answering" --dim=256
  gecko embed corpus.jsonl --model=runs/finetune --output=small --precision=int8

--precision=int8 stores a byte per dim, binary a bit; index and search take either."""

_INDEX = """\
Builds an index from a folder that `gecko embed` made. The search is exact.

example:
  gecko index vectors --output=index"""

_SEARCH = """\
Answers queries from an index; without one, reads them one a line.

examples:
  gecko search --model=runs/finetune --index=index "how do plants make food"
  gecko search --model=runs/finetune --index=index --count=3 "first" "second"
  gecko search --model=runs/finetune --index=index < queries.txt > hits.jsonl --json"""

_IMPORT = """\
Turns a checkpoint of T5X, Hugging Face or sentence-transformers into a model folder.

SOURCE is a T5X checkpoint (its folder, or the model_dir that holds several; a path,
gs:// or https://), a folder with config.json or modules.json, or a name on the hub.
Only the encoder, its embeddings and its projection are read, one tensor at a time.

examples:
  gecko import t5_1_1_base/checkpoint_1000000 --output=t5-base \\
      --vocabulary=sentencepiece.model --extra-ids=100
  gecko import google/flan-t5-base --output=flan-t5-base
  gecko import sentence-transformers/gtr-t5-base --output=gtr --query-length=64"""

_EXPORT = """\
Writes a trained model into a folder of its own, without the state of training.

  --to=gecko                  settings, weights, vocabulary; the default
  --to=sentence-transformers  SentenceTransformer(DIR), prompts and model card included
  --to=t5x                    a legacy T5X checkpoint, for t5x and t5x_retrieval
  --to=onnx                   one graph from tokens to vectors, and a tokenizer

examples:
  gecko export runs/finetune --output=my-gecko
  gecko export runs/finetune --output=my-gecko-st --to=sentence-transformers \\
      --results=results/results.json --push=my-lab/my-gecko
  gecko export runs/finetune --output=my-gecko-onnx --to=onnx --dim=256"""


class _UsageError(Exception):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and offers the nearest names."""

    _arguments: Sequence[str] = ()

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (overloads)
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        self._arguments = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if "arguments are required" in message:
            # A misspelt option is missing too, but the spelling is what to tell.
            self.refuse_unknown(self._arguments)
        raise _UsageError(f"{self.prog}: error: {message}\nSee {self.prog} --help")

    def refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raises for the first option that this parser does not have."""
        for argument in arguments:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if re.match(r"--(no)?config\.", name):
                self.error(f"{name}: this verb takes no config")
            if name.startswith("-") and name not in self._option_string_actions:
                options = list(self._option_string_actions)
                self.error(f"unknown option {name}{_nearest(name, options)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            what = action.metavar or "/".join(action.option_strings) or action.dest
            self.error(
                f"{what} {value!r}: must be one of {', '.join(names)}"
                f"{_nearest(str(value), names)}"
            )


def run() -> NoReturn:
    """Runs the command as a process of its own, which ends here."""
    sys.unraisablehook = _repeat_lost_interrupt
    status = main()
    if status == _INTERRUPTED:
        # XLA's threads are at work still, and crash when Python is taken down.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _repeat_lost_interrupt(lost: Any) -> None:
    """Gives Ctrl-C again when it fell into a callback, where Python drops errors."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status.

    Returns:
        0 when done, 1 for an error that was told, 2 for a command line that cannot be
        understood, 130 when interrupted; a verb may exit with its own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("GECKO_DEBUG", "") not in ("", "0")
    # TensorFlow's C++ notes would drown ours; it reads this when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    command = "gecko"
    try:
        options = _parse(arguments)
        options.arguments = arguments
        command = options.parser.prog
        _set_up_logging(debug)
        room = "fret_verbs" if options.verb.startswith("fret_") else "verbs"
        verbs = importlib.import_module(f"gecko_jax.{room}")
        getattr(verbs, options.verb.removeprefix("fret_"))(options)
    except _UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"\n{command}: interrupted; the same command goes on from what is saved",
            file=sys.stderr,
        )
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone: no fault of anyone's.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _EXPECTED as error:
        if debug:
            raise
        print(f"{command}: error: {_describe(error)}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    # Keys of configs cannot be known to a parser: they are set apart before.
    overrides = [a for a in arguments if re.match(r"--(no)?config\.", a)]
    if overrides:
        from gecko_jax import flags

        overrides, arguments = flags.split(arguments)
    options, unknown = parser.parse_known_args(arguments)
    options.overrides = overrides
    if overrides and "config" not in options:
        unknown = overrides + unknown
    if unknown:
        options.parser.refuse_unknown(unknown)
        options.parser.error(
            f"argument {unknown[0]!r} is one too many, or apart from the others"
        )
    return options


def _nearest(name: str, names: Sequence[str]) -> str:
    from gecko_jax import flags

    return flags.nearest(name, names)


def _describe(error: BaseException) -> str:
    message = str(error) or type(error).__name__
    # "[Errno 2] No such file or directory: 'x'" -> "x: no such file or directory"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror.lower()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, ModuleNotFoundError) and "gecko-jax[" not in message:
        return f"{message}; install it with pip"
    return message


class _LogHandler(standard_logging.Handler):
    """Our own notes and everyone's warnings, one clean line each, to stderr."""

    debug = False

    def filter(self, record: standard_logging.LogRecord) -> bool:
        is_ours = f"{os.sep}gecko_jax{os.sep}" in record.pathname
        return self.debug or is_ours or record.levelno >= standard_logging.WARNING

    def emit(self, record: standard_logging.LogRecord) -> None:
        time = standard_logging.Formatter().formatTime(record, "%H:%M:%S")
        level = record.levelname.lower() + ": "
        # sys.stderr is looked up now: an open progress bar puts its own in place.
        print(
            f"{time} {'' if level == 'info: ' else level}{record.getMessage()}",
            file=sys.stderr,
        )


_LOG_HANDLER = _LogHandler()


def _set_up_logging(debug: bool) -> None:
    _LOG_HANDLER.debug = debug
    root = standard_logging.getLogger()
    if _LOG_HANDLER not in root.handlers:
        root.addHandler(_LOG_HANDLER)
    logging.set_verbosity(logging.INFO)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `gecko`, with a parser for every verb."""
    parser = _Parser(prog="gecko", **_texts(_DESCRIPTION))
    parser.add_argument(
        "--version", action="version", version=f"gecko-jax {gecko_jax.__version__}"
    )
    _add_debug(parser)
    verbs = parser.add_subparsers(metavar="VERB", required=True, help="see above")

    train = _add_verb(verbs, "gecko train", _TRAIN, "train")
    _add_config(train)
    train.add_argument(
        "--workdir", required=True, type=_path, metavar="DIR", help="of the run"
    )
    train.add_argument(
        "--profile",
        type=_count,
        default=0,
        metavar="STEPS",
        help="write a trace of so many steps to DIR/profile, for xprof (0)",
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, as TPU metadata, SLURM or Open MPI say",
    )
    train.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, where nothing says so"
    )
    train.add_argument("--processes", type=_positive, metavar="N", help="how many")
    train.add_argument("--process", type=_count, metavar="I", help="which, from 0")
    train.add_argument(
        "--peer-timeout",
        type=_positive,
        default=100,
        metavar="SECONDS",
        help="how long a silent process is waited for (100)",
    )

    compile_ = _add_verb(verbs, "gecko compile", _COMPILE, "compile_step")
    _add_config(compile_)
    compile_.add_argument(
        "--topology", required=True, metavar="NAME", help="such as v5e:4x4"
    )
    compile_.add_argument(
        "--slices", type=_positive, default=1, help="of the pod, joined by DCN (1)"
    )
    compile_.add_argument(
        "--search", action="store_true", help="try microbatches, remat and meshes"
    )
    compile_.add_argument("--json", action="store_true", help="print JSON lines")

    data = _add_verb(verbs, "gecko data", "Looks at data and prepares it.")
    data_verbs = data.add_subparsers(metavar="VERB", required=True)

    show = _add_verb(data_verbs, "gecko data show", _SHOW, "data_show")
    show.add_argument("mixture", nargs="?", metavar="MIXTURE", help="of the table")
    _add_config(show, required=False)
    _add_prepared_dir(show)
    show.add_argument(
        "--count", type=_positive, default=2, help="examples of each task (2)"
    )

    vocabulary = _add_verb(
        data_verbs, "gecko data vocabulary", _VOCABULARY, "data_vocabulary"
    )
    vocabulary.add_argument(
        "files", nargs="+", type=_path, metavar="FILE", help="JSONL of pairs"
    )
    _add_output(vocabulary, "FILE", "the .model file to write")
    vocabulary.add_argument(
        "--size", type=_positive, default=32_000, help="number of pieces (32000)"
    )

    prepare = _add_verb(data_verbs, "gecko data prepare", _PREPARE, "data_prepare")
    prepare.add_argument(
        "files",
        nargs="+",
        type=_path,
        metavar="NAME|FILE",
        help="a set, or JSONL of pairs",
    )
    prepare.add_argument(
        "--output",
        type=_path,
        metavar="FILE",
        help="the JSONL of triples to write, for files",
    )
    prepare.add_argument(
        "--source", default="", metavar="PATH", help="where the set's files lie"
    )
    prepare.add_argument(
        "--accept-licence",
        action="append",
        default=[],
        metavar="NAME",
        help="a set whose restricted licence you have read and accept",
    )
    prepare.add_argument(
        "--tfds-data-dir", type=_path, metavar="DIR", help="where TFDS keeps its sets"
    )
    _add_prepared_dir(prepare)
    prepare.add_argument(
        "--negatives", type=_positive, default=1, help="hard negatives of a pair (1)"
    )
    prepare.add_argument(
        "--skip-top",
        type=_count,
        default=0,
        help="best-ranked passages to pass over: the likeliest unmarked answers (0)",
    )

    evaluate = _add_verb(verbs, "gecko evaluate", _EVALUATE, "evaluate")
    evaluate.add_argument(
        "folders", nargs="*", type=_path, metavar="FOLDER", help="BEIR, or a file"
    )
    _add_config(evaluate, required=False)
    _add_model(evaluate)
    evaluate.add_argument(
        "--dims", type=_dims, help="such as 256,768; all that were trained"
    )
    evaluate.add_argument(
        "--task", help="task of queries that name none (search result)"
    )
    evaluate.add_argument(
        "--precision",
        type=_words,
        default=("float32",),
        help="of passages: float32, int8, binary or several (float32)",
    )
    evaluate.add_argument(
        "--untrained", action="store_true", help="add the same model before training"
    )
    evaluate.add_argument(
        "--no-baselines", action="store_true", help="leave out BM25 and bags of words"
    )
    evaluate.add_argument(
        "--output", type=_path, metavar="DIR", help="for the tables and the plot"
    )

    embed = _add_verb(verbs, "gecko embed", _EMBED, "embed")
    embed.add_argument("file", type=_path, metavar="FILE", help="the texts")
    _add_model(embed)
    _add_output(embed, "DIR", "the folder of shards to write")
    embed.add_argument(
        "--side", choices=("query", "passage"), default="passage", help="(passage)"
    )
    embed.add_argument("--task", help="name or description of the task")
    embed.add_argument(
        "--dim", type=_positive, help="one that was trained (the largest)"
    )

    embed.add_argument(
        "--precision",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="of the vectors (float32)",
    )

    index = _add_verb(verbs, "gecko index", _INDEX, "index")
    index.add_argument(
        "vectors", type=_path, metavar="DIR", help="what `gecko embed` wrote"
    )
    _add_output(index, "DIR", "the folder of the index to write")

    search = _add_verb(verbs, "gecko search", _SEARCH, "search")
    search.add_argument("queries", nargs="*", metavar="QUERY", help="in quotes")
    _add_model(search)
    search.add_argument(
        "--index", required=True, type=_path, metavar="DIR", help="of `gecko index`"
    )
    search.add_argument("--task", help="name or description (search result)")
    search.add_argument(
        "--count", type=_positive, default=5, help="results of a query (5)"
    )
    search.add_argument("--json", action="store_true", help="print JSON lines")

    import_ = _add_verb(verbs, "gecko import", _IMPORT, "import_")
    import_.add_argument("source", metavar="SOURCE", help="path, URL or hub name")
    _add_output(import_, "DIR", "the folder to write")
    import_.add_argument(
        "--vocabulary", metavar="FILE", help="SentencePiece model; T5X holds none"
    )
    import_.add_argument(
        "--extra-ids", type=_count, default=0, help="sentinels after it (0; T5: 100)"
    )
    for side in ("query", "passage"):
        import_.add_argument(
            f"--{side}-length",
            type=_length,
            help=f"longest {side} in tokens (the source's, or 512)",
        )

    export = _add_verb(verbs, "gecko export", _EXPORT, "export")
    export.add_argument("model", type=_path, metavar="DIR", help="workdir of a run")
    _add_output(export, "DIR", "the folder to write")
    export.add_argument(
        "--to",
        choices=("gecko", "sentence-transformers", "t5x", "onnx"),
        default="gecko",
        help="whose format (gecko)",
    )
    export.add_argument(
        "--dim",
        type=_positive,
        help="dims that sentence-transformers or the ONNX graph gives, one that was "
        "trained",
    )
    export.add_argument(
        "--results",
        metavar="FILE",
        help="results.json of `gecko evaluate`, for the model card",
    )
    export.add_argument(
        "--push", metavar="OWNER/NAME", help="upload to this repository of the hub"
    )

    fret = _add_verb(verbs, "gecko fret", fret_parsers.DESCRIPTION)
    fret_parsers.add_parsers(
        fret, _add_verb, _add_config, {"count": _count, "positive": _positive}
    )
    return parser


def _add_verb(
    verbs: Any, name: str, description: str, function: str | None = None
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name.split()[-1], prog=name, **_texts(description))
    # The parser that speaks for the command, and the function in `verbs`.
    parser.set_defaults(parser=parser, verb=function)
    _add_debug(parser)
    return parser


def _texts(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks and every log line"
    )


def _add_prepared_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prepared-dir",
        default="~/.cache/gecko_jax/prepared",
        metavar="DIR",
        help="where prepared sets lie (~/.cache/gecko_jax/prepared)",
    )


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--config", required=required, metavar="FILE.py:ARG", help="the config file"
    )
    # Never stored: `flags.split` has taken these. Here for the help.
    parser.add_argument(
        "--config.GROUP.KEY", dest="_key", metavar="VALUE", help="sets one of its keys"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=_path,
        metavar="DIR",
        help="workdir of a run, or an export",
    )


def _add_output(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument(
        "--output", required=True, type=_path, metavar=metavar, help=text
    )


def _path(text: str) -> str:
    if not text.strip():  # Such as "$UNSET": it would mean the current folder.
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _length(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 2")
    return int(text)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part.strip()) for part in text.split(",")}))
