"""`gecko average`: averages checkpoints of one run, or several models."""

import argparse
from typing import Any

from gecko_jax.cli import parsing

_AVERAGE = """\
Averages the checkpoints of one run, or several models that were fine-tuned from the
same checkpoint. The average is often better than each input, at no training cost.

  --method=mean    weighted mean of every parameter (the default)
  --method=slerp   spherical mean: averages directions and lengths separately

With one workdir, its own checkpoints are averaged: all of them, or those of --steps.
With several sources, each is a workdir (its newest checkpoint), a model folder, or
anything that `gecko import` reads. Sizes, vocabulary, text format, lengths and MRL dims
must agree. Compare the average with its inputs by `gecko evaluate`.

examples:
  gecko average runs/finetune --output=averaged
  gecko average runs/finetune --steps=16000,18000,20000 --output=averaged
  gecko average runs/retrieval runs/similarity --weights=3,1 --output=soup
  gecko average runs/a runs/b runs/c --method=slerp --output=soup

The gecko.json of the output records the sources and their weights."""


def add_parser(verbs: Any) -> None:
    """Adds the parser of `gecko average`."""
    parser = parsing.add_verb(verbs, "gecko average", _AVERAGE, average)
    add = parser.option
    add("sources", "one workdir, or several models", "SOURCE", nargs="+")
    add("--output", "folder for the averaged model", "DIR", required=True)
    add("--method", "kind of mean", ("mean", "slerp"), "mean")
    text = "relative weights of the models (default: equal)"
    add("--weights", text, _weights, (), metavar="W,W,...")
    text = "checkpoints of the workdir to average (default: all)"
    add("--steps", text, parsing.positives, (), metavar="N,N,...")


def average(options: argparse.Namespace) -> None:
    """Averages models and prints their weights and similarities."""
    from gecko_jax.formats import averaging

    done = averaging.average(
        options.sources,
        options.output,
        method=options.method,
        weights=options.weights,
        steps=options.steps,
    )
    for model, cosine in zip(done.inputs, (None, *done.cosines), strict=True):
        similarity = "" if cosine is None else f", cosine {cosine:.4f} to the previous"
        parsing.say(f"{model['weight']:.3f}  {averaging.describe(model)}{similarity}")
    parsing.say(
        f"{options.output}: {options.method} of {len(done.inputs)} models, revision "
        f"{done.model_files.revision}. Load it with gecko_jax.load({options.output!r})"
    )


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a comma-separated list of numbers"
        ) from None
