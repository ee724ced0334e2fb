"""Configs: every key with its default, unit, source and rule, written once.

A config is an `ml_collections.ConfigDict`. A config file starts from `training` or
another table of defaults and assigns what differs:

    config = gecko_jax.config.training("base")
    config.data.batch_size = 1024

`load` reads such a file. `check` reports every key that is missing, unknown, of the
wrong type or out of range, all in one error.

keys            the tables of keys
rules, checks   the rules of values, and the keys that must agree
"""

import difflib
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from flax import traverse_util

from gecko_jax.config import checks, keys, rules
from gecko_jax.models import dual_encoder

Key, Rule, find_wrong_values = rules.Key, rules.Rule, rules.find_wrong_values
TRAINING, ADDED_KEYS, SCHEMA = keys.TRAINING, keys.ADDED_KEYS, checks.SCHEMA
RELEASED, LOCAL = keys.RELEASED, keys.LOCAL
EVALUATION, SUITES = keys.EVALUATION, keys.SUITES
check, check_evaluation = checks.check, checks.check_evaluation
flatten = checks.flatten


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
    name, colon, arg = argument.partition(":")
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
        config = module.get_config(arg) if colon else module.get_config()
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


def to_json(config: ml_collections.ConfigDict) -> str:
    """Returns the resolved config as JSON, keys sorted."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list) + "\n"


def encoder_config(config: ml_collections.ConfigDict) -> dual_encoder.EncoderConfig:
    """Returns the `model` group as the model's dataclass."""
    return dual_encoder.EncoderConfig(**config.model.to_dict())
