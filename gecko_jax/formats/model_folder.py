"""Model folders: all of a trained model, in safetensors and JSON.

Made by `gecko export`, opened by `gecko_jax.load`, independent of any training config:

    gecko.json         what a model is besides its parameters (see `ModelFiles`)
    vocabulary.model   the SentencePiece vocabulary
    model.safetensors  the parameters under T5X's names, or shards (see `tensors`)

A training workdir has the first two, and its newest checkpoint in place of the third
(see `checkpoints`).
"""

import copy
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

import gecko_jax.config
from gecko_jax.formats import checkpoints, parameters, pretrained, tensors
from gecko_jax.io import checksums, field_rules, inputs, reading, writing
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.text import text_formats, vocabularies

# 2: parameters may lie in shards, and an encoder may do without a projection.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MODEL_JSON = "gecko.json"
VOCABULARY = "vocabulary.model"
# What a model folder may hold, as patterns.
FILES = (MODEL_JSON, VOCABULARY, f"model*{tensors.SUFFIX}*")
# What training writes about itself, and cards and averages read; there may be more.
_PROVENANCE = {
    "tasks": field_rules.optional(
        field_rules.map_of(
            field_rules.object_of(
                {
                    "licence": field_rules.optional(field_rules.TEXT),
                    "num_examples": field_rules.optional(field_rules.COUNT),
                }
            )
        )
    ),
    "config": field_rules.optional(
        field_rules.object_of({"loss": field_rules.optional(field_rules.OBJECT)})
    ),
    "started_from": field_rules.optional(field_rules.TEXT),
}
_ADDED_TOKEN = {"content": str, "id": int, "single_word": bool, "normalized": bool}
# What gecko.json must hold; the sizes of `model` obey the config's own rules.
_RULES = {
    "model": gecko_jax.config.Rule(dict),
    "text_format": gecko_jax.config.Rule(dict),
    "vocabulary_sha256": gecko_jax.config.Rule(str),
    "extra_ids": gecko_jax.config.SCHEMA["data.extra_ids"],
    "mrl_dims": gecko_jax.config.SCHEMA["loss.mrl_dims"],
    "query_length": gecko_jax.config.SCHEMA["data.query_length"],
    "passage_length": gecko_jax.config.SCHEMA["data.passage_length"],
    "step": gecko_jax.config.Rule(int),
    "revision": gecko_jax.config.Rule(str),
    "provenance": gecko_jax.config.Rule(
        dict,
        "must hold tasks with their licences and sizes, config and started_from as "
        "training writes them, or none of them",
        lambda facts: not field_rules.faults(facts, _PROVENANCE),
    ),
    "added_tokens": gecko_jax.config.Rule(
        tuple,
        "must be objects with content, id, single_word and normalized",
        lambda tokens: all(
            isinstance(token, dict)
            and {key: type(value) for key, value in token.items()} == _ADDED_TOKEN
            for token in tokens
        ),
    ),
}
_COPY_AGAIN = "copy it again from where the model was made"
# Keys that are left out where there is nothing to say.
_OPTIONAL = {"added_tokens"}
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
        added_tokens: Tokens of an imported tokenizer that the SentencePiece model does
            not know.
    """

    params: dict[str, Any]
    encoder_config: dual_encoder.EncoderConfig
    text_format: text_formats.TextFormat
    vocabulary_proto: bytes
    extra_ids: int
    mrl_dims: tuple[int, ...]
    query_length: int
    passage_length: int
    step: int
    revision: str
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added_tokens: tuple[vocabularies.AddedToken, ...] = ()

    def build_vocabulary(self) -> vocabularies.Vocabulary:
        """Returns what cuts texts into tokens."""
        return vocabularies.Vocabulary(
            self.vocabulary_proto, self.extra_ids, self.added_tokens
        )


def save_model(
    path: str | pathlib.Path,
    model_files: ModelFiles,
    shard_bytes: int = tensors.SHARD_BYTES,
    dtype: str = "float32",
) -> ModelFiles:
    """Writes a model folder, whole or not at all; parameters go one at a time.

    Args:
        path: The folder.
        model_files: The model.
        shard_bytes: Largest file of parameters.
        dtype: One of `tensors.DTYPES`. Less than float32 rounds the parameters, which
            makes another model of them, with a revision of its own.

    Returns:
        What was written; a model without a revision has got one.

    Raises:
        ValueError: The folder is there, and is not a model folder or holds more.
    """
    path = pathlib.Path(path)
    if dtype != "float32":
        rounded = {
            name: tensors.as_tensor(leaf).round(dtype)
            for name, leaf in parameters.flatten(model_files.params).items()
        }
        model_files = dataclasses.replace(
            model_files, params=parameters.unflatten(rounded), revision=""
        )
    # Exports to other formats also hold gecko.json and safetensors, and more.
    writing.check_replaceable(path, [MODEL_JSON, f"model{tensors.SUFFIX}*"], FILES)
    params, digests = _digested(model_files)
    with writing.write_folder(path) as folder:
        tensors.write(folder, params, shard_bytes=shard_bytes, dtype=dtype)
        model_files = _name_revision(model_files, digests)
        write_model_json(folder, model_files, tensors.names(folder))
    return model_files


def write_model_json(
    folder: pathlib.Path, model_files: ModelFiles, weights: Sequence[str] = ()
) -> None:
    """Writes `gecko.json` and the vocabulary; a workdir has no more of a model.

    Args:
        folder: The folder.
        model_files: The model.
        weights: Names of the files of parameters, whose checksums are written too.
    """
    with writing.write_file(folder / VOCABULARY) as temporary:
        temporary.write_bytes(model_files.vocabulary_proto)
    values = {
        "format_version": FORMAT_VERSION,
        **settings(model_files),
        "vocabulary_sha256": hashlib.sha256(model_files.vocabulary_proto).hexdigest(),
        "step": model_files.step,
        "revision": model_files.revision,
        "provenance": dict(model_files.provenance),
        "versions": versions(),
        checksums.FILES: checksums.of_files(folder, [VOCABULARY, *weights]),
    }
    values = checksums.seal(values)
    with writing.write_file(folder / MODEL_JSON) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def settings(model_files: ModelFiles) -> dict[str, Any]:
    """Returns all but the parameters and the vocabulary that decides an embedding."""
    values = {
        "model": dual_encoder.config_to_dict(model_files.encoder_config),
        "text_format": model_files.text_format.to_dict(),
        "extra_ids": model_files.extra_ids,
        "mrl_dims": list(model_files.mrl_dims),
        "query_length": model_files.query_length,
        "passage_length": model_files.passage_length,
    }
    added = [dataclasses.asdict(token) for token in model_files.added_tokens]
    # Left out where empty, so that the revisions of other models stay as they were.
    return values | ({"added_tokens": added} if added else {})


def load_model(
    path: str | pathlib.Path, mesh: jax.sharding.Mesh | None = None
) -> ModelFiles:
    """Reads a model folder, or the newest checkpoint of a training workdir.

    Args:
        path: The folder, or the name of a model that comes along (`pretrained`).
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
    """Opens what `load_model` reads; the parameters are `Tensor`s still.

    Those of a workdir are not when there is a mesh: each process reads its own part.
    """
    path = pathlib.Path(pretrained.find(path))
    model_files = load_settings(path)
    config = model_files.encoder_config
    if tensors.has_tensors(path):
        params = parameters.unflatten(tensors.read(path))
        step, revision = model_files.step, model_files.revision
    else:
        step = checkpoints.latest_step(path)
        if step is None:
            raise ValueError(
                f"{path}: no finished checkpoint yet; train until the first one "
                "(config.checkpoint.every_steps)"
            )
        if mesh is None:
            params = parameters.unflatten(checkpoints.open_params(path, step))
        else:
            params = checkpoints.restore_params(path, step, _shardings(config, mesh))
        revision = f"{model_files.revision}-{step}"
    parameters.check(params, config, source=str(path))
    return dataclasses.replace(
        model_files, params=require_finite(params), step=step, revision=revision
    )


def open_step(path: str | pathlib.Path, step: int) -> ModelFiles:
    """Opens one checkpoint of a training workdir; its parameters are `Tensor`s still.

    Raises:
        ValueError: It is not there or cannot be read; names those that are.
    """
    model_files = load_settings(path)
    there = checkpoints.all_steps(path)
    if step not in there:
        raise ValueError(
            f"{path}: no checkpoint of step {step}; there are those of "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    params = parameters.unflatten(checkpoints.open_params(path, step))
    parameters.check(params, model_files.encoder_config, source=f"{path}, step {step}")
    return dataclasses.replace(
        model_files,
        params=require_finite(params),
        step=step,
        revision=f"{model_files.revision}-{step}",
    )


def require_finite(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters, each of which is refused as it is read if not finite.

    Parameters that are not `Tensor`s are already in memory and are checked now.

    Raises:
        ValueError: A parameter holds NaN or infinity; names it.
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
    """Reads the parameters that are `Tensor`s still, one at a time.

    Args:
        model_files: Of `open_model`, or opened from another library's format.
        mesh: Where each goes as soon as it is read; None leaves them in numpy arrays.
    """
    shardings = {}
    if mesh is not None:
        shardings = parameters.flatten(_shardings(model_files.encoder_config, mesh))
    read, digests = _digested(model_files)
    flat = parameters.flatten(model_files.params)
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
        _name_revision(model_files, digests), params=parameters.unflatten(flat)
    )


def _shardings(
    config: dual_encoder.EncoderConfig, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    return sharding.param_shardings(*dual_encoder.abstract_params(config), mesh)


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
        name: tensors.as_tensor(leaf)
        for name, leaf in parameters.flatten(model_files.params).items()
    }
    if not model_files.revision:
        flat = {name: digested(name, tensor) for name, tensor in flat.items()}
    return flat, digests


def _name_revision(model_files: ModelFiles, digests: Mapping[str, str]) -> ModelFiles:
    """Names a model that has no revision by everything that decides an embedding."""
    if model_files.revision:
        return model_files
    proto = hashlib.sha256(model_files.vocabulary_proto).hexdigest()
    content = json.dumps(
        [settings(model_files), proto, dict(sorted(digests.items()))],
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
        proto = writing.member(path, VOCABULARY).read_bytes()
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
    checksums.check_files(path, values, _COPY_AGAIN)
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
        added_tokens=values.get("added_tokens", ()),
    )


def _read_model_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the values, checked, `model` and `text_format` as their dataclasses."""
    try:
        values = reading.parse_json(writing.member(path, MODEL_JSON).read_text("utf-8"))
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
            f"{path / MODEL_JSON}: {inputs.kind(values)}, not an object; copy it again"
        )
    if values.get("format_version") not in READABLE_VERSIONS:
        raise ValueError(
            f"{path / MODEL_JSON}: format_version {values.get('format_version')}, "
            f"this gecko_jax reads {READABLE_VERSIONS}; upgrade gecko-jax"
        )
    # `values` are turned into dataclasses below.
    written = copy.deepcopy(values)
    # Folders of version 1 know nothing of the vocabulary's checksum.
    optional = set(_OPTIONAL)
    if values["format_version"] == 1:
        optional.add("vocabulary_sha256")
    faults = [f"{key}: missing" for key in _RULES.keys() - optional - values.keys()]
    faults += gecko_jax.config.find_wrong_values(_with_tuples(values), _RULES)
    if isinstance(values.get("model"), dict):
        # Not flattened: an object in place of a number would get another key.
        sizes = _with_tuples(values["model"], "model.")
        faults += gecko_jax.config.find_wrong_values(sizes, gecko_jax.config.SCHEMA)
    if not faults:
        sizes = values["model"]
        try:
            values["model"] = dual_encoder.EncoderConfig(**_with_tuples(sizes))
            values["text_format"] = text_formats.TextFormat.from_dict(
                values["text_format"]
            )
            values["added_tokens"] = tuple(
                vocabularies.AddedToken(**token)
                for token in values.get("added_tokens", ())
            )
        except (TypeError, ValueError) as error:
            # TextFormat.__init__() got an unexpected keyword argument 'x'
            faults = [str(error)]
        else:
            width = values["model"].embedding_dim
            if max(values["mrl_dims"]) > width:
                faults = [f"mrl_dims: none may exceed model.embedding_dim={width}"]
            if values["extra_ids"] > values["model"].vocab_size:
                faults.append(
                    f"extra_ids={values['extra_ids']}: must not exceed "
                    f"model.vocab_size={values['model'].vocab_size}"
                )
    if faults:
        raise ValueError(
            f"{path / MODEL_JSON} has faults; copy it again from where the model was "
            "made:\n  " + "\n  ".join(faults)
        )
    checksums.check_object(path / MODEL_JSON, written, _COPY_AGAIN)
    return values


def _with_tuples(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        prefix + key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }


def versions() -> dict[str, str]:
    """Returns the versions of the packages that decide a result."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
