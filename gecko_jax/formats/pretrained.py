"""Bundled models, by name.

    pretrained.find("mini")            the folder of that model
    pretrained.find("runs/finetune")   "runs/finetune"

Each is a model folder (`model_folder`) with a card (README.md) that says how it was
made. A path that exists takes precedence over the name of a bundled model.
"""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "pretrained"


def names() -> tuple[str, ...]:
    """Returns the names of the bundled models."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/gecko.json")))


def find(source: str | os.PathLike) -> str:
    """Returns the folder of a bundled model; any other source as it is."""
    source = os.fspath(source)
    if source in names() and not pathlib.Path(source).exists():
        return str(FOLDER / source)
    return source
