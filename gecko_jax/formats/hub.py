"""Models of the Hugging Face hub, by name.

google/flan-t5-base    sentence-transformers/gtr-t5-base@REVISION    hf://owner/name
"""

import pathlib
import re

# What a model is made of; weights that are pickles are never fetched.
_WANTED = ["*.json", "*.safetensors", "*.model"]
# Other forms of the same weights.
_UNWANTED = ["onnx/*", "openvino/*", "*.onnx", "*.msgpack", "coreml/*"]

_NAME = r"(?:hf://)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?"


def download(source: str) -> pathlib.Path:
    """Fetches a model of the hub, or finds it in the cache; returns its folder.

    Raises:
        ValueError: The source is no hub name, there is no such model, or it cannot be
            reached.
        ImportError: huggingface_hub is missing.
    """
    match = re.fullmatch(_NAME, source)
    # `runs/fintune` beside a folder `runs/finetune` is a slip, not a hub name.
    is_slip = pathlib.Path(source).parent.is_dir()
    if match is None or is_slip:
        raise ValueError(
            f"{source}: no such folder, and not the name of a model on the hub "
            "(owner/name); check the path"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{source}: no such folder; to take it from the hub, install "
            'huggingface_hub: pip install "gecko-jax[hub]"'
        ) from None
    name, revision = match.groups()
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except Exception as error:  # of several libraries, all of them about the network
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{source}: no such folder, and not to be had from the hub "
            f"({lines[0][:200]}); check the name and the network, or copy the model's "
            "folder here"
        ) from error
    if not any(pathlib.Path(folder).rglob("*.safetensors")):
        raise ValueError(
            f"{source}: has no safetensors on the hub, and pickles, which can run any "
            "program when they are opened, are never fetched. Look among the model's "
            f"revisions for converted weights, and name one as {name}@REVISION"
        )
    return pathlib.Path(folder)
