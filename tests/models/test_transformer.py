"""The decoder: causality, prefixes, caches, local layers and log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.llm import decoding
from gecko_jax.models import transformer
from tests import tiny_decoder

CONFIGS = {
    "llama": tiny_decoder.LLAMA,
    "qwen": dataclasses.replace(tiny_decoder.QWEN2, head_norms=True),
    "gemma": tiny_decoder.GEMMA,
}
TOKENS = np.random.default_rng(1).integers(0, 300, (3, 24)).astype(np.int32)

extend = jax.jit(transformer.extend, static_argnums=1)


@pytest.fixture(params=CONFIGS, name="config")
def _config(request):
    return CONFIGS[request.param]


def _positions(lengths, width, start=0):
    places = np.arange(width)[None] + np.full((len(lengths), 1), start)
    is_text = np.arange(width)[None] < np.array(lengths)[:, None]
    return jnp.asarray(
        np.where(is_text, places, transformer.PAD_POSITION).astype(np.int32)
    )


def _whole(config, tokens):
    positions = _positions([tokens.shape[1]] * len(tokens), tokens.shape[1])
    return extend(tiny_decoder.params(config), config, tokens, positions)


def test_a_token_does_not_attend_to_later_tokens(config):
    hidden, _ = _whole(config, TOKENS)
    changed = TOKENS.copy()
    changed[:, 10] = (changed[:, 10] + 1) % 300
    other, _ = _whole(config, changed)
    np.testing.assert_allclose(hidden[:, :10], other[:, :10], atol=1e-5)
    assert np.all(np.abs(hidden[:, 10:] - other[:, 10:]).max(axis=2) > 1e-4)


def test_a_shared_prefix_equals_the_same_tokens_in_every_row(config):
    tokens = TOKENS.copy()
    tokens[:, :15] = TOKENS[:1, :15]
    params = tiny_decoder.params(config)
    padded = jnp.pad(jnp.asarray(tokens[0, :15]), (0, 3))
    prefix = decoding.compute_prefix(params, config, padded, _positions([15], 18)[0])
    hidden, own = extend(
        params, config, tokens[:, 15:], _positions([9] * 3, 9, 15), prefix
    )
    expected, whole = _whole(config, tokens)
    np.testing.assert_allclose(hidden, expected[:, 15:], atol=2e-5)
    np.testing.assert_allclose(own.keys, whole.keys[:, :, 15:], atol=2e-5)


def test_a_cache_equals_one_call_with_all_tokens(config):
    params = tiny_decoder.params(config)
    _, cache = extend(params, config, TOKENS[:, :20], _positions([20] * 3, 20))
    hidden, _ = extend(
        params, config, TOKENS[:, 20:], _positions([4] * 3, 4, 20), None, cache
    )
    expected, _ = _whole(config, TOKENS)
    np.testing.assert_allclose(hidden, expected[:, 20:], atol=2e-5)


def test_padding_and_other_rows_do_not_change_hidden_states(config):
    params = tiny_decoder.params(config)
    lengths = [5, 24, 11]
    hidden, _ = extend(params, config, TOKENS, _positions(lengths, 24))
    for row, length in ((0, 5), (2, 11)):
        alone, _ = _whole(config, TOKENS[row : row + 1, :length])
        np.testing.assert_allclose(hidden[row, :length], alone[0], atol=2e-5)


def test_a_local_layer_attends_to_its_window_only():
    config = dataclasses.replace(tiny_decoder.GEMMA, num_layers=1)
    assert config.is_local == (True,)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 300
    params = tiny_decoder.params(config)
    before, after = (
        extend(params, config, tokens, _positions([24] * 3, 24))[0]
        for tokens in (TOKENS, changed)
    )
    changes = np.abs(before - after).max(axis=(0, 2)) > 1e-5
    assert np.flatnonzero(changes).tolist() == list(range(3, 3 + 7))


def test_log_probs_equal_the_softmax_for_any_block_size(config, monkeypatch):
    hidden, _ = _whole(config, TOKENS)
    hidden = hidden.reshape(-1, config.model_dim)
    targets = np.random.default_rng(2).integers(0, 300, (len(hidden), 3))
    params = tiny_decoder.params(config)
    logits = np.asarray(hidden, np.float64) @ params["embedding"].T.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = np.take_along_axis(log_probs, targets, axis=1)
    for logits_at_once in (1 << 25, 300 * 7):
        monkeypatch.setattr(transformer, "_HEAD_LOGITS", logits_at_once)
        actual = transformer.token_log_probs(
            params, config, hidden, jnp.asarray(targets)
        )
        np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p):
    logits = np.random.default_rng(3).standard_normal((5, 200)).astype(np.float32) * 3
    actual = decoding.is_in_nucleus(jnp.asarray(logits), jnp.float32(top_p))
    for row, kept in zip(logits.astype(np.float64), np.asarray(actual), strict=True):
        probs = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-probs)
        count = int(np.argmax(np.cumsum(probs[order]) >= top_p)) + 1
        assert sorted(np.flatnonzero(kept)) == sorted(order[:count])
