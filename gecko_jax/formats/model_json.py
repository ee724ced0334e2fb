"""`gecko.json`: the settings of a model, checked when they are read."""

import copy
import pathlib
from collections.abc import Mapping
from typing import Any

import gecko_jax.config
from gecko_jax.io import checksums, field_rules, reading, writing
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats, vocabularies

NAME = "gecko.json"
COPY_AGAIN = "copy it again from the original model"

# Version 2 permits shards of parameters, and an encoder without a projection.
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)

# Fields of the provenance that cards and averages read; there may be others.
_OBJECT = field_rules.optional(field_rules.OBJECT)
_TEXT = field_rules.optional(field_rules.TEXT)
_TASK = {"licence": _TEXT, "num_examples": field_rules.optional(field_rules.COUNT)}
_PROVENANCE = {
    "tasks": field_rules.optional(field_rules.map_of(field_rules.object_of(_TASK))),
    "config": field_rules.optional(field_rules.object_of({"loss": _OBJECT})),
    "started_from": _TEXT,
}
_ADDED_TOKEN = {"content": str, "id": int, "single_word": bool, "normalized": bool}
# Fields of gecko.json; the sizes in `model` have the rules of the training config.
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
        "tasks (with licence and num_examples), config and started_from must be as "
        "training writes them, or missing",
        lambda facts: not field_rules.find_errors(facts, _PROVENANCE),
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


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Reads and checks `gecko.json`; raises ValueError that lists all problems.

    `model`, `text_format` and `added_tokens` are returned as their dataclasses.
    """
    path = writing.member(folder, NAME)
    remedy = "the file is damaged, copy it again"
    try:
        values = reading.read_object(path, {}, remedy=remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: no {NAME} here, so this is neither a training workdir nor a "
            "model folder; check the path"
        ) from None
    version = values.get("format_version")
    if version not in _READABLE_VERSIONS:
        raise ValueError(
            f"{path}: format_version {version}, this gecko_jax reads "
            f"{_READABLE_VERSIONS}; upgrade gecko-jax"
        )
    written = copy.deepcopy(values)
    # Version 1 has no checksum of the vocabulary.
    optional = {"added_tokens"} | ({"vocabulary_sha256"} if version == 1 else set())
    problems = [f"{key}: missing" for key in _RULES.keys() - optional - values.keys()]
    problems += gecko_jax.config.find_wrong_values(_with_tuples(values), _RULES)
    if isinstance(values.get("model"), dict):
        # `config.flatten` would give an object in place of a number another key.
        sizes = _with_tuples(values["model"], "model.")
        problems += gecko_jax.config.find_wrong_values(sizes, gecko_jax.config.SCHEMA)
    problems = problems or _convert(values)
    if problems:
        raise ValueError(
            f"{path} has errors; {COPY_AGAIN}:\n  " + "\n  ".join(problems)
        )
    checksums.check_object(path, written, COPY_AGAIN)
    return values


def _convert(values: dict[str, Any]) -> list[str]:
    """Converts values to their dataclasses in place; returns the problems."""
    try:
        config = dual_encoder.EncoderConfig(**_with_tuples(values["model"]))
        values["model"] = config
        values["text_format"] = text_formats.TextFormat.from_dict(values["text_format"])
        values["added_tokens"] = tuple(
            vocabularies.AddedToken(**token) for token in values.get("added_tokens", ())
        )
    except (TypeError, ValueError) as error:
        # Such as "__init__() got an unexpected keyword argument 'x'".
        return [str(error)]
    values["mrl_dims"] = tuple(values["mrl_dims"])
    problems = []
    if max(values["mrl_dims"]) > (dim := config.embedding_dim):
        problems.append(f"mrl_dims: none may exceed model.embedding_dim={dim}")
    if (extra_ids := values["extra_ids"]) > config.vocab_size:
        limit = f"model.vocab_size={config.vocab_size}"
        problems.append(f"extra_ids={extra_ids}: must not exceed {limit}")
    return problems


def _with_tuples(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        prefix + key: tuple(value) if isinstance(value, list) else value
        for key, value in values.items()
    }
