"""Checkpoints of a run: round trips, and what happens to damaged ones."""

import os

import jax
import numpy as np
import pytest

from gecko_jax import checkpoints


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


def test_the_training_state_is_restored_where_it_is_asked_for(small_files, workdir):
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
    with pytest.raises(OSError, match=r"that of step 4 is whole.*same command goes on"):
        checkpointer.save(6, small_files.params, {"count": np.int32(6)}, {})
    checkpointer.close()


def test_old_checkpoints_go_but_for_those_that_are_kept(small_files, tmp_path):
    checkpointer = checkpoints.Checkpointer(tmp_path, keep=2, keep_every_steps=4)
    for step in range(2, 13, 2):
        checkpointer.save(step, small_files.params, {"count": np.int32(step)}, {})
    checkpointer.close()
    names = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {4, 8, 10, 12}


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
