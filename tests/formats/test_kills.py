"""`gecko import` and `gecko export`, killed while they write, and run again."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from gecko_jax.cli import entry
from gecko_jax.formats import model_folder

ROOT = pathlib.Path(__file__).parents[2]
DATA = pathlib.Path(__file__).parents[1] / "testdata"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"

# The command, which prints "read" and sleeps before it reads a tensor.
SLOWLY = """
import json, sys, time
from gecko_jax.cli import entry
from gecko_jax.formats import tensors

make = tensors.Tensor.__init__

def make_slow(self, shape, read, *args, **kwargs):
    def read_slowly():
        print("read", flush=True)
        time.sleep(0.1)
        return read()
    make(self, shape, read_slowly, *args, **kwargs)

tensors.Tensor.__init__ = make_slow
sys.exit(entry.main(json.loads(sys.argv[1])))
"""


def _start_and_kill(arguments, kill, num_reads):
    """Runs a command and kills it after it has read `num_reads` tensors."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, json.dumps(arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        num_reads -= line == "read\n"
        if num_reads == 0:
            process.send_signal(kill)
            break
    process.communicate()
    return process.returncode


def _contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "form", "kill"),
    [
        ("import", "gecko", signal.SIGKILL),
        ("export", "gecko", signal.SIGINT),
        ("export", "sentence-transformers", signal.SIGKILL),
        ("export", "t5x", signal.SIGKILL),
        ("export", "t5x", signal.SIGTERM),
        ("export", "onnx", signal.SIGINT),
    ],
)
def test_what_was_killed_is_no_model_and_is_done_again(
    verb, form, kill, tiny_files, tmp_path, capsys
):
    if verb == "import":
        source = DATA / "t5x_tiny" / "legacy_f32"
        settings = [f"--vocabulary={VOCABULARY}"]
    else:
        source = tmp_path / "model"
        model_folder.save_model(source, tiny_files)
        settings = [f"--to={form}"]

    def command(name):
        return [verb, str(source), f"--output={tmp_path / name}", *settings]

    assert entry.main(command("undisturbed")) == 0
    want = _contents(tmp_path / "undisturbed")
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "earlier")
    # The first read of an import is that of the step, before the folder is written.
    for name, num_reads in (("new", 9), ("earlier", 2)):
        status = _start_and_kill(command(name), kill, num_reads)
        assert status == (130 if kill == signal.SIGINT else -kill)
        # No folder, or the unchanged earlier one.
        assert (tmp_path / name).exists() == (name == "earlier")
        if name == "earlier":
            assert _contents(tmp_path / name) == want
        if kill != signal.SIGINT:
            left = [p.name for p in tmp_path.iterdir() if p.name[0] == "."]
            assert all(n.startswith(f".{name}.") for n in left)
            assert left
        assert entry.main(command(name)) == 0
        assert _contents(tmp_path / name) == want
        assert [p.name for p in tmp_path.iterdir() if p.name[0] == "."] == []
    capsys.readouterr()
