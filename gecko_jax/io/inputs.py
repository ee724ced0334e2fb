"""Rules for the fields of users' files, the same for all formats.

    {"_id": 7, "title": null, "text": "Geckos climb walls.", "score": 2.0}
    id_field(place, record, "_id")           -> "7"
    string_field(..., "title", default="")   -> ""
    number_field(place, record, "score")     -> 2

null counts as a missing value, and so does NaN, which the readers turn into null. A
text is a string, an id a string or an integer. Errors start with the place, file:line.
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

# float() also accepts "1_000" and the digits of other scripts.
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def kind(value: Any) -> str:
    """Returns JSON's name for the type of a value: "a number", "null", ..."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def check_characters(place: str, record: Mapping[str, Any]) -> None:
    """Refuses a lone surrogate, which JSON can escape but UTF-8 cannot encode."""
    for name, value in record.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{place}: field {name!r} holds a lone surrogate, which is not a "
                "character; write the text as UTF-8"
            ) from None


def check_id(name: str, value: Any) -> str | int:
    """Returns an id, a string or an integer.

    A whole float becomes an integer: pandas turns a column of integers into floats if
    a value is missing. Raises ValueError for other types and for blank strings.
    """
    # Floats represent all integers up to 2^53 exactly.
    if isinstance(value, float) and abs(value) <= 2**53 and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        shown = f"{value!r}"[:80]
        raise ValueError(
            f"field {name!r} is {shown}; an id must be a string or a whole number"
        )
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"field {name!r} is empty; an id needs a character")
    return value


def id_field(
    place: str, record: Mapping[str, Any], *names: str, default: str | None = None
) -> str:
    """Returns the first of the named fields that has a value, as an id (`check_id`).

    Without a default, one of them must have a value. Labels follow the same rule.
    """
    for name in names:
        if (value := record.get(name)) is not None:
            try:
                return str(check_id(name, value))
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
    if default is None:
        raise no_value(place, record, *names)
    return default


def string_field(
    place: str, record: Mapping[str, Any], *names: str, default: str | None = None
) -> str:
    """Returns the first of the named fields that has a value, which must be a string.

    Without a default, one of them must have a value that is not blank.
    """
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(
                f"{place}: field {name!r} is {kind(value)}; it must be a string"
            )
        if default is None and not value.strip():
            raise ValueError(
                f"{place}: field {name!r} is empty; give it text or drop the line"
            )
        return value
    if default is None:
        raise no_value(place, record, *names)
    return default


def number_field(place: str, record: Mapping[str, Any], name: str) -> int | float:
    """Returns a finite number; the field may hold it as a string."""
    value = record.get(name)
    if value is None:
        raise no_value(place, record, name)
    number = math.nan
    is_number = type(value) in (int, float)
    if is_number or (isinstance(value, str) and _NUMBER.fullmatch(value.strip())):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number):
        shown = f"{value!r}"[:80]
        raise ValueError(
            f"{place}: {name} {shown} is not a number; write a finite number or drop "
            "the line"
        )
    return int(number) if number.is_integer() else number


def no_value(place: str, record: Mapping[str, Any], *names: str) -> ValueError:
    """Returns the error for a record without a value in any of the named fields."""
    if present := [name for name in names if name in record]:
        return ValueError(
            f"{place}: field {present[0]!r} is null or NaN; give it a value or drop "
            "the line"
        )
    has = ", ".join(sorted(record)) or "no fields"
    expected = " or ".join(map(repr, names))
    return ValueError(
        f"{place}: no field {expected} (it has {has}); every line needs it"
    )


class UniqueIds:
    """Refuses duplicate ids, and names both lines; uses about 200 bytes per id."""

    def __init__(self):
        self._places: dict[bytes, str] = {}

    def add(self, place: str, identity: str) -> None:
        """Adds the id of the record at `place` (file:line)."""
        key = identity.encode(errors="surrogatepass")
        key = hashlib.blake2b(key, digest_size=12).digest()
        earlier = self._places.setdefault(key, place)
        if earlier is not place:
            raise ValueError(
                f"{place}: id {identity!r} was given before, at {earlier}; ids must "
                "differ: drop one of the two lines"
            )
