"""Configs: every key with its default, unit, source and rule, written once.

A config is an `ml_collections.ConfigDict`. A config file starts from `training` or
another table of defaults and assigns what differs:

    config = gecko_jax.config.training("base")
    config.data.batch_size = 1024

`load` reads such a file. `check` reports every key that is missing, unknown, of the
wrong type or out of range, all in one error.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from flax import traverse_util

from gecko_jax.models import dual_encoder, families, layers
from gecko_jax.parallel import sharding


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses the argument after the colon of `--config=file.py:argument`.

    The argument is comma-separated words and pairs, in any order: `parse_arg(
    "xl,local", size="base", local=False)` has `size` "xl" and `local` True. A word sets
    the boolean of its name; if `defaults` has `size`, a word can be a model size.

    Args:
        arg: The argument; "" or None for the defaults.
        **defaults: The arguments that the config accepts.

    Raises:
        ValueError: A word or a pair is unknown, or contradicts another.
    """
    values: dict[str, Any] = {}
    for word in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, _, text = word.partition("=")
        if not text and isinstance(defaults.get(name), bool):
            value: Any = True
        elif not text and "size" in defaults and name in dual_encoder.PRESETS:
            name, value = "size", name
        elif text and name in defaults and not isinstance(defaults[name], bool):
            kind = type(defaults[name])
            try:
                value = kind(text)
            except ValueError:
                raise ValueError(
                    f"config argument {word!r}: {name} must be {kind.__name__}"
                ) from None
        else:
            known = [key for key, default in defaults.items() if default is False]
            known += dual_encoder.PRESETS if "size" in defaults else []
            known += [
                f"{k}=..." for k, v in defaults.items() if not isinstance(v, bool)
            ]
            raise ValueError(
                f"config argument {word!r}: unknown; use any of {', '.join(known)}"
            )
        if values.setdefault(name, value) != value:
            raise ValueError(
                f"config argument {arg!r}: {name} is both {values[name]} and {value}; "
                "keep one of them"
            )
    return ml_collections.ConfigDict(defaults | values)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Type and range of a value.

    Attributes:
        kind: The type; an int passes for a float, and a list for a tuple.
        rule: The range in words, for the error message.
        holds: Returns whether a value of the right type is in range.
    """

    kind: type
    rule: str = ""
    holds: Callable[[Any], bool] = lambda value: True


@dataclasses.dataclass(frozen=True)
class Key:
    """A config key.

    Attributes:
        default: The default value.
        rule: Type and range.
        doc: Meaning, unit and source.
    """

    default: Any
    rule: Rule
    doc: str


def one_of(*names: str) -> Rule:
    """Returns the rule of a string with few values."""
    return Rule(str, "must be one of " + ", ".join(names), lambda v: v in names)


def between(least: int, most: int) -> Rule:
    """Returns the rule of an integer with bounds."""
    return Rule(int, f"must be in [{least:,}, {most:,}]", lambda v: least <= v <= most)


TEXT = Rule(str)
NAME = Rule(str, "must not be empty", bool)
SWITCH = Rule(bool)
POSITIVE = Rule(int, "must be at least 1", lambda v: v >= 1)
COUNT = Rule(int, "must be 0 or more", lambda v: v >= 0)
ABOVE_ZERO = Rule(float, "must be a number above 0", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Rule(float, "must be a number, 0 or more", lambda v: 0 <= v < math.inf)
SHARE = Rule(float, "must be in [0, 1)", lambda v: 0 <= v < 1)
# Bounds far beyond any model catch typing errors before anything is allocated.
_WIDTH = between(1, 2**20)
_LENGTH = between(8, 2**20)
_AXIS = Rule(int, "must be at least 1, or -1 for the rest", lambda v: v >= 1 or v == -1)
_PATHS = Rule(
    tuple, "must be paths", lambda v: all(isinstance(p, str) and p for p in v)
)
_ACTIVATIONS = Rule(
    tuple,
    "must hold one or two of " + ", ".join(layers.ACTIVATIONS),
    lambda v: (
        1 <= len(v) <= 2
        and all(isinstance(n, str) and n in layers.ACTIVATIONS for n in v)
    ),
)
_WINDOW = Rule(
    tuple,
    "must hold the distances to the left and right, 0 or more, or nothing",
    lambda v: len(v) in (0, 2) and all(_is_kind(n, int) and 0 <= n < 2**31 for n in v),
)
_BUCKETS = Rule(
    int, "must be even and in [4, 65,536]", lambda v: 4 <= v <= 2**16 and v % 2 == 0
)
_MRL_DIMS = Rule(
    tuple,
    "must be increasing integers above 0",
    lambda v: (
        len(v) > 0
        and all(_is_kind(dim, int) and dim > 0 for dim in v)
        and list(v) == sorted(set(v))
    ),
)
_MRL_WEIGHTS = Rule(
    tuple,
    "must be numbers of 0 or more",
    lambda v: all(_is_kind(w, float) and 0 <= w < math.inf for w in v),
)
_MESH_RULES = Rule(
    tuple,
    "must be pairs of a logical axis and a mesh axis, several, or None",
    lambda v: all(
        isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)
        for rule in v
    ),
)

# Defaults are those of fine-tuning; those without a source are ours.
TRAINING: dict[str, Key] = {
    "seed": Key(
        0, Rule(int, "must be in [0, 2^63)", lambda v: 0 <= v < 2**63), "PRNG seed."
    ),
    "data.mixture": Key("quickstart", NAME, "Mixture to train on if `files` is empty."),
    "data.files": Key((), _PATHS, "JSONL files of pairs or triples."),
    "data.vocabulary": Key(
        "quickstart",
        NAME,
        "Path of a SentencePiece model or a `tokenizer.json`, or of a folder with one; "
        "or `quickstart`.",
    ),
    "data.extra_ids": Key(
        0, between(0, 100_000), "Sentinel ids after the vocabulary's pieces (T5: 100)."
    ),
    "data.query_length": Key(64, _LENGTH, "Query length in tokens (GTR)."),
    "data.passage_length": Key(512, _LENGTH, "Passage length in tokens (GTR)."),
    "data.text_format": Key(
        "gecko", one_of("gecko", "plain"), "`plain` drops task descriptions and titles."
    ),
    "data.batch_size": Key(
        2048, between(2, 2**24), "Examples per step, over all hosts (GTR)."
    ),
    "data.num_negatives": Key(
        1, between(0, 10_000), "Hard negatives per example (eq. 3: 1, eq. 2: 0)."
    ),
    "data.packing": Key(
        True, SWITCH, "Packs several texts into a row; embeddings do not change."
    ),
    "data.one_task_per_batch": Key(
        False, SWITCH, "Draws each batch from a single task (EmbeddingGemma)."
    ),
    "data.unique_ids": Key(
        False,
        SWITCH,
        "Appends a unique id to classification texts (section 3.3) instead of masking "
        "their in-batch negatives.",
    ),
    "data.cache_dir": Key("~/.cache/gecko_jax", NAME, "Folder of tokenized examples."),
    "data.prepared_dir": Key(
        "~/.cache/gecko_jax/prepared", NAME, "Output folder of `gecko data prepare`."
    ),
    "data.teacher": Key(
        "",
        TEXT,
        "Output of `gecko data teach`, for embedding matching; empty for none.",
    ),
    "data.teacher_dim": Key(0, COUNT, "Dims of the teacher's vectors; 0 without one."),
    "model.family": Key(
        "t5",
        one_of("t5", *families.FAMILIES),
        "Encoder family: T5, Gemma 3 (EmbeddingGemma, T5Gemma 2), EmbeddingGemma 2's "
        "text part, or Qwen 3.",
    ),
    "model.vocab_size": Key(8_064, between(1, 2**24), "Rows of the embedding table."),
    "model.model_dim": Key(256, _WIDTH, "Encoder width."),
    "model.num_layers": Key(
        2, between(0, 1_000), "Encoder layers; 0 for a bag of tokens."
    ),
    "model.num_heads": Key(4, _WIDTH, "Attention heads."),
    "model.head_dim": Key(64, _WIDTH, "Width of a head."),
    "model.mlp_dim": Key(512, _WIDTH, "Width of the MLP."),
    "model.mlp_activations": Key(
        ("gelu", "linear"), _ACTIVATIONS, "MLP branches; two are gated (T5 1.1)."
    ),
    "model.shared_relative_bias": Key(
        True, SWITCH, "Shares one relative-position bias among layers (T5; not umT5)."
    ),
    "model.relpos_num_buckets": Key(32, _BUCKETS, "Relative-position buckets (T5)."),
    "model.relpos_max_distance": Key(
        128, between(1, 2**24), "Distance in tokens that fills the last bucket (T5)."
    ),
    "model.embedding_dim": Key(256, _WIDTH, "Width of the embedding."),
    "model.projection": Key(
        True, SWITCH, "Projects the pooled hidden state to `embedding_dim`."
    ),
    "model.dropout_rate": Key(0.1, SHARE, "Dropout rate (T5)."),
    "model.dtype": Key("bfloat16", one_of(*families.DTYPES), "Activation dtype."),
    "model.scan_layers": Key(
        True, SWITCH, "Scans over layers, which compiles faster; results do not change."
    ),
    "model.remat": Key(
        "dots",
        one_of(*families.REMAT_POLICIES),
        "Recomputed in the backward pass: none, all but matrix products, or full.",
    ),
    "model.l2_epsilon": Key(
        1e-12,
        ABOVE_ZERO,
        "Added under the root when a trained model normalizes embeddings.",
    ),
    "model.attention": Key(
        "xla",
        one_of(*families.ATTENTIONS),
        "`cudnn` fuses attention on a GPU, without dropout.",
    ),
    "model.residual_init_scale": Key(
        0.1,
        ABOVE_ZERO,
        "Scale of residual-branch initializers, relative to T5X's; a fresh encoder is "
        "then close to a bag of tokens.",
    ),
    "model.pooling": Key(
        "mean",
        one_of(*families.POOLINGS),
        "Mean over the tokens of a text, or its last token (Qwen3-Embedding).",
    ),
    "model.num_kv_heads": Key(
        0, COUNT, "Key and value heads; 0 for as many as `num_heads`."
    ),
    "model.global_num_kv_heads": Key(
        0, COUNT, "The same of global layers, if it differs (EmbeddingGemma 2)."
    ),
    "model.global_head_dim": Key(
        0, COUNT, "Width of a head of global layers, if it differs (EmbeddingGemma 2)."
    ),
    "model.local_window": Key(
        (), _WINDOW, "Reach of local layers to the left and right, in tokens."
    ),
    "model.global_every": Key(
        1, between(1, 1_000), "Period of the global layers (Gemma 3: 6)."
    ),
    "model.rope_base": Key(
        1e6, ABOVE_ZERO, "Base of the rotary frequencies of global layers (Gemma 3)."
    ),
    "model.rope_factor": Key(
        1.0, ABOVE_ZERO, "Divisor of these frequencies (Gemma 3 of 4B and more: 8)."
    ),
    "model.local_rope_base": Key(
        1e4, ABOVE_ZERO, "Base of the rotary frequencies of local layers (Gemma 3)."
    ),
    "model.query_scale": Key(
        0.0, NOT_NEGATIVE, "Factor of the attention logits; 0 for head_dim ** -0.5."
    ),
    "model.norm_epsilon": Key(1e-6, ABOVE_ZERO, "Added to the mean square in norms."),
    "model.per_layer_dim": Key(
        0, COUNT, "Width of the per-layer embeddings (EmbeddingGemma 2)."
    ),
    "init.checkpoint": Key(
        "", TEXT, "Workdir, model folder or checkpoint to start from; empty for none."
    ),
    "init.token_weights": Key(
        "none",
        one_of("none", "idf"),
        "From scratch: `idf` makes rare tokens count more.",
    ),
    "init.token_weight_dims": Key(
        0.25,
        Rule(float, "must be in (0, 1)", lambda v: 0 < v < 1),
        "From scratch with `idf`: share of the token dims hidden from the projection.",
    ),
    "init.align_steps": Key(
        0, COUNT, "From scratch: batches to align the projection on; 0 for none."
    ),
    "loss.temperature": Key(0.01, ABOVE_ZERO, "Divides the similarities (GTR)."),
    "loss.mrl_dims": Key((256,), _MRL_DIMS, "Trained prefixes (section 3.1)."),
    "loss.mrl_weights": Key(
        (1.0,), _MRL_WEIGHTS, "Weight of each prefix; the paper's are equal."
    ),
    "loss.same_tower": Key(
        True, SWITCH, "Same-tower negatives: other queries (eq. 3)."
    ),
    "loss.same_tower_passages": Key(
        False, SWITCH, "Same-tower negatives: other positives (SamToNe)."
    ),
    "loss.bidirectional": Key(False, SWITCH, "Adds the passage-to-query loss (GTR)."),
    "loss.all_hard_negatives": Key(
        False, SWITCH, "Adds the hard negatives of the other examples (GTR)."
    ),
    "loss.mask_duplicates": Key(
        False, SWITCH, "Masks in-batch negatives equal to the query or the positive."
    ),
    "loss.hardness": Key(
        0.0, NOT_NEGATIVE, "Weight of hard negatives by cosine (EmbeddingGemma: 5)."
    ),
    "loss.spread_weight": Key(
        0.0, NOT_NEGATIVE, "Weight of the spread-out regularizer (EmbeddingGemma)."
    ),
    "loss.matching_weight": Key(
        0.0, NOT_NEGATIVE, "Weight of embedding matching (EmbeddingGemma)."
    ),
    "loss.kl_weight": Key(
        0.0,
        NOT_NEGATIVE,
        "Weight of the KL divergence from the lines' `scores` (E5; FlagEmbedding: 1).",
    ),
    "loss.kl_temperature": Key(
        1.0, ABOVE_ZERO, "Divides these scores before their softmax (FlagEmbedding)."
    ),
    "optimizer.name": Key(
        "adafactor", one_of("adafactor", "adamw"), "Optimizer (GTR)."
    ),
    "optimizer.learning_rate": Key(1e-3, ABOVE_ZERO, "Peak learning rate (GTR)."),
    "optimizer.token_rate": Key(
        1.0, ABOVE_ZERO, "Learning rate of token embeddings, relative to the others."
    ),
    "optimizer.schedule": Key(
        "linear",
        one_of("constant", "linear", "cosine", "rsqrt"),
        "Decay after the warm-up (GTR).",
    ),
    "optimizer.warmup_steps": Key(200, COUNT, "Steps of linear warm-up."),
    "optimizer.weight_decay": Key(0.0, NOT_NEGATIVE, "Weight decay of matrices."),
    "optimizer.clip_norm": Key(
        1.0, NOT_NEGATIVE, "Largest global gradient norm; 0 for no clipping."
    ),
    "optimizer.beta1": Key(0.0, SHARE, "First-moment decay (T5's Adafactor: 0)."),
    "optimizer.beta2": Key(0.999, SHARE, "Second-moment decay of AdamW."),
    "train.num_steps": Key(20_000, POSITIVE, "Optimizer steps (GTR)."),
    "train.microbatch_size": Key(
        0, COUNT, "Rows of the longer side per microbatch, over all hosts; 0: no split."
    ),
    "train.log_every_steps": Key(100, POSITIVE, "Steps between lines of metrics."),
    "train.max_skipped_steps": Key(
        0, COUNT, "Non-finite steps in a row to skip before the run stops."
    ),
    "train.compilation_cache": Key(
        "~/.cache/gecko_jax/compiled", TEXT, "Folder of compiled steps; empty for none."
    ),
    "mesh.data": Key(-1, _AXIS, "Devices per slice along `data`; -1: the rest."),
    "mesh.fsdp": Key(1, _AXIS, "Devices of a slice along `fsdp`."),
    "mesh.tensor": Key(1, _AXIS, "Devices of a slice along `tensor`."),
    "mesh.dcn_data": Key(-1, _AXIS, "Slices along `data`."),
    "mesh.dcn_fsdp": Key(1, _AXIS, "Slices along `fsdp`."),
    "mesh.rules": Key(
        sharding.RULES, _MESH_RULES, "Mesh axis of each logical axis (t5x)."
    ),
    "checkpoint.every_steps": Key(1_000, POSITIVE, "Steps between checkpoints."),
    "checkpoint.every_minutes": Key(
        30, COUNT, "Minutes between checkpoints, in addition; 0 for steps only."
    ),
    "checkpoint.keep": Key(3, POSITIVE, "Newest checkpoints to keep."),
    "checkpoint.keep_every_steps": Key(
        5_000, COUNT, "Also keeps checkpoints at multiples of this step; 0 for none."
    ),
    "evaluation.every_steps": Key(
        1_000, COUNT, "Steps between evaluations; 0 for start and end only."
    ),
    "evaluation.folder": Key(
        "", TEXT, "Evaluation set in BEIR layout; empty for none."
    ),
    "evaluation.max_queries": Key(
        1_000, COUNT, "Queries to evaluate, for speed; 0 for all."
    ),
}
SCHEMA = {name: key.rule for name, key in TRAINING.items()}

# Keys that older configs lack, with the value that reproduces those runs.
ADDED_KEYS: dict[str, Any] = {
    "data.unique_ids": False,
    "loss.kl_temperature": 1.0,
    "loss.kl_weight": 0.0,
    "init.token_weight_dims": 0.25,
    "model.attention": "xla",
    "model.residual_init_scale": 0.1,
    # T5 was the only family.
    "model.family": "t5",
    **{f"model.{name}": value for name, value in families.ROTARY_FIELDS.items()},
}

# Both stages of a run that starts from a released encoder other than T5.
RELEASED: dict[str, Any] = {
    "model.dropout_rate": 0.0,  # The released models are trained without.
    "model.remat": "full",
    "optimizer.name": "adamw",
    "optimizer.beta1": 0.9,
    "train.microbatch_size": 512,  # Results do not depend on it.
    "mesh.data": 1,
    "mesh.fsdp": -1,  # All chips.
}

# The `local` argument of both stages: `mini` on a laptop CPU.
LOCAL: dict[str, Any] = {
    "data.query_length": 32,
    "data.passage_length": 128,
    "data.batch_size": 64,
    "model.dropout_rate": 0.0,  # A few epochs: every dim is better without dropout.
    "model.dtype": "float32",
    "model.scan_layers": False,
    "model.remat": "none",
    "loss.temperature": 0.05,
    "loss.mask_duplicates": True,
    "optimizer.name": "adamw",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.98,
    "train.log_every_steps": 10,
    "checkpoint.keep_every_steps": 0,
    "evaluation.folder": "quickstart",
    "evaluation.max_queries": 0,
}

# The suites of `configs/evaluate.py`; `evaluation.mteb_suites` knows their tasks.
SUITES = ("MTEB(eng, v1)", "MTEB(eng, v2)", "NanoBEIR", "MIRACL")

EVALUATION: dict[str, Key] = {
    "suites": Key(
        (),
        Rule(
            tuple,
            "must hold some of " + "; ".join(SUITES),
            lambda v: all(name in SUITES for name in v),
        ),
        "Suites of mteb.",
    ),
    "tasks": Key((), Rule(tuple), "Single tasks of mteb."),
    "folders": Key((), Rule(tuple), "Local sets, as for `gecko evaluate`."),
    "dims": Key(
        (),
        Rule(
            tuple,
            "must be integers above 0",
            lambda v: all(isinstance(dim, int) and dim > 0 for dim in v),
        ),
        "Trained dims to evaluate; empty for all.",
    ),
    "name": Key(
        "",
        Rule(
            str,
            "must be organization/model, or empty",
            lambda v: not v or re.fullmatch(r"[\w.-]+/[\w.-]+", v) is not None,
        ),
        "Model name in the results; empty for gecko-jax/FOLDER.",
    ),
    "query_length": Key(0, COUNT, "Query length in tokens; 0 for that of training."),
    "passage_length": Key(
        0, COUNT, "Passage length in tokens; 0 for that of training."
    ),
    "cache.folder": Key("~/.cache/gecko_jax/vectors", NAME, "Cache of vectors."),
    "cache.max_gib": Key(
        50.0, NOT_NEGATIVE, "Size of the cache after a run, over all models, in GiB."
    ),
    "mesh.data": Key(-1, _AXIS, "Devices along `data`."),
    "mesh.fsdp": Key(1, _AXIS, "Devices along `fsdp`."),
    "mesh.tensor": Key(1, _AXIS, "Devices along `tensor`."),
}


def defaults(keys: Mapping[str, Key]) -> ml_collections.ConfigDict:
    """Returns a config of default values."""
    flat = {name: key.default for name, key in keys.items()}
    return ml_collections.ConfigDict(traverse_util.unflatten_dict(flat, sep="."))


def training(size: str = "mini") -> ml_collections.ConfigDict:
    """Returns the default training config of a model size (`dual_encoder.PRESETS`)."""
    config = defaults(TRAINING)
    config.model.update(dual_encoder.PRESETS[size])
    set_mrl_dims(config, sorted({256, config.model.embedding_dim}))  # Section 3.1.
    return config


def set_mrl_dims(config: ml_collections.ConfigDict, dims: Iterable[int]) -> None:
    """Sets the trained prefixes, all with weight 1 (the paper's plain sum)."""
    config.loss.mrl_dims = tuple(dims)
    config.loss.mrl_weights = (1.0,) * len(config.loss.mrl_dims)


def load(
    argument: str, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
    """Loads a config file.

        config = gecko_jax.config.load(
            "configs/finetune.py:local",
            {"data.files": ("triples.jsonl",), "train.num_steps": 100},
        )

    Args:
        argument: Path of the file; after a colon, the argument of its `get_config`.
        overrides: Values by key.

    Raises:
        ValueError: There is no such file or key, or a value has the wrong type.
    """
    config = load_file(argument)
    keys = list(flatten(config))
    for key, value in (overrides or {}).items():
        check_key(key, keys, argument)
        try:
            config.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}={value!r}: {error}") from None
    return config


def load_file(argument: str) -> ml_collections.ConfigDict:
    """Calls the `get_config` of a config file; see `load`."""
    name, colon, rest = argument.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(
            f"--config={argument}: no file {path}; the configs are in configs/ of a "
            "clone of the repository, and the path is relative to the current folder"
        )
    specification = importlib.util.spec_from_file_location("gecko_config", path)
    if specification is None or specification.loader is None:
        raise ValueError(f"--config={argument}: {path} is not a Python file")
    module: Any = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("has no function get_config(arg)")
        config = module.get_config(rest) if colon else module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise ValueError("get_config must return an ml_collections.ConfigDict")
    except Exception as error:  # Whatever the code of the file may raise.
        why = str(error)
        if not isinstance(error, ValueError | ImportError):
            why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--config={argument}: {why}") from error
    return config.lock()


def check_key(key: str, keys: Sequence[str], source: str) -> None:
    """Raises ValueError if a config has no such key; names the nearest ones."""
    if key in keys:
        return
    members = [other for other in keys if other.startswith(f"{key}.")]
    if members:
        raise ValueError(
            f"--config.{key} is a group; set one of its keys: {', '.join(members)}"
        )
    raise ValueError(f"--config.{key}: no such key in {source}{nearest(key, keys)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with the most similar names, or nothing."""
    names = list(names)
    last = name.rpartition(".")[2]
    leaves = {n: n.rpartition(".")[2] for n in names}
    # The right key in the wrong group first, then typing errors.
    matches = [n for n in names if leaves[n] == last]
    matches = matches or difflib.get_close_matches(name, names, cutoff=0.75)
    matches = matches or [n for n in names if len(name) > 2 and n.startswith(name)]
    close = difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.75)
    matches = matches or [n for n in names if leaves[n] in close]
    return f"; did you mean {' or '.join(matches[:3])}?" if matches else ""


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every key of a training config.

    Raises:
        ValueError: Lists every fault: the key, its value, the rule, the remedy.
    """
    flat = flatten(config)
    refuse(find_faults(flat, SCHEMA) or _faults_between_keys(flat))


def check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Checks every key of `configs/evaluate.py`; raises as `check` does."""
    flat = flatten(config)
    refuse(find_faults(flat, {name: key.rule for name, key in EVALUATION.items()}))
    faults = _faults_of_mesh(flat)
    if not (flat["suites"] or flat["tasks"] or flat["folders"]):
        faults.append("suites, tasks, folders: all are empty; set at least one")
    refuse(faults)


def find_faults(flat: Mapping[str, Any], schema: Mapping[str, Rule]) -> list[str]:
    """Returns a line for each unknown or missing key and each wrong value.

    Args:
        flat: The config, as `flatten` returns it.
        schema: Every key of such a config.
    """
    faults = []
    for key in sorted(set(flat) - set(schema)):
        near = difflib.get_close_matches(key, schema, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        faults.append(f"{key}={flat[key]!r}: unknown key; {hint}")
    faults += [
        f"{key}: missing; start from the defaults of gecko_jax.config"
        for key in schema
        if key not in flat
    ]
    return faults + find_wrong_values(flat, schema)


def find_wrong_values(flat: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Returns a line for each key whose value breaks its rule."""
    faults = []
    for key, rule in rules.items():
        if key in flat:
            value = flat[key]
            if not _is_kind(value, rule.kind):
                faults.append(
                    f"{key}={value!r}: must be {rule.kind.__name__}, is "
                    f"{type(value).__name__}"
                )
            elif not rule.holds(value):
                faults.append(f"{key}={value!r}: {rule.rule}")
    return faults


def refuse(faults: Sequence[str]) -> None:
    """Raises ValueError with all faults, if there are any."""
    if faults:
        raise ValueError("the config has faults:\n  " + "\n  ".join(faults))


def _faults_between_keys(flat: Mapping[str, Any]) -> list[str]:
    faults = []
    dims, weights = flat["loss.mrl_dims"], flat["loss.mrl_weights"]
    width = flat["model.embedding_dim"]
    if dims[-1] > width:
        faults.append(
            f"loss.mrl_dims={dims}: no dim may exceed model.embedding_dim={width}; "
            f"drop {dims[-1]} or widen the projection"
        )
    if flat["model.scan_layers"] and not flat["model.num_layers"]:
        faults.append(
            "model.scan_layers=True: model.num_layers=0 has no layers to scan; set it "
            "to False"
        )
    if flat["model.attention"] == "cudnn":
        faults += [
            f"model.attention='cudnn': needs {key}={needed!r}, not {flat[key]!r}; set "
            "it, or set model.attention='xla'"
            for key, needed in (
                ("model.dtype", "bfloat16"),
                ("model.dropout_rate", 0.0),
            )
            if flat[key] != needed
        ]
    fields = {
        name.removeprefix("model."): value
        for name, value in flat.items()
        if name.startswith("model.")
    }
    faults += families.find_faults(fields, "model.")
    if not flat["model.projection"]:
        faults += [
            f"{key}={flat[key]!r}: needs model.projection=True"
            for key, none in (("init.token_weights", "none"), ("init.align_steps", 0))
            if flat[key] != none
        ]
    if len(weights) != len(dims):
        faults.append(
            f"loss.mrl_weights={weights}: needs one weight for each of "
            f"loss.mrl_dims={dims}"
        )
    elif not any(weights):
        faults.append(f"loss.mrl_weights={weights}: one must be above 0")
    if flat["optimizer.warmup_steps"] > flat["train.num_steps"]:
        faults.append(
            f"optimizer.warmup_steps={flat['optimizer.warmup_steps']}: must not exceed "
            f"train.num_steps={flat['train.num_steps']}; lower it (0 for none)"
        )
    faults += _faults_of_mesh(flat)
    microbatch_size, batch_size = flat["train.microbatch_size"], flat["data.batch_size"]
    if microbatch_size > batch_size:
        faults.append(
            f"train.microbatch_size={microbatch_size}: must not exceed "
            f"data.batch_size={batch_size}; lower it, or set 0 for no microbatches"
        )
    if flat["init.checkpoint"] and flat["init.token_weights"] != "none":
        faults.append(
            f"init.token_weights={flat['init.token_weights']!r}: applies to fresh "
            "token embeddings, but init.checkpoint is set; set it to none"
        )
    if flat["init.checkpoint"] and flat["init.align_steps"]:
        faults.append(
            f"init.align_steps={flat['init.align_steps']}: applies to a fresh "
            "projection, but init.checkpoint is set; set it to 0"
        )
    if flat["loss.all_hard_negatives"] and not flat["data.num_negatives"]:
        faults.append(
            "loss.all_hard_negatives=True: data.num_negatives=0 leaves no hard "
            "negatives; set it to False"
        )
    return faults + _faults_of_teacher(flat)


def _faults_of_teacher(flat: Mapping[str, Any]) -> list[str]:
    teacher, dim = flat["data.teacher"], flat["data.teacher_dim"]
    weight, width = flat["loss.matching_weight"], flat["model.embedding_dim"]
    faults = []
    if not bool(teacher) == bool(dim) == bool(weight):
        faults.append(
            f"loss.matching_weight={weight}, data.teacher={teacher!r}, "
            f"data.teacher_dim={dim}: embedding matching needs all three; set all of "
            "them or none"
        )
    if teacher and flat["data.unique_ids"]:
        faults.append(
            f"data.unique_ids=True, data.teacher={teacher!r}: a teacher's vectors "
            "belong to texts without ids; turn one of them off"
        )
    if dim > width:
        faults.append(
            f"data.teacher_dim={dim}: must not exceed model.embedding_dim={width}; "
            f"make narrower vectors with `gecko data teach --dim={width}`"
        )
    faults += [
        f"{key}={flat[key]}: data.num_negatives=0 leaves no hard negatives; set it to 0"
        for key in ("loss.hardness", "loss.kl_weight")
        if flat[key] and not flat["data.num_negatives"]
    ]
    return faults


def _faults_of_mesh(flat: Mapping[str, Any]) -> list[str]:
    return [
        f"mesh: at most one of {', '.join(axes)} may be -1"
        for axes in (("data", "fsdp", "tensor"), ("dcn_data", "dcn_fsdp"))
        if [flat.get(f"mesh.{axis}") for axis in axes].count(-1) > 1
    ]


def flatten(
    config: Mapping[str, Any] | ml_collections.ConfigDict, prefix: str = ""
) -> dict[str, Any]:
    """Returns {"group.key": value}, with references resolved and lists as tuples."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the resolved config as JSON, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + "\n"


def encoder_config(config: ml_collections.ConfigDict) -> dual_encoder.EncoderConfig:
    """Returns the `model` group as the model's dataclass."""
    return dual_encoder.EncoderConfig(**config.model.to_dict())


def _is_kind(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
