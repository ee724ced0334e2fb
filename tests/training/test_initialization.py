"""The start of a run: a checkpoint of any format, or an error before any work."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples

import gecko_jax.config
from gecko_jax.cli import flags
from gecko_jax.formats import detection, model_folder, names, parameters
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats, vocabularies
from gecko_jax.training import initialization, loop
from tests import tiny_encoders

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests" / "testdata"
T5X = DATA / "t5x_tiny"
VOCABULARY = DATA / "model_v1" / "vocabulary.model"


def build(checkpoint, **overrides):
    values = {
        "init.checkpoint": str(checkpoint),
        "data.vocabulary": str(VOCABULARY),
        "model.vocab_size": 64,
        "model.model_dim": 16,
        "model.num_layers": 2,
        "model.num_heads": 3,
        "model.head_dim": 4,
        "model.mlp_dim": 24,
        "model.embedding_dim": 8,
        "loss.mrl_dims": "(4,8)",
        "loss.mrl_weights": "(1.0,1.0)",
        "optimizer.warmup_steps": 1,
        "train.num_steps": 2,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return flags.load(
        f"{ROOT / 'configs/finetune.py'}:local",
        [f"--config.{key}={value}" for key, value in values.items()],
    )


def load_start(config):
    start = initialization.open_start(config, loop.load_vocabulary(config))
    return start and initialization.read_start(config, start)


@pytest.fixture
def hf(tmp_path):
    copy = shutil.copytree(T5X / "hf", tmp_path / "hf")
    shutil.copy(VOCABULARY, copy / "spiece.model")
    return copy


def test_no_checkpoint_is_no_start():
    assert load_start(build("")) is None
    assert initialization.text_format(None, "gecko") == text_formats.TextFormat()


@pytest.mark.parametrize("form", ["legacy_f32", "orbax_f32"])
def test_a_t5x_checkpoint_is_a_start_with_the_vocabulary_of_the_data(form):
    start = load_start(build(T5X / form, data__extra_ids=3))
    assert start.vocabulary_proto == VOCABULARY.read_bytes()
    assert start.extra_ids == 3
    with np.load(T5X / "params.npz") as stored:
        np.testing.assert_array_equal(
            start.params["projection_layer"]["kernel"], stored[names.PROJECTION]
        )
    # A plain encoder has no text format, so training uses the paper's.
    assert initialization.text_format(start, "gecko") == text_formats.TextFormat()


def test_an_encoder_without_projection_gets_a_fresh_one(hf, caplog):
    caplog.set_level("INFO")
    starts = [load_start(build(hf, seed=seed)) for seed in (1, 1, 2)]
    assert "has no projection; adding a fresh one" in caplog.text
    first, again, other = (
        start.params["projection_layer"]["kernel"] for start in starts
    )
    # Its columns are orthonormal.
    np.testing.assert_allclose(first.T @ first, np.eye(8), atol=1e-5)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    # A config without a projection omits it.
    bare = build(
        hf, model__projection=False, model__embedding_dim=16, loss__mrl_dims="(8,16)"
    )
    assert "projection_layer" not in load_start(bare).params


def test_a_bag_of_tokens_gets_layers_that_add_nothing_yet(tiny_files, tmp_path, caplog):
    caplog.set_level("INFO")
    config = gecko_jax.config.encoder_config(build(""))
    bag_config = dataclasses.replace(config, num_layers=0)
    bag = dual_encoder.init_params(bag_config, jax.random.key(0))
    files = dataclasses.replace(
        tiny_files,
        params=bag,
        encoder_config=bag_config,
        mrl_dims=(4, 8),
        vocabulary_proto=VOCABULARY.read_bytes(),
    )
    model_folder.save_model(tmp_path / "bag", files)
    start = load_start(build(tmp_path / "bag"))
    assert start is not None
    assert "is a bag of tokens; adding 2 layers" in caplog.text
    tokens, segments = jnp.arange(1, 9)[None], jnp.ones((1, 8), jnp.int32)
    np.testing.assert_array_equal(
        dual_encoder.DualEncoder(config).apply(
            {"params": start.params}, tokens, segments
        ),
        dual_encoder.DualEncoder(bag_config).apply({"params": bag}, tokens, segments),
    )
    # All parameters can learn, because only the last matrix of a block is 0.
    for name, leaf in parameters.flatten(start.params).items():
        assert np.any(leaf) != name.endswith(("/out/kernel", "/wo/kernel"))


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_new_layers_of_every_family_add_nothing_yet(family):
    config = tiny_encoders.FAMILIES[family]
    init = jax.jit(dual_encoder.init_params, static_argnums=0)
    bag = init(dataclasses.replace(config, num_layers=0), jax.random.key(0))
    params = initialization._add_layers(bag, config, jax.random.key(1))
    parameters.check(params, config, source=family)
    tokens = jnp.arange(2, 22).reshape(2, 10)
    embed = jax.jit(dual_encoder.DualEncoder(config).apply)
    actual = embed({"params": params}, tokens, jnp.ones_like(tokens))
    rest = params["encoder"]["encoder_norm"]["scale"] + config.switches.norm_offset
    hidden = params["token_embedder"]["embedding"][tokens] * config.embedding_scale
    mean_square = jnp.mean(jnp.square(hidden), axis=-1, keepdims=True)
    states = (
        hidden * jax.lax.rsqrt(mean_square + config.norm_epsilon) * rest[None, None]
    )
    expected = states[:, -1] if config.pooling == "last" else states.mean(axis=1)
    if config.projection:
        expected = expected @ params["projection_layer"]["kernel"]
    np.testing.assert_allclose(actual[:, 0], expected, atol=1e-5)


def test_the_format_of_a_trained_start_stays(tiny_files):
    assert initialization.text_format(tiny_files, "gecko") == tiny_files.text_format
    prompted = dataclasses.replace(
        tiny_files,
        text_format=text_formats.TextFormat(query="query: {text}", passage="{text}"),
    )
    assert initialization.text_format(prompted, "gecko").query == "query: {text}"


def test_a_plain_run_writes_texts_as_they_are(tiny_files):
    for start in (None, tiny_files):
        plain = initialization.text_format(start, "plain")
        assert plain.format_query("a list", "docs") == "a list"
        assert plain.format_passage("sorted()") == "sorted()"
        assert plain.format_passage("sorted()", "Lists") == "Lists sorted()"


def test_another_vocabulary_is_refused_with_the_way_to_get_it(hf):
    config = build(hf)
    other = vocabularies.Vocabulary(VOCABULARY.read_bytes(), 1)
    with pytest.raises(ValueError, match=r"gecko import .*hf --output DIR.*DIR/voc"):
        initialization.open_start(config, other)
    vocab = vocabularies.Vocabulary(VOCABULARY.read_bytes())
    assert initialization.open_start(config, vocab) is not None


def test_the_format_of_a_start_is_known_before_its_parameters_are_read(hf, tmp_path):
    (hf / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "ask: ", "document": ""}})
    )
    modules = [("0", "Transformer", ""), ("1", "Pooling", "1_Pooling")]
    (hf / "modules.json").write_text(
        json.dumps(
            [
                {"idx": n, "path": path, "type": f"sentence_transformers.models.{kind}"}
                for n, (_, kind, path) in enumerate(modules)
            ]
        )
    )
    (hf / "1_Pooling").mkdir()
    (hf / "1_Pooling" / "config.json").write_text("{}")
    vocab = vocabularies.Vocabulary(VOCABULARY.read_bytes())
    found = initialization.expected_format(build(hf), vocab)
    assert found.format_query("a list", "docs") == "ask: a list"
    missing = build(tmp_path / "later")
    assert initialization.expected_format(missing, vocab) == text_formats.TextFormat()


def test_a_start_with_added_tokens_is_refused(hf):
    """The training pipeline does not split added tokens off the texts."""
    config = build(hf)
    token = vocabularies.AddedToken("[QRY]", 40)
    start = dataclasses.replace(load_start(config), added_tokens=(token,))
    vocab = vocabularies.Vocabulary(VOCABULARY.read_bytes())
    with pytest.raises(ValueError, match=r"added tokens \('\[QRY\]'\), which training"):
        initialization.check_vocabulary(vocab, config, start)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__mlp_dim": 48}, r"set model.mlp_dim=24 \(now 48\)$"),
        ({"model__num_layers": 3}, r"set model.num_layers=2 \(now 3\)$"),
        (
            {"model__num_heads": 6, "model__head_dim": 2},
            r"head_dim=4 \(now 2\), model.num_heads=3 \(now 6\)$",
        ),
        ({"model__relpos_num_buckets": 16}, r"wrong shape encoder/relpos_bias"),
        (
            {"model__mlp_activations": "('silu','linear')"},
            r"mlp_activations=\('gelu', 'linear'\) \(now \('silu'",
        ),
        ({"model__relpos_max_distance": 99}, r"relpos_max_distance=128 \(now 99"),
    ],
)
def test_a_start_of_other_sizes_or_settings_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_start(build(T5X / "legacy_f32", **overrides))


@pytest.mark.slow
def test_a_run_starts_from_an_encoder_of_hugging_face(hf, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    line = '{"task": "docs", "query": "list %d", "positive": "the values of %d"}\n'
    pairs.write_text("".join(line % (n, n) for n in range(32)))
    config = build(
        hf,
        data__files=f"('{pairs}',)",
        data__cache_dir=str(tmp_path / "cache"),
        data__batch_size=8,
        data__num_negatives=0,
        loss__all_hard_negatives=False,
        evaluation__folder="",
        checkpoint__every_steps=2,
    )
    loop.train(config, tmp_path / "run")
    trained = samples.load_model(tmp_path / "run")
    assert trained.text_format.query.startswith("task: ")
    opened = model_folder.read_params(detection.open_model(hf))
    assert trained.provenance["started_from"] == opened.revision
    before = opened.params["encoder"]["encoder_norm"]["scale"]
    after = trained.params["encoder"]["encoder_norm"]["scale"]
    assert 0 < np.abs(before - after).max() < 0.1
