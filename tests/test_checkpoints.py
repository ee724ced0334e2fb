"""Checkpoints and model folders: round trips and honest refusals."""

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

from gecko_jax import checkpoints, embedding, model, sharding, tensors

WEIGHTS = "model.safetensors"
STORED = pathlib.Path(__file__).parent / "data" / "model_v1"
CONFIG = model.EncoderConfig(
    vocab_size=32,
    model_dim=8,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    embedding_dim=8,
)


@pytest.fixture
def files(tiny_files):
    params = jax.jit(model.init_params, static_argnums=0)(CONFIG, jax.random.key(1))
    return dataclasses.replace(
        tiny_files, params=params, encoder_config=CONFIG, mrl_dims=(4, 8)
    )


@pytest.fixture
def folder(files, tmp_path):
    checkpoints.save_model(tmp_path / "model", files)
    return tmp_path / "model"


@pytest.fixture
def workdir(files, tmp_path):
    """A workdir with checkpoints of steps 2 and 4, whose parameters differ."""
    path = tmp_path / "run"
    path.mkdir()
    checkpoints.write_model_json(path, files)
    checkpointer = checkpoints.Checkpointer(path, keep=3, keep_every_steps=0)
    for step in (2, 4):
        params = jax.tree.map(lambda leaf, step=step: leaf + step, files.params)
        checkpointer.save(step, params, {"count": np.int32(step)}, {"seed": step})
    checkpointer.close()
    return path


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_model_folder_holds_all_of_the_model(files, folder):
    loaded = checkpoints.load_model(folder)
    assert_equal(loaded.params, files.params)
    for field in dataclasses.fields(files):
        if field.name != "params":
            assert getattr(loaded, field.name) == getattr(files, field.name)
    names = safetensors.numpy.load_file(folder / WEIGHTS)
    assert "encoder/layers_0/attention/query/kernel" in names


def test_a_stored_folder_of_version_1_still_loads():
    """Its vectors are those of the release that wrote it."""
    loaded = checkpoints.load_model(STORED)
    assert json.loads((STORED / "gecko.json").read_text())["format_version"] == 1
    assert (loaded.step, loaded.revision) == (5, "stored-5")
    assert loaded.encoder_config.projection
    vectors = embedding.Gecko(loaded).encode_passages(
        ["a list of values", "the gecko"], titles=["Arrays", None]
    )
    np.testing.assert_allclose(vectors, np.load(STORED / "passages.npy"), atol=1e-6)


def test_shards_hold_what_one_file_holds(files, tmp_path):
    path = tmp_path / "shards"
    checkpoints.save_model(path, files, shard_bytes=1_000)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == sorted(file.name for file in path.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 2
    # A file holds at most 1,000 bytes of numbers, or one tensor.
    for name in names:
        held = safetensors.numpy.load_file(path / name).values()
        assert len(held) == 1 or sum(leaf.nbytes for leaf in held) <= 1_000
    assert_equal(checkpoints.load_model(path).params, files.params)
    # Written over by one file, of which nothing of the shards is left.
    checkpoints.save_model(path, files)
    assert {file.name for file in path.glob("model*")} == {WEIGHTS}


@pytest.mark.parametrize("kind", ["folder", "workdir"])
def test_parameters_lie_on_a_mesh_as_in_training(request, files, kind):
    mesh = sharding.build_mesh(data=2, fsdp=2, tensor=2)
    loaded = checkpoints.load_model(request.getfixturevalue(kind), mesh)
    table = loaded.params["token_embedder"]["embedding"]
    assert table.sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    added = 0 if kind == "folder" else 4
    assert_equal(loaded.params, jax.tree.map(lambda leaf: leaf + added, files.params))


def test_a_model_without_a_revision_is_named_by_its_content(files, tmp_path):
    def revision(**changes):
        changed = dataclasses.replace(files, revision="", **changes)
        return checkpoints.read_params(changed).revision

    name = revision()
    assert len(name) == 12
    assert name == revision(step=99)
    written = checkpoints.save_model(
        tmp_path / "m", dataclasses.replace(files, revision="")
    )
    assert name == written.revision == checkpoints.load_model(tmp_path / "m").revision
    params = checkpoints.flatten_params(files.params)
    params["encoder/encoder_norm/scale"] += 1e-6
    others = [
        revision(params=checkpoints.unflatten_params(params)),
        revision(query_length=9),
        revision(extra_ids=1),
        revision(vocabulary_proto=b"x"),
    ]
    assert len({name, *others}) == 5


def test_a_missing_shard_is_named(files, tmp_path):
    path = tmp_path / "shards"
    checkpoints.save_model(path, files, shard_bytes=1_000)
    lost = sorted(path.glob("model-*"))[1]
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=rf"{lost.name}: missing; copy it"):
        checkpoints.load_model(path)
    shutil.copy(path / sorted(path.glob("model-*"))[0].name, lost)
    with pytest.raises(ValueError, match=rf"{lost.name}: .* should be in this file"):
        checkpoints.load_model(path)
    lost.write_bytes(content)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of safetensors files"):
        checkpoints.load_model(path)


def test_a_workdir_loads_its_newest_checkpoint(files, workdir):
    loaded = checkpoints.load_model(workdir)
    assert_equal(loaded.params, jax.tree.map(lambda leaf: leaf + 4, files.params))
    assert loaded.step == 4
    assert loaded.revision == f"{files.revision}-4"


def _restore(files, workdir):
    checkpointer = checkpoints.Checkpointer(workdir, keep=3, keep_every_steps=0)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        (files.params, {"count": jax.device_put(np.int32(0))}),
    )
    try:
        return checkpointer.restore(*shapes)
    finally:
        checkpointer.close()


def _halve(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            os.truncate(path, path.stat().st_size // 2)


def test_the_training_state_is_restored_where_it_is_asked_for(files, workdir):
    step, params, opt_state, position = _restore(files, workdir)
    assert step == 4
    assert_equal(params, jax.tree.map(lambda leaf: leaf + 4, files.params))
    assert int(opt_state["count"]) == 4
    assert position == {"seed": 4}


@pytest.mark.parametrize("part", ["params", "opt_state", "position"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    files, workdir, caplog, part
):
    _halve(workdir / "checkpoints" / "4" / part)
    step, params, opt_state, position = _restore(files, workdir)
    assert (step, int(opt_state["count"]), position) == (2, 2, {"seed": 2})
    assert_equal(params, jax.tree.map(lambda leaf: leaf + 2, files.params))
    assert "Set aside in" in caplog.text
    assert checkpoints.latest_step(workdir) == 2
    assert (workdir / "damaged" / "4").is_dir()


def test_a_position_that_is_no_object_is_damage(files, workdir, caplog):
    for file in (workdir / "checkpoints" / "4" / "position").glob("metadata"):
        file.write_text("[]")
    assert _restore(files, workdir)[0] == 2
    assert "its position is a list" in caplog.text


def test_when_no_checkpoint_can_be_read_none_is_touched(files, workdir):
    _halve(workdir / "checkpoints")
    with pytest.raises(ValueError, match="4: this checkpoint cannot be read"):
        _restore(files, workdir)
    assert checkpoints.latest_step(workdir) == 4
    assert not (workdir / "damaged").exists()


def test_a_full_disk_while_saving_names_what_is_whole(files, workdir, monkeypatch):
    checkpointer = checkpoints.Checkpointer(workdir, keep=3, keep_every_steps=0)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: writing: No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(OSError, match=r"that of step 4 is whole.*same command goes on"):
        checkpointer.save(6, files.params, {"count": np.int32(6)}, {})
    checkpointer.close()


def test_old_checkpoints_go_but_for_those_that_are_kept(files, tmp_path):
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=2, keep_every_steps=4)
    for step in range(2, 13, 2):
        checkpointer.save(step, files.params, {"count": np.int32(step)}, {})
    checkpointer.close()
    names = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {4, 8, 10, 12}


def test_unfinished_checkpoints_are_removed_and_never_loaded(workdir):
    unfinished = workdir / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    assert checkpoints.latest_step(workdir) == 4
    checkpoints.remove_temporary(workdir)
    assert not unfinished.exists()


def test_a_truncated_model_is_named(folder):
    path = folder / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: not a whole safetensors"
    ):
        checkpoints.load_model(folder)


def test_a_truncated_checkpoint_is_named_with_the_remedy(workdir):
    for path in (workdir / "checkpoints" / "4" / "params").rglob("*"):
        if path.is_file() and path.stat().st_size:
            os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        ValueError, match=r"4/params: this checkpoint.*truncated.*Remove"
    ):
        checkpoints.load_model(workdir)


def test_damaged_settings_are_named(folder):
    path = folder / checkpoints.MODEL_JSON
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"gecko\.json: not JSON .*damaged"):
        checkpoints.load_model(folder)


def test_a_newer_format_is_refused(folder):
    path = folder / checkpoints.MODEL_JSON
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"format_version 99.*upgrade"):
        checkpoints.load_model(folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (checkpoints.MODEL_JSON, "neither a training workdir nor a model folder"),
        (checkpoints.VOCABULARY, r"vocabulary\.model is missing"),
        (WEIGHTS, "no finished checkpoint yet"),
    ],
)
def test_a_missing_file_is_named(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(folder)


def test_parameters_of_another_size_are_listed_together(files):
    params = checkpoints.flatten_params(files.params)
    kernel = params.pop("encoder/layers_0/attention/query/kernel")
    params["encoder/layers_1/attention/query/kernel"] = kernel
    params["token_embedder/embedding"] = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"set config\.model to the sizes") as error:
        checkpoints.check_params(
            checkpoints.unflatten_params(params), CONFIG, source="here"
        )
    lines = str(error.value).splitlines()
    assert "  missing encoder/layers_0/attention/query/kernel (8, 8)" in lines
    assert "  unexpected encoder/layers_1/attention/query/kernel (8, 8)" in lines
    assert any("wrong shape" in line and "(3, 3)" in line for line in lines)


def test_a_full_disk_leaves_the_folder_as_it_was(files, folder, monkeypatch):
    before = (folder / WEIGHTS).read_bytes()

    def full(path, _):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(tensors, "_write_file", full)
    with pytest.raises(OSError, match=r"no disk space left.*nothing half-written"):
        checkpoints.save_model(folder, files)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_workdir_is_not_overwritten(files, workdir):
    with pytest.raises(ValueError, match="not empty and not a model folder"):
        checkpoints.save_model(workdir, files)
    assert checkpoints.latest_step(workdir) == 4


def test_a_folder_of_something_else_is_not_overwritten(files, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not a model folder"):
        checkpoints.save_model(tmp_path, files)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_export_that_holds_more_than_a_model_folder_is_not_overwritten(
    files, folder
):
    checkpoints.save_model(folder, files)  # One of ours is replaced,
    (folder / "modules.json").write_text("[]")  # not that of sentence-transformers.
    with pytest.raises(ValueError, match=r"not a model folder \(modules\.json\)"):
        checkpoints.save_model(folder, files)
    assert (folder / "modules.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "step: missing"),
        ({"mrl_dims": [4, 16]}, r"none may exceed model\.embedding_dim=8"),
        ({"query_length": "64"}, "query_length='64': must be int"),
        ({"text_format": {"qurey": "{text}"}}, "unexpected keyword argument 'qurey'"),
        ({"model": {"num_layers": 1}}, "missing"),
        ({"model": {"num_heads": 0}}, r"model\.num_heads=0: must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(folder, change, message):
    path = folder / checkpoints.MODEL_JSON
    values = json.loads(path.read_text()) | change
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"(?s)gecko\.json has faults.*{message}"):
        checkpoints.load_model(folder)


def test_another_vocabulary_is_refused(folder):
    path = folder / checkpoints.VOCABULARY
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="not the vocabulary that the model was"):
        checkpoints.load_model(folder)


def test_a_checkpoint_that_cannot_be_written_names_the_remedy(
    files, tmp_path, monkeypatch
):
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=1, keep_every_steps=0)

    def full(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(OSError, match=r"checkpoints: .*No space left.*Make room"):
        checkpointer.save(1, files.params, {}, {})
