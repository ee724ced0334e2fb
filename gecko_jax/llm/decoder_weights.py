"""Decoder parameters: names and layout in files, and loading onto the mesh.

GGUF and Hugging Face files store a matrix per layer as [out, in]. The decoder takes
[in, heads, width] and the like, stacked over layers, in the dtype of the products.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from gecko_jax.io import wording
from gecko_jax.models import transformer
from gecko_jax.parallel import sharding

# Parameter -> its name in GGUF and in Hugging Face files.
_NAMES = {
    "embedding": ("token_embd", "model.embed_tokens"),
    "final_norm": ("output_norm", "model.norm"),
    "output": ("output", "lm_head"),
    "attention_norm": ("attn_norm", "input_layernorm"),
    "query": ("attn_q", "self_attn.q_proj"),
    "key": ("attn_k", "self_attn.k_proj"),
    "value": ("attn_v", "self_attn.v_proj"),
    "out": ("attn_output", "self_attn.o_proj"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "gate": ("ffn_gate", "mlp.gate_proj"),
    "up": ("ffn_up", "mlp.up_proj"),
    "down": ("ffn_down", "mlp.down_proj"),
    "query_norm": ("attn_q_norm", "self_attn.q_norm"),
    "key_norm": ("attn_k_norm", "self_attn.k_norm"),
}
_NAMES |= {f"{name}_bias": _NAMES[name] for name in ("query", "key", "value")}
_GEMMA_NAMES = _NAMES | {
    "post_attention_norm": ("post_attention_norm", "post_attention_layernorm"),
    "mlp_norm": ("ffn_norm", "pre_feedforward_layernorm"),
    "post_mlp_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
}

Format = Literal["gguf", "hugging_face"]


@runtime_checkable
class ModelFile(Protocol):
    """An open model, see `gguf.Gguf` and `safetensors_folder.SafetensorsFolder`."""

    config: transformer.DecoderConfig
    file_format: Format

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor: matrices as [out, in], norm weights as multipliers.

        Rows of queries and keys are in Hugging Face's order of rotary pairs.
        """
        ...


def file_names(
    config: transformer.DecoderConfig, file_format: Format
) -> dict[str, list[str]]:
    """Returns the tensor names of each parameter, one per layer where it has any."""
    column, layers = (0, "blk") if file_format == "gguf" else (1, "model.layers")
    table = _GEMMA_NAMES if config.sandwich_norms else _NAMES
    axes = transformer.logical_axes(config)

    def of(name: str) -> str:
        kind = "bias" if name.endswith("_bias") else "weight"
        return f"{table[name][column]}.{kind}"

    return {name: [of(name)] for name in axes if name != "layers"} | {
        name: [f"{layers}.{layer}.{of(name)}" for layer in range(config.num_layers)]
        for name in axes["layers"]
    }


def check(
    place: object,
    config: transformer.DecoderConfig,
    file_format: Format,
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
) -> None:
    """Raises a ValueError that lists all tensors of a file that do not fit it."""
    expected = {}
    for parameter, names in file_names(config, file_format).items():
        expected |= dict.fromkeys(names, _file_shape(config, parameter))
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys() - set(ignored)),
        "wrong shape": [
            f"{name} {shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    listed = "; ".join(
        f"{problem}: {', '.join(names[:5])}" + (", ..." if len(names) > 5 else "")
        for problem, names in problems.items()
        if names
    )
    if listed:
        raise ValueError(
            f"{place}: the tensors do not match the settings "
            f"({wording.printable(listed)}); copy the file again, or choose a model of "
            "the Llama, Qwen or Gemma 3 family"
        )


def _file_shape(config: transformer.DecoderConfig, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter, or of one of its layers, in a file."""
    shapes = transformer.param_shapes(config)
    shape = shapes["layers"][name][1:] if name in shapes["layers"] else shapes[name]
    if name.endswith("_bias"):
        return (int(np.prod(shape)),)
    if len(shape) == 1 or name in ("embedding", "output"):
        return shape
    num_inputs = 2 if name == "out" else 1
    return int(np.prod(shape[num_inputs:])), int(np.prod(shape[:num_inputs]))


def load(file: ModelFile, *, dtype: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Reads the parameters one at a time onto the mesh, by the rules of `sharding`.

    On CPU, bfloat16 is stored as its bits; see `transformer.extend`.
    """
    is_bits = dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    names = file_names(file.config, file.file_format)

    def place(path: Any, shape: tuple[int, ...], axes: Any) -> jax.Array:
        is_layered = len(path) > 1
        values = np.empty(shape, dtype)
        for layer, name in enumerate(names[path[-1].key]):
            tensor = file.read(name)
            if is_layered:
                values[layer] = tensor.T.reshape(shape[1:])
            else:
                values[...] = tensor
        values = values.view(np.uint16) if is_bits else values
        struct = jax.ShapeDtypeStruct(shape, values.dtype)
        where = sharding.param_shardings(struct, axes, mesh)
        return jax.make_array_from_callback(shape, where, lambda index: values[index])

    return jax.tree.map_with_path(
        place,
        transformer.param_shapes(file.config),
        transformer.logical_axes(file.config),
        is_leaf=lambda node: isinstance(node, tuple),
    )
