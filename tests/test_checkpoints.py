"""Checkpoints and model folders: round trips and honest refusals."""

import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from gecko_jax import checkpoints, model

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
    return dataclasses.replace(tiny_files, params=params, encoder_config=CONFIG)


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
    names = safetensors.numpy.load_file(folder / checkpoints.PARAMS)
    assert "encoder/layers_0/attention/query/kernel" in names


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
    path = folder / checkpoints.PARAMS
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
        (checkpoints.PARAMS, "no finished checkpoint yet"),
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
    before = (folder / checkpoints.PARAMS).read_bytes()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"no disk space left.*nothing half-written"):
        checkpoints.save_model(folder, files)
    assert (folder / checkpoints.PARAMS).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_of_something_else_is_not_overwritten(files, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and not a model folder"):
        checkpoints.save_model(tmp_path, files)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
