"""What chips can do, by their makers' data sheets; nothing here is measured."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """A kind of accelerator.

    Attributes:
        flops_per_second: Peak of its matrix units in bfloat16.
        hbm_bytes: Memory, as a data sheet counts it.
        hbm_bytes_per_second: Of the memory.
        link_bytes_per_second: Of all links to other chips of its slice together, one
            way; 0 where there is no one number.
    """

    flops_per_second: float
    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float


_GIB = 2.0**30

# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm and NVIDIA's data sheets.
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1.228e12, 150e9),
    "v5e": Chip(197e12, 16 * _GIB, 0.819e12, 100e9),
    "v5p": Chip(459e12, 95 * _GIB, 2.765e12, 300e9),
    "v6e": Chip(918e12, 32 * _GIB, 1.640e12, 224e9),
    "A100": Chip(312e12, 80e9, 2.039e12, 0.0),
    "H100": Chip(989e12, 80e9, 3.35e12, 0.0),
    "H200": Chip(989e12, 141e9, 4.8e12, 0.0),
}

# The first that is in JAX's name of the device.
_KINDS = (
    ("TPU v4", "v4"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("A100", "A100"),
    ("H200", "H200"),
    ("H100", "H100"),
)


def of(device: jax.Device) -> Chip | None:
    """Returns the chip behind a device, or None for one that is not listed."""
    for part, name in _KINDS:
        if part in device.device_kind:
            return CHIPS[name]
    return None
