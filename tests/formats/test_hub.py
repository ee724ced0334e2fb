"""Uploads to a fake hub that records its calls."""

import types
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from gecko_jax.formats import hub


@pytest.fixture
def calls(monkeypatch):
    """Replaces the hub by one that records its calls."""
    made = []

    class Api:
        def whoami(self):
            made.append("whoami")
            return {"name": "me"}

    def create_repo(repo_id, **settings):
        made.append(("create_repo", repo_id, settings))

    def upload_folder(**settings):
        made.append(("upload_folder", settings))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return made


def test_a_folder_is_uploaded(calls, tmp_path):
    hub.check_upload("my-lab/my-gecko")
    assert calls == ["whoami"]
    url = hub.upload(tmp_path, "my-lab/my-gecko")
    assert url == "https://huggingface.co/my-lab/my-gecko"
    assert calls[1] == ("create_repo", "my-lab/my-gecko", {"exist_ok": True})
    name, settings = calls[2]
    assert name == "upload_folder"
    assert settings["repo_id"] == "my-lab/my-gecko"
    assert settings["folder_path"] == str(tmp_path)


@pytest.mark.parametrize("name", ["gecko", "a/b/c", "a b/c", "", "/x"])
def test_a_name_must_be_a_repository(calls, name):
    with pytest.raises(ValueError, match="OWNER/NAME"):
        hub.check_upload(name)
    assert calls == []


@pytest.mark.parametrize("offline", [False, True])
def test_a_missing_login_or_network_is_an_error(monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(OSError, match=r"did not accept the login.*hf auth login"):
        hub.check_upload("a/b")


def test_an_unreachable_hub_is_an_error_of_one_line(calls, monkeypatch):
    class Unreachable:
        def whoami(self):
            raise ConnectionError("no route\nand more")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    with pytest.raises(OSError, match="no route") as error:
        hub.check_upload("a/b")
    assert "\n" not in str(error.value)


def test_a_gated_model_is_an_error_of_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        response: Any = types.SimpleNamespace(headers={}, request=None)
        message = "403 Client Error.\n\nCannot access gated repo."
        raise errors.GatedRepoError(message, response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=r"google/x@main: access to this") as error:
        hub.download("google/x@main")
    message = str(error.value)
    assert "https://huggingface.co/google/x, then run `hf auth login`" in message
    assert "\n" not in message


def test_a_failed_upload_names_the_command_to_repeat_it(calls, monkeypatch, tmp_path):
    def upload_folder(**_):
        raise RuntimeError("403")

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    with pytest.raises(OSError, match=r"not uploaded \(403\).*hf upload a/b"):
        hub.upload(tmp_path, "a/b")
