"""Peak rates of accelerators, from the vendors' data sheets; nothing is measured."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Data sheet of an accelerator."""

    flops_per_second: float  # peak bfloat16 FLOPs of the matrix units
    hbm_bytes: float
    hbm_bytes_per_second: float
    # One-way bandwidth of all links to chips of the same slice together; 0 if there is
    # no single number.
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

# Part of JAX's `device_kind` -> chip; the first match counts.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    **{name: name for name in ("A100", "H200", "H100")},
}


def of(device: jax.Device) -> Chip | None:
    """Returns the data sheet of a device, or None for a device that is not listed."""
    kinds = (kind for part, kind in _KINDS.items() if part in device.device_kind)
    return CHIPS.get(next(kinds, ""))
