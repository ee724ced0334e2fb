"""Settings of language models that the in-process decoder computes, or refuses."""

import pytest

from gecko_jax.llm import decoder_settings

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 4,
    "sliding_window": 8,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def test_rotary_bases_per_kind_of_layer():
    ropes = {
        "full_attention": LINEAR | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = decoder_settings.build("f", GEMMA | {"rope_parameters": ropes})
    assert (config.rope_base, config.local_rope_base) == (1e6, 2e4)
    assert config.rope_factors == (8.0, 8.0)
    for settings in ({"rope_scaling": LINEAR}, {"partial_rotary_factor": 1.0}):
        config = decoder_settings.build("f", GEMMA | settings)
        assert (config.rope_base, config.local_rope_base) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be one"),
        (
            LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters: partial_rotary_factor must be one of 1.0",
        ),
        (
            GEMMA | {"rope_parameters": {"sliding_attention": LINEAR}},
            "sliding_attention: rope_type must be one of default",
        ),
        (GEMMA | {"rope_parameters": LINEAR}, "rope_parameters has no full_attention"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "scaled by 'yarn'"),
        (LLAMA | {"attention_bias": True}, "attention_bias=True"),
        (LLAMA | {"num_key_value_heads": 3}, "4 query heads, 3 key heads"),
        (GEMMA | {"layer_types": ["full_attention"] * 2}, "layer_types do not repeat"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        decoder_settings.build("f", settings)
