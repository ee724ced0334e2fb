"""`config.json` of EmbeddingGemma, T5Gemma 2, EmbeddingGemma 2 and Qwen3-Embedding."""

import dataclasses
import json

import pytest
import tiny_encoders

from gecko_jax.formats import detection, family_configs
from gecko_jax.models import dual_encoder

LOCAL, GLOBAL = "sliding_attention", "full_attention"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "layer_types": [LOCAL, LOCAL, GLOBAL],
    "attention_bias": False,
    "max_position_embeddings": 128,
}
# As transformers 4 wrote google/embeddinggemma-300m, and 5 the others.
GEMMA = {
    "architectures": ["Gemma3TextModel"],
    "model_type": "gemma3_text",
    **SIZES,
    "_sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 8,
    "use_bidirectional_attention": True,
}
ROPE = {
    GLOBAL: {"rope_type": "default", "rope_theta": 1e6},
    LOCAL: {"rope_type": "default", "rope_theta": 1e4},
}
LINEAR = ROPE | {GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
T5GEMMA2_TEXT = {
    "model_type": "t5gemma2_text",
    **SIZES,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 16,
    "rope_parameters": LINEAR,
    "sliding_window": 8,
    "use_bidirectional_attention": False,
}
T5GEMMA2 = {
    "architectures": ["T5Gemma2ForConditionalGeneration"],
    "model_type": "t5gemma2",
    "is_encoder_decoder": True,
    "encoder": {"model_type": "t5gemma2_encoder", "text_config": T5GEMMA2_TEXT},
    "decoder": {"model_type": "t5gemma2_decoder"},
}
EMBEDDINGGEMMA2_TEXT = {
    "model_type": "embedding_gemma2_text",
    **SIZES,
    "num_hidden_layers": 4,
    "layer_types": [LOCAL, GLOBAL] * 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 12,
    "embedding_dim": 8,
    "per_layer_config": {
        str(n): {"head_dim": 24, "num_key_value_heads": 1} for n in (1, 3)
    },
    "rope_parameters": ROPE,
    "sliding_window": 5,
}
EMBEDDINGGEMMA2 = {
    "model_type": "embedding_gemma2",
    "text_config": EMBEDDINGGEMMA2_TEXT,
    "vision_config": {"model_type": "gemma4_vision"},
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    **SIZES,
    "num_hidden_layers": 2,
    "layer_types": [GLOBAL] * 2,
    "hidden_act": "silu",
    "max_window_layers": 28,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}


def without_projection(config, **changes):
    changes = {"projection": False, "embedding_dim": config.model_dim, **changes}
    return dataclasses.replace(config, **changes)


READ = {
    "gemma": (GEMMA, without_projection(tiny_encoders.GEMMA)),
    "gemma without layer_types": (
        {key: value for key, value in GEMMA.items() if key != "layer_types"}
        | {"_sliding_window_pattern": 3},
        without_projection(tiny_encoders.GEMMA),
    ),
    "t5gemma2": (
        T5GEMMA2,
        without_projection(tiny_encoders.GEMMA, local_window=(3, 4), rope_factor=8.0),
    ),
    # The larger sizes end within a period: 26 and 34 layers, every 6th global.
    "t5gemma2 with half a period": (
        T5GEMMA2
        | {
            "encoder": {
                "text_config": T5GEMMA2_TEXT
                | {"num_hidden_layers": 4, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL]}
            }
        },
        without_projection(
            tiny_encoders.GEMMA, num_layers=4, local_window=(3, 4), rope_factor=8.0
        ),
    ),
    "embeddinggemma2": (EMBEDDINGGEMMA2, tiny_encoders.EMBEDDINGGEMMA2),
    "embeddinggemma2, text": (EMBEDDINGGEMMA2_TEXT, tiny_encoders.EMBEDDINGGEMMA2),
    "qwen3": (QWEN3, dataclasses.replace(tiny_encoders.QWEN3, num_kv_heads=2)),
}


@pytest.mark.parametrize("name", READ)
def test_each_model_type_is_read_as_its_family(name):
    values, expected = READ[name]
    assert family_configs.read(values, "x") == expected


def test_window_of_t5gemma2_reaches_further_right_unless_it_is_odd():
    text = T5GEMMA2_TEXT | {"sliding_window": 9}
    values = T5GEMMA2 | {"encoder": {"text_config": text}}
    assert family_configs.read(values, "x").local_window == (4, 4)


@pytest.mark.parametrize("preset", ["embeddinggemma", "t5gemma2-270m", "qwen3-0.6b"])
def test_published_sizes_are_written_and_read_back(preset):
    config = dual_encoder.EncoderConfig(**dual_encoder.PRESETS[preset])
    values = family_configs.write(config, 2048, {"pad_token_id": 0})
    read_back = family_configs.read(json.loads(json.dumps(values)), "x")
    changes = {
        "projection": config.projection,
        "embedding_dim": config.embedding_dim,
        "pooling": config.pooling,
    }
    assert dataclasses.replace(read_back, **changes) == config
    if preset == "embeddinggemma":
        assert values["sliding_window"] == 512
        assert values["query_pre_attn_scalar"] == 256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dataclasses.replace(tiny_encoders.QWEN3, query_scale=0.5),
            "query_scale='0.5'",
        ),
        (
            dataclasses.replace(tiny_encoders.GEMMA, local_window=(4, 9)),
            r"local_window=\(4, 9\)",
        ),
        (
            dataclasses.replace(
                tiny_encoders.EMBEDDINGGEMMA2, projection=False, embedding_dim=32
            ),
            "projection=False",
        ),
        (
            dataclasses.replace(
                tiny_encoders.GEMMA, mlp_activations=("silu", "linear")
            ),
            "hidden_activation must be one of gelu_pytorch_tanh",
        ),
    ],
)
def test_an_encoder_that_transformers_lacks_is_not_written(config, message):
    with pytest.raises(ValueError, match=message):
        family_configs.write(config, 64, {})


REFUSED = [
    (
        {"model_type": "gemma2"},
        "model_type 'gemma2' has no encoder of Gecko's; take one",
    ),
    ({"model_type": "qwen3_moe"}, "model_type 'qwen3_moe' has no encoder"),
    ({"model_type": "siglip_vision_model"}, "model_type 'siglip_vision_model' has no"),
    (GEMMA | {"use_bidirectional_attention": False}, "a causal language model"),
    (GEMMA | {"use_bidirectional_attention": "vision"}, "a causal language model"),
    (GEMMA | {"num_hidden_layers": 10_000_000}, "num_hidden_layers must be .* 1,000"),
    (GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null"),
    (GEMMA | {"attention_bias": True}, "attention_bias must be one of False"),
    (GEMMA | {"hidden_activation": "gelu"}, "hidden_activation must be one of gelu_p"),
    (GEMMA | {"num_experts": 8}, "num_experts must be one of 0"),
    (GEMMA | {"layer_types": [GLOBAL, LOCAL, LOCAL]}, "layer_types must repeat"),
    (
        GEMMA | {"layer_types": ["chunked_attention"] * 3},
        r"layer_types: \[0\] must be one of sliding_attention",
    ),
    (GEMMA | {"num_key_value_heads": 3}, "num_kv_heads=3: must divide"),
    (GEMMA | {"hidden_size": 0}, "hidden_size must be a whole number from 1"),
    (GEMMA | {"head_dim": "wide"}, 'head_dim must be a whole number.*not "wide"'),
    (GEMMA | {"quantization_config": {"bits": 4}}, "quantization_config is set"),
    (
        GEMMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        'rope_type must be one of default, linear or null, not "yarn"',
    ),
    (GEMMA | {"rope_scaling": {"rope_type": "linear"}}, "linear scaling without a fac"),
    (
        GEMMA | {"rope_parameters": LINEAR | {LOCAL: LINEAR[GLOBAL]}},
        'rope_type must be one of default or null, not "linear"',
    ),
    (
        GEMMA | {"rope_parameters": {GLOBAL: {"partial_rotary_factor": 0.5}}},
        "partial_rotary_factor must be one of 1.0, 1",
    ),
    ({"model_type": "t5gemma2"}, "has no object encoder.text_config; the file is dama"),
    (
        {"model_type": "embedding_gemma2", "text_config": []},
        "has no object text_config",
    ),
    (
        EMBEDDINGGEMMA2_TEXT | {"per_layer_config": {"2": {"head_dim": 24}}},
        r"per_layer_config: \[\"2\"\]: no num_key_value_heads",
    ),
    (
        EMBEDDINGGEMMA2_TEXT
        | {"per_layer_config": {"2": {"head_dim": 24, "num_key_value_heads": 1}}},
        "per_layer_config must give all global layers the same heads",
    ),
    (EMBEDDINGGEMMA2_TEXT | {"attention_k_eq_v": True}, "attention_k_eq_v must be"),
    (QWEN3 | {"use_sliding_window": True}, "use_sliding_window must be one of False"),
    (QWEN3 | {"is_causal": False}, "is_causal must be one of True"),
    (QWEN3 | {"layer_types": [GLOBAL, LOCAL]}, "layer_types has sliding_attention"),
    (GEMMA | {"rope_parameters": ROPE[GLOBAL]}, "has no full_attention and no sliding"),
    (GEMMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be one"),
    (QWEN3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be one"),
    (QWEN3 | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type must be one of"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_gecko_does_not_compute_is_refused_by_name(tmp_path, values, message):
    # There are no weights: nothing but `config.json` is read.
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        detection.open_model(tmp_path)
