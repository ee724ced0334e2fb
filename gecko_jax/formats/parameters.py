"""Parameter trees under T5X's names, and the check that one fits a model.

A tree is nested dicts, `{"encoder": {"layers_0": ...}}`. A flat tree is one dict with
names such as `encoder/layers_0/attention/query/kernel`. Leaves are arrays, `Tensor`s,
or anything else with a shape.
"""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from gecko_jax.formats import tensors
from gecko_jax.models import dual_encoder


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"encoder/layers_0/...": leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def flatten_to_tensors(params: Mapping[str, Any]) -> dict[str, tensors.Tensor]:
    """Returns {"encoder/layers_0/...": leaf}, with every leaf as a `Tensor`."""
    return {name: tensors.as_tensor(leaf) for name, leaf in flatten(params).items()}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def check(
    params: Mapping[str, Any],
    config: dual_encoder.EncoderConfig,
    *,
    source: str,
    remedy: str = "set config.model to the sizes of the checkpoint",
) -> None:
    """Raises a ValueError that lists missing, unexpected and wrong-shape parameters."""
    shapes = {name: leaf.shape for name, leaf in flatten(params).items()}
    # Every layer has parameters. A damaged number of layers would make tracing the
    # model take forever.
    if config.num_layers > len(shapes):
        raise ValueError(
            f"{source}: the model has num_layers={config.num_layers:,}, and there are "
            f"{len(shapes):,} parameters in all; {remedy}"
        )
    abstract_params, _ = dual_encoder.abstract_params(config)
    expected = {name: leaf.shape for name, leaf in flatten(abstract_params).items()}
    missing = expected.keys() - shapes.keys()
    problems = [f"missing {n} {expected[n]}" for n in expected if n in missing]
    problems += [f"unexpected {n} {shapes[n]}" for n in shapes if n not in expected]
    problems += [
        f"wrong shape {name}: {shapes[name]}, needs {shape}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    if problems:
        raise ValueError(
            f"{source}: the parameters do not fit the model; {remedy}:\n  "
            + "\n  ".join(problems)
        )
