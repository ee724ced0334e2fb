"""Model folders: round trips and errors."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import samples

from gecko_jax.formats import checkpoints, model_folder, parameters, safetensors_files
from gecko_jax.inference import embedding
from gecko_jax.parallel import sharding

WEIGHTS = "model.safetensors"
STORED = pathlib.Path(__file__).parents[1] / "testdata" / "model_v1"


@pytest.fixture
def folder(small_files, tmp_path):
    model_folder.save_model(tmp_path / "model", small_files)
    return tmp_path / "model"


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_model_folder_holds_all_of_the_model(small_files, folder):
    loaded = samples.load_model(folder)
    assert_equal(loaded.params, small_files.params)
    for field in dataclasses.fields(small_files):
        if field.name != "params":
            assert getattr(loaded, field.name) == getattr(small_files, field.name)
    names = safetensors.numpy.load_file(folder / WEIGHTS)
    assert "encoder/layers_0/attention/query/kernel" in names


def test_a_stored_folder_of_version_1_still_loads():
    """Its embeddings are those of the release that wrote it."""
    loaded = samples.load_model(STORED)
    assert json.loads((STORED / "gecko.json").read_text())["format_version"] == 1
    assert (loaded.step, loaded.revision) == (5, "stored-5")
    assert loaded.encoder_config.projection
    vectors = embedding.Gecko(loaded).encode_passages(
        ["a list of values", "the gecko"], titles=["Arrays", None]
    )
    np.testing.assert_allclose(vectors, np.load(STORED / "passages.npy"), atol=1e-6)


def test_shards_hold_what_one_file_holds(small_files, tmp_path):
    path = tmp_path / "shards"
    model_folder.save_model(path, small_files, shard_bytes=1_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == sorted(file.name for file in path.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 2
    # A file has at most 1,000 bytes of values, or one tensor.
    for name in names:
        held = safetensors.numpy.load_file(path / name).values()
        assert len(held) == 1 or sum(leaf.nbytes for leaf in held) <= 1_000
    assert_equal(samples.load_model(path).params, small_files.params)
    # One file replaces all shards.
    model_folder.save_model(path, small_files)
    assert {file.name for file in path.glob("model*")} == {WEIGHTS}


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_parameters_lie_on_a_mesh_as_in_training(request, small_files, kind):
    mesh = sharding.build_mesh(data=2, fsdp=2, tensor=2)
    loaded = samples.load_model(request.getfixturevalue(kind), mesh)
    table = loaded.params["token_embedder"]["embedding"]
    assert table.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    added = 0 if kind == "folder" else 4
    assert_equal(
        loaded.params, jax.tree.map(lambda leaf: leaf + added, small_files.params)
    )


def test_a_model_without_a_revision_is_named_by_its_content(small_files, tmp_path):
    def revision(**changes):
        changed = dataclasses.replace(small_files, revision="", **changes)
        return model_folder.read_params(changed).revision

    name = revision()
    assert len(name) == 12
    assert name == revision(step=99)
    written = model_folder.save_model(
        tmp_path / "m", dataclasses.replace(small_files, revision="")
    )
    assert name == written.revision == samples.load_model(tmp_path / "m").revision
    params = parameters.flatten(small_files.params)
    params["encoder/encoder_norm/scale"] += 1e-6
    others = [
        revision(params=parameters.unflatten(params)),
        revision(query_length=9),
        revision(extra_ids=1),
        revision(vocabulary_proto=b"x"),
    ]
    assert len({name, *others}) == 5


def test_rounded_parameters_are_another_model(small_files, tmp_path):
    written = model_folder.save_model(tmp_path / "half", small_files, dtype="float16")
    loaded = samples.load_model(tmp_path / "half")
    assert_equal(
        loaded.params,
        jax.tree.map(
            lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32),
            small_files.params,
        ),
    )
    assert loaded.revision == written.revision != small_files.revision
    # The revision depends on the content: equal float32 parameters, equal revision.
    again = dataclasses.replace(loaded, revision="")
    whole = model_folder.save_model(tmp_path / "whole", again)
    assert whole.revision == loaded.revision
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.8 * sizes[1]


def test_a_missing_shard_is_named(small_files, tmp_path):
    path = tmp_path / "shards"
    model_folder.save_model(path, small_files, shard_bytes=1_000)
    lost = sorted(path.glob("model-*"))[1]
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{lost.name}: missing; copy it"):
        samples.load_model(path)
    samples.forget_checksums(path / "gecko.json")
    shutil.copy(path / sorted(path.glob("model-*"))[0].name, lost)
    with pytest.raises(ValueError, match=rf"{lost.name}: .* should be in this file"):
        samples.load_model(path)
    lost.write_bytes(content)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map; the file is damaged"):
        samples.load_model(path)


def test_a_workdir_loads_its_newest_checkpoint(small_files, workdir):
    loaded = samples.load_model(workdir)
    assert_equal(loaded.params, jax.tree.map(lambda leaf: leaf + 4, small_files.params))
    assert loaded.step == 4
    assert loaded.revision == f"{small_files.revision}-4"


def test_a_truncated_model_is_named(folder):
    path = folder / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: damaged .* bytes, not .*copy it again"
    ):
        samples.load_model(folder)
    samples.forget_checksums(folder / "gecko.json")
    with pytest.raises(
        ValueError, match=r"model\.safetensors: not a whole safetensors"
    ):
        samples.load_model(folder)


def test_a_truncated_checkpoint_is_named_with_the_remedy(workdir):
    for path in (workdir / "checkpoints" / "4" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        ValueError, match=r"checkpoints/4: this checkpoint is damaged.*move .* away"
    ):
        samples.load_model(workdir)


def test_damaged_settings_are_named(folder):
    path = folder / model_folder.MODEL_JSON
    for content in (path.read_text()[:40], "[" * 100_000, '{"a":' * 400 + "}" * 400):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"gecko\.json: not JSON .*damaged"):
            samples.load_model(folder)


def test_a_newer_format_is_refused(folder):
    path = folder / model_folder.MODEL_JSON
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format_version 99.*upgrade"):
        samples.load_model(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (model_folder.MODEL_JSON, "neither a training workdir nor a model folder"),
        (model_folder.VOCABULARY, r"vocabulary\.model is missing"),
        (WEIGHTS, r"model\.safetensors: missing; copy it again"),
    ],
)
def test_a_missing_file_is_named(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        samples.load_model(folder)


def test_a_full_disk_leaves_the_folder_as_it_was(small_files, folder, monkeypatch):
    before = (folder / WEIGHTS).read_bytes()

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(safetensors_files, "_write_file", full)
    with pytest.raises(
        OSError, match=r"no disk space left.*partial output was removed"
    ):
        model_folder.save_model(folder, small_files)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_workdir_is_not_overwritten(small_files, workdir):
    with pytest.raises(ValueError, match="not empty, and not an earlier export"):
        model_folder.save_model(workdir, small_files)
    assert checkpoints.latest_step(workdir) == 4


def test_a_folder_of_something_else_is_not_overwritten(small_files, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty, and not an earlier export"):
        model_folder.save_model(tmp_path, small_files)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_export_that_holds_more_than_a_model_folder_is_not_overwritten(
    small_files, folder
):
    model_folder.save_model(folder, small_files)  # A model folder is replaced,
    (folder / "modules.json").write_text(
        "[]"
    )  # an export for sentence-transformers is not.
    with pytest.raises(ValueError, match=r"also holds modules\.json, which"):
        model_folder.save_model(folder, small_files)
    assert (folder / "modules.json").read_text() == "[]"
    (folder / "modules.json").rename(folder / "notes.txt")
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("")
    with pytest.raises(ValueError, match=r"also holds a/b and 1 more, which would be"):
        model_folder.save_model(folder, small_files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "step: missing"),
        ({"mrl_dims": [4, 16]}, r"none may exceed model\.embedding_dim=8"),
        ({"query_length": "64"}, "query_length='64': must be int"),
        ({"text_format": {"qurey": "{text}"}}, "unknown field 'qurey'"),
        ({"model": {"num_layers": 1}}, "missing"),
        ({"model": {"num_heads": 0}}, r"model\.num_heads=0: must be in \[1, "),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(folder, change, message):
    path = folder / model_folder.MODEL_JSON
    values = json.loads(path.read_text()) | change
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"(?s)gecko\.json has errors.*{message}"):
        samples.load_model(folder)


def test_another_vocabulary_is_refused(folder):
    path = folder / model_folder.VOCABULARY
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="not the vocabulary that the model was"):
        samples.load_model(folder)
