"""Fields: what an object of JSON must hold, declared once for each kind of object.

    USAGE = {"prompt_tokens": COUNT, "completion_tokens": COUNT, "requests": COUNT}
    fields.check(place, value, {"text": TEXT, "usage": object_of(USAGE)}, remedy)

Files that a run reads back were written by an earlier run, and may have been edited,
cut or swapped since. A value of another kind is named, before anything works with it.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from gecko_jax.io import inputs

# JSON's numbers are exact up to here in every reader.
_MOST = 2**53


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field must hold.

    Attributes:
        name: As errors call it.
        holds: Whether a value is of this kind.
        is_optional: The field may be absent or null.
    """

    name: str
    holds: Callable[[Any], bool]
    is_optional: bool = False


def integer(least: int, most: int = _MOST) -> Kind:
    """Returns the kind of whole numbers in a range."""
    name = f"a whole number from {least:,}" + (f" to {most:,}" if most < _MOST else "")
    return Kind(name, lambda v: type(v) is int and least <= v <= most)


def number(
    least: int | float = -math.inf,
    most: int | float = math.inf,
    *,
    above: int | float = -math.inf,
) -> Kind:
    """Returns the kind of finite numbers in a range, without its lower end `above`."""
    parts = [
        word
        for word, is_there in (
            (f"of {least:g} or more", least > -math.inf),
            (f"above {above:g}", above > -math.inf),
            (f"of {most:g} or less", most < math.inf),
        )
        if is_there
    ]

    def holds(value: Any) -> bool:
        return (
            type(value) in (int, float)
            and -1e300 < value < 1e300  # No NaN, nor an integer that no float can be.
            and least <= value <= most
            and value > above
        )

    return Kind(" ".join(["a number", *parts]), holds)


COUNT = integer(0)
TEXT = Kind("text", lambda v: isinstance(v, str))
NAME = Kind("text that is not empty", lambda v: isinstance(v, str) and bool(v))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
# Log-likelihoods are sums, so they have no lower bound.
LOG_PROB = number(most=1e-5)
OBJECT = Kind("an object", lambda v: isinstance(v, dict))


def one_of(*values: Any) -> Kind:
    """Returns the kind of some values, each of which has its type."""
    name = f"one of {', '.join(map(str, values))}"
    return Kind(name, lambda v: any(type(v) is type(w) and v == w for w in values))


def optional(kind: Kind) -> Kind:
    """Returns the kind of a field that may be absent or null."""
    return Kind(f"{kind.name} or null", kind.holds, True)


def nullable(kind: Kind) -> Kind:
    """Returns the kind of a field that must be there and may be null."""
    return Kind(f"{kind.name} or null", lambda v: v is None or kind.holds(v))


def list_of(kind: Kind, least: int = 0) -> Kind:
    """Returns the kind of lists whose entries are of one kind."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) >= least
            and all(map(kind.holds, value))
        )

    return Kind(f"a list of {kind.name}", holds)


def map_of(kind: Kind, names: Kind = TEXT) -> Kind:
    """Returns the kind of objects whose values, and names, are each of one kind."""
    return Kind(
        f"an object of {kind.name}",
        lambda v: (
            isinstance(v, dict)
            and all(map(kind.holds, v.values()))
            and all(map(names.holds, v))
        ),
    )


def object_of(kinds: Mapping[str, Kind], *, only: bool = False) -> Kind:
    """Returns the kind of objects with these fields, and others unless `only`."""
    return Kind(
        f"an object with {', '.join(kinds)}",
        lambda v: (
            isinstance(v, dict)
            and not faults(v, kinds)
            and not (only and v.keys() - kinds.keys())
        ),
    )


def faults(record: Mapping[str, Any], kinds: Mapping[str, Kind]) -> list[str]:
    """Returns what is wrong with a record, field by field."""
    return [
        f"{name} must be {kind.name}, not {_shown(record[name])}"
        if name in record
        else f"no {name}"
        for name, kind in kinds.items()
        if not (record.get(name) is None and kind.is_optional)
        and not (name in record and kind.holds(record[name]))
    ]


def _shown(value: Any) -> str:
    """Returns the begin of a value, or what it is where it holds others."""
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
    """Returns a record as it is, once its fields are right.

    Args:
        place: The file, with the line where it has lines.
        record: What JSON held.
        kinds: The fields.
        remedy: What to do about a record that is something else.
        only: Whether other fields are refused.

    Raises:
        ValueError: Names every fault, and the remedy.
    """
    if not isinstance(record, dict):
        raise ValueError(f"{place}: {inputs.kind(record)}, not an object; {remedy}")
    listed = faults(record, kinds)
    if only:
        unknown = sorted(record.keys() - kinds.keys())
        listed += [f"{name[:40]!r} is no field of it" for name in unknown[:3]]
    if listed:
        raise ValueError(f"{place}: {'; '.join(listed)}; {remedy}")
    return record
