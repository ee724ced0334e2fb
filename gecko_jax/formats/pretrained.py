"""Bundled models by name, and where released encoders are.

    pretrained.find("mini")            the folder of that model
    pretrained.find("runs/finetune")   "runs/finetune"

Each is a model folder (`model_folder`) with a card (README.md) that says how it was
made. A path that exists takes precedence over the name of a bundled model.
"""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parents[1] / "pretrained"

# Preset -> arguments of `gecko import`. The configs of these presets expect the model
# in the folder models/PRESET.
RELEASED = {
    "embeddinggemma": "google/embeddinggemma-300m --mrl-dims=128,256,512",
    "embeddinggemma-2": "google/embeddinggemma-2",
    "t5gemma2-270m": "google/t5gemma-2-270m-270m",
    "qwen3-0.6b": "Qwen/Qwen3-Embedding-0.6B",
    "qwen3-4b": "Qwen/Qwen3-Embedding-4B",
    "qwen3-8b": "Qwen/Qwen3-Embedding-8B",
}


def names() -> tuple[str, ...]:
    """Returns the names of the bundled models."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/gecko.json")))


def check_imported(path: str | os.PathLike) -> None:
    """Raises a ValueError with the command that writes a missing models/PRESET."""
    folder = pathlib.Path(path)
    source = RELEASED.get(folder.name)
    if source and folder.parent.name == "models" and not folder.exists():
        raise ValueError(
            f"{path}: no such folder; write it with `gecko import {source} "
            f"--output={path}`"
        )


def find(source: str | os.PathLike) -> str:
    """Returns the folder of a bundled model; any other source as it is."""
    source = os.fspath(source)
    if source in names() and not pathlib.Path(source).exists():
        return str(FOLDER / source)
    return source
