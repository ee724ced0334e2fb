"""The lines of the tables of `quality.py`: what each is, and what it changes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

VOCABULARY_SIZE = 8_000  # what `mini` has room for

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
        first: Argument of the first stage's config; "local,bag" keeps its own batches
            and steps.
        vocabulary_size: Pieces of the vocabulary; the bundled corpus has its own.
    """

    kind: str
    about: str
    both: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    second: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    classes: str = ""
    first: str = "local"
    vocabulary_size: int = VOCABULARY_SIZE


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
    "gecko-bag": Row(
        "gecko",
        "gecko_jax: `prefinetune.py:local,bag`, then `finetune.py:local`",
        first="local,bag",
    ),
    "bag": Row(
        "gecko",
        "gecko_jax: `prefinetune.py:local,bag`, 400 steps of 1,024; no layers",
        second={"model.num_layers": 0},
        first="local,bag",
    ),
    "bag-wide": Row(
        "gecko",
        "the same at width 512",
        {
            "model.model_dim": 512,
            "model.embedding_dim": 512,
            "loss.mrl_dims": (64, 128, 256, 512),
            "loss.mrl_weights": (1.0,) * 4,
        },
        second={"model.num_layers": 0},
        first="local,bag",
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


def _times(key: str, factor: float) -> Callable[[Any], int]:
    """Returns a whole number times a factor, at least 1."""

    def value(config: Any) -> int:
        group, name = key.split(".")
        return max(round(config[group][name] * factor), 1)

    return value


def _scaled(**factors: float) -> dict[str, Value]:
    """Returns keys of whole numbers, such as model__num_layers, times a factor each."""
    keys = {name.replace("__", "."): factor for name, factor in factors.items()}
    return {key: _times(key, factor) for key, factor in keys.items()}


def _sized(pieces: int) -> Row:
    about = f"a vocabulary of {pieces:,}"
    keys = {"model.vocab_size": pieces + 64}
    return Row("gecko", about, keys, vocabulary_size=pieces)


# What the recipe was chosen from, on dev: one change each, to be combined by hand. Rows
# of another batch see as many pairs.
SEARCH = {
    "search-base": Row("gecko", "the recipe"),
    "search-vocabulary-4k": _sized(4_000),
    "search-vocabulary-16k": _sized(16_000),
    "search-depth-half": Row(
        "gecko", "half the layers", _scaled(model__num_layers=0.5)
    ),
    "search-depth-double": Row(
        "gecko", "twice the layers", _scaled(model__num_layers=2)
    ),
    "search-width": Row(
        "gecko",
        "half as wide again",
        _scaled(model__model_dim=1.5, model__num_heads=1.5, model__mlp_dim=1.5),
    ),
    "search-short": Row(
        "gecko", "passages half as long", _scaled(data__passage_length=0.5)
    ),
    "search-long": Row(
        "gecko", "passages twice as long", _scaled(data__passage_length=2)
    ),
    "search-batch-double": Row(
        "gecko",
        "twice the batch, half the steps",
        _scaled(data__batch_size=2, train__num_steps=0.5, optimizer__warmup_steps=0.5),
    ),
    "search-batch-half": Row(
        "gecko",
        "half the batch, twice the steps",
        _scaled(data__batch_size=0.5, train__num_steps=2, optimizer__warmup_steps=2),
    ),
    "search-cold": Row(
        "gecko",
        "half the temperature",
        {"loss.temperature": lambda config: config.loss.temperature / 2},
    ),
    "search-warm": Row(
        "gecko",
        "twice the temperature",
        {"loss.temperature": lambda config: config.loss.temperature * 2},
    ),
    "search-rate-double": Row(
        "gecko",
        "twice the learning rate",
        {"optimizer.learning_rate": lambda config: config.optimizer.learning_rate * 2},
    ),
    "search-rate-half": Row(
        "gecko",
        "half the learning rate",
        {"optimizer.learning_rate": lambda config: config.optimizer.learning_rate / 2},
    ),
    "search-adafactor": Row(
        "gecko",
        "Adafactor, GTR's rate",
        {
            "optimizer.name": "adafactor",
            "optimizer.learning_rate": 1e-3,
            "optimizer.beta1": 0.0,
        },
    ),
    "search-no-warmup": Row("gecko", "no warm-up", {"optimizer.warmup_steps": 0}),
    "search-dropout": Row("gecko", "dropout", {"model.dropout_rate": 0.1}),
    "search-bidirectional": Row(
        "gecko", "passages choose queries as well", {"loss.bidirectional": True}
    ),
    "search-all-negatives": Row(
        "gecko",
        "hard negatives of all others",
        {},
        {"loss.all_hard_negatives": True},
    ),
}
GROUPS = {
    "ladder": tuple(LADDER),
    "ablations": tuple(ABLATIONS),
    "search": tuple(SEARCH),
}
ROWS = LADDER | ABLATIONS | SEARCH
