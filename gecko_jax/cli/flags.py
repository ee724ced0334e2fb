"""Configs from the command line: a file, its argument, and overrides of its keys.

    --config=configs/finetune.py:local --config.data.batch_size=512

The file's `get_config` is called with what follows the colon; each override is read
as the type of the value it replaces. A key that the config does not have is an error
that names the nearest ones.
"""

import difflib
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

# A key that only the configs of one kind of verb have, and where such a config lies.
TRAIN = ("train", "configs/prefinetune.py")
EVALUATE = ("suites", "configs/evaluate.py")
FRET = ("fuse", "configs/fret.py")


def load(
    argument: str, overrides: Sequence[str] = (), kind: tuple[str, str] | None = None
) -> ml_collections.ConfigDict:
    """Loads a config and applies the overrides.

    Args:
        argument: A path, and after a colon the argument of its `get_config`.
        overrides: Such as `--config.data.batch_size=512`; a boolean may be
            `--config.data.packing` or `--noconfig.data.packing`.
        kind: What it is for: TRAIN, EVALUATE or FRET.

    Raises:
        ValueError: There is no such file or key, the config is of another kind, or a
            value does not fit its key.
    """
    config = _load_file(argument)
    if kind and kind[0] not in config:
        raise ValueError(
            f"{argument}: has no `{kind[0]}`, so it is made for another verb; "
            f"take {kind[1]}, or a copy of it"
        )
    keys = list(_keys(config))
    for override in overrides:
        key = re.sub(r"^--(no)?config\.|=.*$", "", override, flags=re.DOTALL)
        if key in keys:
            continue
        if any(other.startswith(f"{key}.") for other in keys):
            inside = ", ".join(k for k in keys if k.startswith(f"{key}."))
            raise ValueError(
                f"--config.{key} is a group; set one of its keys: {inside}"
            )
        raise ValueError(
            f"--config.{key}: no such key in {argument}{nearest(key, keys)}"
        )
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, sys_argv=["gecko", *overrides]
    )
    try:
        values(["gecko", *overrides])
    except flags.Error as error:
        raise ValueError(_plain(str(error))) from error
    return config


def split(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Parts the overrides of config keys from the other arguments.

    `--config.key value` is joined to `--config.key=value`.
    """
    overrides, others = [], []
    waiting = False  # for the value of the last override
    for argument in arguments:
        if re.match(r"--(no)?config\.", argument):
            overrides.append(argument)
            waiting = "=" not in argument and not argument.startswith("--no")
        elif waiting and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
            waiting = False
        else:
            others.append(argument)
            waiting = False
    return overrides, others


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns `; did you mean ...?` with the names most like this one, or nothing."""
    names = list(names)
    last = name.rpartition(".")[2]
    leaves = {n: n.rpartition(".")[2] for n in names}
    # The right key in the wrong group, then a slip of the finger, in either part.
    found = [n for n in names if leaves[n] == last]
    found = found or difflib.get_close_matches(name, names, cutoff=0.75)
    found = found or [n for n in names if len(name) > 2 and n.startswith(name)]
    close = difflib.get_close_matches(last, leaves.values(), n=1, cutoff=0.75)
    found = found or [n for n in names if leaves[n] in close]
    return f"; did you mean {' or '.join(found[:3])}?" if found else ""


def _load_file(argument: str) -> ml_collections.ConfigDict:
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


def _keys(config: ml_collections.ConfigDict, prefix: str = "") -> Iterable[str]:
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _plain(message: str) -> str:
    """Says `flag --x=1: why` in our words."""
    message = re.sub(r"^flag (--[^=]*=)", r"\1", message)
    message = re.sub(
        r": invalid literal for int\(\).*|: could not convert string to float.*",
        ": it must be a number",
        message,
        flags=re.DOTALL,
    )
    return re.sub(
        r": Error while parsing string.*",
        ": it must be a tuple in quotes, such as '(256,768)' or '(\"a\",\"b\")'",
        message,
        flags=re.DOTALL,
    )
