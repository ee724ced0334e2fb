"""Right numbers on CPU: a flag for XLA, and a probe that says whether it took.

jaxlib 0.10.2 and later return uninitialised memory on CPU when a matrix product
with a constant runs into a reduction:

    jax.jit(lambda x: (x @ jnp.ones((256, 256))).sum(-1))(x)   # 32 rows or more

The cause is XLA's fusion of the two into one call of its YNN library. The flag
`--xla_cpu_experimental_ynn_fusion_type=` (an empty list of fusions) gives right
results, but XLA reads it only when its backend starts, and a flag that XLA does
not know ends the process. So `import gecko_jax` sets it, where it is known and
still in time, and `check` computes the case above before anything relies on it.
"""

import functools
import importlib.metadata
import mmap
import os
import pathlib
import re
import sys

_FLAG = "xla_cpu_experimental_ynn_fusion_type"

# The first version that is wrong without the flag.
_FIRST_WRONG = (0, 10, 2)

# Versions seen to know the flag. Of any other, the compiled library is searched.
_KNOWN = ("0.10.2", "0.12.0.1")

# Every package with an XLA of its own, which reads XLA_FLAGS too.
_PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")


def set_cpu_flags() -> None:
    """Sets the flag in XLA_FLAGS, where it is known and JAX has not started.

    Leaves the environment alone when jaxlib does not need the flag, when some
    installed XLA would not know it, when XLA_FLAGS has it or names a file, and
    when the backend is up already. `check` catches what that leaves wrong.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if _FLAG in flags or (flags and not flags.startswith("-")):
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        return
    if _is_flag_known():
        os.environ["XLA_FLAGS"] = f"{flags} --{_FLAG}=".strip()


@functools.cache
def check() -> None:
    """Computes the known-wrong case once per process, on CPU.

    Call it before training or encoding; on an accelerator it does nothing.

    Raises:
        ArithmeticError: XLA's results are wrong; the message has the remedy.
    """
    import jax

    if jax.default_backend() != "cpu":
        return
    wrong = _probe_error()
    # A right result differs by rounding only; NaN compares as wrong.
    if not wrong < 1e-3:
        raise ArithmeticError(
            f"jaxlib {_jaxlib_version()} computes wrong numbers on this CPU: a "
            f"matrix product with a constant is off by {wrong:.1e} of its size. "
            "Import gecko_jax before anything runs in JAX, or start Python with "
            f"XLA_FLAGS=--{_FLAG}= in the environment"
        )


def _probe_error() -> float:
    """Largest error of the known-wrong case, relative to the results' size."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    # Up to 8 rows the result is right; from 32 rows on it is not.
    rows = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    found = jax.jit(lambda x: (x @ jnp.ones((256, 256), jnp.float32)).sum(-1))(rows)
    expected = rows.astype(np.float64).sum(-1) * 256
    with np.errstate(over="ignore", invalid="ignore"):
        return float(
            np.abs(np.asarray(found, np.float64) - expected).max()
            / np.abs(expected).max()
        )


def _is_flag_known() -> bool:
    """Whether jaxlib needs the flag and every installed XLA knows it."""
    version = _jaxlib_version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < _FIRST_WRONG:
        return False
    if version not in _KNOWN and not _has_flag("jaxlib"):
        return False
    # A CUDA plugin of jaxlib's own version is built from the same XLA.
    return all(
        version == _version(name) or _has_flag(name)
        for name in _PLUGINS
        if _version(name)
    )


def _jaxlib_version() -> str:
    return _version("jaxlib") or "0"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_flag(distribution: str) -> bool:
    """Whether a library of an installed package holds the flag's name.

    The name as a C string is the flag itself; in the serialized description of
    XLA's options, which may outlive the flag, no zero byte follows it.
    """
    files = importlib.metadata.files(distribution) or []
    for file in files:
        path = pathlib.Path(str(file.locate()))
        if path.suffix != ".so" or not path.is_file() or path.stat().st_size < 1 << 24:
            continue
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(_FLAG.encode() + b"\0") >= 0:
                return True
    return False
