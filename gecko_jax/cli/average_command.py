"""`gecko average`: checkpoints of one run, or several models, as one."""

import argparse
from typing import Any

from gecko_jax.cli import parsing

_AVERAGE = """\
Averages the checkpoints of one run, or several models that started from the same
checkpoint, into a model folder: often better than each of them, at no cost of training.

  --method=mean    the weighted mean of every parameter; the default
  --method=slerp   the weighted mean on the sphere: directions turn, lengths stay

One workdir means its own checkpoints: all that it holds, or those of --steps. Several
models may be workdirs (the newest checkpoint counts), folders, or anything that
`gecko import` reads. They must agree in sizes, vocabulary, text format, lengths and MRL
dims. Nothing of this chooses: judge the average and its parts with `gecko evaluate`.

examples:
  gecko average runs/finetune --output=averaged
  gecko average runs/finetune --steps=16000,18000,20000 --output=averaged
  gecko average runs/retrieval runs/similarity --weights=3,1 --output=soup
  gecko average runs/a runs/b runs/c --method=slerp --output=soup

The folder's gecko.json says what went in, with which weights."""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko average`."""
    parser = parsing.add_verb(verbs, "gecko average", _AVERAGE, average)
    parser.add_argument(
        "sources",
        nargs="+",
        type=parsing.path,
        metavar="SOURCE",
        help="one workdir, or models",
    )
    parsing.add_output(parser, "DIR", "the folder to write")
    parser.add_argument("--method", choices=("mean", "slerp"), default="mean")
    parser.add_argument(
        "--weights",
        type=_weights,
        default=(),
        metavar="W,W,...",
        help="of the models, in any unit (all equal)",
    )
    parser.add_argument(
        "--steps",
        type=_steps,
        default=(),
        metavar="N,N,...",
        help="checkpoints of the one workdir (all it holds)",
    )


def average(options: argparse.Namespace) -> None:
    """Averages models and says what went in."""
    from gecko_jax.formats import averaging

    done = averaging.average(
        options.sources,
        options.output,
        method=options.method,
        weights=options.weights,
        steps=options.steps,
    )
    for model, cosine in zip(done.inputs, (None, *done.cosines), strict=True):
        near = "" if cosine is None else f", cosine {cosine:.4f} with the one before"
        parsing.say(f"{model['weight']:.3f}  {averaging.describe(model)}{near}")
    parsing.say(
        f"{options.output}: {options.method} of {len(done.inputs)} models, revision "
        f"{done.model_files.revision}. Load it with gecko_jax.load({options.output!r})"
    )


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be numbers with commas between them"
        ) from None


def _steps(text: str) -> tuple[int, ...]:
    return tuple(sorted({parsing.positive(part.strip()) for part in text.split(",")}))
