"""Platforms: JAX does not start libtpu on a host without a TPU."""

import os
import subprocess
import sys

import pytest

from gecko_jax.parallel import platforms


@pytest.fixture
def host(monkeypatch):
    """Simulates a host with modules, environment variables and optionally a TPU."""
    for name in (*platforms._CHOICES, *platforms.NO_METADATA):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "jax")  # JAX counts as not imported yet.

    def build(*modules, has_tpu=False, **environment):
        monkeypatch.setattr(platforms, "_has_tpu", lambda: has_tpu)
        find = {name: object() for name in modules}.get
        monkeypatch.setattr(platforms.importlib.util, "find_spec", find)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        platforms.skip_absent_tpu()
        return os.environ.get("JAX_PLATFORMS"), os.environ.get("TPU_SKIP_MDS_QUERY")

    return build


def test_libtpu_is_skipped_without_a_tpu(host):
    assert host("libtpu") == ("cpu", None)


def test_jax_still_looks_for_a_gpu(host):
    assert host("libtpu", "jax_cuda12_plugin") == (None, "1")


def test_a_host_with_a_tpu_or_without_libtpu_is_left_alone(host):
    assert host("libtpu", has_tpu=True) == (None, None)
    assert host() == (None, None)


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "TPU_NAME", "JAX_FORCE_TPU_INIT"])
def test_the_users_choice_is_kept(host, name):
    chosen = host("libtpu", **{name: "tpu"})
    assert chosen == ("tpu" if name == "JAX_PLATFORMS" else None, None)


def test_jax_imported_first_is_configured_too(tmp_path):
    (tmp_path / "libtpu.py").write_text("raise RuntimeError('libtpu was loaded')")
    code = (
        "import jax, gecko_jax; from gecko_jax.parallel import platforms; "
        "print(jax.config.jax_platforms if not platforms._has_tpu() else 'cpu', "
        "jax.default_backend())"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in platforms._CHOICES
    }
    path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["cpu", "cpu"], done.stderr
