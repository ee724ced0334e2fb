"""Training checkpoints (Orbax) and model folders (safetensors and JSON).

A training workdir:

    config.json       the resolved config
    gecko.json        what a model is besides its parameters (see `ModelFiles`)
    vocabulary.model  the SentencePiece vocabulary
    checkpoints/N/    parameters, optimizer state and data position after step N
    damaged/N/        checkpoints that could not be read, set aside
    metrics.jsonl     one line per logged step; tensorboard/ holds the same

A model folder, made by `gecko export` and independent of any training config:

    gecko.json  vocabulary.model  model.safetensors

Parameter names are T5X's in both (`encoder/layers_0/attention/query/kernel`).
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from gecko_jax import files, model, text

FORMAT_VERSION = 1
MODEL_JSON = "gecko.json"
VOCABULARY = "vocabulary.model"
PARAMS = "model.safetensors"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
_VERSIONED = ("gecko-jax", "jax", "jaxlib", "flax", "sentencepiece", "numpy")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A trained model: everything that decides an embedding.

    Attributes:
        params: Parameters by T5X name, nested dicts.
        encoder_config: Sizes and settings.
        text_format: How queries and passages are written.
        vocabulary_proto: The serialized SentencePiece model.
        extra_ids: Sentinels after its pieces (T5: 100).
        mrl_dims: Prefixes of the embedding that were trained.
        query_length: Longest query, in tokens, EOS included.
        passage_length: Longest passage, in tokens, EOS included.
        step: Optimizer updates behind the parameters.
        revision: Changes with the parameters; keys caches and indexes.
        provenance: Free facts about the training (config, data, versions).
    """

    params: dict[str, Any]
    encoder_config: model.EncoderConfig
    text_format: text.TextFormat
    vocabulary_proto: bytes
    extra_ids: int
    mrl_dims: tuple[int, ...]
    query_length: int
    passage_length: int
    step: int
    revision: str
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def save_model(path: str | pathlib.Path, model_files: ModelFiles) -> None:
    """Writes a model folder, whole or not at all.

    Raises:
        ValueError: The folder is there and is not a model folder.
    """
    path = pathlib.Path(path)
    if path.exists() and any(path.iterdir()) and not (path / PARAMS).exists():
        raise ValueError(
            f"{path}: not empty and not a model folder; choose another folder"
        )
    flat = flatten_params(model_files.params)
    tensors = {
        name: np.ascontiguousarray(jax.device_get(leaf)) for name, leaf in flat.items()
    }
    with files.write_folder(path) as folder:
        _write_safetensors(tensors, folder / PARAMS)
        write_model_json(folder, model_files)


def write_model_json(folder: pathlib.Path, model_files: ModelFiles) -> None:
    """Writes `gecko.json` and the vocabulary; a workdir has no more of a model."""
    with files.write_file(folder / VOCABULARY) as temporary:
        temporary.write_bytes(model_files.vocabulary_proto)
    values = {
        "format_version": FORMAT_VERSION,
        "model": model.config_to_dict(model_files.encoder_config),
        "text_format": model_files.text_format.to_dict(),
        "extra_ids": model_files.extra_ids,
        "mrl_dims": list(model_files.mrl_dims),
        "query_length": model_files.query_length,
        "passage_length": model_files.passage_length,
        "step": model_files.step,
        "revision": model_files.revision,
        "provenance": dict(model_files.provenance),
        "versions": versions(),
    }
    with files.write_file(folder / MODEL_JSON) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def load_model(path: str | pathlib.Path) -> ModelFiles:
    """Reads a model folder, or the newest checkpoint of a training workdir.

    Raises:
        ValueError: Nothing to load there, or files that are missing, truncated or do
            not fit each other; names all of it.
    """
    path = pathlib.Path(path)
    model_files = load_settings(path)
    if (path / PARAMS).exists():
        params = _read_safetensors(path / PARAMS)
        step, revision = model_files.step, model_files.revision
    else:
        step = latest_step(path)
        if step is None:
            raise ValueError(
                f"{path}: no finished checkpoint yet; train until the first one "
                "(config.checkpoint.every_steps)"
            )
        params = restore_params(path, step)
        revision = f"{model_files.revision}-{step}"
    check_params(params, model_files.encoder_config, source=str(path))
    return dataclasses.replace(model_files, params=params, step=step, revision=revision)


def load_settings(path: str | pathlib.Path) -> ModelFiles:
    """Reads everything but the parameters, which are left empty.

    Raises:
        ValueError: Files are missing or damaged.
    """
    path = pathlib.Path(path)
    values = _read_model_json(path)
    sizes = values["model"]
    sizes["mlp_activations"] = tuple(sizes["mlp_activations"])
    try:
        proto = (path / VOCABULARY).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: {VOCABULARY} is missing; copy it from where the model was made"
        ) from None
    return ModelFiles(
        params={},
        encoder_config=model.EncoderConfig(**sizes),
        text_format=text.TextFormat.from_dict(values["text_format"]),
        vocabulary_proto=proto,
        extra_ids=values["extra_ids"],
        mrl_dims=tuple(values["mrl_dims"]),
        query_length=values["query_length"],
        passage_length=values["passage_length"],
        step=values["step"],
        revision=values["revision"],
        provenance=values["provenance"],
    )


def check_params(
    params: Mapping[str, Any], config: model.EncoderConfig, *, source: str
) -> None:
    """Compares names and shapes with what the config asks for.

    Raises:
        ValueError: Lists missing, unexpected and wrong-shape parameters together.
    """
    expected = {
        name: leaf.shape
        for name, leaf in flatten_params(model.abstract_params(config)[0]).items()
    }
    found = {name: leaf.shape for name, leaf in flatten_params(params).items()}
    faults = [
        f"missing {name} {expected[name]}" for name in expected if name not in found
    ]
    faults += [
        f"unexpected {name} {found[name]}" for name in found if name not in expected
    ]
    faults += [
        f"wrong shape {name}: {found[name]}, needs {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if faults:
        raise ValueError(
            f"{source}: the parameters do not fit the model; set config.model to the "
            "sizes of the checkpoint:\n  " + "\n  ".join(faults)
        )


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"encoder/layers_0/...": leaf}."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten_params(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten_params`."""
    params: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a result."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
        with self._explain_full_disk():
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
            return self._manager.restore(step, args=args)
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
        with self._explain_full_disk():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Tensorstore's errors are no OSError; they hold the text of one.
            text = str(error)
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(number) in text or f"Errno {number}]" in text:
                    last = latest_step(self._workdir)
                    kept = f"that of step {last} is whole" if last else "none is whole"
                    raise OSError(
                        number,
                        f"{self._workdir / CHECKPOINTS}: {os.strerror(number).lower()} "
                        f"while saving; {kept}. Make room (checkpoint.keep, "
                        "checkpoint.keep_every_steps), and the same command goes on",
                    ) from error
            raise

    def close(self) -> None:
        """Waits for writers and lets go of the workdir."""
        self._manager.close()


def latest_step(workdir: str | pathlib.Path) -> int | None:
    """Returns the newest whole checkpoint of a workdir, or None."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return None
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()]
    return max(steps, default=None)


def restore_params(workdir: str | pathlib.Path, step: int) -> dict[str, Any]:
    """Reads the parameters of one checkpoint as numpy arrays, on any mesh."""
    folder = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step) / "params"
    try:
        handler = ocp.PyTreeCheckpointHandler()
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            handler.metadata(epath.Path(folder)).tree,
        )
        restored = handler.restore(
            epath.Path(folder), args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )
        handler.close()
        return restored
    except Exception as error:
        raise ValueError(
            f"{folder}: this checkpoint cannot be read ({_first_line(error)}); it is "
            f"truncated. Remove {folder.parent} to use the one before"
        ) from error


def _is_anywhere(fact: bool) -> bool:
    """Whether a fact holds on any process."""
    if jax.process_count() == 1:
        return fact
    return bool(np.any(multihost_utils.process_allgather(np.asarray(fact))))


def remove_temporary(workdir: str | pathlib.Path) -> None:
    """Removes checkpoints that a killed run left half-written."""
    folder = pathlib.Path(workdir) / CHECKPOINTS
    for child in folder.glob("*.orbax-checkpoint-tmp*"):
        logging.info("removing the unfinished checkpoint %s", child.name)
        shutil.rmtree(child, ignore_errors=True)


def _read_model_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads((path / MODEL_JSON).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no {MODEL_JSON} here, so this is neither a training workdir nor "
            "a model folder; check the path"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path / MODEL_JSON}: not JSON ({error.msg}, line {error.lineno}); the "
            "file is damaged, copy it again"
        ) from None
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path / MODEL_JSON}: format_version {values.get('format_version')}, "
            f"this gecko_jax reads {FORMAT_VERSION}; upgrade gecko-jax"
        )
    return values


def _write_safetensors(tensors: dict[str, Any], path: pathlib.Path) -> None:
    try:
        safetensors.numpy.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        # Its I/O errors are no OSError; whoever asks about the disk needs one.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _read_safetensors(path: pathlib.Path) -> dict[str, Any]:
    try:
        return unflatten_params(safetensors.numpy.load_file(path))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); copy it again"
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
