"""A model as one ONNX graph: from tokens to a normalized embedding.

    input_ids [batch, length]  attention_mask [batch, length], int64
    sentence_embedding [batch, dim], float32, length 1

    model.onnx                                  (and model.onnx_data above 256 MiB)
    config.json                                 for text-embeddings-inference
    tokenizer.json  ...                         see `to_hugging_face_tokenizer`
    gecko.json  vocabulary.model                text format, lengths

Batch size and length are dynamic. The relative bias is a table by distance: it is
constant beyond `relpos_max_distance`, so a clipped distance finds its bias at any
length.
"""

import contextlib
import json
import pathlib
from typing import Any, BinaryIO

import numpy as np

from gecko_jax.formats import (
    model_folder,
    names,
    parameters,
    tensors,
    to_hugging_face_tokenizer,
)
from gecko_jax.io import writing
from gecko_jax.models import dual_encoder, layers, t5
from gecko_jax.text import vocabularies

MODEL, _DATA, _CONFIG = "model.onnx", "model.onnx_data", "config.json"

# Old enough for every runtime in use.
_OPSET, _IR_VERSION = 17, 8

# A protobuf message is limited to 2 GiB, and in memory twice while it is written. The
# weights of larger models are written to a separate file, one at a time.
_INLINE_BYTES = 2**28


def save(
    path: pathlib.Path, model_files: model_folder.ModelFiles, *, dim: int | None = None
) -> None:
    """Writes a complete folder or none; an earlier export is replaced.

    `dim` is the width of the embeddings; None takes the largest trained one. Raises
    ValueError if the folder contains other files, or the encoder is not a T5.
    """
    config = model_files.encoder_config
    if config.family != "t5":
        raise ValueError(
            f"--to=onnx: writes T5 encoders only, not the family {config.family!r}; "
            "export with --to=sentence-transformers, and that folder with optimum: "
            "`optimum-cli export onnx --model DIR --library sentence_transformers ONNX`"
        )
    try:
        import onnx
    except ImportError:
        raise ImportError(
            "exporting to ONNX needs onnx: pip install 'gecko-jax[onnx]'"
        ) from None
    others = (
        *(_DATA, _CONFIG, model_folder.VOCABULARY),
        *to_hugging_face_tokenizer.FILES,
    )
    writing.check_replaceable(path, [MODEL, model_folder.MODEL_JSON], others)
    dim = dim or max(model_files.mrl_dims)
    vocab = model_files.build_vocabulary()
    max_length = max(model_files.query_length, model_files.passage_length)
    flat = parameters.flatten_to_tensors(model_files.params)
    with writing.write_folder(path) as folder:
        is_large = sum(tensor.nbytes for tensor in flat.values()) > _INLINE_BYTES
        no_file = contextlib.nullcontext()
        with (folder / _DATA).open("wb") if is_large else no_file as data:
            graph = _Graph(flat, config, data).build(dim)
        onnx.save_model(graph, folder / MODEL)
        # What text-embeddings-inference and vLLM read.
        values = {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "vocab_size": config.vocab_size,
            "hidden_size": config.model_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "max_position_embeddings": max_length,
            "pad_token_id": vocabularies.PAD_ID,
            "eos_token_id": vocabularies.EOS_ID,
            "matryoshka_dimensions": sorted(
                d for d in model_files.mrl_dims if d <= dim
            ),
        }
        (folder / _CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        to_hugging_face_tokenizer.write_tokenizer(folder, vocab, max_length)
        model_folder.write_model_json(folder, model_files)


class _Graph:
    """Builds the nodes and constants of the encoder's graph.

    The weights are written to `data`; None puts them into the graph. The methods but
    `build` return names of values in the graph.
    """

    def __init__(
        self,
        flat: dict[str, tensors.Tensor],
        config: dual_encoder.EncoderConfig,
        data: BinaryIO | None,
    ):
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._flat = flat
        self._config = config
        self._data = data
        self._names: dict[Any, str] = {}

    def build(self, dim: int) -> Any:
        """Returns the `onnx.ModelProto`, in float32."""
        from onnx import TensorProto, helper

        self.op("Identity", self._embed(dim), output="sentence_embedding")
        value_info = helper.make_tensor_value_info
        inputs = [
            value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ]
        outputs = [value_info("sentence_embedding", TensorProto.FLOAT, ["batch", dim])]
        model = helper.make_model(
            helper.make_graph(self.nodes, "gecko", inputs, outputs, self.constants),
            opset_imports=[helper.make_opsetid("", _OPSET)],
            producer_name="gecko_jax",
        )
        model.ir_version = _IR_VERSION
        return model

    def op(self, name: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Adds a node of the operator `name`, and returns the name of its value.

        Inputs are names of values, or constants: a float, an int, or a tuple of ints
        for a shape or axes. `output` is the name of the value; "" for a new one.
        """
        from onnx import helper

        values = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        output = output or f"{name}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(name, values, [output], **attributes))
        return output

    def _constant(self, value: float | int | tuple[int, ...]) -> str:
        from onnx import numpy_helper

        dtype = np.float32 if isinstance(value, float) else np.int64
        if (dtype, value) not in self._names:
            name = self._names[dtype, value] = f"constant_{len(self._names)}"
            array = np.asarray(value, dtype)
            self.constants.append(numpy_helper.from_array(array, name))
        return self._names[dtype, value]

    def _weight(self, name: str, array: np.ndarray) -> str:
        """Adds a parameter."""
        from onnx import TensorProto, numpy_helper

        array = np.ascontiguousarray(array, "<f4")
        if self._data is None:
            self.constants.append(numpy_helper.from_array(array, name))
            return name
        # Runtimes can map aligned weights into memory.
        self._data.write(b"\0" * (-self._data.tell() % 4_096))
        place = {"location": _DATA, "offset": self._data.tell(), "length": array.nbytes}
        proto = TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
        proto.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self._data.write(array.reshape(-1).view(np.uint8).data)
        self.constants.append(proto)
        return name

    def _embed(self, dim: int) -> str:
        """Adds the whole encoder: embeddings of [B, dim]."""
        op, config = self.op, self._config
        name = "token_embedder/embedding"
        x = op("Gather", self._weight(name, self._flat[name].read()), "input_ids")
        mask = op("Cast", "attention_mask", to=1)  # float32, [B, L]
        masked = op("Mul", op("Sub", 1.0, mask), float(layers.MASKED_LOGIT))
        key_bias = op("Unsqueeze", masked, (1, 2))
        distances = self._distances(config.relpos_max_distance)
        bias = ""
        for n in range(config.num_layers):
            layer = f"encoder/layers_{n}"
            if n == 0 or not config.shared_relative_bias:
                owner = "encoder" if config.shared_relative_bias else layer
                own = self._bias(f"{owner}/relpos_bias", distances)
                bias = op("Add", own, key_bias)
            y = self._norm(f"{layer}/pre_attention_layer_norm", x)
            x = op("Add", x, self._attention(f"{layer}/attention", y, bias))
            y = self._norm(f"{layer}/pre_mlp_layer_norm", x)
            x = op("Add", x, self._mlp(f"{layer}/mlp", y))
        x = self._norm("encoder/encoder_norm", x)
        weights = op("Unsqueeze", mask, (2,))
        total = op("ReduceSum", op("Mul", x, weights), (1,), keepdims=0)
        count = op("ReduceSum", weights, (1,), keepdims=0)
        pooled = op("Div", total, op("Max", count, 1.0))
        if config.projection:
            # Cutting the kernel cuts the embedding.
            kernel = self._flat[names.PROJECTION].read()[:, :dim]
            cut = op("MatMul", pooled, self._weight("projection_layer", kernel))
        else:
            cut = op("Slice", pooled, (0,), (dim,), (1,))
        squares = op("ReduceSum", op("Mul", cut, cut), (1,), keepdims=1)
        length = op("Sqrt", op("Add", squares, float(config.l2_epsilon)))
        return op("Div", cut, length)

    def _distances(self, max_distance: int) -> str:
        """Adds clipped distances of keys from queries, from 0 on; [L, L]."""
        op = self.op
        length = op("Gather", op("Shape", "input_ids"), 1)
        positions = op("Range", 0, length, 1)
        keys = op("Unsqueeze", positions, (0,))
        queries = op("Unsqueeze", positions, (1,))
        clipped = op("Clip", op("Sub", keys, queries), -max_distance, max_distance)
        return op("Add", clipped, max_distance)

    def _bias(self, name: str, distances: str) -> str:
        """Adds the relative bias, [H, L, L]."""
        reach = self._config.relpos_max_distance
        num_buckets = self._config.relpos_num_buckets
        buckets = t5.relative_position_buckets(2 * reach + 1, num_buckets, reach)
        buckets = buckets[reach]  # Of the middle query: distances -reach to reach.
        by_distance = self._flat[f"{name}/rel_embedding"].read()[:, buckets]
        return self.op("Gather", self._weight(name, by_distance), distances, axis=1)

    def _norm(self, name: str, x: str) -> str:
        op = self.op
        square = op("ReduceMean", op("Mul", x, x), axes=[-1], keepdims=1)
        root = op("Sqrt", op("Add", square, 1e-6))
        scale = self._weight(name, self._flat[f"{name}/scale"].read())
        return op("Mul", op("Div", x, root), scale)

    def _dense(self, name: str, x: str) -> str:
        kernel = self._weight(name, self._flat[f"{name}/kernel"].read())
        return self.op("MatMul", x, kernel)

    def _attention(self, name: str, x: str, bias: str) -> str:
        op, config = self.op, self._config

        def heads(part: str, perm: list[int]) -> str:
            projected = self._dense(f"{name}/{part}", x)
            shape = (0, 0, config.num_heads, config.head_dim)
            return op("Transpose", op("Reshape", projected, shape), perm=perm)

        query, value = heads("query", [0, 2, 1, 3]), heads("value", [0, 2, 1, 3])
        key = heads("key", [0, 2, 3, 1])
        logits = op("Add", op("MatMul", query, key), bias)
        mixed = op("MatMul", op("Softmax", logits, axis=-1), value)
        mixed = op("Transpose", mixed, perm=[0, 2, 1, 3])
        joined = op("Reshape", mixed, (0, 0, config.num_heads * config.head_dim))
        return self._dense(f"{name}/out", joined)

    def _mlp(self, name: str, x: str) -> str:
        activations = self._config.mlp_activations
        hidden = ""
        for n, activation in enumerate(activations):
            wi = "wi" if len(activations) == 1 else f"wi_{n}"
            branch = self._activate(activation, self._dense(f"{name}/{wi}", x))
            hidden = self.op("Mul", hidden, branch) if hidden else branch
        return self._dense(f"{name}/wo", hidden)

    def _activate(self, activation: str, x: str) -> str:
        op = self.op
        if activation == "relu":
            return op("Relu", x)
        if activation == "silu":
            return op("Mul", x, op("Sigmoid", x))
        if activation == "gelu":  # T5's tanh approximation.
            cubic = op("Mul", op("Mul", op("Mul", x, x), x), 0.044715)
            inner = op("Mul", op("Add", x, cubic), (2 / np.pi) ** 0.5)
            return op("Mul", op("Mul", x, 0.5), op("Add", op("Tanh", inner), 1.0))
        return x
