"""Checkpoints of a training run (Orbax): saved, restored, and set aside when damaged.

A training workdir:

    config.json       the resolved config
    gecko.json        what a model is besides its parameters (see `model_folder`)
    vocabulary.model  the SentencePiece vocabulary
    checkpoints/N/    parameters, optimizer state and data position after step N
    damaged/N/        checkpoints that could not be read, set aside
    metrics.jsonl     one line per logged step; tensorboard/ holds the same

Parameter names are T5X's (`encoder/layers_0/attention/query/kernel`).

The position of a checkpoint also holds a digest of every array (see `checksums`), which
is verified after an array is restored, where it lies. A checkpoint is *damaged* when
its own files prove it: one is missing, is short, does not decode, or holds something
else than was written. Any other fault, of the network or of the machine, says nothing
about the files, and leaves them as they are.
"""

import contextlib
import errno
import json
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from gecko_jax.formats import tensors
from gecko_jax.io import checksums, inputs, reading

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"

# Names in a position that are ours, not the run's.
_DIGESTS = "digests"

# How TensorStore says that bytes are missing or do not decode. Other states, such as
# UNAVAILABLE and PERMISSION_DENIED, are about the way to the bytes.
_IS_DAMAGE = re.compile(
    r"^(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|FAILED_PRECONDITION): |"
    r"^Error .*(Error decoding|; at byte \d+)|"
    r"tree structures do not match"
)

# Outcomes of a restore; processes go on with the greatest of all.
_WHOLE, _DAMAGE, _FAULT = range(3)


class DamagedError(ValueError):
    """A checkpoint whose files prove that they are not what was written."""


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
        digests = checksums.of_arrays(_named(params=params, opt_state=opt_state))
        position = checksums.seal({**position, _DIGESTS: digests})
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
        """Restores the newest checkpoint that is whole, onto the shardings given.

        Newer ones, which a fault of the disk or a kill has damaged, are set aside in
        `damaged/` of the workdir, with a warning.

        Args:
            params: Shapes and shardings of the parameters.
            opt_state: Shapes and shardings of the optimizer state.

        Returns:
            Step, parameters, optimizer state and position; None if there is nothing.

        Raises:
            ValueError: A checkpoint could not be read, or there are checkpoints and all
                of them are damaged. All stay where they are.
        """
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            opt_state=ocp.args.StandardRestore(opt_state),
            position=ocp.args.JsonRestore(),
        )
        faults: dict[int, ValueError] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            fault = restored = None
            outcome = _WHOLE
            try:
                restored = self._restore(step, args)
            except DamagedError as error:
                fault, outcome = error, _DAMAGE
            except ValueError as error:
                fault, outcome = error, _FAULT
            # All processes must go back to the same step.
            worst = _greatest(outcome)
            if worst == _FAULT:
                raise fault or ValueError(
                    f"{self._folder(step)}: another process cannot read it and says why"
                )
            if worst == _WHOLE:
                assert restored is not None
                try:
                    # A collective: every process comes to the same result.
                    self._verify(step, restored)
                except DamagedError as error:
                    fault, worst = error, _DAMAGE
            if worst == _DAMAGE:
                faults[step] = fault or ValueError(
                    f"{self._folder(step)}: another process found it damaged"
                )
                continue
            assert restored is not None
            self._set_aside(faults, step)
            position = dict(restored.position)
            for name in (_DIGESTS, checksums.CHECKSUM):
                position.pop(name, None)
            return step, restored.params, restored.opt_state, position
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

    def _folder(self, step: int) -> pathlib.Path:
        return self._workdir / CHECKPOINTS / str(step)

    def _restore(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            restored: Any = self._manager.restore(step, args=args)
        except Exception as error:
            raise _explain_reading(self._folder(step), error) from error
        _check_position(self._folder(step), restored.position)
        return restored

    def _verify(self, step: int, restored: Any) -> None:
        """Compares what was restored with the digests of what was saved."""
        _check_digests(
            self._folder(step),
            restored.position.get(_DIGESTS),
            _named(params=restored.params, opt_state=restored.opt_state),
        )

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
    folder = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step)
    digests = _read_digests(folder)
    with _reading_params(folder) as (handler, place):
        params = handler.restore(
            place, args=ocp.args.PyTreeRestore(restore_args=restore_args)
        )
    _check_digests(folder, digests, _named(params=params))
    return params


def open_params(workdir: str | pathlib.Path, step: int) -> dict[str, tensors.Tensor]:
    """Opens the parameters of one checkpoint, to be read one at a time.

    Args:
        workdir: The run's folder.
        step: One that is whole.

    Returns:
        By name, `encoder/layers_0/...`.
    """
    folder = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step)
    digests = _read_digests(folder)
    with _reading_params(folder) as (handler, place):
        found = jax.tree_util.tree_leaves_with_path(handler.metadata(place).tree)
        keys = [tuple(str(part.key) for part in path) for path, _ in found]
        shapes = [tuple(leaf.shape) for _, leaf in found]

    def open_leaf(key: tuple[str, ...], shape: tuple[int, ...]) -> tensors.Tensor:
        def nest(leaf: Any) -> Any:
            for part in reversed(key):
                leaf = {part: leaf}
            return leaf

        def read() -> np.ndarray:
            with _reading_params(folder) as (handler, place):
                args = ocp.args.PyTreeRestore(
                    item=nest(0),
                    restore_args=nest(ocp.RestoreArgs(restore_type=np.ndarray)),
                    partial_restore=True,
                )
                restored = handler.restore(place, args=args)
            _check_digests(folder, digests, _named(params=restored))
            (leaf,) = jax.tree.leaves(restored)
            return np.asarray(leaf, np.float32)

        return tensors.Tensor(shape, read)

    return {
        "/".join(key): open_leaf(key, shape)
        for key, shape in zip(keys, shapes, strict=True)
    }


@contextlib.contextmanager
def _reading_params(
    folder: pathlib.Path,
) -> Iterator[tuple[ocp.PyTreeCheckpointHandler, epath.Path]]:
    """Gives what reads the parameters, and their folder; explains what fails."""
    try:
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            yield handler, epath.Path(folder / "params")
    except Exception as error:
        raise _explain_reading(folder, error) from error


def _read_digests(folder: pathlib.Path) -> dict[str, int] | None:
    """Returns the digests of a checkpoint; None for one of a version without them."""
    try:
        position = reading.parse_json((folder / "position" / "metadata").read_bytes())
    except Exception as error:
        raise _explain_reading(folder, error) from error
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
    path = folder / "position" / "metadata"
    if not isinstance(position, dict):
        raise _damaged(folder, f"its position is {inputs.kind(position)}")
    try:
        checksums.check_object(path, position, _remedy(folder))
    except ValueError as error:
        raise DamagedError(str(error)) from None


def _check_digests(
    folder: pathlib.Path, digests: dict[str, int] | None, arrays: Mapping[str, Any]
) -> None:
    if digests is None:  # `_check_position` has said so.
        return
    found = checksums.of_arrays(arrays)
    wrong = [name for name, digest in found.items() if digests.get(name) != digest]
    if wrong:
        more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
        raise _damaged(folder, f"{wrong[0]}{more} does not have the digest it had")


def _explain_reading(folder: pathlib.Path, error: Exception) -> ValueError:
    """Returns the error to raise where a checkpoint could not be read."""
    causes = list(_causes(error))
    # Orbax wraps what TensorStore says, which is at the end.
    first = f"{type(causes[-1]).__name__}: {_first_line(causes[-1])}"
    proof = _proof_of_damage(folder, causes)
    if proof:
        return _damaged(folder, proof)
    return ValueError(
        f"{folder}: this checkpoint cannot be read ({first}), and nothing proves that "
        "its files are damaged, so they stay where they are; remove the cause and run "
        "the same command again"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        if not isinstance(seen, StopIteration):  # How Python's JSON parser ends.
            yield seen
        seen = seen.__cause__ or (
            None if seen.__suppress_context__ else seen.__context__
        )


def _proof_of_damage(folder: pathlib.Path, causes: list[BaseException]) -> str:
    """Returns what proves that the files are damaged, "" where nothing does."""
    proofs = []
    for cause in causes:
        # A file that is not there, where the folder is, is lost. Every other fault of
        # the system, of the memory or of the installation is no fault of the files.
        if isinstance(cause, FileNotFoundError) and folder.is_dir():
            if str(folder) in str(cause):
                proofs.append(_first_line(cause))
                continue
            return ""
        if isinstance(cause, OSError | ImportError | MemoryError):
            return ""
        is_not_json = isinstance(cause, UnicodeDecodeError | json.JSONDecodeError)
        is_said = isinstance(cause, ValueError) and _IS_DAMAGE.search(str(cause))
        if is_not_json or is_said:
            proofs.append(_first_line(cause))
    return _fault_of_metadata(folder) or (proofs[-1] if proofs else "")


def _fault_of_metadata(folder: pathlib.Path) -> str:
    """Returns what is wrong with the JSON in which Orbax describes the arrays."""
    paths = [
        path for item in ("params", "opt_state") for path in _metadata(folder / item)
    ]
    for path in (*paths, folder / "position" / "metadata"):
        try:
            values = reading.parse_json(path.read_bytes())
            if path.name == "_METADATA":
                for entry in values["tree_metadata"].values():
                    _need(entry["value_metadata"], "value_type", "skip_deserialize")
                    for key in entry["key_metadata"]:
                        _need(key, "key", "key_type")
            elif path.parent.name == "array_metadatas":
                for entry in values["array_metadatas"]:
                    _need(entry["array_metadata"], "param_name", "write_shape")
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{path}: {type(error).__name__}: {_first_line(error)}"
    return ""


def _need(values: Mapping[str, Any], *names: str) -> None:
    for name in names:
        values[name]


def _metadata(item: pathlib.Path) -> list[pathlib.Path]:
    return [item / "_METADATA", *sorted(item.glob("array_metadatas/*"))]


def _remedy(folder: pathlib.Path) -> str:
    return f"move {folder} away to use the one before"


def _damaged(folder: pathlib.Path, proof: str) -> DamagedError:
    return DamagedError(
        f"{folder}: this checkpoint is damaged ({proof}); {_remedy(folder)}"
    )


def remove_temporary(workdir: str | pathlib.Path) -> None:
    """Removes checkpoints that a killed run left half-written."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    for child in folder.glob("*.orbax-checkpoint-tmp*"):
        logging.info("removing the unfinished checkpoint %s", child.name)
        shutil.rmtree(child, ignore_errors=True)


def _greatest(outcome: int) -> int:
    """Returns the greatest outcome of all processes."""
    if jax.process_count() == 1:
        return outcome
    return int(np.max(multihost_utils.process_allgather(np.asarray(outcome))))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # TensorStore adds the whole of its settings.
    return lines[0].partition(" [tensorstore_spec")[0][:300]
