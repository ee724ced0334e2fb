"""Parity of the encoder families with Hugging Face transformers, gradients included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.formats import names, parameters
from gecko_jax.models import dual_encoder
from tests import tiny_encoders

pytestmark = pytest.mark.torch

LENGTH = 40  # longer than every local window


def _gemma():
    import transformers

    # EmbeddingGemma halves the window: distances up to 4 (transformers: below 5).
    settings = transformers.Gemma3TextConfig(
        **_sizes(tiny_encoders.GEMMA),
        query_pre_attn_scalar=16,
        sliding_window=8,
        sliding_window_pattern=3,
        use_bidirectional_attention=True,
    )
    return tiny_encoders.GEMMA, transformers.Gemma3TextModel(settings)


def _t5gemma2():
    from transformers.models.t5gemma2 import configuration_t5gemma2, modeling_t5gemma2

    config = dataclasses.replace(
        tiny_encoders.GEMMA, local_window=(3, 4), rope_factor=8.0
    )
    settings = configuration_t5gemma2.T5Gemma2TextConfig(
        **_sizes(config),
        query_pre_attn_scalar=16,
        sliding_window=8,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    settings.dropout_rate = 0.0
    return config, modeling_t5gemma2.T5Gemma2TextEncoder(settings, eoi_token_index=63)


def _embeddinggemma2():
    from transformers.models import embedding_gemma2

    config = tiny_encoders.EMBEDDINGGEMMA2
    settings = embedding_gemma2.EmbeddingGemma2TextConfig(
        **_sizes(config),
        sliding_window=5,
        sliding_window_pattern=2,
        global_head_dim=config.global_head_dim,
        num_global_key_value_heads=config.global_num_kv_heads,
        hidden_size_per_layer_input=config.per_layer_dim,
        embedding_dim=config.embedding_dim,
    )
    return config, embedding_gemma2.EmbeddingGemma2TextModel(settings)


def _qwen3():
    import transformers

    settings = transformers.Qwen3Config(
        **_sizes(tiny_encoders.QWEN3),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return tiny_encoders.QWEN3, transformers.Qwen3Model(settings)


MODEL_TYPES = {"t5gemma2": "t5gemma2_text"}
BUILD = {
    "gemma": _gemma,
    "t5gemma2": _t5gemma2,
    "embeddinggemma2": _embeddinggemma2,
    "qwen3": _qwen3,
}


def _sizes(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": 128,
        "rms_norm_eps": config.norm_epsilon,
    }


@functools.cache
def _pair(name):
    """Our config and parameters, and transformers' model with the same weights."""
    import torch

    config, model = BUILD[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in key or "layer_scalar" in key
            if is_norm:
                offset = config.switches.norm_offset
                weight.copy_(1 - offset + 0.2 * noise)
            elif weight.ndim == 2:
                width = 1 if "embed_tokens" in key else weight.shape[1] ** 0.5
                weight.copy_(noise / width)
    table = names.hugging_face_names(config, MODEL_TYPES.get(name, ""))
    state = {key: value.numpy().copy() for key, value in model.state_dict().items()}
    flat = {
        ours: state[theirs].T if transposed else state[theirs]
        for ours, (theirs, transposed) in table.items()
    }
    if "embedding_projection.weight" in state:
        flat[names.PROJECTION] = state["embedding_projection.weight"].T
    elif config.projection:
        rng = np.random.default_rng(0)
        shape = (config.model_dim, config.embedding_dim)
        flat[names.PROJECTION] = rng.standard_normal(shape, np.float32)
    params = parameters.unflatten(flat)
    parameters.check(params, config, source=name)
    return config, params, model.eval()


def _rows():
    rng = np.random.default_rng(1)
    lengths = [LENGTH, 25, 7]
    tokens = np.zeros((3, LENGTH), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(2, 60, length)
    return tokens, (tokens > 0).astype(np.int32)


def _theirs(model, tokens, segments):
    import torch

    return model(
        input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(segments)
    ).last_hidden_state


@pytest.mark.parametrize("name", BUILD)
def test_hidden_states_equal_those_of_transformers(name):
    import torch

    config, params, model = _pair(name)
    tokens, segments = _rows()
    with torch.no_grad():
        expected = _theirs(model, tokens, segments).numpy()
    encoder = dual_encoder.DualEncoder(config)
    hidden = jax.jit(functools.partial(encoder.apply, method="hidden_states"))(
        {"params": params}, tokens, segments
    )
    pooled = jax.jit(encoder.apply)({"params": params}, tokens, segments)[:, 0]
    actual, real = np.asarray(hidden), segments > 0
    # EmbeddingGemma 2 projects each token in the model.
    if name == "embeddinggemma2":
        actual = actual @ params["projection_layer"]["kernel"]
    scale = np.abs(expected[real]).max()
    np.testing.assert_allclose(actual[real], expected[real], atol=2e-5 * scale, rtol=0)
    mask = segments[:, :, None].astype(np.float64)
    mean = (expected * mask).sum(1) / mask.sum(1)
    if config.pooling == "last":
        mean = expected[np.arange(3), segments.sum(1) - 1]
    if name != "embeddinggemma2" and config.projection:
        mean = mean @ params["projection_layer"]["kernel"]
    cosine = (pooled * mean).sum(1) / np.linalg.norm(pooled, axis=1)
    assert (cosine / np.linalg.norm(mean, axis=1)).min() > 0.999999


@pytest.mark.parametrize("name", BUILD)
def test_gradients_equal_those_of_torch(name):
    import torch

    config, params, model = _pair(name)
    tokens, segments = _rows()
    weights = (
        np.random.default_rng(2).standard_normal((3, LENGTH, 1)) * segments[..., None]
    )
    hidden = _theirs(model, tokens, segments)
    model.zero_grad()
    torch.sum(torch.sin(hidden) * torch.tensor(weights, dtype=torch.float32)).backward()
    theirs = dict(model.named_parameters())
    rows = (jnp.asarray(tokens), jnp.asarray(segments))

    @jax.jit
    def gradients(params):
        def total(params):
            states = dual_encoder.DualEncoder(config).apply(
                {"params": params}, *rows, method="hidden_states"
            )
            if name == "embeddinggemma2":
                states = states @ params["projection_layer"]["kernel"]
            return jnp.sum(jnp.sin(states) * weights.astype(np.float32))

        return jax.grad(total)(params)

    flat = parameters.flatten(gradients(params))
    table = names.hugging_face_names(config, MODEL_TYPES.get(name, ""))
    assert len(table) > 10 * config.num_layers
    for ours, (key, transposed) in table.items():
        if key not in theirs:  # the layer scalar is a constant
            assert not np.any(flat[ours])
            continue
        expected = theirs[key].grad.numpy()
        expected = expected.T if transposed else expected
        scale = np.abs(expected).max()
        assert scale > 0, ours
        np.testing.assert_allclose(flat[ours], expected, atol=1e-4 * scale, rtol=0)
