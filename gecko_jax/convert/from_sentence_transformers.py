"""sentence-transformers folders: a T5 encoder, mean pooling, Dense, Normalize.

    modules.json                        the modules, in order
    config.json, model.safetensors      Transformer
    1_Pooling/config.json               mean over all tokens
    2_Dense/model.safetensors           the projection, if there is one
    config_sentence_transformers.json   the prompts

Gecko computes exactly this chain; whatever else a folder asks for is refused by name.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from gecko_jax import files, model, tensors, text
from gecko_jax.convert import from_hugging_face, names

MODULES = "modules.json"

_ORDERS = (
    ["Transformer", "Pooling"],
    ["Transformer", "Pooling", "Normalize"],
    ["Transformer", "Pooling", "Dense"],
    ["Transformer", "Pooling", "Dense", "Normalize"],
)

# The prompts that encode_query and encode_document look for, in this order.
_QUERY_PROMPTS = ("query",)
_PASSAGE_PROMPTS = ("document", "passage", "corpus")

# The name that our queries have unless they name a task (section 3.1).
_DEFAULT_TASK = "search result"


@dataclasses.dataclass(frozen=True)
class Chain:
    """What the folder computes.

    Attributes:
        encoder: Folder of the encoder and its tokenizer.
        dense: Folder of the projection, or None.
        max_length: Tokens a text is cut to, or None where the folder has no limit.
        text_format: The prompts.
        truncate_dim: The dim that it cuts to unless told otherwise, or None.
    """

    encoder: pathlib.Path
    dense: pathlib.Path | None
    max_length: int | None
    text_format: text.TextFormat
    truncate_dim: int | None


def read_chain(folder: pathlib.Path) -> Chain:
    """Reads the modules and refuses those that Gecko does not compute.

    Raises:
        ValueError: Names the module and what it may be.
    """
    places = _read_modules(folder)
    if "Normalize" not in places:
        logging.warning(
            "%s: has no Normalize module; gecko_jax normalizes all the same, which "
            "leaves every cosine as it is",
            folder,
        )
    _check_pooling(places["Pooling"] / "config.json")
    dense = places.get("Dense")
    if dense is not None:
        _check_dense(dense / "config.json")
    encoder = places["Transformer"]
    path = folder / "config_sentence_transformers.json"
    values = from_hugging_face.read_json(path) if path.exists() else {}
    return Chain(
        encoder,
        dense,
        _max_length(encoder),
        _read_prompts(values, path),
        values.get("truncate_dim"),
    )


def add_projection(
    chain: Chain, params: dict[str, tensors.Tensor], config: model.EncoderConfig
) -> tuple[dict[str, tensors.Tensor], model.EncoderConfig]:
    """Adds the Dense module, if there is one, to an encoder."""
    if chain.dense is None:
        return params, config
    from_hugging_face.refuse_pickle(chain.dense)
    weights = tensors.read(chain.dense)
    weight = weights.get(names.DENSE_WEIGHT)
    if weight is None or len(weights) > 1 or len(weight.shape) != 2:
        raise ValueError(
            f"{chain.dense}: holds {', '.join(sorted(weights))}; the projection must "
            f"be one matrix, {names.DENSE_WEIGHT}"
        )
    width = weight.shape[0]
    config = dataclasses.replace(config, embedding_dim=width, projection=True)
    return params | {names.PROJECTION: weight.transpose()}, config


def _read_modules(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    path = folder / MODULES
    try:
        modules = files.parse_json(path.read_text(encoding="utf-8"))
        found = [
            (str(module["type"]).rpartition(".")[2], str(module["path"]))
            for module in sorted(modules, key=lambda module: module["idx"])
        ]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: not a list of modules; the file is damaged, copy it again"
        ) from None
    kinds = [kind for kind, _ in found]
    if kinds not in _ORDERS:
        raise ValueError(
            f"{path}: the modules are {', '.join(kinds)}; Gecko computes "
            f"{', '.join(_ORDERS[-1])}, with or without the last two"
        )
    for _, place in found:
        inside = pathlib.PurePosixPath(place)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(
                f"{path}: it names the folder {place!r}, outside its own; do not use "
                "this model"
            )
    return {kind: folder / place for kind, place in found}


def _check_pooling(path: pathlib.Path) -> None:
    values = from_hugging_face.read_json(path)
    # One name since 5.x, a switch for each mode before.
    modes = values.get("pooling_mode") or [
        re.sub(r"^pooling_mode_|_tokens?$", "", key)
        for key, value in values.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes != ["mean"]:
        raise ValueError(
            f"{path}: pools by {' and '.join(map(str, modes)) or 'nothing'}; Gecko "
            "pools by the mean of all tokens"
        )
    if values.get("include_prompt", True) is not True:
        raise ValueError(
            f"{path}: include_prompt is false, so its mean leaves the prompt out; "
            "Gecko's is over all tokens, prompt and text"
        )


def _check_dense(path: pathlib.Path) -> None:
    values = from_hugging_face.read_json(path)
    activation = str(values.get("activation_function", "Tanh")).rpartition(".")[2]
    if activation != "Identity" or values.get("bias", True):
        raise ValueError(
            f"{path}: activation {activation}, bias {values.get('bias', True)}; "
            "Gecko's projection is one matrix: Identity, without bias"
        )
    for key in ("module_input_name", "module_output_name"):
        if values.get(key, "sentence_embedding") != "sentence_embedding":
            raise ValueError(
                f"{path}: {key} is {values[key]!r}; Gecko projects after pooling, "
                "sentence_embedding"
            )


def _max_length(encoder: pathlib.Path) -> int | None:
    path = encoder / "sentence_bert_config.json"
    values = from_hugging_face.read_json(path) if path.exists() else {}
    if values.get("do_lower_case"):
        raise ValueError(
            f"{path}: do_lower_case is true; Gecko leaves the case of a text as it is"
        )
    if values.get("max_seq_length"):
        return int(values["max_seq_length"])
    return tokenizer_length(encoder)


def tokenizer_length(encoder: pathlib.Path) -> int | None:
    """Returns the tokens that a folder's tokenizer keeps, None for no limit."""
    path = encoder / "tokenizer_config.json"
    values = from_hugging_face.read_json(path) if path.exists() else {}
    length = values.get("model_max_length")
    # "No limit" is written as 10^30.
    return int(length) if isinstance(length, int) and 0 < length < 2**20 else None


def _read_prompts(values: Mapping[str, Any], path: pathlib.Path) -> text.TextFormat:
    prompts: Mapping[str, Any] = values.get("prompts") or {}
    if not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ValueError(f"{path}: prompts must be texts by name; mend the file")
    default = prompts.get(values.get("default_prompt_name") or "", "")
    passage = _first(prompts, _PASSAGE_PROMPTS, default)
    query = _first(prompts, _QUERY_PROMPTS, default)
    others = {
        name: prompt
        for name, prompt in prompts.items()
        if name not in (*_QUERY_PROMPTS, *_PASSAGE_PROMPTS)
    }
    try:
        if not others:
            return text.TextFormat(
                query=query + "{text}", passage=passage + "{text}", no_title=""
            )
        return text.TextFormat(
            query="{task_description}{text}",
            passage=passage + "{text}",
            no_title="",
            task_descriptions={**prompts, _DEFAULT_TASK: query},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _first(prompts: Mapping[str, str], wanted: tuple[str, ...], default: str) -> str:
    return next((prompts[name] for name in wanted if name in prompts), default)
