"""Rules of config values: the type and range of a key, and the check of a config."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """Type and range of a value."""

    kind: type  # an int passes for a float, and a list for a tuple
    rule: str = ""  # the range in words, for the error message
    holds: Callable[[Any], bool] = lambda value: True  # whether it is in range


@dataclasses.dataclass(frozen=True)
class Key:
    """A config key."""

    default: Any
    rule: Rule


def one_of(*names: str) -> Rule:
    """Returns the rule of a string with few values."""
    return Rule(str, "must be one of " + ", ".join(names), lambda v: v in names)


def between(least: int, most: int) -> Rule:
    """Returns the rule of an integer with bounds."""
    return Rule(int, f"must be in [{least:,}, {most:,}]", lambda v: least <= v <= most)


def tuple_of(
    kind: type | tuple[type, ...], rule: str, holds: Callable[[Any], bool]
) -> Rule:
    """Returns the rule of a tuple, whose entries have a type and a range."""
    return Rule(tuple, rule, lambda v: all(is_kind(n, kind) and holds(n) for n in v))


TEXT = Rule(str)
NAME = Rule(str, "must not be empty", bool)
SWITCH = Rule(bool)
POSITIVE = Rule(int, "must be at least 1", lambda v: v >= 1)
COUNT = Rule(int, "must be 0 or more", lambda v: v >= 0)
ABOVE_ZERO = Rule(float, "must be a number above 0", lambda v: 0 < v < math.inf)
NOT_NEGATIVE = Rule(float, "must be a number, 0 or more", lambda v: 0 <= v < math.inf)
SHARE = Rule(float, "must be in [0, 1)", lambda v: 0 <= v < 1)
AXIS = Rule(int, "must be at least 1, or -1 for the rest", lambda v: v >= 1 or v == -1)


def is_kind(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a value has a type; an int passes for a float, a bool for neither."""
    if kind in (int, float):
        kinds = int if kind is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, kind)


def find_errors(flat: Mapping[str, Any], schema: Mapping[str, Rule]) -> list[str]:
    """Returns a line for each unknown or missing key and each wrong value.

    `flat` is the config, as `flatten` returns it, and `schema` has all of its keys.
    """
    errors = []
    for key in sorted(set(flat) - set(schema)):
        near = difflib.get_close_matches(key, schema, n=1)
        hint = f"did you mean {near[0]}?" if near else "remove it"
        errors.append(f"{key}={flat[key]!r}: unknown key; {hint}")
    missing = [key for key in schema if key not in flat]
    errors += [
        f"{k}: missing; start from the defaults of gecko_jax.config" for k in missing
    ]
    return errors + find_wrong_values(flat, schema)


def find_wrong_values(flat: Mapping[str, Any], schema: Mapping[str, Rule]) -> list[str]:
    """Returns a line for each key whose value breaks its rule."""
    errors = []
    for key, value in ((key, flat[key]) for key in schema if key in flat):
        kind = schema[key].kind
        if not is_kind(value, kind):
            is_now = type(value).__name__
            errors.append(f"{key}={value!r}: must be {kind.__name__}, is {is_now}")
        elif not schema[key].holds(value):
            errors.append(f"{key}={value!r}: {schema[key].rule}")
    return errors


def refuse(errors: Iterable[str]) -> None:
    """Raises a ValueError that lists all errors, if there are any."""
    if errors := list(errors):
        raise ValueError("the config has errors:\n  " + "\n  ".join(errors))
