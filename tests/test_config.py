"""Configs: arguments, the check, and every file with every argument."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from gecko_jax import config as config_lib
from gecko_jax import flags, model, train

ROOT = pathlib.Path(__file__).parents[1]
SIZES = tuple(model.PRESETS)
ARGUMENTS = ("", "local", *SIZES, *(f"{size},local" for size in SIZES))
FINETUNE = ("fret", "fret,local", "xl,fret")


def test_arguments_are_words_and_pairs():
    values = config_lib.parse_arg("xl,local,rate=3", size="mini", local=False, rate=1)
    assert values.to_dict() == {"size": "xl", "local": True, "rate": 3}
    with pytest.raises(ValueError, match=r"'giant' is unknown.*local.*xxl"):
        config_lib.parse_arg("giant", size="mini", local=False)
    with pytest.raises(ValueError, match="rate must be int"):
        config_lib.parse_arg("rate=x", rate=1)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *(("prefinetune", argument) for argument in ARGUMENTS),
        *(("finetune", argument) for argument in (*ARGUMENTS, *FINETUNE)),
    ],
)
def test_every_config_is_sound_and_traces(name, argument):
    config = flags.load(f"{ROOT / 'configs' / name}.py:{argument}")
    config_lib.check(config)
    config.model.num_layers = 2  # they are all alike, and tracing 24 takes long
    encoder_config = config_lib.encoder_config(config)
    _, tx = train.build_optimizer(config)
    params, _ = model.abstract_params(encoder_config)
    size, num_negatives = 4, config.data.num_negatives
    length = config.data.passage_length

    def shape(*dims, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(dims, dtype)

    batch = {
        "query_tokens": shape(size, length),
        "query_segment_ids": shape(size, length),
        "query_index": shape(size, 2),
        "passage_tokens": shape(size, length),
        "passage_segment_ids": shape(size, length),
        "passage_index": shape(size * (1 + num_negatives), 2),
        "query_id": shape(size, 2, dtype=jnp.uint32),
        "passage_id": shape(size, 2, dtype=jnp.uint32),
        "negative_id": shape(size, num_negatives, 2, dtype=jnp.uint32),
        "negative_mask": shape(size, num_negatives, dtype=bool),
        "example_mask": shape(size, dtype=bool),
        "negative_group": shape(size),
        "task_index": shape(size),
    }
    state = train.TrainState(params, jax.eval_shape(tx.init, params), shape())
    step = functools.partial(
        train.train_step,
        encoder=model.DualEncoder(encoder_config),
        tx=tx,
        num_segments=16,
        num_tasks=3,
        loss_settings=config.loss.to_dict(),
    )
    after, metrics = jax.eval_shape(step, state, batch, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(
        lambda a: a.shape, state
    )
    assert metrics["loss"].shape == ()


def test_all_faults_are_told_at_once():
    config = flags.load(f"{ROOT / 'configs/finetune.py'}:local").unlock()
    config.data.bach_size = 3
    del config.loss.temperature
    config.model.dropout_rate = 1.5
    config.train = {**config.train.to_dict(), "num_steps": "many"}
    with pytest.raises(ValueError, match="the config has faults") as error:
        config_lib.check(config)
    message = str(error.value)
    assert "data.bach_size=3: unknown key; did you mean data.batch_size?" in message
    assert "loss.temperature: missing" in message
    assert "model.dropout_rate=1.5: must be in [0, 1)" in message
    assert "train.num_steps='many': must be int, is str" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.mrl_dims=(64,128,512)", "no dim may exceed model.embedding_dim=256"),
        ("loss.mrl_dims=(64,)", "one weight for each"),
        ("optimizer.warmup_steps=1000000", "must not exceed"),
        ("mesh.fsdp=-1", "at most one"),
        ("init.token_weights=idf", "brings its own"),
        ("init.align_steps=1", "brings its own"),
        ("optimizer.name=sgd", "must be one of adafactor, adamw"),
    ],
)
def test_keys_must_fit_each_other(override, message):
    overrides = [f"--config.{override}", "--config.init.checkpoint=somewhere"]
    config = flags.load(f"{ROOT / 'configs/finetune.py'}:local", overrides)
    with pytest.raises(ValueError, match=message):
        config_lib.check(config)
