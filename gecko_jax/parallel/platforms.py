"""Keeps JAX from starting libtpu on a host without a TPU.

JAX starts libtpu wherever it is installed, and `gecko compile` needs it installed. On a
host without a TPU, libtpu prints a page of errors, takes a second, and holds a lock
that blocks `gecko compile`. `import gecko_jax` therefore tells JAX to skip it.
"""

import importlib.util
import os
import pathlib
import sys

# Any of these variables means that the user has chosen a platform.
_CHOICES = (
    *("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_LIBRARY_PATH"),
    *("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"),
)

# Lets libtpu start without asking a cloud metadata server about its machine.
NO_METADATA = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# Google's PCI vendor id, and the ids of its devices that are network cards and disks.
_GOOGLE, _OTHER_DEVICES = "0x1ae0", ("0x0042", "0x001f")


def skip_absent_tpu() -> None:
    """Keeps JAX from starting libtpu if the host has no TPU.

    Changes nothing if the environment names a platform or JAX has started.
    """
    if any(name in os.environ for name in _CHOICES):
        return
    if importlib.util.find_spec("libtpu") is None or _has_tpu():
        return
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    if any(map(importlib.util.find_spec, plugins)):
        # JAX still has to look for a GPU. libtpu starts, but prints nothing.
        os.environ.update(NO_METADATA)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")  # Once imported, it ignores the environment.
    bridge = sys.modules.get("jax._src.xla_bridge")
    if jax is not None and not (bridge and bridge.backends_are_initialized()):
        jax.config.update("jax_platforms", "cpu")


def _has_tpu() -> bool:
    devices = pathlib.Path("/dev")
    if any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*")):
        return True
    return any(
        vendor.read_text().strip() == _GOOGLE
        and vendor.with_name("device").read_text().strip() not in _OTHER_DEVICES
        for vendor in pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
    )
