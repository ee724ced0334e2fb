"""Checkpoints of a run: round trips, and the treatment of damaged ones."""

import json
import os
import random
import shutil

import jax
import numpy as np
import pytest
import samples

from gecko_jax.formats import checkpoint_damage, checkpoints, parameters
from gecko_jax.io import checksums
from gecko_jax.parallel import sharding


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _restore(small_files, workdir):
    checkpointer = checkpoints.Checkpointer(workdir, keep=3, keep_every_steps=0)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        (small_files.params, {"count": jax.device_put(np.int32(0))}),
    )
    try:
        return checkpointer.restore(*shapes)
    finally:
        checkpointer.close()


def _halve(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            os.truncate(path, path.stat().st_size // 2)


def test_the_training_state_is_restored_on_its_shardings(small_files, workdir):
    step, params, opt_state, position = _restore(small_files, workdir)
    assert step == 4
    assert_equal(params, jax.tree.map(lambda leaf: leaf + 4, small_files.params))
    assert int(opt_state["count"]) == 4
    assert position == {"seed": 4}


@pytest.mark.parametrize("part", ["params", "opt_state", "position"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    small_files, workdir, caplog, part
):
    _halve(workdir / "checkpoints" / "4" / part)
    step, params, opt_state, position = _restore(small_files, workdir)
    assert (step, int(opt_state["count"]), position) == (2, 2, {"seed": 2})
    assert_equal(params, jax.tree.map(lambda leaf: leaf + 2, small_files.params))
    assert "Set aside in" in caplog.text
    assert checkpoints.latest_step(workdir) == 2
    assert (workdir / "damaged" / "4").is_dir()


def test_a_position_that_is_no_object_is_damage(small_files, workdir, caplog):
    for file in (workdir / "checkpoints" / "4" / "position").glob("metadata"):
        file.write_text("[]")
    assert _restore(small_files, workdir)[0] == 2
    assert "its position is a list" in caplog.text


def test_when_no_checkpoint_can_be_read_none_is_touched(small_files, workdir):
    _halve(workdir / "checkpoints")
    with pytest.raises(ValueError, match="4: this checkpoint is damaged"):
        _restore(small_files, workdir)
    assert checkpoints.latest_step(workdir) == 4
    assert not (workdir / "damaged").exists()


def test_a_full_disk_while_saving_names_what_is_whole(
    small_files, workdir, monkeypatch
):
    checkpointer = checkpoints.Checkpointer(workdir, keep=3, keep_every_steps=0)

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: writing: No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(OSError, match=r"that of step 4 is intact.*same command again"):
        checkpointer.save(6, small_files.params, {"count": np.int32(6)}, {})
    checkpointer.close()


def test_old_checkpoints_go_but_for_those_that_are_kept(small_files, tmp_path):
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=2, keep_every_steps=4)
    for step in range(2, 13, 2):
        checkpointer.save(step, small_files.params, {"count": np.int32(step)}, {})
    checkpointer.close()
    names = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {4, 8, 10, 12}


def test_a_position_is_saved_as_it_was_when_saving_began(small_files, tmp_path):
    """Orbax writes in the background, while the run changes its counters."""
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=1, keep_every_steps=0)
    sums = {"loss": 0.0, "many": list(range(10_000))}
    for step in range(1, 6):
        sums["loss"] = float(step)
        state = (small_files.params, {"count": np.int32(step)})
        checkpointer.save(step, *state, {"window": {"sums": sums}})
        sums["loss"] = -1.0
        checkpointer.wait()
        path = tmp_path / checkpoints.CHECKPOINTS / str(step) / "position" / "metadata"
        position = json.loads(path.read_text())
        assert position["window"]["sums"]["loss"] == step
        checksums.check_object(path, position, "")
    checkpointer.close()


def test_unfinished_checkpoints_are_removed_and_never_loaded(workdir):
    unfinished = workdir / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    assert checkpoints.latest_step(workdir) == 4
    checkpoints.remove_temporary(workdir)
    assert not unfinished.exists()


def test_a_checkpoint_that_cannot_be_written_names_the_remedy(
    small_files, tmp_path, monkeypatch
):
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=1, keep_every_steps=0)

    def full(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpointer._manager, "save", full)
    with pytest.raises(OSError, match=r"checkpoints: .*No space left.*Make room"):
        checkpointer.save(1, small_files.params, {}, {})


def _tensorstore(state, text):
    """An error of TensorStore, wrapped as Orbax does."""
    try:
        raise ValueError(f"{state}: Error reading {text}")
    except ValueError as error:
        wrapped = Exception("Encountered error while reading array index")
        wrapped.__cause__ = error
        return wrapped


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("No module named 'tensorstore'"), "ImportError: No module"),
        (MemoryError("Unable to allocate 9 GiB"), "MemoryError: Unable to allocate"),
        (PermissionError(13, "Permission denied", "d/0"), "PermissionError: .*denied"),
        (OSError(5, "Input/output error", "d/0"), "OSError: .*Input/output error"),
        (TimeoutError("timed out"), "TimeoutError: timed out"),
        (FileNotFoundError(2, "No such file", "/lib/libcurl.so"), "libcurl.so"),
        (KeyError("a new field"), "KeyError: 'a new field'"),
        (_tensorstore("UNAVAILABLE", '"gs://b/d/0": HTTP 503'), "UNAVAILABLE: .*503"),
        (_tensorstore("PERMISSION_DENIED", '"d/0"'), "PERMISSION_DENIED"),
        (_tensorstore("RESOURCE_EXHAUSTED", '"d/0"'), "RESOURCE_EXHAUSTED"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_that_proves_no_damage_stops_the_run_and_moves_nothing(
    small_files, workdir, monkeypatch, error, message
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.restore", fail)
    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
    before = sorted(workdir.rglob("*"))
    pattern = (
        rf"checkpoints/4: this checkpoint cannot be read \(.*{message}.*nothing proves"
    )
    with pytest.raises(ValueError, match=pattern):
        _restore(small_files, workdir)
    opened = checkpoints.open_params(workdir, 4)
    with pytest.raises(ValueError, match=pattern):
        opened["projection_layer/kernel"].read()
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.parametrize("state", ["DATA_LOSS", "OUT_OF_RANGE", "NOT_FOUND"])
def test_data_errors_of_tensorstore_are_damage(state):
    assert checkpoint_damage._IS_DAMAGE.search(
        str(_tensorstore(state, "d/0").__cause__)
    )


def _files_that_decide(folder):
    """Files of a checkpoint, without those that Orbax never reads."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("commit_success.txt", "_sharding")
    )


@pytest.mark.parametrize("change", ["missing", "short", "flip"])
def test_a_changed_file_is_set_aside_or_changes_nothing(
    small_files, workdir, tmp_path, change
):
    """Two flips for each file, one truncation or removal."""
    rng = random.Random(change)
    folder, good = workdir / "checkpoints" / "4", tmp_path / "good"
    shutil.copytree(workdir, good)
    expected = jax.tree.map(lambda leaf: leaf + 4, small_files.params)
    aside = 0
    for name in _files_that_decide(folder) * (2 if change == "flip" else 1):
        path = folder / name
        content = bytearray(path.read_bytes())
        if change == "missing":
            path.unlink()
        elif change == "short":
            os.truncate(path, len(content) // 2)
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        step, params, opt_state, position = _restore(small_files, workdir)
        if step == 4:
            assert (int(opt_state["count"]), position) == (4, {"seed": 4}), name
            assert_equal(params, expected)
        else:
            assert step == 2, name
            assert (workdir / "damaged" / "4").is_dir(), name
            aside += 1
        shutil.rmtree(workdir)
        shutil.copytree(good, workdir)
    assert aside >= 4


def test_flipped_weights_of_a_workdir_are_reported(small_files, workdir, tmp_path):
    rng = random.Random(0)
    expected = parameters.flatten(samples.load_model(workdir).params)
    mesh = sharding.build_mesh(data=2, fsdp=2, tensor=2)
    reported = 0
    for path in sorted((workdir / "checkpoints" / "4" / "params").rglob("d/*")):
        content = path.read_bytes()
        for number in range(4):
            changed = bytearray(content)
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            params, message = {}, None
            try:
                loaded = samples.load_model(workdir, mesh if number % 2 else None)
                params = parameters.flatten(loaded.params)
            except ValueError as error:
                message = str(error)
            if message is None:
                assert_equal(params, expected)
            else:
                assert "checkpoints/4: this checkpoint is damaged" in message
                reported += 1
        path.write_bytes(content)
    assert reported >= 4


def test_a_checkpoint_of_one_mesh_is_verified_on_another(small_files, tmp_path):
    """Digests do not depend on the sharding."""
    flat = parameters.flatten(small_files.params)

    def place(sizes):
        mesh = sharding.build_mesh(**sizes)
        from gecko_jax.models import dual_encoder

        shardings = sharding.param_shardings(
            *dual_encoder.abstract_params(small_files.encoder_config), mesh
        )
        return jax.device_put(parameters.unflatten(flat), shardings)

    first = place({"data": 2, "fsdp": 2, "tensor": 2})
    second = place({"data": 1, "fsdp": 8, "tensor": 1})
    count = {"count": jax.numpy.int32(1)}
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=1, keep_every_steps=0)
    checkpointer.save(1, first, count, {})
    checkpointer.wait()
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        (second, count),
    )
    restored = checkpointer.restore(*shapes)
    checkpointer.close()
    assert restored is not None
    table = restored[1]["token_embedder"]["embedding"]
    assert table.sharding == second["token_embedder"]["embedding"].sharding
    assert_equal(parameters.flatten(restored[1]), flat)


def test_a_checkpoint_without_digests_is_restored(
    small_files, workdir, monkeypatch, caplog
):
    """Earlier versions wrote such checkpoints."""
    monkeypatch.setattr(checksums, "seal", lambda values: {"seed": values["seed"]})
    checkpointer = checkpoints.Checkpointer(workdir, keep=3, keep_every_steps=0)
    params = jax.tree.map(lambda leaf: leaf + 6, small_files.params)
    checkpointer.save(6, params, {"count": np.int32(6)}, {"seed": 6})
    checkpointer.close()
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        step, restored, _, position = _restore(small_files, workdir)
    assert (step, position) == (6, {"seed": 6})
    assert_equal(restored, params)
    assert caplog.text.count("no checksum, so damage") == 1
