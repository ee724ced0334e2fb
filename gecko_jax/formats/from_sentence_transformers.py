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

import gecko_jax.config
from gecko_jax.formats import from_hugging_face, names, tensors
from gecko_jax.io import inputs, reading, writing
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats

MODULES = "modules.json"

_ORDERS = (
    ["Transformer", "Pooling"],
    ["Transformer", "Pooling", "Normalize"],
    ["Transformer", "Pooling", "Dense"],
    ["Transformer", "Pooling", "Dense", "Normalize"],
)

# Prompts that older releases named after the passage side; `encode_document` passes
# over them, because it always finds a prompt "document".
_OTHER_PASSAGE_PROMPTS = ("passage", "corpus")

# Where the Transformer module keeps its settings; the first that is there counts.
_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_LENGTH = gecko_jax.config.SCHEMA["data.query_length"]
_SETTINGS_RULES = {
    "max_seq_length": _LENGTH,
    "query_length": _LENGTH,
    "document_length": _LENGTH,
    "do_lower_case": gecko_jax.config.Rule(
        bool, "Gecko leaves the case of a text as it is", lambda value: not value
    ),
    "query_expansion": gecko_jax.config.Rule(
        dict, "Gecko adds no tokens to a query", lambda value: not value
    ),
    "processing_kwargs": gecko_jax.config.Rule(
        dict, "Gecko reads texts with no options of the tokenizer", lambda v: not v
    ),
    "transformer_task": gecko_jax.config.Rule(
        str, "must be feature-extraction", lambda value: value == "feature-extraction"
    ),
    "module_output_name": gecko_jax.config.Rule(
        str, "must be token_embeddings", lambda value: value == "token_embeddings"
    ),
}
# Options for transformers' loaders, under the names of every release.
_LOADERS = (
    "model_kwargs",
    "model_args",
    "processor_kwargs",
    "tokenizer_args",
    "config_kwargs",
    "config_args",
)
# Those that change how weights are loaded, and no number beyond rounding.
_HARMLESS_OPTIONS = {
    "attn_implementation",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "torch_dtype",
    "trust_remote_code",
    "use_fast",
    "use_safetensors",
}

_PROMPT_RULES = {
    "prompts": gecko_jax.config.Rule(
        dict,
        "must be texts by name",
        lambda values: all(isinstance(text, str | None) for text in values.values()),
    ),
    "default_prompt_name": gecko_jax.config.Rule(str),
    "truncate_dim": gecko_jax.config.Rule(
        int, "must be at least 1", lambda dim: dim >= 1
    ),
}
_POOLING_RULES = {
    "pooling_mode": gecko_jax.config.Rule(object),
    "include_prompt": gecko_jax.config.Rule(
        bool,
        "its mean leaves the prompt out; Gecko's is over all tokens, prompt and text",
        bool,
    ),
}
_ONE_INPUT = gecko_jax.config.Rule(
    str,
    "Gecko reads and writes sentence_embedding here",
    lambda name: name == "sentence_embedding",
)
_DENSE_RULES = {
    "bias": gecko_jax.config.Rule(
        bool, "Gecko's projection has no bias", lambda v: not v
    ),
    "activation_function": gecko_jax.config.Rule(
        str,
        "Gecko's projection has no activation, torch.nn.modules.linear.Identity",
        lambda name: name.startswith("torch.") and name.endswith(".Identity"),
    ),
    "use_residual": gecko_jax.config.Rule(
        bool, "Gecko's projection has no residual", lambda v: not v
    ),
    "module_input_name": _ONE_INPUT,
    "module_output_name": _ONE_INPUT,
}
_NORMALIZE_RULES = {"module_input_name": _ONE_INPUT, "module_output_name": _ONE_INPUT}


@dataclasses.dataclass(frozen=True)
class Chain:
    """What the folder computes.

    Attributes:
        encoder: Folder of the encoder and its tokenizer.
        dense: Folder of the projection, or None.
        query_length: Tokens a query is cut to, or None where the folder has no limit.
        passage_length: Tokens a passage is cut to, likewise.
        text_format: The prompts.
        truncate_dim: The dim that it cuts to unless told otherwise, or None.
    """

    encoder: pathlib.Path
    dense: pathlib.Path | None
    query_length: int | None
    passage_length: int | None
    text_format: text_formats.TextFormat
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
    elif (places["Normalize"] / "config.json").exists():
        _read(places["Normalize"] / "config.json", _NORMALIZE_RULES)
    _check_pooling(places["Pooling"] / "config.json")
    dense = places.get("Dense")
    if dense is not None:
        # What a file leaves out is what the module has by default.
        defaults = {"bias": True, "activation_function": "torch.nn.Tanh"}
        _read(dense / "config.json", _DENSE_RULES, defaults)
    encoder = places["Transformer"]
    query_length, passage_length = _read_lengths(encoder)
    path = folder / "config_sentence_transformers.json"
    values = _read(path, _PROMPT_RULES) if path.exists() else {}
    return Chain(
        encoder,
        dense,
        query_length,
        passage_length,
        _read_prompts(values, path),
        values.get("truncate_dim"),
    )


def _read(
    path: pathlib.Path,
    rules: Mapping[str, gecko_jax.config.Rule],
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the values of a file that are not null, checked.

    Raises:
        ValueError: The file is missing or damaged, or asks for what Gecko does not
            compute; lists all of it.
    """
    values = {
        **(defaults or {}),
        **{
            key: value
            for key, value in from_hugging_face.read_json(path).items()
            if value is not None
        },
    }
    faults = gecko_jax.config.find_wrong_values(values, rules)
    if faults:
        raise ValueError(f"{path}: {'; '.join(faults)}")
    return values


def add_projection(
    chain: Chain, params: dict[str, tensors.Tensor], config: dual_encoder.EncoderConfig
) -> tuple[dict[str, tensors.Tensor], dual_encoder.EncoderConfig]:
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
    path = writing.member(folder, MODULES)
    try:
        modules = reading.parse_json(path.read_text(encoding="utf-8"))
        modules = sorted(modules, key=lambda module: module["idx"])
        found = [
            (module["type"].rpartition(".")[2], pathlib.PurePosixPath(module["path"]))
            for module in modules
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path}: not a list of modules; the file is damaged, copy it again"
        ) from None
    for module in modules:
        if not module["type"].startswith("sentence_transformers."):
            raise ValueError(
                f"{path}: {module['type']} is a module with code of its own; Gecko "
                "computes those of sentence_transformers only"
            )
    kinds = [kind for kind, _ in found]
    if kinds not in _ORDERS:
        raise ValueError(
            f"{path}: the modules are {', '.join(kinds)}; Gecko computes "
            f"{', '.join(_ORDERS[-1])}, with or without the last two"
        )
    for _, inside in found:
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(
                f"{path}: it names the folder {str(inside)!r}, outside its own; do not "
                "use this model"
            )
    return {kind: writing.inside(folder, str(place)) for kind, place in found}


def _check_pooling(path: pathlib.Path) -> None:
    values = _read(path, _POOLING_RULES)
    # One name since 5.x, a switch for each mode before, the mean where there is none.
    modes = values.get("pooling_mode") or [
        re.sub(r"^pooling_mode_|_tokens?$", "", key)
        for key, value in values.items()
        if key.startswith("pooling_mode_") and value
    ]
    if not isinstance(modes, list):
        modes = [modes]
    if modes not in ([], ["mean"]):
        raise ValueError(
            f"{path}: pools by {' and '.join(map(str, modes))}; Gecko pools by the "
            "mean of all tokens"
        )


def _read_lengths(encoder: pathlib.Path) -> tuple[int | None, int | None]:
    """Returns the tokens that a query and a passage are cut to, None for no limit."""
    values: dict[str, Any] = {}
    for name in _SETTINGS:
        path = encoder / name
        if path.exists():
            values = _read(path, _SETTINGS_RULES)
            _check_loaders(values, path)
        if values:
            break
    length = values.get("max_seq_length")
    if length is None:
        length = tokenizer_length(encoder)
        # transformers' T5 has no such limit, but a config may set one.
        positions = from_hugging_face.read_json(encoder / "config.json").get(
            "max_position_embeddings"
        )
        if type(positions) is int and positions > 0:
            length = min(length or positions, positions)
    return values.get("query_length", length), values.get("document_length", length)


def _check_loaders(values: Mapping[str, Any], path: pathlib.Path) -> None:
    for name in _LOADERS:
        options = values.get(name, {})
        if not isinstance(options, dict):
            raise ValueError(
                f"{path}: {name} is {inputs.kind(options)}, not an object; the file is "
                "damaged, copy it again"
            )
        unknown = sorted(options.keys() - _HARMLESS_OPTIONS)
        if unknown:
            raise ValueError(
                f"{path}: {name} sets {', '.join(unknown)}, which Gecko does not "
                "follow; remove it where it changes nothing"
            )


def tokenizer_length(encoder: pathlib.Path) -> int | None:
    """Returns the tokens that a folder's tokenizer keeps, None for no limit."""
    path = encoder / "tokenizer_config.json"
    values = from_hugging_face.read_json(path) if path.exists() else {}
    length = values.get("model_max_length")
    if length is None:
        return None
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 8:
        raise ValueError(
            f"{path}: model_max_length={length!r}: must be at least 8 tokens"
        )
    # "No limit" is written as 10^30.
    return int(length) if length < 2**20 else None


def _read_prompts(
    values: Mapping[str, Any], path: pathlib.Path
) -> text_formats.TextFormat:
    """Returns the prompts as `encode_query` and `encode_document` write them.

    Both take the prompt "query" or "document", or none where there is none: the default
    prompt is that of a plain `encode`. All other prompts are tasks.
    """
    given = {name: prompt or "" for name, prompt in values.get("prompts", {}).items()}
    default = values.get("default_prompt_name")
    if default is not None and default not in (
        text_formats.QUERY_PROMPT,
        text_formats.DOCUMENT_PROMPT,
    ):
        if default not in given:
            raise ValueError(
                f"{path}: default_prompt_name={default!r}, which is none of its "
                f"prompts ({', '.join(given) or 'it has none'}); mend the file"
            )
        if given[default]:
            logging.warning(
                "%s: encode_query and encode_document write the prompts 'query' and "
                "'document', and not the default prompt %r; name it as a task, "
                "task=%r",
                path,
                default,
                default,
            )
    unused = [name for name in _OTHER_PASSAGE_PROMPTS if given.get(name)]
    if unused and text_formats.DOCUMENT_PROMPT not in given:
        logging.warning(
            "%s: encode_document writes the prompt 'document', which is missing, and "
            "not %r; passages are written without a prompt",
            path,
            unused[0],
        )
    prompts = {text_formats.QUERY_PROMPT: "", text_formats.DOCUMENT_PROMPT: "", **given}
    bare = text_formats.TextFormat(query="{text}", passage="{text}", no_title="")
    if not any(prompts.values()):
        return bare
    return dataclasses.replace(bare, prompts=prompts)
