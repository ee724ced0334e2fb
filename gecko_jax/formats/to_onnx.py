"""A Gecko as one ONNX graph: tokens to a normalized vector of `dim` entries.

    input_ids [batch, length]  attention_mask [batch, length], int64
    sentence_embedding [batch, dim], float32, length 1

    model.onnx                                  (and model.onnx_data past 256 MiB)
    tokenizer.json  ...                         see `to_hugging_face_tokenizer`
    gecko.json  vocabulary.model                text format, lengths

Batch and length are free. The relative bias is a table by distance: buckets stop
growing at `relpos_max_distance`, so a clipped distance finds its bias in any length.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from gecko_jax.formats import (
    model_folder,
    parameters,
    tensors,
    to_hugging_face_tokenizer,
)
from gecko_jax.io import writing
from gecko_jax.models import dual_encoder, t5

MODEL, DATA = "model.onnx", "model.onnx_data"

# Old enough for every runtime in use; nothing here needs more.
_OPSET, _IR_VERSION = 17, 8

# A protobuf message ends at 2 GiB, and is in memory twice while it is written; larger
# models keep their weights beside it, which are written as they are read.
_INLINE_BYTES = 2**28

# Where a weight may begin in the file beside, so that it can be mapped into memory.
_ALIGNMENT = 4_096

_GELU_CUBIC = 0.044715


def save(
    path: pathlib.Path, model_files: model_folder.ModelFiles, *, dim: int | None = None
) -> None:
    """Writes the folder, whole or not at all; an export that is there is replaced.

    Args:
        path: The folder.
        model_files: The model.
        dim: Entries of the vectors; None is the largest that was trained.

    Raises:
        ValueError: The folder holds something else.
        ImportError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError(
            "exporting to ONNX needs onnx: pip install 'gecko-jax[onnx]'"
        ) from None
    others = (DATA, model_folder.VOCABULARY, *to_hugging_face_tokenizer.FILES)
    writing.check_replaceable(path, [MODEL, model_folder.MODEL_JSON], others)
    config = model_files.encoder_config
    dim = dim or max(model_files.mrl_dims)
    vocab = model_files.build_vocabulary()
    max_length = max(model_files.query_length, model_files.passage_length)
    size = sum(
        4 * tensors.num_values(leaf.shape)
        for leaf in parameters.flatten(model_files.params).values()
    )
    with writing.write_folder(path) as folder:
        if size > _INLINE_BYTES:
            with (folder / DATA).open("wb") as data:
                graph = build(model_files.params, config, dim, data)
        else:
            graph = build(model_files.params, config, dim)
        onnx.save_model(graph, folder / MODEL)
        to_hugging_face_tokenizer.write_tokenizer(folder, vocab, max_length)
        model_folder.write_model_json(folder, model_files)


def build(
    params: dict[str, Any],
    config: dual_encoder.EncoderConfig,
    dim: int,
    data: BinaryIO | None = None,
) -> Any:
    """Returns the `onnx.ModelProto`.

    Args:
        params: Parameters by T5X name.
        config: Sizes and settings; its `dtype` is not followed, all is float32.
        dim: Entries of the vectors.
        data: `model.onnx_data`, which gets the weights; None puts them in the graph.
    """
    from onnx import TensorProto, helper

    flat = {
        name: tensors.as_tensor(leaf)
        for name, leaf in parameters.flatten(params).items()
    }
    graph = _Graph(data)
    embedding = _embed(graph, flat, config, dim)
    graph.add("Identity", [embedding], output="sentence_embedding")
    tokens = ["batch", "length"]
    made = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "gecko",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64, tokens)
                for name in ("input_ids", "attention_mask")
            ],
            [
                helper.make_tensor_value_info(
                    "sentence_embedding", TensorProto.FLOAT, ["batch", dim]
                )
            ],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        producer_name="gecko_jax",
    )
    made.ir_version = _IR_VERSION
    return made


class _Graph:
    """Nodes and constants of a graph in the making; values are names."""

    def __init__(self, data: BinaryIO | None):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._data = data
        self._names: dict[Any, str] = {}

    def add(
        self, op: str, inputs: Sequence[str], output: str | None = None, **attributes
    ) -> str:
        """Adds a node; returns its value."""
        from onnx import helper

        output = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def weight(self, name: str, array: np.ndarray) -> str:
        """Adds a parameter under its T5X name."""
        from onnx import TensorProto

        array = np.ascontiguousarray(array, "<f4")
        if self._data is None:
            return self._constant(name, array)
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        place = {
            "location": DATA,
            "offset": self._data.tell(),
            "length": array.nbytes,
        }
        self._data.write(array.reshape(-1).view(np.uint8).data)
        proto = TensorProto(
            name=name,
            dims=array.shape,
            data_type=TensorProto.FLOAT,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.constants.append(proto)
        return name

    def number(self, value: Any, dtype: type = np.float32) -> str:
        """Adds a constant, once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            self._names[key] = self._constant(f"constant_{len(self._names)}", array)
        return self._names[key]

    def integers(self, *values: int) -> str:
        """Adds a shape or a list of axes."""
        return self.number(values, np.int64)

    def _constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(array, name))
        return name


def _embed(
    graph: _Graph,
    flat: dict[str, tensors.Tensor],
    config: dual_encoder.EncoderConfig,
    dim: int,
) -> str:
    name = "token_embedder/embedding"
    table = graph.weight(name, flat[name].read())
    x = graph.add("Gather", [table, "input_ids"])
    mask = graph.add("Cast", ["attention_mask"], to=1)  # float32, [B, L]
    hidden_keys = graph.add(
        "Mul",
        [
            graph.add("Sub", [graph.number(1.0), mask]),
            graph.number(t5.MASKED_LOGIT),
        ],
    )
    key_bias = graph.add("Unsqueeze", [hidden_keys, graph.integers(1, 2)])
    distances = _distances(graph, config.relpos_max_distance)
    bias = ""
    for n in range(config.num_layers):
        layer = f"encoder/layers_{n}"
        if n == 0 or not config.shared_relative_bias:
            owner = "encoder" if config.shared_relative_bias else layer
            bias = _bias(graph, flat, f"{owner}/relpos_bias", distances, config)
            bias = graph.add("Add", [bias, key_bias])
        y = _norm(graph, flat, f"{layer}/pre_attention_layer_norm", x)
        y = _attention(graph, flat, f"{layer}/attention", y, bias, config)
        x = graph.add("Add", [x, y])
        y = _norm(graph, flat, f"{layer}/pre_mlp_layer_norm", x)
        x = graph.add("Add", [x, _mlp(graph, flat, f"{layer}/mlp", y, config)])
    x = _norm(graph, flat, "encoder/encoder_norm", x)
    weights = graph.add("Unsqueeze", [mask, graph.integers(2)])
    total = graph.add(
        "ReduceSum", [graph.add("Mul", [x, weights]), graph.integers(1)], keepdims=0
    )
    count = graph.add("ReduceSum", [weights, graph.integers(1)], keepdims=0)
    pooled = graph.add("Div", [total, graph.add("Max", [count, graph.number(1.0)])])
    if config.projection:
        # The cut is a cut of the matrix.
        kernel = flat["projection_layer/kernel"].read()[:, :dim]
        cut = graph.add("MatMul", [pooled, graph.weight("projection_layer", kernel)])
    else:
        cut = graph.add(
            "Slice",
            [pooled, graph.integers(0), graph.integers(dim), graph.integers(1)],
        )
    squares = graph.add("Mul", [cut, cut])
    length = graph.add("ReduceSum", [squares, graph.integers(1)], keepdims=1)
    length = graph.add("Add", [length, graph.number(config.l2_epsilon)])
    return graph.add("Div", [cut, graph.add("Sqrt", [length])])


def _distances(graph: _Graph, max_distance: int) -> str:
    """Key position minus query position, clipped, from 0 on; [L, L]."""
    length = graph.add(
        "Gather", [graph.add("Shape", ["input_ids"]), graph.number(1, np.int64)]
    )
    positions = graph.add(
        "Range", [graph.number(0, np.int64), length, graph.number(1, np.int64)]
    )
    keys = graph.add("Unsqueeze", [positions, graph.integers(0)])
    queries = graph.add("Unsqueeze", [positions, graph.integers(1)])
    clipped = graph.add(
        "Clip",
        [
            graph.add("Sub", [keys, queries]),
            graph.number(-max_distance, np.int64),
            graph.number(max_distance, np.int64),
        ],
    )
    return graph.add("Add", [clipped, graph.number(max_distance, np.int64)])


def _bias(
    graph: _Graph,
    flat: dict[str, tensors.Tensor],
    name: str,
    distances: str,
    config: dual_encoder.EncoderConfig,
) -> str:
    """The relative bias, [H, L, L]."""
    reach = config.relpos_max_distance
    buckets = t5.relative_position_buckets(
        2 * reach + 1, 2 * reach + 1, config.relpos_num_buckets, reach
    )[reach]  # Seen from the middle: distances -reach to reach.
    by_distance = flat[f"{name}/rel_embedding"].read()[:, buckets]
    return graph.add("Gather", [graph.weight(name, by_distance), distances], axis=1)


def _norm(graph: _Graph, flat: dict[str, tensors.Tensor], name: str, x: str) -> str:
    square = graph.add("ReduceMean", [graph.add("Mul", [x, x])], axes=[-1], keepdims=1)
    root = graph.add("Sqrt", [graph.add("Add", [square, graph.number(1e-6)])])
    scale = graph.weight(name, flat[f"{name}/scale"].read())
    return graph.add("Mul", [graph.add("Div", [x, root]), scale])


def _dense(graph: _Graph, flat: dict[str, tensors.Tensor], name: str, x: str) -> str:
    kernel = graph.weight(name, flat[f"{name}/kernel"].read())
    return graph.add("MatMul", [x, kernel])


def _attention(
    graph: _Graph,
    flat: dict[str, tensors.Tensor],
    name: str,
    x: str,
    bias: str,
    config: dual_encoder.EncoderConfig,
) -> str:
    def heads(part: str, perm: list[int]) -> str:
        split = graph.integers(0, 0, config.num_heads, config.head_dim)
        projected = _dense(graph, flat, f"{name}/{part}", x)
        return graph.add(
            "Transpose", [graph.add("Reshape", [projected, split])], perm=perm
        )

    query, value = heads("query", [0, 2, 1, 3]), heads("value", [0, 2, 1, 3])
    key = heads("key", [0, 2, 3, 1])
    logits = graph.add("Add", [graph.add("MatMul", [query, key]), bias])
    weights = graph.add("Softmax", [logits], axis=-1)
    mixed = graph.add("MatMul", [weights, value])
    mixed = graph.add("Transpose", [mixed], perm=[0, 2, 1, 3])
    joined = graph.integers(0, 0, config.num_heads * config.head_dim)
    return _dense(graph, flat, f"{name}/out", graph.add("Reshape", [mixed, joined]))


def _mlp(
    graph: _Graph,
    flat: dict[str, tensors.Tensor],
    name: str,
    x: str,
    config: dual_encoder.EncoderConfig,
) -> str:
    hidden = ""
    for n, activation in enumerate(config.mlp_activations):
        wi = "wi" if len(config.mlp_activations) == 1 else f"wi_{n}"
        branch = _activate(graph, activation, _dense(graph, flat, f"{name}/{wi}", x))
        hidden = graph.add("Mul", [hidden, branch]) if hidden else branch
    return _dense(graph, flat, f"{name}/wo", hidden)


def _activate(graph: _Graph, activation: str, x: str) -> str:
    if activation == "relu":
        return graph.add("Relu", [x])
    if activation == "silu":
        return graph.add("Mul", [x, graph.add("Sigmoid", [x])])
    if activation == "gelu":  # The tanh form, as T5's.
        cube = graph.add("Mul", [graph.add("Mul", [x, x]), x])
        cubic = graph.add("Mul", [cube, graph.number(_GELU_CUBIC)])
        inner = graph.add(
            "Mul", [graph.add("Add", [x, cubic]), graph.number((2 / np.pi) ** 0.5)]
        )
        gate = graph.add("Add", [graph.add("Tanh", [inner]), graph.number(1.0)])
        return graph.add("Mul", [graph.add("Mul", [x, graph.number(0.5)]), gate])
    return x
