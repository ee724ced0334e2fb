"""Configs: arguments, the check, and every file with every argument."""

import pathlib

import jax
import pytest

import gecko_jax.config
from gecko_jax.cli import flags
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.training import train_step

ROOT = pathlib.Path(__file__).parents[1]
SIZES = tuple(
    name for name, sizes in dual_encoder.PRESETS.items() if "family" not in sizes
)
ARGUMENTS = ("", "local", *SIZES, *(f"{size},local" for size in SIZES))
FAMILIES = tuple(name for name in dual_encoder.PRESETS if name not in SIZES)
FINETUNE = ("fret", "fret,local", "xl,fret", "gemma,local", *FAMILIES)
RECIPES = tuple(
    f"{size},{recipe}{more}"
    for recipe in ("paper", "modern", "zero_shot")
    for size in ("base", "large", "xl")
    for more in ("", ",multilingual")
)

CONFIGS = (
    *(("prefinetune", argument) for argument in ARGUMENTS),
    *(("prefinetune", a) for a in RECIPES if "zero_shot" not in a),
    *(("finetune", argument) for argument in (*ARGUMENTS, *FINETUNE, *RECIPES)),
)
# One config for each combination of settings other than sizes.
TRACED = (
    ("prefinetune", ""),
    ("prefinetune", "local"),
    ("prefinetune", "large,paper,multilingual"),
    ("prefinetune", "base,modern"),
    ("finetune", ""),
    ("finetune", "fret,local"),
    ("finetune", "xxl"),
    ("finetune", "base,zero_shot"),
    ("finetune", "xl,modern,multilingual"),
)


def test_arguments_are_words_and_pairs():
    values = gecko_jax.config.parse_arg(
        "xl,local,rate=3", size="mini", local=False, rate=1
    )
    assert values.to_dict() == {"size": "xl", "local": True, "rate": 3}
    with pytest.raises(ValueError, match=r"'giant': unknown.*local.*xxl"):
        gecko_jax.config.parse_arg("giant", size="mini", local=False)
    with pytest.raises(ValueError, match="rate must be int"):
        gecko_jax.config.parse_arg("rate=x", rate=1)


@pytest.mark.parametrize(("name", "argument"), CONFIGS)
def test_every_config_is_valid(name, argument):
    gecko_jax.config.check(flags.load(f"{ROOT / 'configs' / name}.py:{argument}"))


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        pytest.param(*case, marks=() if case in TRACED else pytest.mark.slow)
        for case in CONFIGS
    ],
)
def test_every_config_traces(name, argument):
    config = flags.load(f"{ROOT / 'configs' / name}.py:{argument}")
    # All layers are alike, or all periods of layers.
    config.model.num_layers = max(
        2, gecko_jax.config.encoder_config(config).scan_period
    )
    config.data.batch_size = 8
    config.train.microbatch_size = min(config.train.microbatch_size, 8)
    mesh = sharding.build_mesh(**train_step.mesh_sizes(config))
    step = train_step.build(config, mesh, num_segments=16, num_tasks=3)
    batch = train_step.abstract_batch(config, mesh)
    after, metrics = jax.eval_shape(step.run, step.shapes, batch, jax.random.key(0))
    assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(
        lambda a: a.shape, step.shapes
    )
    assert metrics["loss"].shape == ()


def test_every_hardware_has_a_batch_that_its_chips_can_split():
    file = f"{ROOT / 'configs/finetune.py'}"
    for name in ("v5e-8", "v5e-16", "v5e-256", "v5p-128", "h100", "h200"):
        config = flags.load(f"{file}:xl,hardware={name}")
        gecko_jax.config.check(config)
        chips = config.mesh.data * config.mesh.fsdp
        assert config.data.batch_size % config.train.microbatch_size == 0
        assert config.train.microbatch_size % chips == 0
    with pytest.raises(ValueError, match="hardware=v9: known are v5e-8"):
        flags.load(f"{file}:hardware=v9")


def test_a_recipe_says_what_it_is():
    paper = flags.load(f"{ROOT / 'configs/finetune.py'}:xl,paper")
    assert paper.loss.same_tower
    assert not any(
        paper.loss[name]
        for name in (
            "same_tower_passages",
            "bidirectional",
            "all_hard_negatives",
            "mask_duplicates",
            "hardness",
            "spread_weight",
            "matching_weight",
            "kl_weight",
        )
    )
    assert (paper.data.batch_size, paper.data.num_negatives) == (2048, 1)
    assert (paper.loss.mrl_dims, paper.loss.mrl_weights) == ((256, 768), (1.0, 1.0))
    alone = flags.load(f"{ROOT / 'configs/finetune.py'}:xl,zero_shot").to_dict()
    assert alone["data"].pop("mixture") == "gecko_fret"
    both = paper.to_dict()
    assert both["data"].pop("mixture") == "gecko_finetune"
    assert alone == both
    for name in ("prefinetune", "finetune"):
        of_mt5 = flags.load(f"{ROOT / 'configs' / name}.py:base,modern,multilingual")
        assert of_mt5.model.vocab_size == 250_112
        assert of_mt5.data.vocabulary == "mt5.model"
    assert of_mt5.data.mixture == "gecko_multilingual"


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("finetune", "xl,paper,modern", "name one of paper, zero_shot, modern"),
        ("finetune", "xl,multilingual", "name one of paper, zero_shot, modern"),
        ("finetune", "paper", "name a size with it"),
        ("finetune", "xxl,modern", "name a size with it"),
        ("prefinetune", "base,paper,modern", "name one of paper, modern"),
        ("prefinetune", "base,multilingual", "name one of paper, modern"),
        ("prefinetune", "paper", "name a size with it"),
        ("finetune", "local,embeddinggemma", "not embeddinggemma"),
        ("prefinetune", "qwen3-0.6b,local", "not qwen3-0.6b"),
        ("prefinetune", "base,zero_shot", "unknown"),
    ],
)
def test_a_recipe_that_is_none_is_refused(name, argument, message):
    with pytest.raises(ValueError, match=message):
        flags.load(f"{ROOT / 'configs' / name}.py:{argument}")


def test_all_faults_are_told_at_once():
    config = flags.load(f"{ROOT / 'configs/finetune.py'}:local").unlock()
    config.data.bach_size = 3
    del config.loss.temperature
    config.model.dropout_rate = 1.5
    config.train = {**config.train.to_dict(), "num_steps": "many"}
    with pytest.raises(ValueError, match="the config has errors") as error:
        gecko_jax.config.check(config)
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
        ("mesh.dcn_fsdp=-1", "at most one"),
        ("train.microbatch_size=65", "must not exceed data.batch_size=64"),
        ("init.token_weights=idf", "but init.checkpoint is set"),
        ("init.align_steps=1", "but init.checkpoint is set"),
        ("seed=9223372036854775808", "must be in"),
        ("model.num_layers=1000000000", r"must be in \[0, 1,000\]"),
        ("model.vocab_size=1000000000000", r"must be in \[1, 16,777,216\]"),
        ("model.model_dim=1000000000", r"must be in \[1, 1,048,576\]"),
        ("data.batch_size=1000000000", r"must be in \[2, 16,777,216\]"),
        ("data.extra_ids=1000000000", r"must be in \[0, 100,000\]"),
        ("data.query_length=7", r"must be in \[8, 1,048,576\]"),
        ("loss.temperature=inf", "must be a number above 0"),
        ("loss.mrl_weights=(nan,1.0)", "must be numbers of 0 or more"),
        ("data.files=(1,2)", "must be paths"),
        ("optimizer.name=sgd", "must be one of adafactor, adamw"),
        ("loss.matching_weight=1.0", "embedding matching needs all three"),
        ("data.teacher=vectors", "embedding matching needs all three"),
        ("data.teacher_dim=512", "must not exceed model.embedding_dim=256"),
        ("loss.spread_weight=-1.0", "0 or more"),
        ("loss.kl_weight=-1.0", "0 or more"),
        ("loss.kl_temperature=0.0", "must be a number above 0"),
        ("model.attention=flash", "must be one of xla, cudnn"),
        ("model.attention=cudnn", "needs model.dtype='bfloat16', not 'float32'"),
    ],
)
def test_keys_must_fit_each_other(override, message):
    overrides = [f"--config.{override}", "--config.init.checkpoint=somewhere"]
    config = flags.load(f"{ROOT / 'configs/finetune.py'}:local", overrides)
    with pytest.raises(ValueError, match=message):
        gecko_jax.config.check(config)


@pytest.mark.parametrize("key", ["hardness", "kl_weight"])
def test_a_loss_of_hard_negatives_needs_some(key):
    config = gecko_jax.config.training()
    config.data.num_negatives = 0
    gecko_jax.config.check(config)
    config.loss[key] = 1.0
    with pytest.raises(ValueError, match=rf"loss\.{key}=1\.0: .* leaves no hard neg"):
        gecko_jax.config.check(config)


def test_a_teacher_knows_no_texts_with_unique_ids():
    overrides = {
        "data.unique_ids": True,
        "data.teacher": "vectors",
        "data.teacher_dim": 64,
        "loss.matching_weight": 1.0,
    }
    words = [f"--config.{name}={value}" for name, value in overrides.items()]
    config = flags.load(f"{ROOT / 'configs/prefinetune.py'}:local", words)
    with pytest.raises(ValueError, match=r"unique_ids=True, data\.teacher='vectors'"):
        gecko_jax.config.check(config)
    config.data.unique_ids = False
    gecko_jax.config.check(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["suites=MTEB"], r"suites=\('MTEB',\): must hold some of MTEB\(eng, v1\)"),
        (["name=gecko"], "name='gecko': must be organization/model"),
        (["dims=(0,)"], "must be integers above 0"),
        (["cache.max_gib=-1"], "0 or more"),
        (["mesh.data=-1", "mesh.fsdp=-1"], "at most one"),
        (["suites=()"], "set at least one"),
    ],
)
def test_faults_of_an_evaluation_are_told(overrides, message):
    overrides = [f"--config.{override}" for override in overrides]
    config = flags.load(f"{ROOT / 'configs/evaluate.py'}:v1", overrides)
    with pytest.raises(ValueError, match=message):
        gecko_jax.config.check_evaluation(config)


def test_an_evaluation_knows_its_keys():
    config = flags.load(f"{ROOT / 'configs/evaluate.py'}:local").unlock()
    gecko_jax.config.check_evaluation(config)
    config.task = "STS12"
    with pytest.raises(ValueError, match="task='STS12': unknown key; did you mean tas"):
        gecko_jax.config.check_evaluation(config)
