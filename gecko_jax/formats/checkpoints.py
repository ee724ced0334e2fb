"""Checkpoints of a training run (Orbax): saving, restoring, setting damaged ones aside.

A training workdir:

    config.json       the resolved config
    gecko.json        settings of the model (see `model_folder`)
    vocabulary.model  SentencePiece vocabulary
    checkpoints/N/    parameters, optimizer state and data position after step N
    damaged/N/        checkpoints that were set aside
    metrics.jsonl     one line per logged step; tensorboard/ has the same values

Parameter names are T5X's (`encoder/layers_0/attention/query/kernel`).

The position of a checkpoint contains a digest of every array (see `checksums`), which
is verified after an array is restored. Damaged checkpoints (see `checkpoint_damage`)
are set aside.
"""

import contextlib
import errno
import functools
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils

from gecko_jax.formats import checkpoint_damage, tensors
from gecko_jax.io import checksums, inputs, reading, wording

CHECKPOINTS = "checkpoints"
_DAMAGED = "damaged"

# Key that `save` adds to the position of a run.
_DIGESTS = "digests"


class Checkpointer:
    """Saves and restores the training state of one workdir.

    Saving is asynchronous: `save` returns when the arrays are copied, `close` waits for
    the files. The folder of a step gets its final name when it is complete.
    """

    def __init__(
        self, workdir: str | pathlib.Path, *, keep: int, keep_every_steps: int
    ):
        """Opens the workdir of a run.

        `keep` is the number of newest checkpoints to keep. Multiples of
        `keep_every_steps` are kept, too; 0 for none.
        """
        self._workdir = pathlib.Path(workdir).absolute()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every_steps or None,
            enable_async_checkpointing=True,
        )
        self._open()

    def _open(self) -> None:
        self._manager = ocp.CheckpointManager(
            epath.Path(self._workdir / CHECKPOINTS),
            options=self._options,
            item_names=("params", "opt_state", "position"),
        )

    def save(
        self, step: int, params: Any, opt_state: Any, position: dict[str, Any]
    ) -> None:
        """Starts to write the state after `step` updates.

        `position` has the JSON values with which the data stream and the run continue.
        Raises OSError if this checkpoint or the previous one could not be written.
        """
        digests = checksums.of_arrays(_named(params=params, opt_state=opt_state))
        # Orbax writes in the background, while the caller changes its counters: write
        # a copy, the one that the checksum covers.
        position = json.loads(json.dumps({**position, _DIGESTS: digests}))
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            position=ocp.args.JsonSave(checksums.seal(position)),
        )
        with self._explain_writing():
            self._manager.save(step, args=args)

    def restore(
        self, params: Any, opt_state: Any
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """Restores the newest intact checkpoint, given the shapes and shardings.

        Newer checkpoints, which a disk error or a kill has damaged, are moved to
        `damaged/` of the workdir, with a warning. If one could not be read, or all are
        damaged, all stay in place, and a ValueError says why. Returns step, parameters,
        optimizer state and position; None without checkpoints.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            position=ocp.args.JsonRestore(),
        )
        damaged: dict[int, ValueError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder = _folder(self._workdir, step)
            error: ValueError | None = None
            restored: Any = None
            try:
                with checkpoint_damage.explain_reading(folder):
                    restored = self._manager.restore(step, args=args)
                _check_position(folder, restored.position)
            except ValueError as raised:
                error = raised
            is_damaged = isinstance(error, checkpoint_damage.DamagedError)
            # All processes must restore the same step.
            if _any_process(error is not None and not is_damaged):
                elsewhere = "another process cannot read it; see its log"
                raise error or ValueError(f"{folder}: {elsewhere}")
            if _any_process(is_damaged):
                elsewhere = "damaged, as another process reports"
                damaged[step] = error or ValueError(f"{folder}: {elsewhere}")
                continue
            position = dict(restored.position)
            arrays = _named(params=restored.params, opt_state=restored.opt_state)
            try:
                # All processes compute the digests together and get the same result.
                _check_digests(folder, position.pop(_DIGESTS, None), arrays)
            except checkpoint_damage.DamagedError as raised:
                # The traceback would keep the arrays in memory.
                damaged[step] = raised.with_traceback(None)
                continue
            if damaged:
                self._set_aside(damaged, step)
            position.pop(checksums.CHECKSUM, None)
            return step, restored.params, restored.opt_state, position
        if damaged:
            raise damaged[max(damaged)]
        return None

    def _set_aside(self, damaged: Mapping[int, ValueError], restored_step: int) -> None:
        target = self._workdir / _DAMAGED
        for error in damaged.values():
            logging.warning(
                "%s. Set aside in %s; continuing from %d", error, target, restored_step
            )
        self._manager.close()
        if jax.process_index() == 0:
            target.mkdir(exist_ok=True)
            for step in damaged:
                shutil.rmtree(target / str(step), ignore_errors=True)
                _folder(self._workdir, step).rename(target / str(step))
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._open()

    def wait(self) -> None:
        """Waits for the last checkpoint; raises OSError if it could not be written."""
        with self._explain_writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writers and closes the workdir."""
        with self._explain_writing():
            self._manager.close()

    @contextlib.contextmanager
    def _explain_writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise several types.
            last = latest_step(self._workdir)
            newest = (
                f"that of step {last} is intact" if last else "none is complete yet"
            )
            raise OSError(
                errno.EIO,
                f"{self._workdir / CHECKPOINTS}: a checkpoint could not be written "
                f"({wording.first_line(error)}); {newest}. Make room on the disk "
                "(checkpoint.keep, checkpoint.keep_every_steps), then run the same "
                "command again to continue",
            ) from error


def _folder(workdir: str | pathlib.Path, step: int) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step)


def latest_step(workdir: str | pathlib.Path) -> int | None:
    """Returns the newest complete checkpoint of a workdir, or None."""
    return max(all_steps(workdir), default=None)


def all_steps(workdir: str | pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints of a workdir, in order."""
    children = pathlib.Path(workdir, CHECKPOINTS).glob("*")
    return sorted(int(child.name) for child in children if child.name.isdigit())


def remove_temporary(workdir: str | pathlib.Path) -> None:
    """Removes incomplete checkpoints of a killed run."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    for child in folder.glob("*.orbax-checkpoint-tmp*"):
        logging.info("removing the incomplete checkpoint %s", child.name)
        shutil.rmtree(child, ignore_errors=True)


def restore_params(
    workdir: str | pathlib.Path, step: int, shardings: Any
) -> dict[str, Any]:
    """Reads the parameters of a complete checkpoint onto any mesh."""
    folder = _folder(workdir, step)
    args = ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(lambda s: ocp.ArrayRestoreArgs(sharding=s), shardings)
    )
    return _restore_params(folder, _read_digests(folder), args)


def open_params(workdir: str | pathlib.Path, step: int) -> dict[str, tensors.Tensor]:
    """Opens the parameters of a complete checkpoint, to be read one at a time."""
    folder = _folder(workdir, step)
    digests = _read_digests(folder)
    with _open_handler(folder) as (handler, path):
        leaves: Any = traverse_util.flatten_dict(handler.metadata(path).tree)

    def read(keys: tuple[str, ...]) -> np.ndarray:
        nest = traverse_util.unflatten_dict
        args = ocp.args.PyTreeRestore(
            item=nest({keys: 0}),
            restore_args=nest({keys: ocp.RestoreArgs(restore_type=np.ndarray)}),
            partial_restore=True,
        )
        (leaf,) = jax.tree.leaves(_restore_params(folder, digests, args))
        return np.asarray(leaf, np.float32)

    return {
        "/".join(keys): tensors.Tensor(tuple(leaf.shape), functools.partial(read, keys))
        for keys, leaf in leaves.items()
    }


def _restore_params(
    folder: pathlib.Path, digests: dict[str, int] | None, args: Any
) -> dict[str, Any]:
    """Restores parameters and verifies their digests."""
    with _open_handler(folder) as (handler, path):
        params = handler.restore(path, args=args)
    _check_digests(folder, digests, _named(params=params))
    return params


@contextlib.contextmanager
def _open_handler(
    folder: pathlib.Path,
) -> Iterator[tuple[ocp.PyTreeCheckpointHandler, epath.Path]]:
    """Yields Orbax's reader of the parameters, and their folder."""
    with (
        checkpoint_damage.explain_reading(folder),
        contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler,
    ):
        yield handler, epath.Path(folder / "params")


def _read_digests(folder: pathlib.Path) -> dict[str, int] | None:
    """Returns the digests of a checkpoint; None for one of a version without them."""
    with checkpoint_damage.explain_reading(folder):
        position = reading.parse_json((folder / "position" / "metadata").read_bytes())
    _check_position(folder, position)
    return position.get(_DIGESTS)


def _named(**trees: Any) -> dict[str, Any]:
    """Returns {"params/encoder/...": leaf} of all trees."""
    return {
        f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for item, tree in trees.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _check_position(folder: pathlib.Path, position: Any) -> None:
    if not isinstance(position, dict):
        raise checkpoint_damage.damaged(
            folder, f"its position is {inputs.kind(position)}"
        )
    path = folder / "position" / "metadata"
    try:
        checksums.check_object(path, position, checkpoint_damage.remedy(folder))
    except ValueError as error:
        raise checkpoint_damage.DamagedError(str(error)) from None


def _check_digests(
    folder: pathlib.Path, digests: dict[str, int] | None, arrays: Mapping[str, Any]
) -> None:
    if digests is None:  # `_check_position` has logged it.
        return
    computed = checksums.of_arrays(arrays)
    wrong = [name for name, digest in computed.items() if digests.get(name) != digest]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise checkpoint_damage.damaged(
            folder, f"{wrong[0]}{more} does not have its stored digest"
        )


def _any_process(value: bool) -> bool:
    """Whether the value is true in any process."""
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))
