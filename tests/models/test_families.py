"""The encoder families without T5: masks, packing, scan and initial parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gecko_jax.formats import parameters
from gecko_jax.models import dual_encoder, families, from_scratch, rotary_encoder
from tests import tiny_encoders

FAMILIES = {
    "gemma": tiny_encoders.GEMMA,
    # Logits of a few units: large ones would amplify rounding.
    "embeddinggemma2": dataclasses.replace(
        tiny_encoders.EMBEDDINGGEMMA2, query_scale=0.25
    ),
    "qwen3": tiny_encoders.QWEN3,
}
# Texts in two packed rows; the first is longer than every local window.
LENGTHS = ([17, 3, 9, 1], [5, 12])
SEGMENTS = np.array(
    [[1] * 17 + [2] * 3 + [3] * 9 + [4] + [0] * 2, [1] * 5 + [2] * 12 + [0] * 15]
)


@pytest.fixture(params=FAMILIES, name="config")
def _config(request):
    return FAMILIES[request.param]


@functools.cache
def _params(config):
    """Random parameters far from the initial ones, whose branches are small."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 - config.switches.norm_offset + 0.2 * noise
        return noise / leaf.shape[0 if path[-1].key == "kernel" else 1] ** 0.5

    return jax.tree.map_with_path(draw, dual_encoder.abstract_params(config)[0])


@functools.partial(jax.jit, static_argnums=(0, 4))
def _embed(config, params, tokens, segment_ids, num_segments=1):
    return dual_encoder.DualEncoder(config).apply(
        {"params": params}, tokens, segment_ids, num_segments=num_segments
    )


def _tokens():
    return np.random.default_rng(1).integers(2, 64, SEGMENTS.shape) * (SEGMENTS > 0)


@functools.cache
def _packed(config):
    return np.asarray(_embed(config, _params(config), _tokens(), SEGMENTS, 4))


def _alone(length):
    """One text per row, each in a row of its own."""
    rows = np.zeros((2, 6, length), np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for text, size in enumerate(lengths):
            rows[row, text, :size] = _tokens()[row, start : start + size]
            start += size
    rows = rows[:, :4].reshape(8, length)
    return rows, (rows > 0).astype(np.int32)


def test_packing_padding_and_the_batch_do_not_change_an_embedding(config):
    packed = _packed(config).reshape(8, -1)
    tokens, segments = _alone(24)
    alone = _embed(config, _params(config), tokens, segments)[:, 0]
    scale = np.abs(packed).max()
    np.testing.assert_allclose(alone, packed, atol=1e-5 * scale, rtol=0)
    assert not packed[6:].any()
    assert np.abs(packed[:6]).max(axis=1).min() > 0.1 * scale
    # Another batch, and tokens under the padding.
    changed = np.where(segments == 0, 9, tokens)[::-1]
    other = _embed(config, _params(config), changed, segments[::-1])[::-1, 0]
    np.testing.assert_allclose(other, alone, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("window", [(2, 5), (4, 4)])
def test_masks_and_positions_equal_a_loop(config, window):
    if config.local_window:
        config = dataclasses.replace(config, local_window=window)
    context = rotary_encoder.build_context(config, jnp.asarray(SEGMENTS))
    reach = config.local_window or (99, 99)
    full, near = np.zeros((2, 2, 32, 32), bool)
    positions = np.zeros((2, 32))
    for row, segments in enumerate(SEGMENTS):
        for query in range(32):
            positions[row, query] = query - list(segments).index(segments[query])
            for key in range(32):
                same = segments[query] == segments[key]
                if config.family == "qwen3":
                    same = same and key <= query
                full[row, query, key] = same
                near[row, query, key] = same and -reach[0] <= key - query <= reach[1]
    np.testing.assert_array_equal(context.masks[0], full)
    np.testing.assert_array_equal(context.masks[1], near)
    bases = (config.rope_base, config.local_rope_base if config.local_window else 1e6)
    for (cosine, sine), base, is_local in zip(
        context.angles, bases, (False, True), strict=True
    ):
        _, _, width = config.heads(is_local and bool(config.local_window))
        angles = positions[:, :, None] * base ** (-np.arange(0, width, 2) / width)
        np.testing.assert_allclose(cosine[:, :, 0], np.cos(angles), atol=2e-6)
        np.testing.assert_allclose(sine[:, :, 0], np.sin(angles), atol=2e-6)


def test_attention_equals_a_loop_in_float64():
    rng = np.random.default_rng(2)
    query = rng.standard_normal((2, 32, 4, 8)).astype(np.float32)
    key, value = rng.standard_normal((2, 2, 32, 2, 8)).astype(np.float32)
    mask = rng.random((2, 32, 32)) < 0.3
    mask |= np.eye(32, dtype=bool)
    actual = rotary_encoder._attend(
        *map(jnp.asarray, (query, key, value, mask)), 0.0, None
    )
    for row, token, head in np.ndindex(2, 32, 4):
        seen = np.flatnonzero(mask[row, token])
        logits = key[row, seen, head // 2].astype(np.float64) @ query[row, token, head]
        weights = np.exp(logits - logits.max())
        expected = weights / weights.sum() @ value[row, seen, head // 2]
        np.testing.assert_allclose(actual[row, token, head], expected, atol=2e-6)


@functools.cache
def _outputs_and_gradients(config):
    """Embeddings without dropout; gradients with it."""
    encoder = dual_encoder.DualEncoder(config)
    rows = (jnp.asarray(_tokens()), jnp.asarray(SEGMENTS))
    keys = jax.random.split(jax.random.key(5), 2)

    def total(params):
        projected = encoder.apply(
            {"params": params}, *rows, num_segments=4, dropout_keys=keys
        )
        return jnp.sum(jnp.square(dual_encoder.normalize(projected) - 0.3)), projected

    @jax.jit
    def compute(params):
        gradients, dropped = jax.grad(total, has_aux=True)(params)
        plain = encoder.apply({"params": params}, *rows, num_segments=4)
        return plain, dropped, gradients

    base = dataclasses.replace(
        config, scan_layers=False, remat="none", dropout_rate=0.0
    )
    return compute(_params(base))


@pytest.mark.parametrize(
    ("family", "remat"),
    # Masks that the scan selects at run time, and a scan over periods.
    [("embeddinggemma2", "dots"), pytest.param("gemma", "dots", marks=pytest.mark.slow)]
    + [pytest.param(name, "full", marks=pytest.mark.slow) for name in FAMILIES],
)
def test_scan_and_remat_change_neither_outputs_nor_gradients(family, remat):
    config = dataclasses.replace(FAMILIES[family], dropout_rate=0.1)
    expected = _outputs_and_gradients(config)
    actual = _outputs_and_gradients(
        dataclasses.replace(config, scan_layers=True, remat=remat)
    )
    assert (abs(expected[0] - expected[1]) > 1e-3).any()  # dropout was on
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()), rtol=1e-4
        ),
        actual,
        expected,
    )


def test_stacked_parameters_and_their_gradients_are_unstacked_again(config):
    config = dataclasses.replace(config, scan_layers=True)
    params = _params(dataclasses.replace(config, scan_layers=False))
    stacked = dual_encoder.compute_params(params, config)
    assert len(stacked["encoder"]["layers"]) == config.scan_period
    back = dual_encoder.unstack_gradients(stacked, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_bfloat16_is_close_to_float32(config):
    low = dataclasses.replace(config, dtype="bfloat16")
    actual = _embed(low, _params(config), _tokens(), SEGMENTS, 4)
    assert actual.dtype == jnp.float32
    one, other = (
        dual_encoder.normalize(x.reshape(8, -1)[:6])
        for x in (actual, jnp.asarray(_packed(config)))
    )
    cosine = jnp.sum(one * other, axis=1)
    assert cosine.min() > 0.99
    assert cosine.max() < 1 - 1e-7


def test_a_fresh_encoder_is_close_to_a_bag_of_tokens(config):
    config = dataclasses.replace(config, residual_init_scale=0.01, pooling="mean")
    init = jax.jit(dual_encoder.init_params, static_argnums=0)
    params = init(config, jax.random.key(0))
    bag = dataclasses.replace(
        config,
        **{"num_layers": 0, "global_head_dim": 0, "global_num_kv_heads": 0},
    )
    tokens, segments = _alone(24)
    # The per-layer embeddings of no layers have no kernel.
    rest = {
        "encoder_norm": params["encoder"]["encoder_norm"],
    }
    if config.switches.per_layer:
        rest["per_layer_norm"] = params["encoder"]["per_layer_norm"]
        rest["per_layer_projection"] = {"kernel": jnp.zeros((config.model_dim, 0))}
    whole, alone = (
        dual_encoder.normalize(_embed(c, p, tokens, segments)[:6, 0])
        for c, p in ((config, params), (bag, params | {"encoder": rest}))
    )
    assert jnp.sum(whole * alone, axis=1).min() > 0.99
    # Token weights keep the length that tokens have in the model.
    if config.projection:
        weights = np.linspace(0, 1, config.vocab_size).astype(np.float32)
        drawn = from_scratch.weight_tokens(
            params, weights, jax.random.key(2), 0.25, config.embedding_scale
        )
        length = jnp.linalg.norm(drawn["token_embedder"]["embedding"], axis=1)
        np.testing.assert_allclose(
            length * config.embedding_scale, config.model_dim**0.5, rtol=1e-5
        )


def test_flops_count_each_weight_of_the_layers(config):
    shapes = parameters.flatten(dual_encoder.abstract_params(config)[0]["encoder"])
    weights = sum(s.size for name, s in shapes.items() if name.endswith("kernel"))
    assert dual_encoder.flops_per_token(config, 0) == 6 * weights
    attention = dual_encoder.flops_per_token(config, 100) / 6 - weights
    expected = 0
    for is_local in config.is_local:
        num_heads, _, head_dim = config.heads(is_local)
        reach = sum(config.local_window) + 1 if is_local else 100
        expected += 2 * num_heads * head_dim * reach
    assert attention == pytest.approx(expected)


@pytest.mark.parametrize(
    ("size", "millions"),
    # transformers' models of these sizes: Gemma3TextModel, EmbeddingGemma2TextModel
    # without its projection, T5Gemma2TextEncoder without `eoi_embedding`, Qwen3Model.
    [
        ("embeddinggemma", 302.863),
        ("embeddinggemma-2", 270.609),
        ("t5gemma2-270m", 268.098),
        ("qwen3-0.6b", 595.777),
    ],
)
def test_presets_have_the_parameter_counts_of_the_models(size, millions):
    shapes, _ = dual_encoder.abstract_params(
        dual_encoder.EncoderConfig(**dual_encoder.PRESETS[size])
    )
    shapes.pop("projection_layer", None)
    actual = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert round(actual, 3) == millions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"family": "t5"}, "num_kv_heads=2: family 't5' does not have this setting"),
        ({"relpos_num_buckets": 16}, "relpos_num_buckets=16: family 'gemma' does not"),
        ({"mlp_activations": ("relu",)}, "mlp_activations=.*gated MLP"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"head_dim": 15}, "head_dim=15: must be even"),
        ({"global_every": 1}, r"local_window=\(4, 4\): needs global_every above 1"),
        (
            {"global_head_dim": 8, "num_layers": 5},
            "num_layers=5: must be a multiple of global_every=3",
        ),
        ({"per_layer_dim": 8}, "per_layer_dim=8: family 'gemma' has none; set it to 0"),
        ({"attention": "cudnn"}, "attention='cudnn': family 'gemma' has no cuDNN"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_encoders.GEMMA, **settings)


def test_a_config_of_every_family_survives_json(config):
    values = dataclasses.asdict(config) | {"local_window": list(config.local_window)}
    assert families.EncoderConfig(**values) == config
