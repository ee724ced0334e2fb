"""The layers of the encoder; `test_dual_encoder.py` tests the whole encoder."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.models import encoder, families, layers, t5

T5X = pathlib.Path(__file__).parents[1] / "testdata" / "t5x_tiny"


def test_relative_position_buckets_equal_those_of_t5():
    reference = np.load(T5X / "reference.npz")
    distances, buckets = reference["rel_distance"], reference["rel_bucket"]
    assert distances.min() == -200
    assert distances.max() == 200
    actual = t5.relative_position_buckets(201, 32, 128)
    # Row 200 has the distances -200 to 0, row 0 has 0 to 200.
    np.testing.assert_array_equal(actual[200], buckets[:201])
    np.testing.assert_array_equal(actual[0], buckets[200:])


def test_relative_position_buckets_depend_only_on_the_distance():
    buckets = t5.relative_position_buckets(50, 32, 128)
    for offset in (-49, -7, 0, 1, 20):
        assert len(set(np.diagonal(buckets, offset))) == 1
    assert buckets.min() == 0
    assert buckets.max() < 32
    np.testing.assert_array_equal(
        buckets[:20, :20], t5.relative_position_buckets(20, 32, 128)
    )


def test_the_norm_does_not_center_and_computes_in_float32():
    norm = layers.LayerNorm(jnp.dtype(jnp.bfloat16))
    x = 100 + jax.random.normal(jax.random.key(0), (2, 3, 8))
    scale = jnp.linspace(0.5, 2.0, 8)
    actual = norm.apply({"params": {"scale": scale}}, x)
    assert actual.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-6)
    exact = exact * np.asarray(scale)
    # Rounded once, at the end: half a unit in the last place of bfloat16.
    np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=2**-8)


def test_dropout_keeps_the_mean_and_shares_one_mask_per_row():
    x = jnp.ones((64, 7, 128))
    dropped = layers.dropout(x, 0.25, jax.random.split(jax.random.key(0), 64))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1) < 0.02
    assert (dropped == dropped[:, :1]).all()
    assert (dropped[0] != dropped[1]).any()


def test_the_dropout_of_a_row_depends_only_on_its_key():
    keys = jax.random.split(jax.random.key(0), 6)
    x = jnp.ones((6, 3, 2, 16))
    whole = layers.dropout(x, 0.5, keys)
    part = layers.dropout(x[3:5], 0.5, keys[3:5])
    np.testing.assert_array_equal(whole[3:5], part)


def test_dropout_without_a_key_or_a_rate_changes_nothing():
    x = jax.random.normal(jax.random.key(1), (3, 4, 5))
    assert layers.dropout(x, 0.5, None) is x
    assert layers.dropout(x, 0.0, jax.random.split(jax.random.key(0), 3)) is x


def test_the_gelu_is_the_tanh_form():
    x = np.linspace(-4, 4, 101)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    actual = layers.ACTIVATIONS["gelu"](jnp.float32(x))
    np.testing.assert_allclose(actual, tanh, atol=1e-6)


def test_a_config_survives_json():
    config = families.EncoderConfig(
        vocab_size=64,
        model_dim=16,
        num_layers=2,
        num_heads=3,
        head_dim=4,
        mlp_dim=24,
        mlp_activations=("relu",),
    )
    values = json.loads(json.dumps(config.__dict__))
    assert isinstance(values["mlp_activations"], list)
    assert families.EncoderConfig(**values) == config
    assert hash(families.EncoderConfig(**values)) == hash(config)


@pytest.mark.parametrize("length", [1, 5])
def test_attention_masks_other_segments_exactly(length):
    config = families.EncoderConfig(
        vocab_size=8,
        model_dim=8,
        num_layers=1,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
    )
    stack = encoder.Encoder(config)
    x = jax.random.normal(jax.random.key(0), (1, length + 3, 8))
    segments = jnp.array([[1] * length + [2] * 3])
    variables = stack.init(jax.random.key(1), x, segments)
    alone = stack.apply(variables, x, segments)
    changed = stack.apply(variables, x.at[:, length:].set(7.0), segments)
    np.testing.assert_array_equal(alone[:, :length], changed[:, :length])
    assert (alone[:, length:] != changed[:, length:]).all()


def test_cudnn_attention_equals_xla_without_a_gpu():
    settings = {
        "vocab_size": 64,
        "model_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "head_dim": 8,
        "mlp_dim": 24,
        "dtype": "bfloat16",
    }
    x = jax.random.normal(jax.random.key(0), (2, 8, 16))
    segments = jnp.ones((2, 8), jnp.int32)
    plain = encoder.Encoder(families.EncoderConfig(**settings))
    variables = plain.init(jax.random.key(1), x, segments)
    fused = encoder.Encoder(families.EncoderConfig(**settings, attention="cudnn"))
    np.testing.assert_array_equal(
        plain.apply(variables, x, segments), fused.apply(variables, x, segments)
    )


@pytest.mark.gpu
def test_cudnn_attention_equals_xla_to_bfloat16():
    keys = jax.random.split(jax.random.key(0), 4)
    heads = [jax.random.normal(key, (2, 4, 64, 64), jnp.bfloat16) for key in keys[:3]]
    bias = jax.random.normal(keys[3], (2, 4, 64, 64))

    def plain(query, key, value, bias):
        logits = jnp.einsum("bhlk,bhmk->bhlm", query, key) + bias
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        mixed = jnp.einsum("bhlm,bhmk->bhlk", weights, value)
        return mixed.swapaxes(1, 2)

    def squares(attend):
        return lambda *parts: jnp.sum(jnp.square(attend(*parts).astype(jnp.float32)))

    parts = (*(0.1 * heads[0], heads[1], heads[2]), bias)
    arguments = (0, 1, 2, 3)
    fused = jax.grad(squares(t5._fused_attention), arguments)(*parts)
    expected = jax.grad(squares(plain), arguments)(*parts)
    for one, other in zip(fused, expected, strict=True):
        difference = jnp.linalg.norm((one - other).astype(jnp.float32))
        assert difference < 0.03 * jnp.linalg.norm(other.astype(jnp.float32))
