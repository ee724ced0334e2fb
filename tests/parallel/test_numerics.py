"""Tests of the flag start a fresh Python: XLA reads its flags once per process."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.parallel import numerics

_FLAG = "--xla_cpu_experimental_ynn_fusion_type="

_WRONG_CASE = """
import jax, jax.numpy as jnp, numpy as np
x = np.random.default_rng(1).standard_normal((32, 256), dtype=np.float32)
y = jax.jit(lambda x: (x @ jnp.ones((256, 256))).sum(-1))(x)
error = np.abs(np.asarray(y) - 256 * x.sum(-1)).max()
print("right" if error < 1 else "wrong")
"""


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_package_gives_correct_results_and_check_passes():
    check = "from gecko_jax.parallel import numerics; numerics.check()"
    run = _run("import gecko_jax" + _WRONG_CASE + check)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["right"]


def test_without_the_flag_results_are_wrong_and_check_raises():
    # If the first line prints "right", XLA has fixed the bug: remove `numerics`.
    run = _run(
        _WRONG_CASE
        + """
from gecko_jax.parallel import numerics
try:
    numerics.check()
except ArithmeticError as error:
    print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    case, message = run.stdout.strip().split("\n", 1)
    assert case == "wrong"
    assert f"XLA_FLAGS={_FLAG}" in message


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", _FLAG),
        (
            "--xla_force_host_platform_device_count=2",
            f"--xla_force_host_platform_device_count=2 {_FLAG}",
        ),
        # The user's own value and a file of flags stay as they are.
        (f"{_FLAG}1", f"{_FLAG}1"),
        ("/tmp/flags.txt", "/tmp/flags.txt"),
    ],
)
def test_the_flag_is_added_to_the_users_flags(before, after):
    run = _run("import gecko_jax, os; print(os.environ['XLA_FLAGS'])", XLA_FLAGS=before)
    assert run.stdout.strip() == after, run.stderr


@pytest.mark.parametrize(
    ("versions", "libraries", "known"),
    [
        ({"jaxlib": "0.10.1"}, {"jaxlib"}, False),  # correct without the flag
        ({"jaxlib": "0.10.2"}, set(), True),
        ({"jaxlib": "0.12.0.1"}, set(), True),
        ({"jaxlib": "0.99.0"}, {"jaxlib"}, True),
        ({"jaxlib": "0.99.0"}, set(), False),  # XLA has removed the flag
        ({}, set(), False),
        ({"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, set(), True),
        ({"jaxlib": "0.10.2", "libtpu": "0.0.50"}, {"libtpu"}, True),
        ({"jaxlib": "0.10.2", "libtpu": "0.0.1"}, set(), False),
    ],
)
def test_the_flag_is_set_only_if_every_xla_knows_it(
    monkeypatch, versions, libraries, known
):
    from gecko_jax.parallel import numerics

    monkeypatch.setattr(numerics, "_version", versions.get)
    monkeypatch.setattr(numerics, "_has_flag", libraries.__contains__)
    assert numerics._is_flag_known() is known


def test_the_flag_is_found_in_the_installed_library():
    from gecko_jax.parallel import numerics

    assert numerics._has_flag("jaxlib")
    assert not numerics._has_flag("numpy")


def test_the_import_is_light():
    run = _run(
        "import sys, gecko_jax; "
        "print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])"
    )
    assert run.stdout.strip() == "[]", run.stderr


def test_bfloat16_options_give_correct_products():
    options = numerics.bfloat16_options()
    rng = np.random.default_rng(0)
    rows, weights = (rng.standard_normal(s) for s in ((64, 96), (96, 40)))
    product = jax.jit(
        lambda x, y: jnp.matmul(x, y, preferred_element_type=jnp.float32),
        compiler_options=options,
    )
    rows, weights = (jnp.asarray(x, jnp.bfloat16) for x in (rows, weights))
    expected = np.asarray(rows, np.float64) @ np.asarray(weights, np.float64)
    np.testing.assert_allclose(product(rows, weights), expected, atol=1e-4)


def test_an_xla_without_the_option_gets_none(monkeypatch):
    monkeypatch.setattr(numerics, "_FLAG", "xla_no_such_option")
    monkeypatch.setattr(numerics, "_is_flag_known", lambda: True)
    assert numerics.bfloat16_options.__wrapped__() == {}
