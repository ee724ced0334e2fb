"""Names of parameters and sizes in T5X, which this package uses, and Hugging Face.

    encoder/layers_0/attention/query/kernel  [M, H*K]
    encoder.block.0.layer.0.SelfAttention.q.weight  [H*K, M]

Hugging Face stores kernels and the relative bias transposed.
"""

from typing import NamedTuple

from gecko_jax.models import dual_encoder

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


def hugging_face_names(
    config: dual_encoder.EncoderConfig,
) -> dict[str, HuggingFaceName]:
    """Returns T5X name -> Hugging Face name of every parameter but the projection."""
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
