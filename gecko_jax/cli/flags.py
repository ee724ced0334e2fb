"""Loads a config file and applies overrides of its keys from the command line.

    --config=configs/finetune.py:local --config.data.batch_size=512

The text after the colon is the argument of the file's `get_config`. Each override is
parsed as the type of the value that it replaces. An unknown key is an error that
suggests similar keys.
"""

import argparse
import difflib
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

# Kinds of config: (a key that only this kind has, an example file).
TRAIN = ("train", "configs/prefinetune.py")
EVALUATE = ("suites", "configs/evaluate.py")
FRET = ("fuse", "configs/fret.py")


def load(
    argument: str, overrides: Sequence[str] = (), kind: tuple[str, str] | None = None
) -> ml_collections.ConfigDict:
    """Loads a config and applies the overrides.

    Args:
        argument: Path of the config file, optionally followed by a colon and the
            argument of its `get_config`.
        overrides: Options such as `--config.data.batch_size=512`. A boolean may be
            `--config.data.packing` or `--noconfig.data.packing`.
        kind: Expected kind of config: TRAIN, EVALUATE or FRET; None accepts all.

    Raises:
        ValueError: The file or a key does not exist, the config is of another kind, or
            a value does not have the type of its key.
    """
    config = _load_file(argument)
    if kind and kind[0] not in config:
        raise ValueError(
            f"{argument}: this config is for another verb (it has no `{kind[0]}`); "
            f"use {kind[1]} or a copy of it"
        )
    keys = list(_keys(config))
    for override in overrides:
        key = re.sub(r"^--(no)?config\.|=.*$", "", override, flags=re.DOTALL)
        members = [name for name in keys if name.startswith(f"{key}.")]
        if members:
            raise ValueError(
                f"--config.{key} is a group; set one of its keys: {', '.join(members)}"
            )
        if key not in keys:
            raise ValueError(
                f"--config.{key}: no such key in {argument}{nearest(key, keys)}"
            )
    values = flags.FlagValues()
    command = ["gecko", *overrides]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=command
    )
    try:
        values(command)
    except flags.Error as error:
        raise ValueError(_describe(str(error))) from error
    return config


def load_checked(
    options: argparse.Namespace, kind: tuple[str, str]
) -> ml_collections.ConfigDict:
    """Loads the config of a verb's options and checks it before any work begins."""
    config = load(options.config, options.overrides, kind)
    from gecko_jax import config as config_checks

    if kind == EVALUATE:
        config_checks.check_evaluation(config)
    else:
        config_checks.check(config)
    return config


def split(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into config overrides and the rest.

    `--config.key value` becomes `--config.key=value`.
    """
    overrides, others = [], []
    needs_value = False
    for argument in arguments:
        if re.match(r"--(no)?config\.", argument):
            overrides.append(argument)
            needs_value = "=" not in argument and not argument.startswith("--no")
            continue
        if needs_value and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
        else:
            others.append(argument)
        needs_value = False
    return overrides, others


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with up to three similar names, or ""."""
    names = list(names)
    last = name.rpartition(".")[2]
    leaves = {n: n.rpartition(".")[2] for n in names}
    # First the right key in the wrong group, then a misspelling of the whole name, an
    # abbreviation, and a misspelling of the last part.
    matches = [n for n in names if leaves[n] == last]
    matches = matches or difflib.get_close_matches(name, names, cutoff=0.75)
    matches = matches or [n for n in names if len(name) > 2 and n.startswith(name)]
    close = difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.75)
    matches = matches or [n for n in names if leaves[n] in close]
    return f"; did you mean {' or '.join(matches[:3])}?" if matches else ""


def _load_file(argument: str) -> ml_collections.ConfigDict:
    name, colon, rest = argument.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise ValueError(
            f"--config={argument}: file {path} not found; the configs are in configs/ "
            "of the repository, and the path is relative to the current folder"
        )
    specification = importlib.util.spec_from_file_location("gecko_config", path)
    if specification is None or specification.loader is None:
        raise ValueError(f"--config={argument}: {path} is not a Python file")
    module: Any = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("the file defines no function get_config(arg)")
        config = module.get_config(rest) if colon else module.get_config()
        if not isinstance(config, ml_collections.ConfigDict):
            raise ValueError("get_config must return an ml_collections.ConfigDict")
    except Exception as error:  # The code of the file may raise anything.
        reason = str(error)
        if not isinstance(error, ValueError | ImportError):
            reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"--config={argument}: {reason}") from error
    return config.lock()


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _describe(message: str) -> str:
    """Rewrites absl's `flag --x=1: reason` as `--x=1: what the value must be`."""
    message = re.sub(r"^flag (--[^=]*=)", r"\1", message)
    for pattern, rule in (
        (r"invalid literal for int\(\)|could not convert string", "must be a number"),
        (
            "Error while parsing string",
            "must be a tuple in quotes, such as '(256,768)' or '(\"a\",\"b\")'",
        ),
    ):
        message = re.sub(rf": ({pattern}).*", f": {rule}", message, flags=re.DOTALL)
    return message
