"""Small files of other libraries' checkpoints, and the errors about damaged ones."""

import pathlib
from typing import Any

from gecko_jax.io import reading, writing

DAMAGED = "the file is damaged, copy it again"


def damaged(place: object, problem: str) -> ValueError:
    """Returns the error for a file, or an entry in one, whose content is wrong."""
    return ValueError(f"{place}: {problem}; {DAMAGED}")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises ValueError if the file is missing or damaged, or lies outside of its folder.
    """
    path = writing.member(path.parent, path.name)
    try:
        return reading.read_object(path, {}, remedy=DAMAGED)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy it from the original model") from None
