"""One table of parameter names: T5X's, which are ours, and Hugging Face's.

    encoder/layers_0/attention/query/kernel  [M, H*K]
    encoder.block.0.layer.0.SelfAttention.q.weight  [H*K, M]

Kernels and the relative bias lie transposed there; nothing else differs.
"""

from typing import NamedTuple

from gecko_jax.models import dual_encoder

PROJECTION = "projection_layer/kernel"

# In the folder of sentence-transformers the projection is a module of its own
# (`2_Dense`), with this one parameter.
DENSE_WEIGHT = "linear.weight"


class HuggingFaceName(NamedTuple):
    """Where a parameter lies in a Hugging Face encoder, and whether transposed."""

    name: str
    transposed: bool


def hugging_face_names(
    config: dual_encoder.EncoderConfig,
) -> dict[str, HuggingFaceName]:
    """Returns T5X name -> Hugging Face name of every parameter but the projection."""
    table = {
        "token_embedder/embedding": HuggingFaceName("shared.weight", False),
        "encoder/encoder_norm/scale": HuggingFaceName(
            "encoder.final_layer_norm.weight", False
        ),
    }
    for layer in range(config.num_layers):
        ours, block = f"encoder/layers_{layer}", f"encoder.block.{layer}"
        attention, mlp = f"{block}.layer.0", f"{block}.layer.1"
        for name, letter in (
            ("query", "q"),
            ("key", "k"),
            ("value", "v"),
            ("out", "o"),
        ):
            table[f"{ours}/attention/{name}/kernel"] = HuggingFaceName(
                f"{attention}.SelfAttention.{letter}.weight", True
            )
        gated = len(config.mlp_activations) > 1
        for name in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
            table[f"{ours}/mlp/{name}/kernel"] = HuggingFaceName(
                f"{mlp}.DenseReluDense.{name}.weight", True
            )
        for name, place in (
            ("pre_attention_layer_norm", attention),
            ("pre_mlp_layer_norm", mlp),
        ):
            table[f"{ours}/{name}/scale"] = HuggingFaceName(
                f"{place}.layer_norm.weight", False
            )
        # T5 and mT5 have one relative bias, in the first block; umT5 one in each.
        shared = config.shared_relative_bias
        if layer == 0 or not shared:
            owner = "encoder" if shared else ours
            table[f"{owner}/relpos_bias/rel_embedding"] = HuggingFaceName(
                f"{attention}.SelfAttention.relative_attention_bias.weight", True
            )
    return table
