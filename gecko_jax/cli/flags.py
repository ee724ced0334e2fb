"""Config flags: loads `--config`, and applies `--config.GROUP.KEY` as absl does.

    --config=configs/finetune.py:local --config.data.batch_size=512

Each override is parsed as the type of the value that it replaces. From Python, use
`gecko_jax.config.load`.
"""

import argparse
import re
from collections.abc import Iterable, Sequence

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
    """Loads a config (FILE.py:ARG) and applies the overrides.

    A boolean may be `--config.data.packing` or `--noconfig.data.packing`. Raises
    ValueError if the file or a key does not exist, a value does not have the type of
    its key, or the config is not of the `kind` TRAIN, EVALUATE or FRET.
    """
    from gecko_jax import config as configs  # Imports JAX.

    config = configs.load_file(argument)
    if kind and kind[0] not in config:
        raise ValueError(
            f"{argument}: this config is for another verb (it has no `{kind[0]}`); "
            f"use {kind[1]} or a copy of it"
        )
    keys = list(configs.flatten(config))
    for override in overrides:
        key = re.sub(r"^--(no)?config\.|=.*$", "", override, flags=re.DOTALL)
        configs.check_key(key, keys, argument)
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
    from gecko_jax import config as configs

    check = configs.check_evaluation if kind == EVALUATE else configs.check
    check(config)
    return config


def split(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into overrides, with "=" before their values, and the rest."""
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
