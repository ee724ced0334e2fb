"""An exported folder, uploaded to the Hugging Face hub.

Whether an upload can succeed is asked before the export is made: a model of many
gigabytes should not be written for nothing.
"""

import pathlib
import re
from typing import Any

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def check(repo_id: str) -> None:
    """Checks the name, the login and the network; uploads nothing.

    Raises:
        ValueError: The name is no repository's, or nobody is logged in.
        OSError: The hub cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    if not _REPOSITORY.fullmatch(repo_id):
        raise ValueError(
            f"{repo_id!r}: a repository is named OWNER/NAME, such as my-lab/my-gecko"
        )
    hub = _import_hub()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError(
            f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, "
            "or export without --push"
        )
    if not hub.get_token():
        raise ValueError(
            f"{repo_id}: not logged in to the hub; run `hf auth login` or set "
            "HF_TOKEN, or export without --push"
        )
    try:
        hub.HfApi().whoami()
    except Exception as error:  # of its HTTP library, whichever that is
        raise OSError(
            f"{repo_id}: the hub did not take the login ({_first_line(error)}); check "
            "the network and the token, or export without --push"
        ) from error


def push(folder: pathlib.Path, repo_id: str) -> str:
    """Uploads a folder in one commit; makes the repository if need be.

    Returns:
        Where it can be seen.

    Raises:
        OSError: The hub refused, or went away. The folder stays.
    """
    hub = _import_hub()
    try:
        hub.create_repo(repo_id, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message="Upload a Gecko model",
        )
    except Exception as error:  # of its HTTP library, whichever that is
        raise OSError(
            f"{repo_id}: not uploaded ({_first_line(error)}); {folder} is whole: try "
            f"again with `hf upload {repo_id} {folder}`"
        ) from error
    return str(getattr(commit, "repo_url", None) or f"https://huggingface.co/{repo_id}")


def _import_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            "uploading needs huggingface_hub: pip install 'gecko-jax[hub]'"
        ) from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
