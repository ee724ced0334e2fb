"""The training loop: exact resume, errors, and the same numbers on any mesh."""

import functools
import json
import os
import pathlib
import re
import signal

import jax
import numpy as np
import pytest
import samples

import gecko_jax
from gecko_jax.cli import flags
from gecko_jax.formats import checkpoints, model_folder
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.text import text_formats
from gecko_jax.training import interruption, loop

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "data.batch_size": 16,
    "data.query_length": 16,
    "data.passage_length": 32,
    "data.num_negatives": 1,
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.embedding_dim": 16,
    "loss.mrl_dims": "(8,16)",
    "loss.mrl_weights": "(1.0,1.0)",
    "optimizer.warmup_steps": 1,
    "train.num_steps": 6,
    "train.log_every_steps": 1,
    "checkpoint.every_steps": 2,
    "checkpoint.keep": 9,
    "evaluation.every_steps": 3,
    "evaluation.folder": "",
}


# Config argument and settings of each family beside `TINY`.
FAMILIES = {
    "t5": ("local", {}),
    "gemma": (
        "local,gemma",
        {
            "model.num_layers": 3,
            "model.num_kv_heads": 1,
            "model.local_window": "(3,3)",
        },
    ),
    "embeddinggemma2": (
        "local,gemma",
        {
            "model.family": "embeddinggemma2",
            "model.num_layers": 4,
            "model.num_kv_heads": 2,
            "model.local_window": "(3,3)",
            "model.global_every": 2,
            "model.global_num_kv_heads": 1,
            "model.global_head_dim": 12,
            "model.per_layer_dim": 8,
        },
    ),
    "qwen3": (
        "local",
        {
            "model.family": "qwen3",
            "model.mlp_activations": "('silu','linear')",
            "model.pooling": "last",
        },
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(48):
            record = {
                "task": "even" if i % 2 == 0 else "odd",
                "query": f"what is number {i} of the list",
                "positive": f"number {i} of the list is the word {chr(97 + i % 26)}{i}",
                "negatives": [f"there is no such number as {i + 100}"],
            }
            file.write(json.dumps(record) + "\n")
    return folder


def build(cache, family="t5", **overrides):
    argument, settings = FAMILIES[family]
    values = (
        TINY
        | settings
        | {
            "data.files": f"('{cache / 'pairs.jsonl'}',)",
            "data.cache_dir": str(cache / "cache"),
        }
    )
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return flags.load(
        f"{ROOT / 'configs/finetune.py'}:{argument}",
        [f"--config.{key}={value}" for key, value in values.items()],
    )


def state_of(workdir, step):
    opened = checkpoints.open_params(workdir, step)
    folder = workdir / "checkpoints" / str(step) / "opt_state"
    assert folder.is_dir()
    return {name: leaf.read() for name, leaf in opened.items()}


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return [
        {k: v for k, v in line.items() if not re.match("time/|.*_per_second", k)}
        for line in lines
    ]


def use_one_device(patch):
    """Uses a mesh of one of the eight devices, as on a laptop; it compiles faster."""
    mesh = jax.make_mesh(
        (1, 1, 1),
        sharding.MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[:1],
    )
    patch.setattr(sharding, "build_mesh", lambda **sizes: mesh)


class Killed(Exception):
    pass


def kill_at(step):
    def evaluate(params, now):
        if now == step:
            raise Killed
        return {
            "norm": float(np.square(params["encoder"]["encoder_norm"]["scale"]).sum())
        }

    return evaluate


def tell_at(step):
    """Returns an evaluation that sends SIGTERM at step `step`."""
    evaluate = kill_at(-1)

    def tell(params, now):
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(params, now)

    return tell


@pytest.mark.slow  # `.ci/run` runs it.
def test_the_gemma_preset_trains(cache, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    sizes = [f"model.{name}" for name in dual_encoder.PRESETS["gemma"]]
    values = {key: value for key, value in TINY.items() if key not in sizes} | {
        "data.files": f"('{cache / 'pairs.jsonl'}',)",
        "data.cache_dir": str(cache / "cache"),
        "loss.mrl_dims": "(64,256)",
    }
    config = flags.load(
        f"{ROOT / 'configs/finetune.py'}:local,gemma",
        [f"--config.{key}={value}" for key, value in values.items()],
    )
    loop.train(config, tmp_path)
    losses = [line["loss"] for line in metrics_of(tmp_path) if "loss" in line]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]
    texts = ["what is number 3 of the list", "a house by the river"]
    vectors = gecko_jax.load(str(tmp_path)).encode_queries(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.slow  # `.ci/run` kills three runs with benchmarks/kills.py.
@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_resumes_bit_for_bit(cache, tmp_path, monkeypatch, family):
    use_one_device(monkeypatch)
    config = build(cache, family, evaluation__every_steps=1)
    loop.train(config, tmp_path / "whole", kill_at(-1))
    # The first kill comes before the first checkpoint.
    for step, saved in ((1, None), (3, 2)):
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "killed", kill_at(step))
        assert checkpoints.latest_step(tmp_path / "killed") == saved
    loop.train(config, tmp_path / "killed", kill_at(-1))
    # SIGTERM defers the evaluation of its step, even after the last step.
    for step in (2, 5):
        stopped = f"after step {step + 1} of 6: saved in"
        with pytest.raises(interruption.Interrupted, match=stopped):
            loop.train(config, tmp_path / "told", tell_at(step))
        assert checkpoints.latest_step(tmp_path / "told") == step + 1
        assert "evaluation/norm" not in metrics_of(tmp_path / "told")[-1]
    loop.train(config, tmp_path / "told", kill_at(-1))
    whole = state_of(tmp_path / "whole", 6)
    for other in ("killed", "told"):
        params = state_of(tmp_path / other, 6)
        for name in whole:
            np.testing.assert_array_equal(whole[name], params[name], err_msg=name)
        assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / other)
    # A finished run does not change.
    assert loop.train(config, tmp_path / "whole") == {}

    other = build(cache, family, loss__temperature=0.5)
    with pytest.raises(ValueError, match=r"(?s)another config.*loss.temperature: was"):
        loop.train(other, tmp_path / "whole")

    names = {"loss", "loss_8", "loss_16", "accuracy", "grad_norm", "padding_share"}
    assert (
        names | {"positive_similarity", "loss/even", "skipped_steps"}
        <= metrics_of(tmp_path / "whole")[-2].keys()
    )


@pytest.mark.parametrize(
    "steps",
    [
        # In the middle of a logging window, and at the start of the next one.
        (3, 5),
        pytest.param((2, 3, 4, 5, 6), marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_writes_the_metrics_of_an_uninterrupted_run(
    cache, tmp_path, monkeypatch, steps
):
    use_one_device(monkeypatch)
    config = build(
        cache,
        data__packing=len(steps) > 2,  # Without packing, only one shape compiles.
        evaluation__every_steps=1,
        train__log_every_steps=4,
        checkpoint__every_steps=1,
    )
    loop.train(config, tmp_path / "whole", lambda params, step: {})
    for step in steps:
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "killed", kill_at(step))
        assert checkpoints.latest_step(tmp_path / "killed") == step - 1
    loop.train(config, tmp_path / "killed", lambda params, step: {})
    whole, killed = (
        [line for line in metrics_of(tmp_path / name) if "loss" in line]
        for name in ("whole", "killed")
    )
    assert [line["step"] for line in whole] == [4, 6]
    assert whole == killed


@pytest.mark.slow
def test_changed_data_is_refused(cache, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    source = tmp_path / "pairs.jsonl"
    source.write_text((cache / "pairs.jsonl").read_text())
    config = build(cache, data__files=f"('{source}',)")
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run", kill_at(3))
    source.write_text(source.read_text().replace("what", "which"))
    with pytest.raises(ValueError, match="the data has changed"):
        loop.train(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_task(
    cache, tmp_path, monkeypatch
):
    use_one_device(monkeypatch)
    config = build(
        cache,
        data__packing=False,
        optimizer__learning_rate=1e30,
        optimizer__clip_norm=0.0,
    )
    with pytest.raises(FloatingPointError, match=r"step \d: loss .*not applied"):
        loop.train(config, tmp_path)
    step = checkpoints.latest_step(tmp_path)
    if step is not None:
        assert all(
            np.isfinite(leaf).all() for leaf in state_of(tmp_path, step).values()
        )


@pytest.mark.slow
def test_training_starts_from_a_workdir_or_a_folder(cache, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    loop.train(build(cache, train__num_steps=2), tmp_path / "first")
    model_folder.save_model(tmp_path / "out", samples.load_model(tmp_path / "first"))
    seen = []

    def evaluate(params, step):
        seen.append(np.asarray(params["projection_layer"]["kernel"]))
        return {}

    for start in ("first", "out"):
        config = build(
            cache, init__checkpoint=tmp_path / start, train__num_steps=1, seed=7
        )
        loop.train(config, tmp_path / f"from_{start}", evaluate)
    first = state_of(tmp_path / "first", 2)["projection_layer/kernel"]
    np.testing.assert_array_equal(seen[0], first)
    np.testing.assert_array_equal(seen[2], first)


def test_a_vocabulary_that_does_not_fit_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="exceed"):
        loop.train(build(cache, model__vocab_size=64), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    [("t5", mesh) for mesh in ((8, 1, 1), (2, 2, 2), (1, 8, 1))]
    + [(family, (2, 2, 2)) for family in FAMILIES if family != "t5"],
)
def test_any_mesh_trains_the_same(cache, tmp_path, family, mesh, single_device):
    data, fsdp, tensor = mesh
    sizes = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    config = build(cache, family, **sizes, train__num_steps=2)
    last = loop.train(config, tmp_path)
    expected, params = single_device(family)
    for name in ("loss", "grad_norm", "accuracy"):
        assert last[name] == pytest.approx(expected[name], rel=2e-4), name
    for name, leaf in state_of(tmp_path, 2).items():
        np.testing.assert_allclose(leaf, params[name], atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_microbatches_train_the_same_and_a_trace_is_written(
    cache, tmp_path, monkeypatch, family, single_device
):
    use_one_device(monkeypatch)
    monkeypatch.setattr(loop, "_STEPS_BEFORE_PROFILE", 1)
    config = build(cache, family, train__num_steps=2, train__microbatch_size=4)
    # The run ends before the profile does.
    last = loop.train(config, tmp_path, profile_steps=9)
    expected, params = single_device(family)
    assert last["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, leaf in state_of(tmp_path, 2).items():
        np.testing.assert_allclose(leaf, params[name], atol=1e-5, err_msg=name)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.fixture(scope="module")
def single_device(cache, tmp_path_factory):
    """Two steps on one device of the eight, for each family."""

    @functools.cache
    def train(family):
        folder = tmp_path_factory.mktemp("single")
        with pytest.MonkeyPatch.context() as patch:
            use_one_device(patch)
            last = loop.train(build(cache, family, train__num_steps=2), folder)
        return last, state_of(folder, 2)

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [("adafactor", "t5"), ("adamw", "t5"), ("adafactor", "embeddinggemma2")],
)
def test_scanned_layers_train_the_same(cache, tmp_path, monkeypatch, name, family):
    use_one_device(monkeypatch)
    results = []
    for scan in (False, True):
        workdir = tmp_path / str(scan)
        config = build(
            cache,
            family,
            model__num_layers=2 if family == "t5" else 4,
            model__scan_layers=scan,
            model__remat="dots" if scan else "none",
            optimizer__name=name,
            train__num_steps=3,
        )
        loop.train(config, workdir)
        results.append(state_of(workdir, 3))
    for leaf in results[0]:
        np.testing.assert_allclose(
            results[0][leaf], results[1][leaf], atol=2e-5, err_msg=leaf
        )


@pytest.mark.slow
def test_aligned_dims_are_better_when_truncated(cache, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    accuracy = []
    for steps in (0, 8):
        config = build(
            cache,
            init__token_weights="idf",
            init__align_steps=steps,
            loss__mrl_dims="(4,16)",
            train__num_steps=1,
        )
        last = loop.train(config, tmp_path / str(steps))
        accuracy.append((last["loss_4"], last["loss_16"]))
    (plain_4, plain_16), (aligned_4, aligned_16) = accuracy
    assert aligned_16 == pytest.approx(plain_16, rel=1e-3)
    assert aligned_4 < plain_4


def test_weighted_tokens_count_by_their_weight(cache):
    config = build(cache, init__token_weights="idf")
    batches = loop.build_batches(config, text_format=text_formats.TextFormat())
    weights = batches.idf_weights(config.model.vocab_size)
    assert weights.min() >= 0.05
    assert weights.max() == 1.0
    # "list" and the end token are in every text.
    (common, end) = batches.vocabulary.encode(["list"])[0][-2:]
    assert weights[common] < 0.2
    assert weights[end] == pytest.approx(0.05)


@pytest.mark.parametrize(("part", "masked"), [("query", True), ("positive", False)])
def test_a_task_without_any_negative_is_reported(tmp_path, caplog, part, masked):
    fields = ("query", "positive")
    records = [
        {"task": "one"}
        | {name: "the same" if name == part else f"other {n}" for name in fields}
        for n in range(16)
    ]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    config = build(
        tmp_path,
        data__num_negatives=0,
        data__packing=False,
        train__num_steps=2,
        loss__mask_duplicates=masked,
    )
    with caplog.at_level("WARNING", logger="absl"):
        last = loop.train(config, tmp_path / "run")
    assert (abs(last["loss"]) < 1e-5) == masked
    told = [r.getMessage() for r in caplog.records if "Task one: " in r.getMessage()]
    assert len(told) == 1  # once, not at every step
    assert "none of its first 16 examples has a negative" in told[0]


def test_scores_of_a_judge_are_distilled(cache, tmp_path, monkeypatch):
    use_one_device(monkeypatch)
    path = tmp_path / "scored.jsonl"
    with path.open("w") as file:
        for i, line in enumerate((cache / "pairs.jsonl").open()):
            # The judge prefers the negative; one example in three has no scores.
            scores = {"scores": [0.0, 3.0]} if i % 3 else {}
            file.write(json.dumps(json.loads(line) | scores) + "\n")
    settings = {
        "data__files": f"('{path}',)",
        "evaluation__every_steps": 0,
        "optimizer__learning_rate": 0.01,
        "train__num_steps": 12,
    }
    config = build(cache, loss__kl_weight=5.0, loss__kl_temperature=2.0, **settings)
    loop.train(config, tmp_path / "run")
    first, *_, last = [line for line in metrics_of(tmp_path / "run") if "kl" in line]
    assert 0 < last["kl"] < 0.7 * first["kl"]
    with pytest.raises(ValueError, match=r"loss\.kl_weight: no line of even, odd has"):
        loop.train(build(cache, loss__kl_weight=5.0), tmp_path / "none")
