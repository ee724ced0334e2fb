"""Averages of models: values, errors and the written folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import random_params
import samples
import tiny_encoders

from gecko_jax.formats import averaging, checkpoints, model_folder, parameters
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats

CONFIG = dual_encoder.EncoderConfig(
    vocab_size=32,
    model_dim=8,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    embedding_dim=8,
)


def build(tiny_files, seed, **changes):
    """A model near the others: one start plus noise that depends on the seed."""
    start = random_params.random_params(CONFIG, 100)
    random = np.random.default_rng(seed)

    def move(leaf):
        own = random.standard_normal(leaf.shape, np.float32)
        leaf = np.asarray(leaf)
        return leaf + np.float32(0.3) * np.abs(leaf).mean() * own

    params = jax.tree.map(move, start)
    facts = {
        "params": params,
        "encoder_config": CONFIG,
        "mrl_dims": (4, 8),
        "step": seed,
        "revision": f"run-{seed}",
        "provenance": {"tasks": {f"set{seed}": {"licence": "MIT", "num_examples": 2}}},
    }
    return dataclasses.replace(tiny_files, **facts | changes)


@pytest.fixture
def models(tiny_files, tmp_path):
    """Paths of three model folders, and their parameters."""
    paths, params = [], []
    for seed in (1, 2, 3):
        files = build(tiny_files, seed)
        paths.append(str(tmp_path / f"model{seed}"))
        model_folder.save_model(paths[-1], files)
        params.append(parameters.flatten(files.params))
    return paths, params


@pytest.fixture
def workdir(tiny_files, tmp_path):
    """A run with checkpoints of steps 2, 4 and 6, and their parameters."""
    path = tmp_path / "run"
    path.mkdir()
    model_folder.write_model_json(path, build(tiny_files, 1, revision="run"))
    saved = {step: build(tiny_files, step).params for step in (2, 4, 6)}
    checkpointer = checkpoints.Checkpointer(path, keep=3, keep_every_steps=0)
    for step, params in saved.items():
        checkpointer.save(step, params, {"count": np.int32(step)}, {"seed": step})
    checkpointer.close()
    return str(path), saved


def read(path):
    return parameters.flatten(samples.load_model(path).params)


def test_the_mean_is_the_weighted_mean_of_every_parameter(models, tmp_path):
    paths, params = models
    averaging.average(paths, tmp_path / "out", weights=(1.0, 2.0, 5.0))
    written = read(tmp_path / "out")
    assert written.keys() == params[0].keys()
    for name, array in written.items():
        want = sum(
            weight * one[name].astype(np.float64)
            for weight, one in zip((1, 2, 5), params, strict=True)
        )
        np.testing.assert_allclose(array, want / 8, rtol=1e-7, atol=1e-9)
        assert array.dtype == np.float32


@pytest.mark.parametrize("method", averaging.METHODS)
def test_the_average_of_equal_models_is_exact(tiny_files, tmp_path, method):
    files = build(tiny_files, 1)
    paths = [str(tmp_path / f"copy{number}") for number in range(3)]
    for path in paths:
        model_folder.save_model(path, files)
    averaging.average(paths, tmp_path / "out", method=method)
    for name, array in parameters.flatten(files.params).items():
        np.testing.assert_array_equal(read(tmp_path / "out")[name], array)


def test_slerp_of_two_models_rotates_by_the_weight(models, tmp_path):
    paths, params = models
    averaging.average(paths[:2], tmp_path / "out", method="slerp", weights=(3.0, 1.0))
    for name, array in read(tmp_path / "out").items():
        a, b = (one[name].reshape(-1).astype(np.float64) for one in params[:2])
        angle = np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        assert angle > 0.05  # With smaller angles, a mean would pass, too.
        direction = (
            np.sin(0.75 * angle) * a / np.linalg.norm(a)
            + np.sin(0.25 * angle) * b / np.linalg.norm(b)
        ) / np.sin(angle)
        length = 0.75 * np.linalg.norm(a) + 0.25 * np.linalg.norm(b)
        np.testing.assert_allclose(
            array.reshape(-1), length * direction, rtol=2e-6, atol=1e-7
        )


def test_the_gradient_at_the_spherical_mean_is_zero(models, tmp_path):
    paths, params = models
    shares = (0.2, 0.3, 0.5)
    averaging.average(paths, tmp_path / "out", method="slerp", weights=shares)
    written = read(tmp_path / "out")
    averaging.average(
        paths[::-1], tmp_path / "back", method="slerp", weights=shares[::-1]
    )
    for name, array in written.items():
        vectors = [one[name].reshape(-1).astype(np.float64) for one in params]
        lengths = [np.linalg.norm(vector) for vector in vectors]
        mean = array.reshape(-1).astype(np.float64)
        np.testing.assert_allclose(
            np.linalg.norm(mean), np.dot(shares, lengths), rtol=1e-6
        )
        mean /= np.linalg.norm(mean)
        pull = 0
        for share, vector, length in zip(shares, vectors, lengths, strict=True):
            cosine = mean @ vector / length
            angle = np.arccos(cosine)
            pull += share * angle / np.sin(angle) * (vector / length - cosine * mean)
        np.testing.assert_allclose(pull, 0, atol=1e-6)
        np.testing.assert_allclose(
            read(tmp_path / "back")[name], array, rtol=1e-6, atol=1e-7
        )


def test_spherical_coefficients_at_wide_angles_and_without_a_direction():
    right = np.eye(3)
    shares = np.array([0.5, 0.5])
    np.testing.assert_allclose(
        averaging.spherical_coefficients(right[:2, :2], shares), np.sqrt(0.5)
    )
    np.testing.assert_allclose(
        averaging.spherical_coefficients(right, np.full(3, 1 / 3)), np.sqrt(1 / 3)
    )
    zero = np.array([[4.0, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(
        averaging.spherical_coefficients(zero, shares), shares
    )
    with pytest.raises(ValueError, match="opposite directions"):
        averaging.spherical_coefficients(np.array([[1.0, -1.0], [-1.0, 1.0]]), shares)


def test_a_run_is_averaged_over_its_checkpoints(workdir, tmp_path):
    path, saved = workdir
    done = averaging.average([path], tmp_path / "all")
    assert [model["step"] for model in done.inputs] == [2, 4, 6]
    assert done.model_files.step == 6
    averaging.average([path], tmp_path / "two", steps=(6, 2))
    name = "projection_layer/kernel"
    for out, steps in (("all", (2, 4, 6)), ("two", (2, 6))):
        arrays = [parameters.flatten(saved[step])[name] for step in steps]
        np.testing.assert_allclose(
            read(tmp_path / out)[name], np.mean(arrays, axis=0), rtol=1e-6, atol=1e-7
        )


def test_a_run_among_several_models_counts_by_its_newest(workdir, models, tmp_path):
    path, saved = workdir
    averaging.average([path, models[0][0]], tmp_path / "out")
    name = "projection_layer/kernel"
    want = (parameters.flatten(saved[6])[name] + models[1][0][name]) / 2
    np.testing.assert_allclose(read(tmp_path / "out")[name], want, rtol=1e-6, atol=1e-7)


def test_the_folder_says_what_went_in(models, tmp_path):
    paths, _ = models
    averaging.average(paths, tmp_path / "out", weights=(1.0, 1.0, 2.0))
    written = json.loads((tmp_path / "out" / "gecko.json").read_text())
    average = written["provenance"]["average"]
    assert average["method"] == "mean"
    assert average["models"][2] == {
        "source": paths[2],
        "revision": "run-3",
        "step": 3,
        "weight": 0.5,
    }
    assert list(written["provenance"]["tasks"]) == ["set1", "set2", "set3"]
    assert "config" not in written["provenance"]
    # The revision depends on the content.
    again = averaging.average(paths, tmp_path / "again", weights=(1.0, 1.0, 2.0))
    other = averaging.average(paths, tmp_path / "other", weights=(2.0, 1.0, 1.0))
    assert again.model_files.revision == written["revision"]
    assert other.model_files.revision != written["revision"]


def test_what_all_inputs_share_is_kept(tiny_files, tmp_path):
    facts = {"config": {"seed": 1}, "started_from": "start"}
    paths = [str(tmp_path / name) for name in "ab"]
    for seed, path in enumerate(paths):
        model_folder.save_model(path, build(tiny_files, seed, provenance=facts))
    done = averaging.average(paths, tmp_path / "out")
    assert {key: done.model_files.provenance[key] for key in facts} == facts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mrl_dims": (2, 8)}, r"mrl_dims: \[4, 8\], and \[2, 8\]"),
        ({"query_length": 32}, "query_length: 64, and 32"),
        (
            {"text_format": text_formats.TextFormat(no_title="x" * 200)},
            r"text_format.no_title: 'none', and 'x{59};",
        ),
        ({"vocabulary_proto": b"another"}, "vocabulary: "),
        (
            {"encoder_config": dataclasses.replace(CONFIG, l2_epsilon=1e-6)},
            r"model.l2_epsilon: 1e-12, and 1e-06",
        ),
    ],
)
def test_models_that_differ_are_refused_by_name(
    tiny_files, tmp_path, models, changes, message
):
    other = str(tmp_path / "other")
    model_folder.save_model(other, build(tiny_files, 9, **changes))
    with pytest.raises(ValueError, match=message) as raised:
        averaging.average([models[0][0], other], tmp_path / "out")
    assert models[0][0] in str(raised.value)
    assert other in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_refused_by_name(tiny_files, tmp_path, models):
    wide = dataclasses.replace(CONFIG, mlp_dim=16)
    params = random_params.random_params(wide, 0)
    other = str(tmp_path / "other")
    model_folder.save_model(
        other, build(tiny_files, 9, encoder_config=wide, params=params)
    )
    with pytest.raises(ValueError, match=r"model\.mlp_dim: 8, and 16") as raised:
        averaging.average([models[0][0], other], tmp_path / "out")
    assert "kernel" not in str(raised.value)


def test_models_of_two_families_are_refused_in_one_line(tiny_files, tmp_path, models):
    config = tiny_encoders.GEMMA
    other = str(tmp_path / "other")
    params = random_params.random_params(config, 0)
    files = build(tiny_files, 9, encoder_config=config, params=params, query_length=9)
    model_folder.save_model(other, files)
    with pytest.raises(ValueError, match="cannot be averaged") as raised:
        averaging.average([models[0][0], other], tmp_path / "out")
    assert str(raised.value).endswith(
        "can: model.family: 't5', and 'gemma'; model.model_dim: 8, and 32; "
        "model.num_layers: 1, and 3; model.vocab_size: 32, and 64"
    )


def test_settings_of_training_alone_may_differ(tiny_files, tmp_path, models):
    other = str(tmp_path / "other")
    config = dataclasses.replace(CONFIG, dropout_rate=0.1, remat="full")
    model_folder.save_model(other, build(tiny_files, 9, encoder_config=config))
    averaging.average([models[0][0], other], tmp_path / "out")


def test_what_cannot_be_averaged_is_refused(models, workdir, tmp_path):
    paths, _ = models
    path, _ = workdir
    out = tmp_path / "out"
    for sources, switches, message in (
        (paths, {"method": "median"}, "must be one of mean, slerp"),
        (paths, {"weights": (1.0, 2.0)}, "weights=1,2: 2 for 3 models"),
        (paths[:2], {"weights": (0.0, 0.0)}, "one above 0"),
        (paths[:2], {"weights": (1.0, -1.0)}, "0 or more"),
        (paths[:2], {"weights": (1.0, float("nan"))}, "0 or more"),
        (paths, {"steps": (2,)}, "selects checkpoints of one run"),
        (paths[:1], {}, "no run with checkpoints"),
        ([path], {"steps": (2, 5)}, "no checkpoint of step 5; there are those of 2, 4"),
        ([path], {"steps": (2,)}, "is no average"),
        ([path], {"steps": (2, 2)}, "named twice"),
        ([paths[0], paths[0] + "/"], {}, "named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            averaging.average(sources, out, **switches)
        assert not out.exists()
    with pytest.raises(ValueError, match="is one of the models"):
        averaging.average(paths, paths[1])
    assert json.loads((tmp_path / "model2" / "gecko.json").read_text())["step"] == 2


def test_a_folder_of_something_else_stays(models, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an earlier export"):
        averaging.average(models[0], tmp_path / "notes")
    assert [child.name for child in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_unrelated_models_are_reported(tiny_files, tmp_path, models, caplog):
    done = averaging.average(models[0], tmp_path / "near")
    assert min(done.cosines) > 0.8
    assert "average is noise" not in caplog.text
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape, np.float32),
        build(tiny_files, 1).params,
    )
    model_folder.save_model(tmp_path / "far", build(tiny_files, 9, params=params))
    done = averaging.average([models[0][0], str(tmp_path / "far")], tmp_path / "mixed")
    a, b = (
        np.concatenate([leaf.reshape(-1) for leaf in parameters.flatten(p).values()])
        for p in (build(tiny_files, 1).params, params)
    )
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    np.testing.assert_allclose(done.cosines, [cosine], rtol=1e-4, atol=1e-6)
    assert "did not start from the same checkpoint" in caplog.text


def test_one_array_of_one_model_is_read_at_a_time(tiny_files, tmp_path, monkeypatch):
    """At most two input arrays are in memory, whatever the number of models."""
    import weakref

    from gecko_jax.formats import safetensors_files

    paths = [str(tmp_path / f"model{seed}") for seed in range(5)]
    for seed, path in enumerate(paths):
        model_folder.save_model(path, build(tiny_files, seed))
    held, most = weakref.WeakSet(), 0

    class Watched(np.ndarray):
        __hash__ = object.__hash__

        def __eq__(self, other):
            return self is other

    opened = safetensors_files.open_file

    def open_file(path):
        def watch(tensor):
            def read():
                nonlocal most
                array = tensor.read().view(Watched)
                held.add(array)
                most = max(most, len(held))
                return array

            return dataclasses.replace(tensor, read=read)

        return {name: watch(tensor) for name, tensor in opened(path).items()}

    monkeypatch.setattr(safetensors_files, "open_file", open_file)
    for method in averaging.METHODS:
        averaging.average(paths, tmp_path / "out", method=method)
    assert 2 <= most <= 4
