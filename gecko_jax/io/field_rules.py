"""Declared types for the fields of JSON objects.

    USAGE = {"prompt_tokens": COUNT, "completion_tokens": COUNT, "requests": COUNT}
    field_rules.check(place, value, {"text": TEXT, "usage": object_of(USAGE)}, remedy)

Files from an earlier run may have been edited, truncated or replaced, so their fields
are checked before use.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gecko_jax.io import inputs

# Largest integer that every JSON reader represents exactly.
_MOST = 2**53
# Errors inside a field that a message lists.
_MOST_LISTED = 3


@dataclasses.dataclass(frozen=True)
class Kind:
    """Type of a field: its name in errors, and a predicate for its values.

    An optional field may be absent or null. `find` lists what is wrong inside an object
    or a list.
    """

    name: str
    holds: Callable[[Any], bool]
    is_optional: bool = False
    find: Callable[[Any], list[str]] = lambda value: []


def integer(least: int, most: int = _MOST) -> Kind:
    """Whole numbers in a range."""
    name = f"a whole number from {least:,}" + (f" to {most:,}" if most < _MOST else "")
    return Kind(name, lambda v: type(v) is int and least <= v <= most)


def number(
    least: int | float = -math.inf,
    most: int | float = math.inf,
    *,
    above: int | float = -math.inf,
) -> Kind:
    """Finite numbers in a range; `above` is an exclusive lower bound."""
    parts = ["a number"]
    if least > -math.inf:
        parts.append(f"of {least:g} or more")
    if above > -math.inf:
        parts.append(f"above {above:g}")
    if most < math.inf:
        parts.append(f"of {most:g} or less")

    def holds(value: Any) -> bool:
        # Neither NaN nor an integer too large for float.
        is_finite = type(value) in (int, float) and -1e300 < value < 1e300
        return is_finite and least <= value <= most and value > above

    return Kind(" ".join(parts), holds)


COUNT = integer(0)
TEXT = Kind("text", lambda v: isinstance(v, str))
NAME = Kind("text that is not empty", lambda v: isinstance(v, str) and bool(v))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
# Sums of log-probabilities have no lower bound.
LOG_PROB = number(most=1e-5)
OBJECT = Kind("an object", lambda v: isinstance(v, dict))


def one_of(*values: Any) -> Kind:
    """One of some values, with its type."""
    name = f"one of {', '.join(map(str, values))}"
    return Kind(name, lambda v: any(type(v) is type(w) and v == w for w in values))


def optional(kind: Kind) -> Kind:
    """A field that may be absent or null."""
    return Kind(f"{kind.name} or null", kind.holds, True, kind.find)


def nullable(kind: Kind) -> Kind:
    """A field that must be present and may be null."""
    return Kind(
        f"{kind.name} or null", lambda v: v is None or kind.holds(v), find=kind.find
    )


def only(*values: Any) -> Kind:
    """One of some values, absent or null."""
    return optional(one_of(*values))


def list_of(kind: Kind, least: int = 0) -> Kind:
    """Lists of at least `least` values of one kind."""
    return Kind(
        f"a list of {kind.name}",
        lambda v: isinstance(v, list) and len(v) >= least and all(map(kind.holds, v)),
        find=lambda v: _find(enumerate(v), kind) if isinstance(v, list) else [],
    )


def map_of(kind: Kind, names: Kind = TEXT) -> Kind:
    """Objects whose values are of one kind, and whose names are of another."""

    def holds(value: Any) -> bool:
        is_dict = isinstance(value, dict) and all(map(names.holds, value))
        return is_dict and all(map(kind.holds, value.values()))

    return Kind(
        f"an object of {kind.name}",
        holds,
        find=lambda v: _find(v.items(), kind) if isinstance(v, dict) else [],
    )


def object_of(kinds: Mapping[str, Kind], *, only: bool = False) -> Kind:
    """Objects with these fields, and with others unless `only`."""
    return Kind(
        f"an object with {', '.join(kinds)}",
        lambda v: isinstance(v, dict) and not find_errors(v, kinds, only=only),
        find=lambda v: find_errors(v, kinds, only=only) if isinstance(v, dict) else [],
    )


def _find(items: Iterable[tuple[Any, Any]], kind: Kind) -> list[str]:
    """Returns messages for the first values that are not of the kind."""
    wrong = (item for item in items if not kind.holds(item[1]))
    return [
        message
        for key, value in itertools.islice(wrong, _MOST_LISTED)
        for message in _explain(f"[{json.dumps(key)[:40]}]", value, kind)
    ]


def _explain(name: str, value: Any, kind: Kind) -> list[str]:
    """Says what is wrong with a field; inside it, if that can be told."""
    if inner := kind.find(value):
        return [f"{name}: {message}" for message in inner[:_MOST_LISTED]]
    return [f"{name} must be {kind.name}, not {_shown(value)}"]


def find_errors(
    record: Mapping[str, Any], kinds: Mapping[str, Kind], *, only: bool = False
) -> list[str]:
    """Returns messages for missing and wrong fields, and with `only` for others."""
    messages = []
    for name, kind in kinds.items():
        if record.get(name) is None and kind.is_optional:
            continue
        if name not in record:
            messages.append(f"no {name}")
        elif not kind.holds(record[name]):
            messages += _explain(name, record[name], kind)
    unknown = sorted(record.keys() - kinds.keys())[:_MOST_LISTED] if only else []
    return messages + [f"unknown field {name[:40]!r}" for name in unknown]


def _shown(value: Any) -> str:
    """Returns the start of a scalar, or the type of a list or object."""
    if isinstance(value, dict | list):
        return inputs.kind(value)
    return json.dumps(value)[:80]


def check(
    place: object,
    record: Any,
    kinds: Mapping[str, Kind],
    remedy: str,
    *,
    only: bool = False,
) -> dict[str, Any]:
    """Returns the record unchanged if its fields are valid.

    `place` is the file, or file:line. With `only`, other fields are invalid. Raises a
    ValueError that lists all invalid fields, and the remedy.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {inputs.kind(record)}, not an object; {remedy}")
    if listed := find_errors(record, kinds, only=only):
        raise ValueError(f"{place}: {'; '.join(listed)}; {remedy}")
    return record
