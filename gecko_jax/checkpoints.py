"""Training checkpoints (Orbax) and model folders (safetensors and JSON).

A training workdir:

    config.json       the resolved config
    gecko.json        what a model is besides its parameters (see `ModelFiles`)
    vocabulary.model  the SentencePiece vocabulary
    checkpoints/N/    parameters, optimizer state and data position after step N
    damaged/N/        checkpoints that could not be read, set aside
    metrics.jsonl     one line per logged step; tensorboard/ holds the same

A model folder, made by `gecko export` and independent of any training config:

    gecko.json  vocabulary.model  model.safetensors (or shards, see `tensors`)

Parameter names are T5X's in both (`encoder/layers_0/attention/query/kernel`).
"""

import contextlib
import dataclasses
import errno
import fnmatch
import hashlib
import importlib.metadata
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
from jax.experimental import multihost_utils

from gecko_jax import config as config_lib
from gecko_jax import files, model, sharding, tensors, text

# 2: parameters may lie in shards, and an encoder may do without a projection.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MODEL_JSON = "gecko.json"
VOCABULARY = "vocabulary.model"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
# What gecko.json must hold; the sizes of `model` obey the config's own rules.
_RULES = {
    "model": config_lib.Rule(dict),
    "text_format": config_lib.Rule(dict),
    "vocabulary_sha256": config_lib.Rule(str),
    "extra_ids": config_lib.SCHEMA["data.extra_ids"],
    "mrl_dims": config_lib.SCHEMA["loss.mrl_dims"],
    "query_length": config_lib.SCHEMA["data.query_length"],
    "passage_length": config_lib.SCHEMA["data.passage_length"],
    "step": config_lib.Rule(int),
    "revision": config_lib.Rule(str),
    "provenance": config_lib.Rule(dict),
}
_VERSIONED = ("gecko-jax", "jax", "jaxlib", "flax", "sentencepiece", "numpy")


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A trained model: everything that decides an embedding.

    Attributes:
        params: Parameters by T5X name, nested dicts; arrays, or `tensors.Tensor`
            where they are not read yet.
        encoder_config: Sizes and settings.
        text_format: How queries and passages are written.
        vocabulary_proto: The serialized SentencePiece model.
        extra_ids: Sentinels after its pieces (T5: 100).
        mrl_dims: Prefixes of the embedding that were trained.
        query_length: Longest query, in tokens, EOS included.
        passage_length: Longest passage, in tokens, EOS included.
        step: Optimizer updates behind the parameters.
        revision: Changes with the parameters; keys caches and indexes. Empty until
            an imported model is read, then made from its content.
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


def save_model(
    path: str | pathlib.Path,
    model_files: ModelFiles,
    shard_bytes: int = tensors.SHARD_BYTES,
) -> ModelFiles:
    """Writes a model folder, whole or not at all; parameters go one at a time.

    Returns:
        What was written; a model without a revision has got one.

    Raises:
        ValueError: The folder is there and is not a model folder.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        _refuse_something_else(path)
    params, digests = _digested(model_files)
    with files.write_folder(path) as folder:
        tensors.write(folder, params, shard_bytes=shard_bytes)
        model_files = _name_revision(model_files, digests)
        write_model_json(folder, model_files)
    return model_files


def _refuse_something_else(path: pathlib.Path) -> None:
    """Refuses a folder with anything in it that `save_model` does not write."""
    names = {child.name for child in path.iterdir()}
    # Exports to other formats also hold gecko.json and safetensors, and more.
    others = sorted(
        name
        for name in names - {MODEL_JSON, VOCABULARY}
        if not fnmatch.fnmatch(name, f"model*{tensors.SUFFIX}*")
    )
    is_model = MODEL_JSON in names and tensors.has_tensors(path)
    if names and (others or not is_model):
        found = f" ({others[0]})" if others else ""
        raise ValueError(
            f"{path}: not empty and not a model folder{found}; choose another folder"
        )


def write_model_json(folder: pathlib.Path, model_files: ModelFiles) -> None:
    """Writes `gecko.json` and the vocabulary; a workdir has no more of a model."""
    with files.write_file(folder / VOCABULARY) as temporary:
        temporary.write_bytes(model_files.vocabulary_proto)
    values = {
        "format_version": FORMAT_VERSION,
        **_settings(model_files),
        "vocabulary_sha256": hashlib.sha256(model_files.vocabulary_proto).hexdigest(),
        "step": model_files.step,
        "revision": model_files.revision,
        "provenance": dict(model_files.provenance),
        "versions": versions(),
    }
    with files.write_file(folder / MODEL_JSON) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def _settings(model_files: ModelFiles) -> dict[str, Any]:
    """Returns all but the parameters and the vocabulary that decides an embedding."""
    return {
        "model": model.config_to_dict(model_files.encoder_config),
        "text_format": model_files.text_format.to_dict(),
        "extra_ids": model_files.extra_ids,
        "mrl_dims": list(model_files.mrl_dims),
        "query_length": model_files.query_length,
        "passage_length": model_files.passage_length,
    }


def load_model(
    path: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None
) -> ModelFiles:
    """Reads a model folder, or the newest checkpoint of a training workdir.

    Args:
        path: The folder.
        mesh: Where the parameters go, shared as in training; None leaves them in
            numpy arrays.

    Raises:
        ValueError: Nothing to load there, or files that are missing, truncated or do
            not fit each other; names all of it.
    """
    return read_params(open_model(path, mesh), mesh)


def open_model(
    path: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None
) -> ModelFiles:
    """Opens what `load_model` reads; a folder's parameters are `Tensor`s still."""
    path = pathlib.Path(path)
    model_files = load_settings(path)
    config = model_files.encoder_config
    if tensors.has_tensors(path):
        params = unflatten_params(tensors.read(path))
        step, revision = model_files.step, model_files.revision
    else:
        step = latest_step(path)
        if step is None:
            raise ValueError(
                f"{path}: no finished checkpoint yet; train until the first one "
                "(config.checkpoint.every_steps)"
            )
        shardings = None if mesh is None else _shardings(config, mesh)
        params = restore_params(path, step, shardings)
        revision = f"{model_files.revision}-{step}"
    check_params(params, config, source=str(path))
    return dataclasses.replace(model_files, params=params, step=step, revision=revision)


def read_params(
    model_files: ModelFiles, mesh: jax.sharding.Mesh | None = None
) -> ModelFiles:
    """Reads the parameters that are `Tensor`s still, one at a time.

    Args:
        model_files: Of `open_model`, or opened from another library's format.
        mesh: Where each goes as soon as it is read; None leaves them in numpy arrays.
    """
    shardings = {}
    if mesh is not None:
        shardings = flatten_params(_shardings(model_files.encoder_config, mesh))
    read, digests = _digested(model_files)
    flat = flatten_params(model_files.params)
    for name, tensor in sorted(read.items(), key=lambda item: item[1].source):
        is_read = not isinstance(flat[name], tensors.Tensor)
        if is_read and model_files.revision:
            continue
        array = tensor.read()
        if mesh is not None and not is_read:
            flat[name] = jax.make_array_from_callback(
                array.shape, shardings[name], array.__getitem__
            )
        elif not is_read:
            flat[name] = array
    return dataclasses.replace(
        _name_revision(model_files, digests), params=unflatten_params(flat)
    )


def _shardings(config: model.EncoderConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return sharding.param_shardings(*model.abstract_params(config), mesh)


def _digested(
    model_files: ModelFiles,
) -> tuple[dict[str, tensors.Tensor], dict[str, str]]:
    """Returns the parameters, and a table their checksums enter as they are read.

    Only a model that has no revision yet needs them.
    """
    digests: dict[str, str] = {}

    def digested(name: str, tensor: tensors.Tensor) -> tensors.Tensor:
        def read() -> np.ndarray:
            array = np.ascontiguousarray(tensor.read())
            digests[name] = hashlib.sha256(
                array.reshape(-1).view(np.uint8).data
            ).hexdigest()
            return array

        return dataclasses.replace(tensor, read=read)

    flat = {
        name: leaf if isinstance(leaf, tensors.Tensor) else tensors.from_array(leaf)
        for name, leaf in flatten_params(model_files.params).items()
    }
    if not model_files.revision:
        flat = {name: digested(name, tensor) for name, tensor in flat.items()}
    return flat, digests


def _name_revision(model_files: ModelFiles, digests: Mapping[str, str]) -> ModelFiles:
    """Names a model that has no revision by everything that decides an embedding."""
    if model_files.revision:
        return model_files
    vocabulary = hashlib.sha256(model_files.vocabulary_proto).hexdigest()
    content = json.dumps(
        [_settings(model_files), vocabulary, dict(sorted(digests.items()))],
        sort_keys=True,
    )
    revision = hashlib.sha256(content.encode()).hexdigest()[:12]
    return dataclasses.replace(model_files, revision=revision)


def load_settings(path: str | pathlib.Path) -> ModelFiles:
    """Reads everything but the parameters, which are left empty.

    Raises:
        ValueError: Files are missing or damaged.
    """
    path = pathlib.Path(path)
    values = _read_model_json(path)
    try:
        proto = (path / VOCABULARY).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: {VOCABULARY} is missing; copy it from where the model was made"
        ) from None
    digest = hashlib.sha256(proto).hexdigest()
    if values.get("vocabulary_sha256", digest) != digest:
        raise ValueError(
            f"{path / VOCABULARY}: not the vocabulary that the model was trained with; "
            "copy it again from where the model was made"
        )
    return ModelFiles(
        params={},
        encoder_config=values["model"],
        text_format=values["text_format"],
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
    params: Mapping[str, Any],
    config: model.EncoderConfig,
    *,
    source: str,
    remedy: str = "set config.model to the sizes of the checkpoint",
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
            f"{source}: the parameters do not fit the model; {remedy}:\n  "
            + "\n  ".join(faults)
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
            restored = self._manager.restore(step, args=args)
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
    folder = pathlib.Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        return None
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()]
    return max(steps, default=None)


def restore_params(
    workdir: str | pathlib.Path, step: int, shardings: Any = None
) -> dict[str, Any]:
    """Reads the parameters of one checkpoint, whatever mesh wrote it.

    Args:
        workdir: The run's folder.
        step: One that is whole.
        shardings: Where each parameter goes; None gives numpy arrays.
    """
    folder = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step) / "params"
    try:
        handler = ocp.PyTreeCheckpointHandler()
        if shardings is None:
            restore_args = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                handler.metadata(epath.Path(folder)).tree,
            )
        else:
            restore_args = jax.tree.map(
                lambda place: ocp.ArrayRestoreArgs(sharding=place), shardings
            )
        restored = handler.restore(
            epath.Path(folder), args=ocp.args.PyTreeRestore(restore_args=restore_args)
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
    """Returns the values, checked, `model` and `text_format` as their dataclasses."""
    try:
        values = json.loads((path / MODEL_JSON).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path}: no {MODEL_JSON} here, so this is neither a training workdir nor "
            "a model folder; check the path"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{path / MODEL_JSON}: not JSON ({error}); the file is damaged, copy it "
            "again"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path / MODEL_JSON}: {files.kind(values)}, not an object; copy it again"
        )
    if values.get("format_version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{path / MODEL_JSON}: format_version {values.get('format_version')}, "
            f"this gecko_jax reads {READABLE_VERSIONS}; upgrade gecko-jax"
        )
    # Folders of version 1 know nothing of the vocabulary's checksum.
    optional = {"vocabulary_sha256"} if values["format_version"] == 1 else set()
    faults = [f"{key}: missing" for key in _RULES.keys() - optional - values.keys()]
    flat = config_lib.flatten(values)
    faults += config_lib.find_wrong_values(
        {key: flat.get(key, value) for key, value in values.items()}, _RULES
    )
    faults += config_lib.find_wrong_values(
        flat, {k: rule for k, rule in config_lib.SCHEMA.items() if k[:6] == "model."}
    )
    if not faults:
        sizes = values["model"]
        try:
            sizes["mlp_activations"] = tuple(sizes.get("mlp_activations", ()))
            values["model"] = model.EncoderConfig(**sizes)
            values["text_format"] = text.TextFormat.from_dict(values["text_format"])
        except (TypeError, ValueError) as error:
            # TextFormat.__init__() got an unexpected keyword argument 'x'
            faults = [str(error)]
        else:
            width = values["model"].embedding_dim
            if max(values["mrl_dims"]) > width:
                faults = [f"mrl_dims: none may exceed model.embedding_dim={width}"]
    if faults:
        raise ValueError(
            f"{path / MODEL_JSON} has faults; copy it again from where the model was "
            "made:\n  " + "\n  ".join(faults)
        )
    return values


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
