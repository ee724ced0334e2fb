"""JAX's platforms: a TPU that is not there is not looked for.

Where libtpu is installed, as `gecko compile` needs it, JAX starts it on every host. On
one without a TPU libtpu writes a page of complaints, takes a second, and holds a lock
that keeps `gecko compile` waiting. So `import gecko_jax` tells JAX to leave it out.
"""

import importlib.util
import os
import pathlib
import sys

# Where any of these is set, someone has said which platform they want.
_CHOICES = (
    "JAX_PLATFORMS",
    "JAX_FORCE_TPU_INIT",
    "TPU_NAME",
    "TPU_LIBRARY_PATH",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_HOSTNAMES",
)

# JAX's plugins for GPUs, as modules.
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")

# How libtpu knows which machine it is on without asking a cloud's metadata server.
NO_METADATA = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# Google's PCI vendor, and those of its devices that are network cards and disks.
_GOOGLE, _OTHER_DEVICES = "0x1ae0", ("0x0042", "0x001f")


def skip_absent_tpu() -> None:
    """Keeps JAX from starting libtpu where the host has no TPU.

    Leaves alone an environment that names a platform, and a JAX that has started.
    """
    if any(name in os.environ for name in _CHOICES):
        return
    if importlib.util.find_spec("libtpu") is None or _has_tpu():
        return
    if any(importlib.util.find_spec(name) for name in _GPU_PLUGINS):
        # JAX must still find out whether there is a GPU. libtpu starts, and is quiet.
        os.environ.update(NO_METADATA)
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = sys.modules.get("jax")  # It has read the environment when it was imported.
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
