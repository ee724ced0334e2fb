"""A decoder of a few thousand random parameters, and a file that holds it."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from gecko_jax.models import transformer
from gecko_jax.parallel import sharding

LLAMA = transformer.DecoderConfig(
    vocab_size=300,
    model_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    context_length=256,
    norm_epsilon=1e-5,
    rope_base=10_000.0,
)
QWEN2 = dataclasses.replace(LLAMA, head_dim=4, qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, head_norms=True)
_FAMILIES = {"llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}
# All that Gemma 3 adds, with windows shorter than the texts of the tests.
GEMMA = transformer.DecoderConfig(
    vocab_size=300,
    model_dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    context_length=256,
    norm_epsilon=1e-6,
    rope_base=1e6,
    rope_factors=(8.0,) * 4,
    activation="gelu",
    embedding_scale=4.0,
    query_scale=0.3,
    sandwich_norms=True,
    head_norms=True,
    local_window=7,
    global_every=3,
)


@functools.cache
def params(config: transformer.DecoderConfig, seed: int = 0) -> dict:
    """Random parameters; norms are near one, logits some units apart."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.standard_normal(shape, np.float32)
        return 1 + 0.2 * noise if "norm" in path[-1].key else 0.4 * noise

    shapes = transformer.param_shapes(config)
    return jax.tree.map_with_path(
        draw, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def mesh(num_devices: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
    """A mesh over some of the devices of the tests."""
    devices = np.array(jax.devices()[:num_devices]).reshape(-1, 1, tensor)
    return jax.sharding.Mesh(devices, sharding.MESH_AXES)


def pieces() -> tuple[list[str], list[str]]:
    """Pieces and merges of a byte-level BPE: two control tokens, bytes, four words."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "c a", "ca t"]
    merged = [merge.replace(" ", "") for merge in merges]
    return ["<|endoftext|>", "<|im_end|>", *alphabet, *merged], merges


def write_gguf(
    path: pathlib.Path,
    kinds: dict[str, str] | None = None,
    config: transformer.DecoderConfig | None = None,
    family: str = "llama",
) -> pathlib.Path:
    """Writes a model of this file as llama.cpp's converter would.

    Args:
        path: The file.
        kinds: Quantization of tensors whose name holds the key; others are F32.
        config: What the header says, if not the truth.
        family: "llama", "qwen2" or "qwen3".
    """
    import gguf

    config = config or _FAMILIES[family]
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_base)
    tokens, merges = pieces()
    tokens += [f"<unused{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if family == "llama" else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    for name, values in _tensors(family).items():
        values = np.ascontiguousarray(values)
        wanted = [kind for key, kind in (kinds or {}).items() if key in name]
        if wanted:
            kind = gguf.GGMLQuantizationType[wanted[0]]
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(family: str) -> dict[str, np.ndarray]:
    """Tensors by llama.cpp's names, in its layout."""
    tree = params(_FAMILIES[family])
    found = {
        "token_embd.weight": tree["embedding"],
        "output_norm.weight": tree["final_norm"],
    }
    names = {
        "attention_norm": "attn_norm",
        "mlp_norm": "ffn_norm",
        "query": "attn_q",
        "key": "attn_k",
        "value": "attn_v",
        "out": "attn_output",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "query_norm": "attn_q_norm",
        "key_norm": "attn_k_norm",
    }
    for ours, layers in tree["layers"].items():
        theirs = names[ours.removesuffix("_bias")]
        for layer, values in enumerate(layers):
            if ours.endswith("_bias"):
                found[f"blk.{layer}.{theirs}.bias"] = values.ravel()
                continue
            if ours in ("query", "key") and family == "llama":
                # [in, head, pair half, pair] -> [head, pair, pair half, in]
                split = values.reshape(values.shape[0], values.shape[1], 2, -1)
                values = split.transpose(1, 3, 2, 0).reshape(-1, values.shape[0])
            elif ours == "out":
                values = values.reshape(-1, values.shape[-1]).T
            elif values.ndim > 1:
                values = values.reshape(values.shape[0], -1).T
            found[f"blk.{layer}.{theirs}.weight"] = values
    return found
