"""The XLA flag that correct results on CPU need, and a check that it works.

jaxlib 0.10.2 and later return uninitialised memory on CPU when a matrix product with a
constant runs into a reduction:

    jax.jit(lambda x: (x @ jnp.ones((256, 256))).sum(-1))(x)   # 32 rows or more

XLA fuses the two into one call of its YNN library. The flag
`--xla_cpu_experimental_ynn_fusion_type=` (an empty list of fusions) prevents that. XLA
reads its flags only when its backend starts, and a flag that it does not know ends the
process. So `import gecko_jax` sets the flag if every installed XLA knows it, and
`check` runs the case above before training or encoding.
"""

import functools
import importlib.metadata
import mmap
import os
import pathlib
import re
import sys

_FLAG = "xla_cpu_experimental_ynn_fusion_type"

# Versions that know the flag. For other versions, `_has_flag` searches the library.
_KNOWN = ("0.10.2", "0.12.0.1")

# Packages with their own copy of XLA, which reads XLA_FLAGS too.
_PLUGINS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")


def set_cpu_flags() -> None:
    """Adds the flag to XLA_FLAGS, if it is needed and JAX has not started.

    Leaves the environment alone if some installed XLA would not know the flag, or if
    XLA_FLAGS already has it or names a file.
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
    """Raises ArithmeticError if the known wrong case is wrong on this CPU."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() != "cpu":
        return
    # Up to 8 rows the result is correct; from 32 rows on it is not.
    rows = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    sums = jax.jit(lambda x: (x @ jnp.ones((256, 256), jnp.float32)).sum(-1))(rows)
    expected = rows.astype(np.float64).sum(-1) * 256
    with np.errstate(over="ignore", invalid="ignore"):
        errors = np.abs(np.asarray(sums, np.float64) - expected)
        error = errors.max() / np.abs(expected).max()
    # A correct result differs by rounding only. NaN fails the comparison.
    if not error < 1e-3:
        raise ArithmeticError(
            f"jaxlib {_version('jaxlib')}: wrong results on this CPU (a matrix product "
            f"has a relative error of {error:.1e}); import gecko_jax before anything "
            f"runs in JAX, or start Python with XLA_FLAGS=--{_FLAG}= in the environment"
        )


@functools.cache
def bfloat16_options() -> dict[str, str]:
    """Returns compiler options that make bfloat16 matrix products fast on CPU.

    They are up to four times as fast in XLA's YNN library, which the flag of this
    module turns off. Single products are not fused, and their results are correct.
    Returns no options on accelerators, and where the known wrong case is wrong or the
    option is unknown.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() != "cpu" or not _is_flag_known():
        return {}
    options = {_FLAG: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    rows = np.random.default_rng(0).integers(-8, 9, (64, 256))

    def sums(rows: jax.Array) -> jax.Array:
        ones = jnp.ones((256, 256), jnp.bfloat16)
        product = jnp.matmul(rows, ones, preferred_element_type=jnp.float32)
        return product.sum(-1)

    try:
        row_sums = jax.jit(sums, compiler_options=options)(rows.astype(jnp.bfloat16))
    except jax.errors.JaxRuntimeError:
        return {}
    # Sums of whole numbers are exact.
    return options if np.array_equal(row_sums, rows.sum(-1) * 256) else {}


def _is_flag_known() -> bool:
    """Returns whether jaxlib needs the flag and every installed XLA knows it."""
    version = _version("jaxlib") or "0"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < (0, 10, 2):  # The first with wrong results.
        return False
    if version not in _KNOWN and not _has_flag("jaxlib"):
        return False
    # A plugin of jaxlib's own version is built from the same XLA.
    versions = {name: _version(name) for name in _PLUGINS}
    return all(
        plugin in (None, version) or _has_flag(name)
        for name, plugin in versions.items()
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_flag(distribution: str) -> bool:
    """Returns whether a large library of an installed package contains the flag.

    The name as a C string is the flag itself. XLA's serialized list of options may name
    a removed flag, but there no zero byte follows the name.
    """
    for file in importlib.metadata.files(distribution) or []:
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
