"""Models that come along in the package, by name.

    pretrained.find("mini")            the folder of that model
    pretrained.find("runs/finetune")   "runs/finetune"

Each is a model folder (`model_folder`), with a card that says what it was made of and
how (README.md). As with `quickstart`, a path that exists goes before a name.
"""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "pretrained"


def names() -> tuple[str, ...]:
    """Returns the names of the models that come along."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/gecko.json")))


def find(source: str | os.PathLike) -> str:
    """Returns the folder of a model that comes along; any other source as it is."""
    source = os.fspath(source)
    if source in names() and not pathlib.Path(source).exists():
        return str(FOLDER / source)
    return source
