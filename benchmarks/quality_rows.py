"""The lines of the tables of `quality.py`: what each is, and what it changes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

# Of a key that depends on the config: makes the value from it.
Value = Any | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        kind: What makes it: bm25, tfidf, gecko, sbert.
        about: For people.
        both: Keys of the config that differ in both stages.
        second: Keys that differ in the second stage.
        classes: Trains on texts with labels as well, in the second stage; "text" or
            "mask" says how their false negatives are kept away (`data.classification`).
    """

    kind: str
    about: str
    both: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    second: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    classes: str = ""


def _widest(config: Any) -> tuple[int, ...]:
    return (config.loss.mrl_dims[-1],)


def _weights(power: int) -> Callable[[Any], tuple[float, ...]]:
    """Returns weights that change with the dim, to a sum of 1 a dim as without."""

    def weights(config: Any) -> tuple[float, ...]:
        raw = [
            (dim / config.loss.mrl_dims[-1]) ** power for dim in config.loss.mrl_dims
        ]
        return tuple(len(raw) * weight / sum(raw) for weight in raw)

    return weights


def _more_dims(config: Any) -> tuple[int, ...]:
    """Returns two smaller dims before those of the config."""
    least = config.loss.mrl_dims[0]
    return (least // 4, least // 2, *config.loss.mrl_dims)


LADDER = {
    "bm25": Row("bm25", "BM25, English stemmer"),
    "tfidf": Row("tfidf", "TF-IDF, cosine"),
    "sbert": Row(
        "sbert", "the same encoder, batches and steps in sentence-transformers"
    ),
    "gecko": Row(
        "gecko", "gecko_jax: `prefinetune.py:local`, then `finetune.py:local`"
    ),
}
# What the paper never isolated; each differs from `base` by what it says, but for
# `classes-text`, which is to be held against `classes-mask`.
ABLATIONS = {
    "base": Row("gecko", "the recipe, one hard negative"),
    "no-same-tower": Row(
        "gecko", "no same-tower negatives", {}, {"loss.same_tower": False}
    ),
    "classes-mask": Row("gecko", "with classes, id mask", classes="mask"),
    "classes-text": Row("gecko", "with classes, unique id in the text", classes="text"),
    "mrl-none": Row(
        "gecko",
        "MRL: the largest dim alone",
        {"loss.mrl_weights": (1.0,), "loss.mrl_dims": _widest},
    ),
    "mrl-large": Row(
        "gecko", "MRL: weights grow with the dim", {"loss.mrl_weights": _weights(1)}
    ),
    "mrl-small": Row(
        "gecko", "MRL: weights fall with the dim", {"loss.mrl_weights": _weights(-1)}
    ),
    "mrl-more": Row(
        "gecko",
        "MRL: two smaller dims more",
        {
            "loss.mrl_weights": lambda config: (1.0,) * (len(config.loss.mrl_dims) + 2),
            "loss.mrl_dims": _more_dims,
        },
    ),
    "one-task": Row("gecko", "one task in a batch", {"data.one_task_per_batch": True}),
    "negatives-0": Row("gecko", "no hard negative", {}, {"data.num_negatives": 0}),
    "negatives-3": Row("gecko", "3 hard negatives", {}, {"data.num_negatives": 3}),
    "no-format": Row("gecko", "no task, no title", {"data.text_format": "plain"}),
    "no-mask": Row("gecko", "duplicates not masked", {"loss.mask_duplicates": False}),
    "hardness": Row("gecko", "hard negatives weighed", {}, {"loss.hardness": 5.0}),
    "spread": Row("gecko", "spread-out regularizer", {"loss.spread_weight": 1.0}),
    "plain-start": Row(
        "gecko",
        "random token embeddings and projection",
        {"init.token_weights": "none", "init.align_steps": 0},
    ),
}
GROUPS = {"ladder": tuple(LADDER), "ablations": tuple(ABLATIONS)}
ROWS = LADDER | ABLATIONS
