"""The rows of the tables of `quality.py`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

VOCABULARY_SIZE = 8_000  # the longest that `mini` reads

# Function that computes the value of a key from the config.
Value = Any | Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        kind: System of the row: bm25, tfidf, pretrained, gecko or sbert.
        about: Description in the table.
        both: Keys of the config that differ in both stages.
        second: Keys of the config that differ in the second stage.
        classes: Adds labelled texts to the second stage. "text" or "mask" is the way
            that their false negatives are avoided (`data.classification`).
        first: Argument of the first stage's config. "local,bag" keeps its own batches
            and steps.
        vocabulary_size: Number of pieces in the vocabulary. The bundled corpus has its
            own vocabulary.
        averaged: Number of checkpoints of the second stage that are averaged, one after
            each tenth of it, up to the last; 0 for the last one only.
        mined: Number of top results to skip when the first stage's model mines hard
            negatives; None for hard negatives of BM25.
    """

    kind: str
    about: str
    both: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    second: Mapping[str, Value] = dataclasses.field(default_factory=dict)
    classes: str = ""
    first: str = "local"
    vocabulary_size: int = VOCABULARY_SIZE
    averaged: int = 0
    mined: int | None = None


def _widest(config: Any) -> tuple[int, ...]:
    return (config.loss.mrl_dims[-1],)


def _weights(power: int) -> Callable[[Any], tuple[float, ...]]:
    """Returns weights that change with the dim; their mean is 1."""

    def weights(config: Any) -> tuple[float, ...]:
        raw = [
            (dim / config.loss.mrl_dims[-1]) ** power for dim in config.loss.mrl_dims
        ]
        return tuple(len(raw) * weight / sum(raw) for weight in raw)

    return weights


def _more_dims(config: Any) -> tuple[int, ...]:
    """Returns the dims of the config with two smaller ones first."""
    least = config.loss.mrl_dims[0]
    return (least // 4, least // 2, *config.loss.mrl_dims)


def _width(width: int) -> dict[str, Value]:
    """Returns the keys of an encoder of a width, with MRL at half and a quarter."""
    return {
        "model.model_dim": width,
        "model.embedding_dim": width,
        "loss.mrl_dims": (width // 4, width // 2, width),
    }


def _pieces(number: int) -> dict[str, Value]:
    """Returns the keys of an encoder for a vocabulary of a number of pieces."""
    return {"model.vocab_size": number + 64}


def _taught_bag(
    about: str,
    both: Mapping[str, Value] | None = None,
    second: Mapping[str, Value] | None = None,
    pieces: int = VOCABULARY_SIZE,
) -> Row:
    """Returns a row of the best recipe of the search, at the best width.

    Args:
        about: Description in the table.
        both: Keys of both stages.
        second: Keys of the second stage. Its lengths become those of the model.
        pieces: Number of pieces in the vocabulary.
    """
    return Row(
        "gecko",
        about,
        {
            **_width(1024),
            **_pieces(pieces),
            "data.one_task_per_batch": True,
            "loss.matching_weight": 10.0,
            "optimizer.learning_rate": 2e-3,
            **(both or {}),
        },
        {
            "model.num_layers": 0,
            "optimizer.learning_rate": 1e-4,
            "train.num_steps": 60,
            **(second or {}),
        },
        first="local,bag",
        vocabulary_size=pieces,
    )


LADDER = {
    "bm25": Row("bm25", "BM25, English stemmer"),
    "tfidf": Row("tfidf", "TF-IDF, cosine"),
    "pretrained": Row(
        "pretrained", "all-MiniLM-L6-v2, which others trained on 1.17 billion pairs"
    ),
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
        "gecko_jax: a bag of tokens, `prefinetune.py:local,bag` and no layers after",
        second={"model.num_layers": 0},
        first="local,bag",
    ),
    "bag-1024": Row(
        "gecko",
        "gecko_jax: such a bag at width 1,024",
        _width(1024),
        {"model.num_layers": 0},
        first="local,bag",
    ),
    "bag-1024-taught": _taught_bag(
        "gecko_jax: such a bag, taught: towards MiniLM's vectors as well, one task in "
        "a batch, at twice the rate",
    ),
    "bag-1024-read": _taught_bag(
        "gecko_jax: taught, then passages of 256 tokens",
        second={"data.passage_length": 256},
    ),
    "bag-1024-triples": _taught_bag(
        "gecko_jax: taught, then 200 steps of 256 triples at a higher rate, passages "
        "of 256 tokens",
        second={
            "data.passage_length": 256,
            "data.batch_size": 256,
            "optimizer.learning_rate": 6e-4,
            "optimizer.token_rate": 60.0,
            "train.num_steps": 200,
        },
    ),
    "bag-1024-long": _taught_bag(
        "gecko_jax: taught for 600 steps, passages of 256 tokens in both stages",
        {"data.passage_length": 256, "train.num_steps": 600},
    ),
    "bag-1024-brief": _taught_bag(
        "gecko_jax: taught for 250 steps, then passages of 256 tokens",
        {"train.num_steps": 250},
        {"data.passage_length": 256},
    ),
    "bag-1024-32k": _taught_bag(
        "gecko_jax: taught for 250 steps with 32,000 pieces, then passages of 256 "
        "tokens: `local,taught` of both configs",
        {"train.num_steps": 250},
        {"data.passage_length": 256},
        pieces=32_000,
    ),
}


def _short(
    about: str,
    both: Mapping[str, Value] | None = None,
    second: Mapping[str, Value] | None = None,
    **fields: Any,
) -> Row:
    """Returns a row that differs from the recipe of the ablations.

    The recipe is a bag of tokens, the best encoder after minutes on a CPU: four epochs
    of the subset on pairs, then one on triples with the same rate for the tokens.
    """
    return Row(
        "gecko",
        about,
        {"train.num_steps": 100, **(both or {})},
        {
            "model.num_layers": 0,
            "data.batch_size": 256,
            "optimizer.learning_rate": 3e-4,
            "optimizer.token_rate": 60.0,
            "train.num_steps": 100,
            **(second or {}),
        },
        first="local,bag",
        **fields,
    )


# Ablations that the paper does not have. Each row changes one thing in `base`, except
# `classes-text`, which compares with `classes-mask`.
ABLATIONS = {
    "base": _short("the recipe, one hard negative"),
    "no-same-tower": _short(
        "no same-tower negatives", second={"loss.same_tower": False}
    ),
    "classes-mask": _short("with classes, id mask", classes="mask"),
    "classes-text": _short("with classes, unique id in the text", classes="text"),
    "mrl-none": _short(
        "MRL: the largest dim alone",
        {"loss.mrl_weights": (1.0,), "loss.mrl_dims": _widest},
    ),
    "mrl-large": _short(
        "MRL: weights grow with the dim", {"loss.mrl_weights": _weights(1)}
    ),
    "mrl-small": _short(
        "MRL: weights fall with the dim", {"loss.mrl_weights": _weights(-1)}
    ),
    "mrl-more": _short(
        "MRL: two smaller dims more",
        {
            "loss.mrl_weights": lambda config: (1.0,) * (len(config.loss.mrl_dims) + 2),
            "loss.mrl_dims": _more_dims,
        },
    ),
    "one-task": _short("one task in a batch", {"data.one_task_per_batch": True}),
    "negatives-0": _short("no hard negative", second={"data.num_negatives": 0}),
    "negatives-3": _short("3 hard negatives", second={"data.num_negatives": 3}),
    "no-format": _short("no task, no title", {"data.text_format": "plain"}),
    "no-mask": _short("duplicates not masked", {"loss.mask_duplicates": False}),
    "hardness": _short("hard negatives weighed", second={"loss.hardness": 5.0}),
    "spread": _short("spread-out regularizer", {"loss.spread_weight": 1.0}),
    "plain-start": _short(
        "random token embeddings and projection",
        {"init.token_weights": "none", "init.align_steps": 0},
    ),
}


def _both(about: str, **keys: Value) -> Row:
    """Returns a row with keys, as loss__temperature, that differ in both stages."""
    both = {name.replace("__", "."): value for name, value in keys.items()}
    return _short(about, both, both)


def _times(key: str, factor: float) -> Callable[[Any], float]:
    group, name = key.split(".")
    return lambda config: config[group][name] * factor


def _sized(pieces: int) -> Row:
    return _short(f"{pieces:,} pieces", _pieces(pieces), vocabulary_size=pieces)


def _taught(
    weight: float, width: int, rate: float = 0.0, pieces: int = VOCABULARY_SIZE
) -> Row:
    about = f"width {width:,}, taught, weight {weight:g}"
    keys = {**_width(width), **_pieces(pieces), "loss.matching_weight": weight}
    if not rate:
        return _short(about, keys)
    about += f", one task in a batch, rates {rate:g} and 0.0006"
    return _short(
        about if pieces == VOCABULARY_SIZE else f"{about}, {pieces:,} pieces",
        {**keys, "data.one_task_per_batch": True, "optimizer.learning_rate": rate},
        {"optimizer.learning_rate": 6e-4},
        vocabulary_size=pieces,
    )


# The recipe was chosen from these rows, on dev. Each has one change, unless it says so.
# Rows with another batch size see as many pairs, at the same learning rate.
SEARCH = {
    "search-vocabulary-4k": _sized(4_000),
    "search-vocabulary-16k": _sized(16_000),
    "search-vocabulary-32k": _sized(32_000),
    "search-width-128": _short("width 128", _width(128)),
    "search-width-512": _short("width 512", _width(512)),
    "search-width-1024": _short("width 1,024", _width(1024)),
    "search-layer": _short(
        "a layer on top in the second stage", second={"model.num_layers": 1}
    ),
    "search-layers": _short(
        "two layers on top in the second stage", second={"model.num_layers": 2}
    ),
    "search-short": _both("passages of 64 tokens", data__passage_length=64),
    "search-long": _both("passages of 256 tokens", data__passage_length=256),
    "search-batch-double": _short(
        "twice the batch, half the steps",
        {"data.batch_size": 2048, "train.num_steps": 50},
        {"data.batch_size": 512, "train.num_steps": 50},
    ),
    "search-batch-half": _short(
        "half the batch, twice the steps",
        {"data.batch_size": 512, "train.num_steps": 200},
        {"data.batch_size": 128, "train.num_steps": 200},
    ),
    "search-steps-double": _short(
        "twice the steps", {"train.num_steps": 200}, {"train.num_steps": 200}
    ),
    "search-steps-half": _short(
        "half the steps", {"train.num_steps": 50}, {"train.num_steps": 50}
    ),
    "search-no-second": _short("no second stage", second={"train.num_steps": 1}),
    "search-cold": _both("temperature 0.025", loss__temperature=0.025),
    "search-warm": _both("temperature 0.1", loss__temperature=0.1),
    "search-rate-double": _short(
        "twice the learning rate",
        {"optimizer.learning_rate": _times("optimizer.learning_rate", 2)},
        {"optimizer.learning_rate": 6e-4},
    ),
    "search-rate-half": _short(
        "half the learning rate",
        {"optimizer.learning_rate": _times("optimizer.learning_rate", 0.5)},
        {"optimizer.learning_rate": 1.5e-4},
    ),
    "search-adafactor": _short(
        "Adafactor", {"optimizer.name": "adafactor", "optimizer.beta1": 0.0}
    ),
    "search-no-warmup": _both("no warm-up", optimizer__warmup_steps=0),
    "search-dropout": _both("dropout", model__dropout_rate=0.1),
    "search-bidirectional": _both(
        "passages choose queries as well", loss__bidirectional=True
    ),
    "search-teacher-1": _taught(1.0, 256),
    "search-teacher-10": _taught(10.0, 256),
    "search-teacher-30": _taught(30.0, 256),
    "search-teacher-512": _taught(10.0, 512),
    "search-teacher-512-slow": _taught(10.0, 512, 1e-3),
    "search-teacher-512-fast": _taught(10.0, 512, 2e-3),
    "search-teacher-512-faster": _taught(10.0, 512, 4e-3),
    "search-teacher-512-16k": _taught(10.0, 512, 2e-3, 16_000),
    "search-teacher-512-32k": _taught(10.0, 512, 2e-3, 32_000),
    "search-averaged": _short("mean of five checkpoints", averaged=5),
    "search-mined": _short("hard negatives by the first stage's model", mined=0),
    "search-mined-below": _short(
        "hard negatives by the first stage's model, below its best ten", mined=10
    ),
    "search-all-negatives": _short(
        "hard negatives of all others", second={"loss.all_hard_negatives": True}
    ),
}
GROUPS = {
    "ladder": tuple(LADDER),
    "ablations": tuple(ABLATIONS),
    "search": ("base", *SEARCH),
}
ROWS = LADDER | ABLATIONS | SEARCH
