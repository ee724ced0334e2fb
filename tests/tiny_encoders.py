"""Small encoders of each family, with all switches and windows shorter than texts."""

from gecko_jax.models import dual_encoder

_SIZES = {
    "vocab_size": 64,
    "model_dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 48,
    "embedding_dim": 8,
}
_LOCAL = {"local_window": (4, 4), "global_every": 3}
T5 = dual_encoder.EncoderConfig(
    **_SIZES | {"num_kv_heads": 0, "num_layers": 2, "num_heads": 2}
)
GEMMA = dual_encoder.EncoderConfig(**_SIZES, **_LOCAL, family="gemma")
EMBEDDINGGEMMA2 = dual_encoder.EncoderConfig(
    **_SIZES | {"num_layers": 4},
    family="embeddinggemma2",
    local_window=(5, 5),
    global_every=2,
    global_num_kv_heads=1,
    global_head_dim=24,
    query_scale=1.0,
    per_layer_dim=12,
)
QWEN3 = dual_encoder.EncoderConfig(
    **_SIZES | {"num_layers": 2, "embedding_dim": 32},
    family="qwen3",
    mlp_activations=("silu", "linear"),
    projection=False,
    pooling="last",
)
FAMILIES = {config.family: config for config in (T5, GEMMA, EMBEDDINGGEMMA2, QWEN3)}
