"""The workdir of a run: one run at a time."""

import os
import pathlib
import subprocess
import sys

import pytest

from gecko_jax import workdir

HOLD = """
import pathlib, sys
from gecko_jax import workdir
with workdir.hold(pathlib.Path(sys.argv[1]), True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_in_one_workdir_are_refused_until_the_first_is_gone(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[1],
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=rf"another run.*process {other.pid} on"),
        workdir.hold(tmp_path, True),
    ):
        pass
    # Processes of one run share its workdir; the first one holds it for all.
    with workdir.hold(tmp_path, False):
        pass
    other.kill()
    other.wait()
    with workdir.hold(tmp_path, True):
        assert str(os.getpid()) in (tmp_path / workdir.LOCK).read_text()
