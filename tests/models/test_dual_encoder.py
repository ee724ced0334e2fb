"""The dual encoder: parity with T5X and Hugging Face, and invariances."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gecko_jax.formats import parameters
from gecko_jax.losses import contrastive
from gecko_jax.models import dual_encoder, from_scratch

T5X = pathlib.Path(__file__).parents[1] / "testdata" / "t5x_tiny"
ATOL = 2e-5  # T5X parity in float32; an erf GELU is already off by 7e-4

CONFIG = dual_encoder.EncoderConfig(
    vocab_size=64,
    model_dim=16,
    num_layers=3,
    num_heads=3,
    head_dim=4,
    mlp_dim=24,
    embedding_dim=8,
)


@functools.cache
def _params(config):
    init = jax.jit(dual_encoder.init_params, static_argnums=0)
    params = init(config, jax.random.key(0))
    # Small residual branches would hide errors in the layers.
    return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim == 2 else leaf, params)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _embed(config, params, tokens, segment_ids, num_segments=1):
    return dual_encoder.DualEncoder(config).apply(
        {"params": params}, tokens, segment_ids, num_segments=num_segments
    )


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config, params, tokens, segment_ids):
    return dual_encoder.DualEncoder(config).apply(
        {"params": params}, tokens, segment_ids, method="hidden_states"
    )


def _texts(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 64, size=rng.integers(1, longest)) for _ in range(count)]


def _rows(texts, length):
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens, (tokens > 0).astype(np.int32)


class TestT5X:
    """Parity with t5x and t5x_retrieval, given the same parameters."""

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls):
        return np.load(T5X / "reference.npz")

    @pytest.fixture(scope="class")
    @classmethod
    def info(cls):
        return json.loads((T5X / "info.json").read_text())

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, info):
        sizes = info["config"]
        return dual_encoder.EncoderConfig(
            vocab_size=sizes["vocab"],
            model_dim=sizes["emb"],
            num_layers=sizes["layers"],
            num_heads=sizes["heads"],
            head_dim=sizes["head_dim"],
            mlp_dim=sizes["mlp"],
            mlp_activations=sizes["acts"],
            embedding_dim=sizes["proj"],
            relpos_num_buckets=sizes["buckets"],
            relpos_max_distance=sizes["max_distance"],
            l2_epsilon=1e-6,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def params(cls):
        return parameters.unflatten(dict(np.load(T5X / "params.npz")))

    def test_names_shapes_and_logical_axes(self, info, config):
        shapes, axes = (
            parameters.flatten(tree) for tree in dual_encoder.abstract_params(config)
        )
        assert {n: list(s.shape) for n, s in shapes.items()} == info["params"]
        expected = {
            name.removesuffix("_axes"): text
            for name, text in info["params_axes"].items()
        }
        names = {n: f"AxisMetadata(names={tuple(a)})" for n, a in axes.items()}
        assert names == expected

    def test_hidden_states(self, reference, config, params):
        tokens = reference["left_tokens"]
        actual = _hidden(config, params, tokens, (tokens > 0).astype(np.int32))
        real = tokens > 0
        np.testing.assert_allclose(
            actual[real], reference["left_hidden"][real], atol=ATOL
        )

    def test_pooled(self, reference, config, params):
        tokens = reference["left_tokens"]
        segments = (tokens > 0).astype(np.int32)
        hidden = _hidden(config, params, tokens, segments)
        actual = dual_encoder.mean_pool(hidden, jnp.asarray(segments), 1)[:, 0]
        np.testing.assert_allclose(actual, reference["left_pooled"], atol=ATOL)

    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_projected_and_encodings(self, reference, config, params, scan_layers):
        config = dual_encoder.EncoderConfig(
            **config.__dict__ | {"scan_layers": scan_layers}
        )
        for side in ("left", "right"):
            tokens = reference[f"{side}_tokens"]
            segments = (tokens > 0).astype(np.int32)
            projected = _embed(config, params, tokens, segments)[:, 0]
            if side == "left":
                np.testing.assert_allclose(
                    projected, reference["left_projected"], atol=ATOL
                )
            actual = dual_encoder.normalize(projected, config.l2_epsilon)
            np.testing.assert_allclose(
                actual, reference[f"{side}_encodings"], atol=ATOL
            )

    def test_a_row_of_padding_is_zero(self, reference, config, params):
        tokens = np.zeros((1, 10), np.int32)
        actual = dual_encoder.normalize(_embed(config, params, tokens, tokens)[:, 0])
        np.testing.assert_array_equal(actual, reference["pad_row_encoding"])

    @pytest.mark.parametrize(
        ("name", "bidirectional", "hard"),
        [
            ("loss_s100_uni", False, False),
            ("loss_s100_bi", True, False),
            ("loss_s100_neg_bi", True, True),
        ],
    )
    def test_losses_equal_those_of_t5x_retrieval(
        self, reference, config, params, name, bidirectional, hard
    ):
        size, num_negatives, _ = reference["negative_tokens"].shape
        negatives = None
        if hard:
            tokens = reference["negative_tokens"].reshape(size * num_negatives, -1)
            segments = (tokens > 0).astype(np.int32)
            negatives = _embed(config, params, tokens, segments)
            negatives = negatives.reshape(size, num_negatives, -1)
        number = num_negatives if hard else 0
        ids = contrastive.BatchIds(
            query_id=np.zeros((size, 2), np.uint32),
            passage_id=np.zeros((size, 2), np.uint32),
            negative_id=np.zeros((size, number, 2), np.uint32),
            negative_mask=np.ones((size, number), bool),
            example_mask=np.ones(size, bool),
            negative_group=np.zeros(size, np.int32),
        )
        terms = contrastive.contrastive_loss(
            jnp.asarray(reference["left_encodings"]),
            jnp.asarray(reference["right_encodings"]),
            negatives,
            ids,
            temperature=0.01,
            bidirectional=bidirectional,
            all_hard_negatives=hard,
        )
        np.testing.assert_allclose(terms.loss.mean(), reference[name], rtol=1e-4)
        if name == "loss_s100_uni":
            np.testing.assert_allclose(
                terms.loss, reference["row_loss_s100"], rtol=1e-4, atol=1e-4
            )


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["t5_1_0", "t5_1_1", "umt5"])
def test_hidden_states_equal_those_of_hugging_face(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": CONFIG.vocab_size,
        "d_model": CONFIG.model_dim,
        "d_kv": CONFIG.head_dim,
        "d_ff": CONFIG.mlp_dim,
        "num_layers": CONFIG.num_layers,
        "num_heads": CONFIG.num_heads,
        "feed_forward_proj": "relu" if kind == "t5_1_0" else "gated-gelu",
    }
    if kind == "umt5":
        hf_model = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))
    else:
        hf_model = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    with torch.no_grad():
        for weights in hf_model.parameters():
            weights.copy_(0.5 * torch.randn_like(weights))
    config = dual_encoder.EncoderConfig(
        **CONFIG.__dict__
        | {
            "mlp_activations": ("relu",) if kind == "t5_1_0" else ("gelu", "linear"),
            "shared_relative_bias": kind != "umt5",
        }
    )
    flat = {"projection_layer/kernel": np.zeros((16, 8), np.float32)}
    for name, weights in hf_model.named_parameters():
        flat[_t5x_name(name, kind)] = (
            weights.detach().numpy().T.copy()
            if weights.ndim == 2 and "shared" not in name
            else weights.detach().numpy()
        )
    params = parameters.unflatten(flat)
    parameters.check(params, config, source=kind)
    tokens, segments = _rows(_texts(5, 20), 20)
    with torch.no_grad():
        expected = hf_model.eval()(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(segments),
        ).last_hidden_state.numpy()
    actual = _hidden(config, params, tokens, segments)
    real = segments > 0
    np.testing.assert_allclose(actual[real], expected[real], atol=ATOL)


def _t5x_name(name, kind):
    """encoder.block.N.layer.0.SelfAttention.q.weight -> its T5X path."""
    if "shared" in name or "embed_tokens" in name:
        return "token_embedder/embedding"
    if "final_layer_norm" in name:
        return "encoder/encoder_norm/scale"
    _, _, number, _, sublayer, module, *rest = name.split(".")
    layer = f"encoder/layers_{number}"
    if rest[0] == "relative_attention_bias":
        prefix = layer if kind == "umt5" else "encoder"
        return f"{prefix}/relpos_bias/rel_embedding"
    if module == "layer_norm":
        norm = "pre_attention_layer_norm" if sublayer == "0" else "pre_mlp_layer_norm"
        return f"{layer}/{norm}/scale"
    if module == "SelfAttention":
        part = {"q": "query", "k": "key", "v": "value", "o": "out"}[rest[0]]
        return f"{layer}/attention/{part}/kernel"
    return f"{layer}/mlp/{rest[0]}/kernel"


def test_padding_and_bucket_length_do_not_change_an_embedding():
    texts = _texts(6, 20)
    base = _embed(CONFIG, _params(CONFIG), *_rows(texts, 20))
    for length in (32, 64):
        actual = _embed(CONFIG, _params(CONFIG), *_rows(texts, length))
        np.testing.assert_allclose(actual, base, atol=1e-5)


def test_tokens_under_padding_do_not_change_an_embedding():
    tokens, segments = _rows(_texts(6, 20), 32)
    base = _embed(CONFIG, _params(CONFIG), tokens, segments)
    actual = _embed(CONFIG, _params(CONFIG), np.where(segments, tokens, 9), segments)
    np.testing.assert_array_equal(actual, base)


def test_the_other_rows_of_a_batch_do_not_change_an_embedding():
    texts, others = _texts(6, 20), _texts(6, 20, seed=1)
    base = _embed(CONFIG, _params(CONFIG), *_rows(texts, 20))
    reverse = _embed(CONFIG, _params(CONFIG), *_rows(texts[::-1], 20))
    np.testing.assert_allclose(reverse[::-1], base, atol=1e-5)
    mixed = _embed(CONFIG, _params(CONFIG), *_rows(texts[:3] + others[:3], 20))
    np.testing.assert_allclose(mixed[:3], base[:3], atol=1e-5)


@pytest.mark.parametrize("shared_relative_bias", [True, False])
def test_packing_does_not_change_an_embedding(shared_relative_bias):
    config = dual_encoder.EncoderConfig(
        **CONFIG.__dict__ | {"shared_relative_bias": shared_relative_bias}
    )
    texts = [text[:8] for text in _texts(8, 20, seed=2)]
    alone = _embed(config, _params(config), *_rows(texts, 20))[:, 0]
    tokens = np.zeros((2, 40), np.int32)
    segments = np.zeros((2, 40), np.int32)
    index = []
    for row, members in enumerate(([0, 1, 2, 3, 4], [5, 6, 7])):
        at = 0
        for number, text in enumerate(members):
            size = len(texts[text])
            tokens[row, at : at + size] = texts[text]
            segments[row, at : at + size] = number + 1
            index.append((row, number))
            at += size
    packed = _embed(config, _params(config), tokens, segments, 5)
    np.testing.assert_allclose(packed[tuple(np.array(index).T)], alone, atol=1e-5)
    assert (packed[1, 3:] == 0).all()


@functools.cache
def _outputs_and_gradients(config):
    """Embeddings without dropout; gradients with it."""
    tokens, segments = map(jnp.asarray, _rows(_texts(4, 12, seed=3), 12))
    encoder = dual_encoder.DualEncoder(config)
    keys = jax.random.split(jax.random.key(5), 4)

    def total(params):
        projected = encoder.apply(
            {"params": params}, tokens, segments, dropout_keys=keys
        )
        return jnp.sum(jnp.square(dual_encoder.normalize(projected) - 0.3)), projected

    @jax.jit
    def compute(params):
        gradients, dropped = jax.grad(total, has_aux=True)(params)
        return encoder.apply({"params": params}, tokens, segments), dropped, gradients

    return compute(_params(CONFIG))


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(True, "none"), (False, "full"), (True, "dots")]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((False, "none"), (True, "full"), (False, "dots"))
    ],
)
def test_scan_and_remat_change_neither_outputs_nor_gradients(scan_layers, remat):
    base = CONFIG.__dict__ | {"dropout_rate": 0.1}
    config = dual_encoder.EncoderConfig(
        **base | {"scan_layers": scan_layers, "remat": remat, "dropout_rate": 0.1}
    )
    assert jax.tree.structure(
        dual_encoder.abstract_params(config)
    ) == jax.tree.structure(dual_encoder.abstract_params(CONFIG))
    expected = _outputs_and_gradients(dual_encoder.EncoderConfig(**base))
    actual = _outputs_and_gradients(config)
    assert (abs(expected[0] - expected[1]) > 1e-3).any()  # dropout was on
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
        actual,
        expected,
    )


def test_scan_and_remat_do_not_change_fresh_parameters():
    for settings in ({"scan_layers": True}, {"remat": "full"}):
        config = dual_encoder.EncoderConfig(**CONFIG.__dict__ | settings)
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.jit(dual_encoder.init_params, static_argnums=0)(
                config, jax.random.key(0)
            ),
            jax.jit(dual_encoder.init_params, static_argnums=0)(
                CONFIG, jax.random.key(0)
            ),
        )


def test_bfloat16_activations_give_close_float32_embeddings():
    config = dual_encoder.EncoderConfig(**CONFIG.__dict__ | {"dtype": "bfloat16"})
    tokens, segments = _rows(_texts(6, 20), 20)
    params = _params(CONFIG)
    shapes = dual_encoder.abstract_params(config)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    hidden = _hidden(config, params, tokens, segments)
    assert hidden.dtype == jnp.bfloat16
    actual = _embed(config, params, tokens, segments)
    assert actual.dtype == jnp.float32
    # Pooling and projection are in float32: their results are not rounded again.
    pooled = np.asarray(hidden, np.float64) * segments[:, :, None]
    pooled = pooled.sum(1) / segments.sum(1, keepdims=True)
    exact = pooled @ np.asarray(params["projection_layer"]["kernel"], np.float64)
    np.testing.assert_allclose(actual[:, 0], exact, atol=1e-5)
    single = dual_encoder.normalize(_embed(CONFIG, params, tokens, segments))
    cosine = jnp.sum(dual_encoder.normalize(actual) * single, axis=-1)
    assert cosine.min() > 0.999
    assert cosine.max() < 1 - 1e-7  # it did compute in bfloat16


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("small", 35.3),
        ("base", 109.6),
        ("large", 341.2),
        ("xl", 1_223.5),
        ("xxl", 4_762),
    ],
)
def test_presets_have_the_parameter_counts_of_t5(size, millions):
    shapes, _ = dual_encoder.abstract_params(
        dual_encoder.EncoderConfig(**dual_encoder.PRESETS[size])
    )
    shapes.pop("projection_layer")
    actual = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert round(actual, 0 if size == "xxl" else 1) == millions


def test_t5_1_0_has_a_plain_mlp_and_umt5_a_bias_in_each_layer():
    config = dual_encoder.EncoderConfig(
        **CONFIG.__dict__
        | {"mlp_activations": ("relu",), "shared_relative_bias": False}
    )
    flat = parameters.flatten(dual_encoder.abstract_params(config)[0])
    assert flat["encoder/layers_0/mlp/wi/kernel"].shape == (16, 24)
    assert not any("wi_0" in name for name in flat)
    assert flat["encoder/layers_2/relpos_bias/rel_embedding"].shape == (3, 32)
    assert "encoder/relpos_bias/rel_embedding" not in flat


def test_a_cut_embedding_is_normalized_again():
    projected = jax.random.normal(jax.random.key(0), (5, 8))
    for dim in (2, 4, 8):
        cut = dual_encoder.normalize(projected[..., :dim])
        assert cut.shape == (5, dim)
        np.testing.assert_allclose(jnp.linalg.norm(cut, axis=-1), 1, atol=1e-6)
        whole = dual_encoder.normalize(projected)[:, :dim]
        np.testing.assert_allclose(cut, dual_encoder.normalize(whole), atol=1e-6)
    assert (dual_encoder.normalize(jnp.zeros((1, 8))) == 0).all()


def test_a_tokens_weight_is_its_share_in_the_projection():
    weights = np.linspace(0, 1, CONFIG.vocab_size).astype(np.float32)
    params = from_scratch.weight_tokens(
        _params(CONFIG), weights, jax.random.key(2), 0.25
    )
    assert jax.tree.structure(params) == jax.tree.structure(_params(CONFIG))
    table = params["token_embedder"]["embedding"]
    seen = (params["projection_layer"]["kernel"] != 0).any(1)
    np.testing.assert_allclose(jnp.linalg.norm(table, axis=1), 4, rtol=1e-5)
    share = jnp.linalg.norm(table[:, seen], axis=1) / 4
    np.testing.assert_allclose(share, weights, atol=1e-5)


def test_an_aligned_projection_keeps_similarities_and_puts_shared_dims_first():
    params = _params(CONFIG)
    rng = np.random.default_rng(3)
    covariance = rng.normal(size=(8, 8)).astype(np.float32)
    aligned = from_scratch.align_projection(params, jnp.asarray(covariance))
    rows = _rows(_texts(9, 20), 20)
    before, after = (_embed(CONFIG, p, *rows)[:, 0] for p in (params, aligned))
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-4)
    rotation = np.linalg.lstsq(before, after, rcond=None)[0]
    shares = np.diag(rotation.T @ covariance @ rotation)
    values = np.linalg.eigvalsh((covariance + covariance.T) / 2)[::-1]
    np.testing.assert_allclose(shares, values, atol=1e-3)


def test_logical_axes_name_every_dimension():
    shapes, axes = dual_encoder.abstract_params(CONFIG)
    jax.tree.map(
        lambda shape, names: np.testing.assert_equal(len(names), shape.ndim),
        shapes,
        axes,
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec | tuple),
    )
