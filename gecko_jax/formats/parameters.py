"""Parameter trees: T5X's names, and what a model must have under them.

A tree is nested dicts, `{"encoder": {"layers_0": ...}}`; flat, it is one dict with
names such as `encoder/layers_0/attention/query/kernel`. The leaves may be anything that
has a shape.
"""

from collections.abc import Mapping
from typing import Any

from gecko_jax.models import dual_encoder


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"encoder/layers_0/...": leaf}."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    params: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def check(
    params: Mapping[str, Any],
    config: dual_encoder.EncoderConfig,
    *,
    source: str,
    remedy: str = "set config.model to the sizes of the checkpoint",
) -> None:
    """Compares names and shapes with what the config asks for.

    Raises:
        ValueError: Lists missing, unexpected and wrong-shape parameters together.
    """
    found = {name: leaf.shape for name, leaf in flatten(params).items()}
    # A layer has parameters of its own. Tracing a model of a damaged number of layers
    # would not end.
    if config.num_layers > len(found):
        raise ValueError(
            f"{source}: the model has num_layers={config.num_layers:,}, and there are "
            f"{len(found):,} parameters in all; {remedy}"
        )
    expected = {
        name: leaf.shape
        for name, leaf in flatten(dual_encoder.abstract_params(config)[0]).items()
    }
    faults = [
        f"missing {name} {expected[name]}" for name in expected if name not in found
    ]
    faults += [
        f"unexpected {name} {found[name]}" for name in found if name not in expected
    ]
    faults += [
        f"wrong shape {name}: {found[name]}, needs {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if faults:
        raise ValueError(
            f"{source}: the parameters do not fit the model; {remedy}:\n  "
            + "\n  ".join(faults)
        )
