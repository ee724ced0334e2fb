"""The Hugging Face hub: downloads of models by name, and uploads of exported folders.

google/flan-t5-base    sentence-transformers/gtr-t5-base@REVISION    hf://owner/name
"""

import pathlib
import re
from typing import Any

from gecko_jax.io import wording

# Files of a model, without other forms of its weights; pickles are never downloaded.
_FILES = {
    "allow_patterns": ["*.json", "*.safetensors", "*.model"],
    "ignore_patterns": ["onnx/*", "openvino/*", "*.onnx", "*.msgpack", "coreml/*"],
}

_NAME = r"[\w.-]+/[\w.-]+"


def download(source: str) -> pathlib.Path:
    """Downloads a model, unless it is in the hub's cache, and returns its folder.

    Raises ValueError if the source is not a hub name, there is no such model, or the
    hub cannot be reached.
    """
    match = re.fullmatch(rf"(?:hf://)?({_NAME})(?:@([\w./-]+))?", source)
    # `runs/fintune` next to a folder `runs/finetune` is a typo, not a hub name.
    is_typo = pathlib.Path(source).parent.is_dir()
    if match is None or is_typo:
        raise ValueError(
            f"{source}: no such folder, and not the name of a model on the hub "
            "(owner/name); check the path"
        )
    hub = _import_hub(f"{source}: no such folder; downloading it from the hub")
    from huggingface_hub import errors

    name, revision = match.groups()
    try:
        folder = hub.snapshot_download(name, revision=revision, **_FILES)
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{source}: access to this model on the hub is restricted; accept its "
            f"terms at https://huggingface.co/{name}, then run `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except Exception as error:  # The errors of several HTTP libraries.
        raise ValueError(
            f"{source}: no such folder, and cannot be downloaded from the hub "
            f"({wording.first_line(error)}); check the name and the network, or "
            "copy the model's folder here"
        ) from error
    if not any(pathlib.Path(folder).rglob("*.safetensors")):
        raise ValueError(
            f"{source}: has no safetensors on the hub, and pickles, which can run any "
            "program when they are opened, are never downloaded; look among the "
            f"model's revisions for converted weights, and use {name}@REVISION"
        )
    return pathlib.Path(folder)


def check_upload(repo_id: str) -> None:
    """Checks the name, the login and the network, before a model is exported.

    Raises ValueError if the name is not a repository name, and OSError if there is no
    login or the hub cannot be reached.
    """
    if not re.fullmatch(_NAME, repo_id, re.ASCII):
        raise ValueError(
            f"{repo_id!r}: a repository is named OWNER/NAME, such as my-lab/my-gecko"
        )
    hub = _import_hub("uploading")
    try:
        hub.HfApi().whoami()
    except Exception as error:  # The errors of several HTTP libraries.
        raise OSError(
            f"{repo_id}: the hub did not accept the login "
            f"({wording.first_line(error)}); check the network, run `hf auth "
            "login` or set HF_TOKEN, or export without --push"
        ) from error


def upload(folder: pathlib.Path, repo_id: str) -> str:
    """Uploads a folder in one commit, and returns the URL of the repository.

    A missing repository is created. Raises OSError if the upload failed; the folder
    stays.
    """
    hub = _import_hub("uploading")
    try:
        hub.create_repo(repo_id, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message="Upload a Gecko model",
        )
    except Exception as error:  # The errors of several HTTP libraries.
        raise OSError(
            f"{repo_id}: not uploaded ({wording.first_line(error)}); {folder} is "
            f"complete: try again with `hf upload {repo_id} {folder}`"
        ) from error
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repo_id}")


def _import_hub(action: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f'{action} needs huggingface_hub: pip install "gecko-jax[hub]"'
        ) from None
    return huggingface_hub
