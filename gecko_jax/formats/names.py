"""Names of parameters and sizes in T5X, which this package uses, and Hugging Face.

    encoder/layers_0/attention/query/kernel  [M, H*K]
    encoder.block.0.layer.0.SelfAttention.q.weight  [H*K, M]

Hugging Face stores kernels and the relative bias transposed. The names of families
other than T5 are those of the text model alone: a prefix, such as `model.`, is removed
by the reader and added by the writer.
"""

from typing import NamedTuple

from gecko_jax.models import dual_encoder, rotary_encoder

PROJECTION = "projection_layer/kernel"

# sentence-transformers stores the projection in a module of its own, `2_Dense`.
DENSE_WEIGHT = "linear.weight"

# Sizes in Hugging Face's `config.json` -> fields of `EncoderConfig`.
HUGGING_FACE_SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "model_dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "mlp_dim",
    "relative_attention_num_buckets": "relpos_num_buckets",
    "relative_attention_max_distance": "relpos_max_distance",
}


class HuggingFaceName(NamedTuple):
    """Name of a parameter in a Hugging Face encoder, and whether it is transposed."""

    name: str
    transposed: bool


# Parameters of a layer of a family other than T5.
_LAYER_STEMS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp/wi_0": "mlp.gate_proj",
    "mlp/wi_1": "mlp.up_proj",
    "mlp/wo": "mlp.down_proj",
    "pre_attention_layer_norm": "input_layernorm",
    "post_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
    "per_layer/gate": "ple_block.per_layer_input_gate",
    "per_layer/out": "ple_block.per_layer_projection",
    "post_per_layer_layer_norm": "ple_block.post_per_layer_input_norm",
    "layer_scalar": "layer_scalar",
}
# What differs, by family; T5Gemma 2 has a form of its own of the family Gemma.
_OTHER_STEMS = {
    "qwen3": {"pre_mlp_layer_norm": "post_attention_layernorm"},
    "t5gemma2": {
        "pre_attention_layer_norm": "pre_self_attn_layernorm",
        "post_attention_layer_norm": "post_self_attn_layernorm",
    },
}


def hugging_face_names(
    config: dual_encoder.EncoderConfig, model_type: str = ""
) -> dict[str, HuggingFaceName]:
    """Returns T5X name -> Hugging Face name of all that the encoder itself holds.

    Only EmbeddingGemma 2 holds its projection. `model_type` is that of the folder's
    `config.json`; "" is that of an export.
    """
    if config.family != "t5":
        return _rotary_names(config, model_type)
    stems = {
        "token_embedder/embedding": "shared",
        "encoder/encoder_norm/scale": "encoder.final_layer_norm",
    }
    is_gated = len(config.mlp_activations) > 1
    is_shared = config.shared_relative_bias
    for layer in range(config.num_layers):
        ours, block = f"encoder/layers_{layer}", f"encoder.block.{layer}"
        attention, mlp = f"{block}.layer.0", f"{block}.layer.1"
        for name in ("query", "key", "value", "out"):
            stem = f"{attention}.SelfAttention.{name[0]}"
            stems[f"{ours}/attention/{name}/kernel"] = stem
        for name in ("wi_0", "wi_1", "wo") if is_gated else ("wi", "wo"):
            stems[f"{ours}/mlp/{name}/kernel"] = f"{mlp}.DenseReluDense.{name}"
        stems[f"{ours}/pre_attention_layer_norm/scale"] = f"{attention}.layer_norm"
        stems[f"{ours}/pre_mlp_layer_norm/scale"] = f"{mlp}.layer_norm"
        # T5 and mT5 have one relative bias, in the first block; umT5 has one in each.
        if layer == 0 or not is_shared:
            owner = "encoder" if is_shared else ours
            stem = f"{attention}.SelfAttention.relative_attention_bias"
            stems[f"{owner}/relpos_bias/rel_embedding"] = stem
    transposed = ("/kernel", "/rel_embedding")
    return {
        name: HuggingFaceName(f"{stem}.weight", name.endswith(transposed))
        for name, stem in stems.items()
    }


def _rotary_names(
    config: dual_encoder.EncoderConfig, model_type: str
) -> dict[str, HuggingFaceName]:
    is_t5gemma2 = model_type.startswith("t5gemma2") or not config.is_symmetric
    form = "t5gemma2" if is_t5gemma2 else config.family
    stems = _LAYER_STEMS | _OTHER_STEMS.get(form, {})
    names = {
        "token_embedder/embedding": HuggingFaceName("embed_tokens.weight", False),
        "encoder/encoder_norm/scale": HuggingFaceName("norm.weight", False),
    }
    if config.switches.per_layer:
        stem = "ple.per_layer_model_projection.weight"
        names["encoder/per_layer_projection/kernel"] = HuggingFaceName(stem, True)
        stem = "ple.per_layer_projection_norm.weight"
        names["encoder/per_layer_norm/scale"] = HuggingFaceName(stem, False)
        names[PROJECTION] = HuggingFaceName("embedding_projection.weight", True)
    for layer, is_local in enumerate(config.is_local):
        for spec in rotary_encoder.layer_specs(config, is_local).values():
            part, _, leaf = spec.path.rpartition("/")
            ending = "" if part == "layer_scalar" else ".weight"
            names[f"encoder/layers_{layer}/{spec.path}"] = HuggingFaceName(
                f"layers.{layer}.{stems[part]}{ending}", leaf == "kernel"
            )
    return names
