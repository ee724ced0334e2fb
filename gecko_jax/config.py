"""Configs: their arguments, their keys, and the check before a run starts.

A config file assigns every key that changes a result; `check` names each key that is
missing, unknown, of the wrong type or out of range, all of them in one error.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from gecko_jax.models import dual_encoder, t5


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Parses the argument after the colon of `--config=file.py:argument`.

    The argument is comma-separated words and pairs: `parse_arg("xl,local", size="base",
    local=False)` has `size` "xl" and `local` True. A word sets the boolean of its name,
    or else is a model size for the default named `size`.

    Args:
        arg: "" or None for the defaults alone.
        **defaults: The arguments a config knows; a pair must name one.

    Raises:
        ValueError: A word or a pair the config does not know.
    """
    values = dict(defaults)
    for word in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, _, value = word.partition("=")
        if not value and isinstance(defaults.get(name), bool):
            values[name] = True
        elif not value and "size" in defaults and name in dual_encoder.PRESETS:
            values["size"] = name
        elif value and name in defaults and not isinstance(defaults[name], bool):
            try:
                values[name] = type(defaults[name])(value)
            except ValueError:
                raise ValueError(
                    f"config argument {word!r}: {name} must be "
                    f"{type(defaults[name]).__name__}"
                ) from None
        else:
            words = [key for key, default in defaults.items() if default is False]
            pairs = [
                f"{key}=..."
                for key, default in defaults.items()
                if not isinstance(default, bool)
            ]
            sizes = list(dual_encoder.PRESETS) if "size" in defaults else []
            raise ValueError(
                f"config argument {word!r} is unknown; known are "
                f"{', '.join(words + sizes + pairs)}"
            )
    return ml_collections.ConfigDict(values)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key of the config must hold.

    Attributes:
        kind: The type; int is taken where float is asked for, lists where tuples are.
        rule: The range in words, for the error.
        holds: Whether a value of the right type is in range.
    """

    kind: type
    rule: str = ""
    holds: Callable[[Any], bool] = lambda value: True


def _one_of(*names: str) -> Rule:
    return Rule(str, "must be one of " + ", ".join(names), lambda v: v in names)


# What `configs/evaluate.py` may name; `evaluation.suites` knows their tasks.
SUITES = ("MTEB(eng, v1)", "MTEB(eng, v2)", "NanoBEIR", "MIRACL")


def _are_dims(values: tuple[Any, ...]) -> bool:
    return all(isinstance(dim, int) and dim > 0 for dim in values)


_TEXT = Rule(str)
_SWITCH = Rule(bool)
_POSITIVE = Rule(int, "must be at least 1", lambda v: v >= 1)


def _between(least: int, most: int) -> Rule:
    return Rule(int, f"must be in [{least:,}, {most:,}]", lambda v: least <= v <= most)


# What is far beyond any model or batch is a slip of the keyboard or damage, and is
# refused before anything of that size is allocated or traced.
_WIDTH = _between(1, 2**20)
_LENGTH = _between(8, 2**20)
_COUNT = Rule(int, "must be 0 or more", lambda v: v >= 0)
_AXIS = Rule(int, "must be at least 1, or -1 for the rest", lambda v: v >= 1 or v == -1)
_ABOVE_ZERO = Rule(float, "must be a number above 0", lambda v: 0 < v < math.inf)
_NOT_NEGATIVE = Rule(float, "must be a number, 0 or more", lambda v: 0 <= v < math.inf)
_SHARE = Rule(float, "must be in [0, 1)", lambda v: 0 <= v < 1)

SCHEMA: dict[str, Rule] = {
    "seed": Rule(int, "must be in [0, 2^63)", lambda v: 0 <= v < 2**63),
    "data.mixture": Rule(str, "must name a mixture", bool),
    "data.files": Rule(
        tuple, "must be paths", lambda v: all(isinstance(p, str) and p for p in v)
    ),
    "data.vocabulary": Rule(str, "must be a path or 'quickstart'", bool),
    "data.extra_ids": _between(0, 100_000),
    "data.query_length": _LENGTH,  # tokens
    "data.passage_length": _LENGTH,  # tokens
    "data.text_format": _one_of("gecko", "plain"),
    "data.batch_size": _between(2, 2**24),
    "data.num_negatives": _between(0, 10_000),
    "data.packing": _SWITCH,
    "data.one_task_per_batch": _SWITCH,
    "data.cache_dir": Rule(str, "must name a folder", bool),
    "data.prepared_dir": Rule(str, "must name a folder", bool),
    "data.unique_ids": _SWITCH,
    "data.teacher": _TEXT,
    "data.teacher_dim": _COUNT,
    "model.vocab_size": _between(1, 2**24),
    "model.model_dim": _WIDTH,
    "model.num_layers": _between(0, 1_000),
    "model.num_heads": _WIDTH,
    "model.head_dim": _WIDTH,
    "model.mlp_dim": _WIDTH,
    "model.mlp_activations": Rule(
        tuple,
        "must hold one or two of " + ", ".join(t5.ACTIVATIONS),
        lambda v: (
            1 <= len(v) <= 2
            and all(isinstance(n, str) and n in t5.ACTIVATIONS for n in v)
        ),
    ),
    "model.shared_relative_bias": _SWITCH,
    "model.relpos_num_buckets": Rule(
        int,
        "must be even and in [4, 65,536]",
        lambda v: 4 <= v <= 2**16 and v % 2 == 0,
    ),
    "model.relpos_max_distance": _between(1, 2**24),
    "model.embedding_dim": _WIDTH,
    "model.projection": _SWITCH,
    "model.dropout_rate": _SHARE,
    "model.dtype": _one_of(*t5.DTYPES),
    "model.scan_layers": _SWITCH,
    "model.remat": _one_of(*t5.REMAT_POLICIES),
    "model.l2_epsilon": _ABOVE_ZERO,
    "model.attention": _one_of(*t5.ATTENTIONS),
    "init.checkpoint": _TEXT,
    "init.token_weights": _one_of("none", "idf"),
    "init.align_steps": _COUNT,
    "loss.temperature": _ABOVE_ZERO,
    "loss.mrl_dims": Rule(
        tuple,
        "must be rising whole numbers above 0",
        lambda v: (
            len(v) > 0
            and all(_is_kind(dim, int) and dim > 0 for dim in v)
            and list(v) == sorted(set(v))
        ),
    ),
    "loss.mrl_weights": Rule(
        tuple,
        "must be numbers of 0 or more",
        lambda v: all(_is_kind(w, float) and 0 <= w < math.inf for w in v),
    ),
    "loss.same_tower": _SWITCH,
    "loss.same_tower_passages": _SWITCH,
    "loss.bidirectional": _SWITCH,
    "loss.all_hard_negatives": _SWITCH,
    "loss.mask_duplicates": _SWITCH,
    "loss.hardness": _NOT_NEGATIVE,
    "loss.spread_weight": _NOT_NEGATIVE,
    "loss.matching_weight": _NOT_NEGATIVE,
    "optimizer.name": _one_of("adafactor", "adamw"),
    "optimizer.learning_rate": _ABOVE_ZERO,
    "optimizer.token_rate": _ABOVE_ZERO,
    "optimizer.schedule": _one_of("constant", "linear", "cosine", "rsqrt"),
    "optimizer.warmup_steps": _COUNT,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "optimizer.beta1": _SHARE,
    "optimizer.beta2": _SHARE,
    "train.num_steps": _POSITIVE,
    "train.microbatch_size": _COUNT,
    "train.log_every_steps": _POSITIVE,
    "train.max_skipped_steps": _COUNT,
    "train.compilation_cache": _TEXT,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.dcn_data": _AXIS,
    "mesh.dcn_fsdp": _AXIS,
    "mesh.rules": Rule(
        tuple,
        "must be pairs of a logical axis and a mesh axis, several, or None",
        lambda v: all(
            isinstance(rule, list | tuple)
            and len(rule) == 2
            and isinstance(rule[0], str)
            for rule in v
        ),
    ),
    "checkpoint.every_steps": _POSITIVE,
    "checkpoint.every_minutes": _COUNT,
    "checkpoint.keep": _POSITIVE,
    "checkpoint.keep_every_steps": _COUNT,
    "evaluation.every_steps": _COUNT,
    "evaluation.folder": _TEXT,
    "evaluation.max_queries": _COUNT,
}


# Keys that older configs lack, with the value that gives what those runs computed.
ADDED_KEYS: dict[str, Any] = {"data.unique_ids": False, "model.attention": "xla"}


EVALUATION_SCHEMA: dict[str, Rule] = {
    "suites": Rule(
        tuple,
        "must hold some of " + "; ".join(SUITES),
        lambda v: all(name in SUITES for name in v),
    ),
    "tasks": Rule(tuple),
    "folders": Rule(tuple),
    "dims": Rule(tuple, "must be whole numbers above 0", _are_dims),
    "name": Rule(
        str,
        "must be organization/model, or empty",
        lambda v: not v or re.fullmatch(r"[\w.-]+/[\w.-]+", v) is not None,
    ),
    "query_length": _COUNT,
    "passage_length": _COUNT,
    "cache.folder": Rule(str, "must name a folder", bool),
    "cache.max_gib": _NOT_NEGATIVE,
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
}


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
    refuse(find_faults(flat, EVALUATION_SCHEMA))
    faults = _faults_of_mesh(flat)
    if not (flat["suites"] or flat["tasks"] or flat["folders"]):
        faults.append("suites, tasks and folders are empty: name something to run")
    refuse(faults)


def find_faults(flat: Mapping[str, Any], schema: Mapping[str, Rule]) -> list[str]:
    """Returns a line for each key that is unknown, missing, of a wrong type or range.

    Args:
        flat: What `flatten` returns.
        schema: Every key that the config must have.
    """
    faults = []
    for key in sorted(set(flat) - set(schema)):
        near = difflib.get_close_matches(key, schema, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        faults.append(f"{key}={flat[key]!r}: unknown key; {hint}")
    faults += [
        f"{key}: missing; every key must be in the config file"
        for key in schema
        if key not in flat
    ]
    return faults + find_wrong_values(flat, schema)


def find_wrong_values(flat: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[str]:
    """Returns a line for each key that is there and breaks its rule."""
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
            "model.scan_layers=True: model.num_layers=0 leaves nothing to scan; set "
            "model.scan_layers=False"
        )
    if flat["model.attention"] == "cudnn":
        faults += [
            f"model.attention='cudnn': needs {key}={needed!r}, is {flat[key]!r}; set "
            "it, or set model.attention='xla'"
            for key, needed in (
                ("model.dtype", "bfloat16"),
                ("model.dropout_rate", 0.0),
            )
            if flat[key] != needed
        ]
    if not flat["model.projection"] and width != flat["model.model_dim"]:
        faults.append(
            f"model.embedding_dim={width}: without a projection it must be "
            f"model.model_dim={flat['model.model_dim']}; set it so, or set "
            "model.projection=True"
        )
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
            f"train.num_steps={flat['train.num_steps']}; set it too (0 for none)"
        )
    faults += _faults_of_mesh(flat)
    microbatch_size, batch_size = flat["train.microbatch_size"], flat["data.batch_size"]
    if microbatch_size > batch_size:
        faults.append(
            f"train.microbatch_size={microbatch_size}: must not exceed "
            f"data.batch_size={batch_size}; 0 is for no microbatches"
        )
    if flat["init.checkpoint"] and flat["init.token_weights"] != "none":
        faults.append(
            f"init.token_weights={flat['init.token_weights']!r}: weighs fresh token "
            "embeddings, and init.checkpoint brings its own; set it to none"
        )
    if flat["init.checkpoint"] and flat["init.align_steps"]:
        faults.append(
            f"init.align_steps={flat['init.align_steps']}: turns a fresh projection, "
            "and init.checkpoint brings its own; set it to 0"
        )
    if flat["loss.all_hard_negatives"] and not flat["data.num_negatives"]:
        faults.append(
            "loss.all_hard_negatives=True: there are none with data.num_negatives=0"
        )
    return faults + _faults_of_teacher(flat)


def _faults_of_teacher(flat: Mapping[str, Any]) -> list[str]:
    teacher, dim = flat["data.teacher"], flat["data.teacher_dim"]
    weight, width = flat["loss.matching_weight"], flat["model.embedding_dim"]
    faults = []
    if not bool(teacher) == bool(dim) == bool(weight):
        faults.append(
            f"loss.matching_weight={weight}, data.teacher={teacher!r}, "
            f"data.teacher_dim={dim}: embedding matching needs all three, a run "
            "without it none of them"
        )
    if teacher and flat["data.unique_ids"]:
        faults.append(
            f"data.unique_ids=True, data.teacher={teacher!r}: a teacher's vectors are "
            "those of texts without ids; turn one of them off"
        )
    if dim > width:
        faults.append(
            f"data.teacher_dim={dim}: must not exceed model.embedding_dim={width}; "
            f"make narrower vectors with `gecko data teach --dim={width}`"
        )
    if flat["loss.hardness"] and not flat["data.num_negatives"]:
        faults.append(
            f"loss.hardness={flat['loss.hardness']}: weighs hard negatives, and there "
            "are none with data.num_negatives=0"
        )
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
    """Returns {"group.key": value}, references resolved, lists as tuples."""
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
    """Returns the `model` group as the dataclass that the model takes."""
    return dual_encoder.EncoderConfig(**config.model.to_dict())


def _is_kind(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
