"""Parity with Hugging Face transformers, from the folders that it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.llm import decoder_weights, safetensors_folder
from gecko_jax.models import transformer
from tests import tiny_decoder

pytestmark = pytest.mark.torch

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _llama(**settings):
    import transformers

    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=3, **settings)
    return transformers.LlamaForCausalLM(config)


def _gemma(**settings):
    import transformers

    config = transformers.Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=7,
        sliding_window=9,
        query_pre_attn_scalar=20,
        **settings,
    )
    return transformers.Gemma3ForCausalLM(config)


def _qwen(name, **settings):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **SIZES, num_hidden_layers=3, **settings
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _save(model, folder):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if "norm" in name else 0.2
            noise = torch.randn(weight.shape, generator=generator) * scale
            # Norm weights are close to 1, but Gemma stores them minus 1.
            is_plain_norm = "norm" in name and "gemma" not in model.config.model_type
            weight.copy_(noise + (1 if is_plain_norm else 0))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: _llama(tie_word_embeddings=True),
        lambda: _llama(tie_word_embeddings=False, rope_parameters=LLAMA_3_ROPE),
        lambda: _qwen("Qwen2", tie_word_embeddings=True),
        lambda: _qwen("Qwen3", tie_word_embeddings=False),
        lambda: _gemma(),
        lambda: _gemma(
            rope_parameters={
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        ),
    ],
    ids=["llama", "llama3", "qwen2", "qwen3", "gemma3", "gemma3-scaled"],
)
def test_log_probs_equal_those_of_transformers(build, tmp_path):
    import torch

    hf_model = _save(build(), tmp_path)
    folder = safetensors_folder.SafetensorsFolder(tmp_path)
    mesh = tiny_decoder.mesh()
    params = decoder_weights.load(folder, dtype=np.float32, mesh=mesh)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 60))
    with torch.no_grad():
        logits = hf_model(torch.from_numpy(tokens)).logits
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    positions = jnp.broadcast_to(jnp.arange(60, dtype=jnp.int32), (2, 60))

    @jax.jit
    def log_probs(params, tokens):
        hidden, _ = transformer.extend(params, folder.config, tokens, positions)
        logits = transformer.next_logits(params, folder.config, hidden.reshape(120, 32))
        return jax.nn.log_softmax(logits)

    actual = log_probs(params, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(actual, expected.reshape(120, 300), atol=1e-4, rtol=0)
