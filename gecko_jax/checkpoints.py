"""Checkpoints of a training run (Orbax): saved, restored, and set aside when damaged.

A training workdir:

    config.json       the resolved config
    gecko.json        what a model is besides its parameters (see `model_folder`)
    vocabulary.model  the SentencePiece vocabulary
    checkpoints/N/    parameters, optimizer state and data position after step N
    damaged/N/        checkpoints that could not be read, set aside
    metrics.jsonl     one line per logged step; tensorboard/ holds the same

Parameter names are T5X's (`encoder/layers_0/attention/query/kernel`).
"""

import contextlib
import errno
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from gecko_jax import files, tensors

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"


class Checkpointer:
    """Saves and restores the training state of one workdir.

    Saving is asynchronous: `save` returns when the arrays are copied, `close` waits for
    the files. A step's folder has its final name only when it is whole.
    """

    def __init__(
        self, workdir: str | pathlib.Path, *, keep: int, keep_every_steps: int
    ):
        """Opens the workdir.

        Args:
            workdir: The run's folder.
            keep: Newest checkpoints that stay.
            keep_every_steps: Multiples of this stay too; 0 for none.
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

    def latest_step(self) -> int | None:
        """Returns the newest step that is whole, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, params: Any, opt_state: Any, position: dict[str, Any]
    ) -> None:
        """Starts to write the state after `step` updates.

        Args:
            step: Number of updates.
            params: Parameters.
            opt_state: Optimizer state.
            position: What the data stream and the run need to go on, as JSON.

        Raises:
            OSError: This checkpoint or the one before could not be written.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            position=ocp.args.JsonSave(position),
        )
        with self._explain_writing():
            self._manager.save(step, args=args)

    def restore(
        self, params: Any, opt_state: Any
    ) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that can be read, onto the shardings given.

        Newer ones, which a fault of the disk or a kill has damaged, are set aside in
        `damaged/` of the workdir, with a warning.

        Args:
            params: Shapes and shardings of the parameters.
            opt_state: Shapes and shardings of the optimizer state.

        Returns:
            Step, parameters, optimizer state and position; None if there is nothing.

        Raises:
            ValueError: There are checkpoints, and none of them can be read.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            position=ocp.args.JsonRestore(),
        )
        faults: dict[int, ValueError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            fault = restored = None
            try:
                restored = self._restore(step, args)
            except ValueError as error:
                fault = error
            # All processes must go back to the same step.
            if _is_anywhere(fault is not None):
                faults[step] = fault or ValueError(f"{step}: unread elsewhere")
                continue
            assert restored is not None
            self._set_aside(faults, step)
            return step, restored.params, restored.opt_state, restored.position
        if faults:
            raise faults[max(faults)]
        return None

    def _set_aside(self, faults: Mapping[int, ValueError], used: int) -> None:
        if not faults:
            return
        folder = self._workdir / DAMAGED
        for fault in faults.values():
            logging.warning(
                "%s. Set aside in %s; going on from %d", fault, folder, used
            )
        self._manager.close()
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            for step in faults:
                shutil.rmtree(folder / str(step), ignore_errors=True)
                (self._workdir / CHECKPOINTS / str(step)).rename(folder / str(step))
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._open()

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            restored: Any = self._manager.restore(step, args=args)
            if not isinstance(restored.position, dict):
                raise TypeError(f"its position is {files.kind(restored.position)}")
            return restored
        except Exception as error:
            raise ValueError(
                f"{self._manager.directory / str(step)}: this checkpoint cannot be "
                f"read ({_first_line(error)}); it is truncated, or of another model "
                "or optimizer"
            ) from error

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            OSError: The last checkpoint could not be written.
        """
        with self._explain_writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for writers and lets go of the workdir."""
        with self._explain_writing():
            self._manager.close()

    @contextlib.contextmanager
    def _explain_writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise several kinds.
            last = latest_step(self._workdir)
            kept = f"that of step {last} is whole" if last else "none is whole yet"
            raise OSError(
                errno.EIO,
                f"{self._workdir / CHECKPOINTS}: a checkpoint could not be written "
                f"({_first_line(error)}); {kept}. Make room on the disk "
                "(checkpoint.keep, checkpoint.keep_every_steps), and the same command "
                "goes on",
            ) from error


def latest_step(workdir: str | pathlib.Path) -> int | None:
    """Returns the newest whole checkpoint of a workdir, or None."""
    return max(all_steps(workdir), default=None)


def all_steps(workdir: str | pathlib.Path) -> list[int]:
    """Returns the steps of the whole checkpoints of a workdir, rising."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def restore_params(
    workdir: str | pathlib.Path, step: int, shardings: Any
) -> dict[str, Any]:
    """Reads the parameters of one checkpoint onto a mesh, whatever mesh wrote it.

    Args:
        workdir: The run's folder.
        step: One that is whole.
        shardings: Where each parameter goes.
    """
    restore_args = jax.tree.map(
        lambda place: ocp.ArrayRestoreArgs(sharding=place), shardings
    )
    with _reading_params(workdir, step) as (handler, folder):
        return handler.restore(
            folder, args=ocp.args.PyTreeRestore(restore_args=restore_args)
        )


def open_params(workdir: str | pathlib.Path, step: int) -> dict[str, tensors.Tensor]:
    """Opens the parameters of one checkpoint, to be read one at a time.

    Args:
        workdir: The run's folder.
        step: One that is whole.

    Returns:
        By name, `encoder/layers_0/...`.
    """
    with _reading_params(workdir, step) as (handler, folder):
        found = jax.tree_util.tree_leaves_with_path(handler.metadata(folder).tree)
        keys = [tuple(str(part.key) for part in path) for path, _ in found]
        shapes = [tuple(leaf.shape) for _, leaf in found]

    def open_leaf(key: tuple[str, ...], shape: tuple[int, ...]) -> tensors.Tensor:
        def nest(leaf: Any) -> Any:
            for part in reversed(key):
                leaf = {part: leaf}
            return leaf

        def read() -> np.ndarray:
            with _reading_params(workdir, step) as (handler, folder):
                args = ocp.args.PyTreeRestore(
                    item=nest(0),
                    restore_args=nest(ocp.RestoreArgs(restore_type=np.ndarray)),
                    partial_restore=True,
                )
                (leaf,) = jax.tree.leaves(handler.restore(folder, args=args))
                return np.asarray(leaf, np.float32)

        return tensors.Tensor(shape, read)

    return {
        "/".join(key): open_leaf(key, shape)
        for key, shape in zip(keys, shapes, strict=True)
    }


@contextlib.contextmanager
def _reading_params(
    workdir: str | pathlib.Path, step: int
) -> Iterator[tuple[ocp.PyTreeCheckpointHandler, epath.Path]]:
    """Gives what reads the parameters, and their folder; explains what fails."""
    folder = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step) / "params"
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            yield handler, epath.Path(folder)
    except Exception as error:
        raise ValueError(
            f"{folder}: this checkpoint cannot be read ({_first_line(error)}); it is "
            f"truncated. Remove {folder.parent} to use the one before"
        ) from error


def remove_temporary(workdir: str | pathlib.Path) -> None:
    """Removes checkpoints that a killed run left half-written."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    for child in folder.glob("*.orbax-checkpoint-tmp*"):
        logging.info("removing the unfinished checkpoint %s", child.name)
        shutil.rmtree(child, ignore_errors=True)


def _is_anywhere(fact: bool) -> bool:
    """Whether a fact holds on any process."""
    if jax.process_count() == 1:
        return fact
    return bool(np.any(multihost_utils.process_allgather(np.asarray(fact))))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
