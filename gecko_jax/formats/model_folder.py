"""Model folders: a trained model in safetensors and JSON.

Written by `gecko export`, opened by `gecko_jax.load`, independent of any training
config:

    gecko.json         settings of the model (see `model_json`)
    vocabulary.model   SentencePiece vocabulary; or tokenizer.json and its
                       tokenizer_config.json
    model.safetensors  parameters under T5X's names, or shards (see `safetensors_files`)

A training workdir has the first two, and checkpoints in place of the third (see
`checkpoints`).
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gecko_jax.formats import (
    checkpoints,
    model_json,
    parameters,
    pretrained,
    safetensors_files,
    tensors,
)
from gecko_jax.io import checksums, writing
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.text import text_formats, vocabularies

MODEL_JSON = model_json.NAME
VOCABULARY = vocabularies.MODEL_FILE
VOCABULARY_FILES = (VOCABULARY, vocabularies.JSON_FILE, vocabularies.JSON_CONFIG)
_WEIGHTS = f"model*{safetensors_files.SUFFIX}*"
# Patterns of the files in a model folder.
FILES = (MODEL_JSON, *VOCABULARY_FILES, _WEIGHTS)
_VERSIONED = "gecko-jax jax jaxlib flax sentencepiece numpy tokenizers"


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A trained model: everything that affects an embedding."""

    params: dict[str, Any]  # nested, by T5X name; arrays, or tensors to be read later
    encoder_config: dual_encoder.EncoderConfig
    text_format: text_formats.TextFormat  # templates or prompts
    vocabulary_proto: bytes  # bytes of the SentencePiece model or tokenizer.json
    extra_ids: int  # sentinels after the pieces of the SentencePiece model (T5: 100)
    mrl_dims: tuple[int, ...]  # trained prefixes of the embedding
    query_length: int  # longest query in tokens, EOS included
    passage_length: int
    step: int  # optimizer updates
    # Identifies the parameters; a key of caches and indexes. Empty until the parameters
    # of an imported model are read, then derived from its content.
    revision: str
    # Facts about the training: config, data, versions.
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Tokens of an imported tokenizer that the SentencePiece model does not have.
    added_tokens: tuple[vocabularies.AddedToken, ...] = ()
    tokenizer_config: bytes = b""  # bytes of the file next to a tokenizer.json

    def build_vocabulary(self) -> vocabularies.Vocabulary:
        """Returns the tokenizer of the model."""
        return vocabularies.build(
            self.vocabulary_proto,
            self.extra_ids,
            self.added_tokens,
            tokenizer_config=self.tokenizer_config,
        )


def vocabulary_name(content: bytes) -> str:
    """Returns the name of the file that holds a vocabulary with these bytes."""
    return vocabularies.JSON_FILE if content[:1] == b"{" else VOCABULARY


def save_model(
    path: str | pathlib.Path,
    model_files: ModelFiles,
    shard_bytes: int = safetensors_files.SHARD_BYTES,
    dtype: str = "float32",
) -> ModelFiles:
    """Writes a complete model folder or none, with one parameter in memory at a time.

    A `dtype` of float16 rounds the parameters, so the written model has another
    revision. An earlier model folder is replaced. Returns the written model, with a
    revision. Raises ValueError if the folder has other files than a model folder.
    """
    path = pathlib.Path(path)
    if dtype != "float32":
        flat = parameters.flatten_to_tensors(model_files.params)
        rounded = {name: tensor.round(dtype) for name, tensor in flat.items()}
        model_files = dataclasses.replace(
            model_files, params=parameters.unflatten(rounded), revision=""
        )
    # Exports in other formats have gecko.json and safetensors, too, and other files.
    markers = [MODEL_JSON, f"model{safetensors_files.SUFFIX}*"]
    writing.check_replaceable(path, markers, FILES)
    params, digests = _digested(model_files)
    with writing.write_folder(path) as folder:
        safetensors_files.write(folder, params, shard_bytes=shard_bytes, dtype=dtype)
        model_files = _with_revision(model_files, digests)
        write_model_json(folder, model_files, safetensors_files.names(folder))
    return model_files


def write_model_json(
    folder: pathlib.Path, model_files: ModelFiles, weights: Sequence[str] = ()
) -> None:
    """Writes the vocabulary and `gecko.json`, with the checksums of `weights`."""
    name = vocabulary_name(model_files.vocabulary_proto)
    files = {name: model_files.vocabulary_proto}
    if model_files.tokenizer_config:
        files[vocabularies.JSON_CONFIG] = model_files.tokenizer_config
    for name, content in files.items():
        with writing.write_file(folder / name) as temporary:
            temporary.write_bytes(content)
    values = {
        "format_version": model_json.FORMAT_VERSION,
        **settings(model_files),
        "vocabulary_sha256": hashlib.sha256(model_files.vocabulary_proto).hexdigest(),
        "step": model_files.step,
        "revision": model_files.revision,
        "provenance": dict(model_files.provenance),
        "versions": versions(),
        checksums.FILES: checksums.of_files(folder, [*files, *weights]),
    }
    checksums.write_object(folder / MODEL_JSON, values)


def settings(model_files: ModelFiles) -> dict[str, Any]:
    """Returns what affects an embedding besides the parameters and the vocabulary."""
    values = {
        "model": dataclasses.asdict(model_files.encoder_config),
        "text_format": model_files.text_format.to_dict(),
        "extra_ids": model_files.extra_ids,
        "mrl_dims": list(model_files.mrl_dims),
        "query_length": model_files.query_length,
        "passage_length": model_files.passage_length,
    }
    added = [dataclasses.asdict(token) for token in model_files.added_tokens]
    # An empty list would change the revisions of models without added tokens.
    return values | ({"added_tokens": added} if added else {})


def open_model(
    path: str | pathlib.Path,
    mesh: jax.sharding.Mesh | None = None,
    step: int | None = None,
) -> ModelFiles:
    """Opens a model folder or a training workdir; `read_params` reads the parameters.

    Raises a ValueError that names all missing, truncated or unfitting files.

    Args:
        path: The folder, or the name of a bundled model (`pretrained`).
        mesh: Mesh for the parameters of a workdir, whose checkpoint is restored at
            once, each process its own part; None reads them later.
        step: Checkpoint of a workdir; None takes the newest.
    """
    path = pathlib.Path(pretrained.find(path))
    model_files = load_settings(path)
    config, source = model_files.encoder_config, str(path)
    if step is None and safetensors_files.has_tensors(path):
        params = parameters.unflatten(safetensors_files.read(path))
    else:
        steps = checkpoints.all_steps(path)
        if not steps:
            raise ValueError(
                f"{path}: no finished checkpoint yet; train until the first one "
                "(config.checkpoint.every_steps)"
            )
        step = steps[-1] if step is None else step
        if step not in steps:
            raise ValueError(
                f"{path}: no checkpoint of step {step}; there are those of "
                f"{', '.join(map(str, steps))}"
            )
        if mesh is None:
            params = parameters.unflatten(checkpoints.open_params(path, step))
        else:
            params = checkpoints.restore_params(path, step, _shardings(config, mesh))
        model_files = dataclasses.replace(
            model_files, step=step, revision=f"{model_files.revision}-{step}"
        )
        source = f"{path}, step {step}"
    parameters.check(params, config, source=source)
    return dataclasses.replace(model_files, params=require_finite(params))


def require_finite(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters, which raise a ValueError if they are not finite.

    Arrays are checked at once, a `Tensor` when it is read.
    """
    checked = {}
    for name, leaf in parameters.flatten(params).items():
        if isinstance(leaf, tensors.Tensor):
            leaf = leaf.require_finite(name)
        elif not jnp.isfinite(leaf).all():
            raise ValueError(
                f"{name}: not all weights are finite; the training diverged, take an "
                "earlier checkpoint"
            )
        checked[name] = leaf
    return parameters.unflatten(checked)


def read_params(
    model_files: ModelFiles, mesh: jax.sharding.Mesh | None = None
) -> ModelFiles:
    """Reads each parameter that is a `Tensor` and places it on the mesh.

    Without a mesh, they are NumPy arrays.
    """
    shardings = {}
    if mesh is not None:
        shardings = parameters.flatten(_shardings(model_files.encoder_config, mesh))
    opened, digests = _digested(model_files)
    flat = parameters.flatten(model_files.params)
    for name, tensor in tensors.in_reading_order(opened):
        if not isinstance(flat[name], tensors.Tensor):
            if not model_files.revision:
                tensor.read()  # Arrays, too, enter the revision.
            continue
        array = flat[name] = tensor.read()
        if mesh is not None:
            flat[name] = jax.make_array_from_callback(
                array.shape, shardings[name], array.__getitem__
            )
    return dataclasses.replace(
        _with_revision(model_files, digests), params=parameters.unflatten(flat)
    )


def _shardings(
    config: dual_encoder.EncoderConfig, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    return sharding.param_shardings(*dual_encoder.abstract_params(config), mesh)


def _digested(
    model_files: ModelFiles,
) -> tuple[dict[str, tensors.Tensor], dict[str, str]]:
    """Returns the parameters, and a dict that gets the hash of each when it is read.

    The dict stays empty for a model that has a revision.
    """
    digests: dict[str, str] = {}

    def digested(name: str, tensor: tensors.Tensor) -> tensors.Tensor:
        def read() -> np.ndarray:
            array = np.ascontiguousarray(tensor.read())
            content = array.reshape(-1).view(np.uint8).data
            digests[name] = hashlib.sha256(content).hexdigest()
            return array

        return dataclasses.replace(tensor, read=read)

    flat = parameters.flatten_to_tensors(model_files.params)
    if not model_files.revision:
        flat = {name: digested(name, tensor) for name, tensor in flat.items()}
    return flat, digests


def _with_revision(model_files: ModelFiles, digests: Mapping[str, str]) -> ModelFiles:
    """Gives a model without a revision one that depends on its whole content."""
    if model_files.revision:
        return model_files
    vocabulary = model_files.vocabulary_proto + model_files.tokenizer_config
    proto = hashlib.sha256(vocabulary).hexdigest()
    content = json.dumps([settings(model_files), proto, digests], sort_keys=True)
    revision = hashlib.sha256(content.encode()).hexdigest()[:12]
    return dataclasses.replace(model_files, revision=revision)


def load_settings(path: str | pathlib.Path) -> ModelFiles:
    """Reads everything but the parameters, which are left empty.

    Raises ValueError if files are missing or damaged.
    """
    path = pathlib.Path(path)
    values = model_json.read(path)
    # An export of a SentencePiece model has a tokenizer.json, too, which is not listed.
    listed = values.get(checksums.FILES)
    listed = listed if isinstance(listed, dict) else {}
    name = vocabularies.JSON_FILE if vocabularies.JSON_FILE in listed else VOCABULARY
    try:
        proto = writing.member(path, name).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: {name} is missing; {model_json.COPY_AGAIN}"
        ) from None
    digest = hashlib.sha256(proto).hexdigest()
    if values.get("vocabulary_sha256", digest) != digest:
        raise ValueError(
            f"{path / name}: not the vocabulary that the model was trained with; "
            f"{model_json.COPY_AGAIN}"
        )
    checksums.check_files(path, values, model_json.COPY_AGAIN)
    config = b""
    if vocabularies.JSON_CONFIG in listed:
        config = writing.member(path, vocabularies.JSON_CONFIG).read_bytes()
    names = "text_format extra_ids mrl_dims query_length passage_length step revision"
    return ModelFiles(
        params={},
        encoder_config=values["model"],
        vocabulary_proto=proto,
        **{name: values[name] for name in names.split()},
        provenance=values["provenance"],
        added_tokens=values["added_tokens"],
        tokenizer_config=config,
    )


def versions() -> dict[str, str]:
    """Returns the versions of the packages that affect a result."""
    installed = {}
    for name in _VERSIONED.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
