"""The decoder's parameters, as they lie in files and as `decoder` wants them.

Both formats store a matrix as [out, in], one per layer, under a name of their own. Here
they become [in, heads, width] and the like, stacked over layers, in the dtype of the
products, and lie on the mesh by the rules of `sharding`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from gecko_jax.io import wording
from gecko_jax.models import transformer
from gecko_jax.parallel import sharding

# A name of `decoder` -> the name in a file; `{}` is the layer's number.
Names = Mapping[str, str]


def names(config: transformer.DecoderConfig, table: Names) -> dict[str, list[str]]:
    """Returns the names in a file of every parameter, one per layer where it has any.

    Args:
        config: The decoder; it decides which parameters there are.
        table: Of the file's format.
    """
    axes = transformer.logical_axes(config)
    found = {
        name: [table[name].format(layer) for layer in range(config.num_layers)]
        for name in axes["layers"]
    }
    return found | {name: [table[name]] for name in axes if name != "layers"}


def check(
    place: str,
    config: transformer.DecoderConfig,
    table: Names,
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
) -> None:
    """Checks names and shapes of a file before anything is read.

    Args:
        place: The file, for the error.
        config: What the file's own settings say.
        table: Of the file's format.
        shapes: Shape of every tensor in the file.
        ignored: Names of tensors that a file may hold beside the parameters.

    Raises:
        ValueError: Lists missing, unexpected and wrong-shape tensors together.
    """
    expected = {}
    for ours, theirs in names(config, table).items():
        expected |= dict.fromkeys(theirs, file_shape(config, ours))
    faults = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys() - set(ignored)),
        "wrong shape": [
            f"{name} {shapes[name]} for {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    listed = [
        f"{fault}: {', '.join(found[:5])}" + (", ..." if len(found) > 5 else "")
        for fault, found in faults.items()
        if found
    ]
    if listed:
        told = wording.printable("; ".join(listed))
        raise ValueError(
            f"{place}: its tensors are not those of its settings ({told});"
            " copy the file again, or choose a model of the Llama or Gemma 3 family"
        )


def file_shape(config: transformer.DecoderConfig, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter, or of one layer of it, in a file."""
    shapes = transformer.param_shapes(config)
    shape = shapes["layers"][name][1:] if name in shapes["layers"] else shapes[name]
    if len(shape) == 1 or name in ("embedding", "output"):
        return shape
    rows = shape[:-1] if name == "out" else shape[:1]
    columns = shape[len(rows) :]
    return int(np.prod(columns)), int(np.prod(rows))


def load(
    read: Callable[[str], np.ndarray],
    config: transformer.DecoderConfig,
    table: Names,
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Reads all parameters and puts each onto the mesh before the next is read.

    Args:
        read: Returns a tensor of the file by name: [out, in], a query's or key's
            halves as Hugging Face's rotary positions pair them, a norm's weight as
            what it multiplies with.
        config: The decoder.
        table: Of the file's format.
        dtype: Of the parameters.
        mesh: Where they go.
    """
    shapes = transformer.param_shapes(config)
    axes = transformer.logical_axes(config)
    found = names(config, table)

    def place(path: Any, shape: tuple[int, ...], axes: Any) -> jax.Array:
        name = path[-1].key
        layers = len(path) > 1
        whole = np.empty(shape, dtype)
        for layer, theirs in enumerate(found[name]):
            tensor = read(theirs)
            if tensor.ndim == 2 and layers:
                tensor = tensor.T
            part = shape[1:] if layers else shape
            whole[layer if layers else ...] = tensor.reshape(part)
        struct = jax.ShapeDtypeStruct(shape, dtype)
        where = sharding.param_shardings(struct, axes, mesh)
        return jax.make_array_from_callback(shape, where, lambda index: whole[index])

    return jax.tree.map_with_path(
        place, shapes, axes, is_leaf=lambda node: isinstance(node, tuple)
    )
