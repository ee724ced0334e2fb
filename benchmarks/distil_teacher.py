"""The teacher's vectors of texts, stored in chunks, for `distil.py`.

On a CPU the teacher runs in int8 on ONNX Runtime, about three times as fast as in
float32: the mean cosine between the two vectors of a text is 0.994. If PyTorch is
installed, the teacher runs in float16 on a GPU, and in bfloat16 on a CPU with AMX,
which is faster than int8 there, and nearer to float32 (mean cosine 0.99996).
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import time
import typing
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from distil_texts import say
from safetensors import numpy as safetensors

from gecko_jax.io import writing

if typing.TYPE_CHECKING:
    from jaxtyping import Float, Int

# Longest text that the teacher reads, in its own tokens. It learned from texts cut at
# 128 tokens.
LENGTH = 128
# Number of tokens in a batch. In int8 one scale holds for a whole batch.
BATCH = 512
BATCH_IN_BFLOAT16 = 4_096
BATCH_ON_GPU = 262_144
# Number of texts whose vectors are stored at a time.
BLOCK = 8_192

Encode = Callable[[Any], Any]


class Store:
    """Vectors of texts in a folder of chunks. Each text is known by its digest."""

    def __init__(self, folder: pathlib.Path):
        """Opens the folder and creates it if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def add(self, texts: Sequence[str], vectors: Float[np.ndarray, "N T"]) -> None:
        """Writes a chunk: all of it or, if the process is killed, nothing."""
        number = len(list(self.folder.glob("*.npz")))
        path = self.folder / f"{number:05}.npz"
        with writing.write_file(path) as temporary, temporary.open("wb") as out:
            np.savez(out, digests=digests(texts), vectors=vectors)

    def digests(self) -> set[int]:
        """Returns the digests of all texts that have a vector."""
        known: set[int] = set()
        for chunk in self._chunks():
            known.update(chunk["digests"].tolist())
        return known

    def find(
        self, texts: Sequence[str]
    ) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N T"]]:
        """Returns the indices of the texts that have a vector, and their vectors."""
        index = {digest: place for place, digest in enumerate(digests(texts).tolist())}
        places, blocks = [], []
        for chunk in self._chunks():
            rows = [index.pop(digest, -1) for digest in chunk["digests"].tolist()]
            chosen = np.array(rows)
            places.append(chosen[chosen >= 0])
            blocks.append(chunk["vectors"][chosen >= 0])
        order = np.argsort(merged := np.concatenate(places))
        return merged[order], np.concatenate(blocks)[order]

    def vectors(self, texts: Sequence[str]) -> Float[np.ndarray, "N T"]:
        """Returns the vectors of texts that all have one; texts may be equal."""
        distinct = list(dict.fromkeys(texts))
        positions, vectors = self.find(distinct)
        if len(positions) != len(distinct):
            raise ValueError(
                f"{self.folder}: {len(distinct) - len(positions)} are missing"
            )
        index = {text: place for place, text in enumerate(distinct)}
        return vectors[[index[text] for text in texts]]

    def _chunks(self):
        for path in sorted(self.folder.glob("*.npz")):
            try:
                yield np.load(path)
            except zipfile.BadZipFile as error:
                raise SystemExit(f"{path}: {error}; remove the file") from error


def digests(texts: Sequence[str]) -> Int[np.ndarray, " N"]:
    """Returns 64 bits for each text."""
    values = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(values), np.uint64)


def teach(
    folder: pathlib.Path, texts: Sequence[str], store: Store, until: float
) -> None:
    """Stores the teacher's normalized vectors, in float16, of the texts without one.

    Args:
        folder: Folder of the teacher, a BERT encoder with mean pooling.
        texts: Texts to embed, the most important first.
        store: Store of the vectors.
        until: Time (`time.monotonic`) after which no block starts.
    """
    import tokenizers

    known = store.digests()
    keys = digests(texts).tolist()
    distinct = dict(zip(keys, texts, strict=True))
    texts = [text for key, text in distinct.items() if key not in known]
    if not texts or time.monotonic() > until:
        return
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTH)
    encode, size = encoder(folder)
    begun = reported = time.monotonic()
    done = 0
    for place in range(0, len(texts), BLOCK):
        if time.monotonic() > until:
            break
        block = texts[place : place + BLOCK]
        rows = [encoding.ids for encoding in tokenizer.encode_batch(block)]
        vectors = embed(encode, rows, size)
        store.add(block, vectors)
        done += len(block)
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            rate = done / (reported - begun)
            say(f"teacher {done:,} of {len(texts):,}, {rate:,.0f}/s")


def embed(
    encode: Encode, rows: Sequence[Sequence[int]], size: int
) -> Float[np.ndarray, "N T"]:
    """Returns normalized vectors. A batch has texts of one length, without padding."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(index)
    vectors: list[Any] = [None] * len(rows)
    for length, indices in sorted(by_length.items()):
        step = max(1, size // length)
        for place in range(0, len(indices), step):
            part = indices[place : place + step]
            batch_vectors = encode(np.array([rows[i] for i in part], np.int64))
            batch_vectors /= np.linalg.norm(batch_vectors, axis=1, keepdims=True)
            for i, vector in zip(part, batch_vectors.astype(np.float16), strict=True):
                vectors[i] = vector
    return np.stack(vectors)


def encoder(folder: pathlib.Path) -> tuple[Encode, int]:
    """Returns a function from token ids to vectors, and the tokens of a batch."""
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        return torch_encoder(folder, torch, "cuda", torch.float16), BATCH_ON_GPU
    if torch is not None and torch.cpu.get_capabilities().get("amx_bf16"):
        return torch_encoder(folder, torch, "cpu", torch.bfloat16), BATCH_IN_BFLOAT16
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        int8_graph(folder), settings, providers=["CPUExecutionProvider"]
    )
    return lambda ids: session.run(None, {"ids": ids})[0], BATCH


def torch_encoder(folder: pathlib.Path, torch: Any, device: str, dtype: Any) -> Encode:
    """Returns the teacher in a half precision of PyTorch."""
    import transformers

    config = transformers.BertConfig.from_pretrained(folder)
    model = transformers.BertModel(config, add_pooling_layer=False)
    weights = {
        name: torch.from_numpy(value) for name, value in load_weights(folder).items()
    }
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not [name for name in missing if not name.endswith("_ids")], missing
    torch.nn.Module.to(model, device, dtype)
    model.eval()

    def encode(ids):
        with torch.inference_mode():
            hidden = model(torch.from_numpy(ids).to(device)).last_hidden_state
            return hidden.float().mean(1).cpu().numpy()

    return encode


def load_weights(folder: pathlib.Path) -> dict[str, Float[np.ndarray, ...]]:
    """Returns the parameters of the encoder in float32."""
    stored = safetensors.load_file(folder / "model.safetensors")
    return {
        name: value.astype(np.float32)
        for name, value in stored.items()
        if not name.startswith("pooler") and not name.endswith("_ids")
    }


def int8_graph(folder: pathlib.Path) -> bytes:
    """Returns an ONNX model from token ids to mean hidden states.

    Each matrix is in int8 with a scale per column; ONNX Runtime quantizes the
    activations of each batch. All texts of a batch have equal lengths.
    """
    import onnx
    from onnx import helper, numpy_helper

    weights = load_weights(folder)
    config = json.loads((folder / "config.json").read_text())
    epsilon = config["layer_norm_eps"]
    nodes, constants = [], []

    def constant(array: np.ndarray) -> str:
        name = f"constant_{len(constants)}"
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], domain=domain, **attributes))
        return name

    def fused(op: str, *inputs: str, **attributes: Any) -> str:
        return node(op, *inputs, domain="com.microsoft", **attributes)

    def dense(x: str, *names: str) -> str:
        kernel = np.concatenate([weights[f"{name}.weight"] for name in names]).T
        bias = np.concatenate([weights[f"{name}.bias"] for name in names])
        scale = np.abs(kernel).max(0) / 127
        values = np.round(kernel / scale).astype(np.int8)
        zeros = np.zeros(len(scale), np.int8)
        return fused(
            "DynamicQuantizeMatMul", x, *map(constant, (values, scale, zeros, bias))
        )

    def norm(x: str, name: str) -> str:
        scale, bias = (constant(weights[f"{name}.{one}"]) for one in ("weight", "bias"))
        return node("LayerNormalization", x, scale, bias, epsilon=epsilon)

    words, positions, types = (
        weights[f"embeddings.{name}_embeddings.weight"]
        for name in ("word", "position", "token_type")
    )
    zero, one = (constant(np.array([number], np.int64)) for number in (0, 1))
    length = node("Shape", "ids", start=1, end=2)
    places = node("Slice", constant(positions + types[0]), zero, length, zero)
    x = node("Add", node("Gather", constant(words), "ids"), places)
    x = norm(x, "embeddings.LayerNorm")
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        joined = [f"{name}.attention.self.{one}" for one in ("query", "key", "value")]
        parts = [f"{name}.{one}" for one in ("query", "key", "value")]
        nodes.append(
            helper.make_node(
                "Split", [dense(x, *joined)], parts, axis=-1, num_outputs=3
            )
        )
        heads = config["num_attention_heads"]
        attended = fused("MultiHeadAttention", *parts, num_heads=heads)
        attended = dense(attended, f"{name}.attention.output.dense")
        x = norm(node("Add", x, attended), f"{name}.attention.output.LayerNorm")
        hidden = fused("Gelu", dense(x, f"{name}.intermediate.dense"))
        hidden = dense(hidden, f"{name}.output.dense")
        x = norm(node("Add", x, hidden), f"{name}.output.LayerNorm")
    nodes.append(helper.make_node("ReduceMean", [x, one], ["vectors"], keepdims=0))
    integer, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("ids", integer, ["texts", "length"])],
        [helper.make_tensor_value_info("vectors", real, ["texts", words.shape[1]])],
        constants,
    )
    operators = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=operators, ir_version=9)
    return model.SerializeToString()
