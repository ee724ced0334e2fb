"""sentence-transformers folders: an encoder, pooling, Dense, Normalize.

    modules.json                        the modules, in order
    config.json, model.safetensors      Transformer
    1_Pooling/config.json               mean over all tokens, or the last token
    2_Dense/model.safetensors           projection, optional
    3_Dense/model.safetensors           its second half (EmbeddingGemma)
    config_sentence_transformers.json   prompts

Gecko computes exactly these modules; other modules and settings are refused by name.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from gecko_jax.formats import (
    from_hugging_face,
    names,
    safetensors_files,
    source_files,
    tensors,
)
from gecko_jax.io import field_rules, reading, writing
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats

MODULES = "modules.json"

_ORDERS = (
    ["Transformer", "Pooling"],
    ["Transformer", "Pooling", "Normalize"],
    ["Transformer", "Pooling", "Dense"],
    ["Transformer", "Pooling", "Dense", "Dense", "Normalize"],
    ["Transformer", "Pooling", "Dense", "Normalize"],
)

# Pooling of sentence-transformers -> ours.
_POOLINGS = {"mean": "mean", "lasttoken": "last"}

# Settings of the Transformer module; the first file that exists counts.
_ENCODERS = "bert roberta distilbert camembert albert xlm-roberta xlnet"
_SETTINGS = [f"sentence_{name}_config.json" for name in _ENCODERS.split()]

# What Gecko computes. All other settings change no embedding.
_REMEDY = (
    "Gecko computes nothing else: take another model, or remove it if it changes no "
    "embedding"
)
_only = field_rules.only
_TEXT, _LENGTH = field_rules.TEXT, field_rules.optional(field_rules.integer(8, 2**20))
_TRANSFORMER = {
    "max_seq_length": _LENGTH,
    "query_length": _LENGTH,
    "document_length": _LENGTH,
    "do_lower_case": _only(False),
    "query_expansion": _only({}),
    "processing_kwargs": _only({}),
    "transformer_task": _only("feature-extraction"),
    "module_output_name": _only("token_embeddings"),
}
_PROMPTS = {
    "prompts": field_rules.optional(field_rules.map_of(field_rules.nullable(_TEXT))),
    "default_prompt_name": field_rules.optional(_TEXT),
    "truncate_dim": field_rules.optional(field_rules.integer(1)),
}
_POOLING = {"include_prompt": _only(True)}
_NORMALIZE = {
    "module_input_name": _only("sentence_embedding"),
    "module_output_name": _only("sentence_embedding"),
}
_DENSE = {
    "bias": field_rules.one_of(False),
    "activation_function": field_rules.Kind(
        "torch.nn.modules.linear.Identity",
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"torch\..*\.Identity", v)),
    ),
    "use_residual": _only(False),
    **_NORMALIZE,
}
# Defaults of the module.
_DENSE_DEFAULTS = {"bias": True, "activation_function": "torch.nn.Tanh"}
# Options of transformers' loaders, under the names of all releases, and those that
# change no embedding beyond rounding.
_LOADERS = (
    *("model_kwargs", "model_args", "processor_kwargs", "tokenizer_args"),
    *("config_kwargs", "config_args"),
)
_HARMLESS_OPTIONS = (
    *("attn_implementation", "device_map", "dtype", "low_cpu_mem_usage"),
    *("torch_dtype", "trust_remote_code", "use_fast", "use_safetensors"),
)
_ANY = field_rules.Kind("any value", lambda v: True, is_optional=True)
_OPTIONS = field_rules.object_of(dict.fromkeys(_HARMLESS_OPTIONS, _ANY), only=True)
_TRANSFORMER |= dict.fromkeys(_LOADERS, field_rules.optional(_OPTIONS))
_TOKENIZER = {"model_max_length": field_rules.optional(field_rules.number(8))}


@dataclasses.dataclass(frozen=True)
class Modules:
    """Modules of a folder."""

    encoder: pathlib.Path  # folder of the encoder and its tokenizer
    dense: tuple[pathlib.Path, ...]  # the product of their matrices is the projection
    pooling: str  # "mean" or "last"
    query_length: int | None  # longest query in tokens; None if there is no limit
    passage_length: int | None
    text_format: text_formats.TextFormat  # the prompts
    truncate_dim: int | None  # default dim of embeddings; None for the full width


def read_modules(folder: pathlib.Path) -> Modules:
    """Reads the modules; raises ValueError for those that Gecko does not compute."""
    folders = _read_folders(folder)
    [encoder], [pooling] = folders["Transformer"], folders["Pooling"]
    dense = tuple(folders.get("Dense", ()))
    if "Normalize" not in folders:
        logging.warning(
            "%s: has no Normalize module; gecko_jax normalizes embeddings "
            "nevertheless, which changes no cosine",
            folder,
        )
    elif (folders["Normalize"][0] / "config.json").exists():
        _read(folders["Normalize"][0] / "config.json", _NORMALIZE)
    for place in dense:
        _read(place / "config.json", _DENSE, **_DENSE_DEFAULTS)
    lengths = _read_lengths(encoder)
    path = folder / "config_sentence_transformers.json"
    values = _read(path, _PROMPTS) if path.exists() else {}
    pooling = _read_pooling(pooling / "config.json")
    prompts, truncate_dim = _read_prompts(values, path), values.get("truncate_dim")
    return Modules(encoder, dense, pooling, *lengths, prompts, truncate_dim)


def _read(
    path: pathlib.Path, kinds: Mapping[str, field_rules.Kind], **defaults: Any
) -> dict[str, Any]:
    """Returns the values of a file that are not null, checked."""
    values = defaults | source_files.read_json(path)
    field_rules.check(path, values, kinds, _REMEDY)
    return {key: value for key, value in values.items() if value is not None}


def add_projection(
    modules: Modules,
    params: dict[str, tensors.Tensor],
    config: dual_encoder.EncoderConfig,
) -> tuple[dict[str, tensors.Tensor], dual_encoder.EncoderConfig]:
    """Adds the product of the Dense modules, if there are any, to an encoder.

    Two matrices without an activation between them are one, computed in float64.
    """
    if not modules.dense:
        return params, config
    # EmbeddingGemma 2 has a projection inside its encoder.
    matrices = [params[names.PROJECTION]] if config.projection else []
    for folder in modules.dense:
        from_hugging_face.refuse_pickle(folder)
        weights = safetensors_files.read(folder)
        weight = weights.get(names.DENSE_WEIGHT)
        if weight is None or len(weights) > 1 or len(weight.shape) != 2:
            raise ValueError(
                f"{folder}: holds {', '.join(sorted(weights))}; the projection must "
                f"be one matrix, {names.DENSE_WEIGHT}"
            )
        if matrices and matrices[-1].shape[1] != weight.shape[1]:
            raise ValueError(
                f"{folder}: reads vectors of {weight.shape[1]} entries, and the matrix "
                f"before it writes {matrices[-1].shape[1]}; copy both again"
            )
        matrices.append(weight.transpose())
    width = matrices[-1].shape[1]
    config = dataclasses.replace(config, embedding_dim=width, projection=True)
    return params | {names.PROJECTION: _multiply(matrices)}, config


def _multiply(matrices: Sequence[tensors.Tensor]) -> tensors.Tensor:
    if len(matrices) == 1:
        return matrices[0]

    def read() -> np.ndarray:
        wide = (matrix.read().astype(np.float64) for matrix in matrices)
        return functools.reduce(np.matmul, wide).astype(np.float32)

    shape = (matrices[0].shape[0], matrices[-1].shape[1])
    return tensors.Tensor(
        shape, read, " times ".join(matrix.source for matrix in matrices)
    )


def _read_folders(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Returns the folders of each kind of module, in order."""
    path = writing.member(folder, MODULES)
    try:
        entries = reading.parse_json(path.read_text(encoding="utf-8"))
        entries = sorted(entries, key=lambda entry: entry["idx"])
        kinds = [entry["type"].rpartition(".")[2] for entry in entries]
        places = [str(entry["path"]) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise source_files.damaged(path, "not a list of modules") from None
    for entry in entries:
        if not entry["type"].startswith("sentence_transformers."):
            raise ValueError(
                f"{path}: {entry['type']} is a module with its own code; Gecko "
                "computes modules of sentence_transformers only"
            )
    if kinds not in _ORDERS:
        raise ValueError(
            f"{path}: the modules are {', '.join(kinds)}; Gecko computes "
            f"{', '.join(_ORDERS[-1])}, with or without the last two, or with two Dense"
        )
    folders: dict[str, list[pathlib.Path]] = {}
    for kind, place in zip(kinds, places, strict=True):
        folders.setdefault(kind, []).append(writing.inside(folder, place))
    return folders


def _read_pooling(path: pathlib.Path) -> str:
    """Returns the pooling by our name."""
    values = _read(path, _POOLING)
    # One key since release 5, a switch for each mode before; the default is the mean.
    modes = values.get("pooling_mode") or [
        re.sub(r"^pooling_mode_|_tokens?$", "", key)
        for key, value in values.items()
        if key.startswith("pooling_mode_") and value
    ]
    modes = modes if isinstance(modes, list) else [modes]
    modes = modes or ["mean"]
    if len(modes) > 1 or str(modes[0]) not in _POOLINGS:
        raise ValueError(
            f"{path}: pools by {' and '.join(map(str, modes))}; Gecko pools by the "
            "mean of all tokens, or by the last token"
        )
    return _POOLINGS[modes[0]]


def _read_lengths(encoder: pathlib.Path) -> tuple[int | None, int | None]:
    """Returns the longest query and passage in tokens, None for no limit."""
    values: dict[str, Any] = {}
    for path in (encoder / name for name in _SETTINGS):
        if not values and path.exists():
            values = _read(path, _TRANSFORMER)
    length = values.get("max_seq_length")
    if length is None:
        length = tokenizer_length(encoder)
        # transformers' T5 has no such limit, but a config may set one.
        config = source_files.read_json(encoder / "config.json")
        positions = config.get("max_position_embeddings")
        if type(positions) is int and positions > 0:
            length = min(length or positions, positions)
    return values.get("query_length", length), values.get("document_length", length)


def tokenizer_length(encoder: pathlib.Path) -> int | None:
    """Returns the limit of a folder's tokenizer in tokens, None for no limit."""
    path = encoder / "tokenizer_config.json"
    values = _read(path, _TOKENIZER) if path.exists() else {}
    # transformers writes 10^30 for no limit.
    length = values.get("model_max_length", 1e30)
    return int(length) if length < 2**20 else None


def _read_prompts(
    values: Mapping[str, Any], path: pathlib.Path
) -> text_formats.TextFormat:
    """Returns the prompts as `encode_query` and `encode_document` write them.

    They write the prompt "query" or "document", or none if it is missing; only `encode`
    writes the default prompt. All other prompts are tasks.
    """
    query, document = text_formats.QUERY_PROMPT, text_formats.DOCUMENT_PROMPT
    own_prompts = {
        name: prompt or "" for name, prompt in values.get("prompts", {}).items()
    }
    default = values.get("default_prompt_name")
    if default not in (None, query, document):
        if default not in own_prompts:
            raise ValueError(
                f"{path}: default_prompt_name={default!r}, which is none of its "
                f"prompts ({', '.join(own_prompts) or 'it has none'}); correct the file"
            )
        if own_prompts[default]:
            logging.warning(
                "%s: encode_query and encode_document write the prompts 'query' and "
                "'document', not the default prompt %r; to use it, pass task=%r",
                path,
                default,
                default,
            )
    # Models of older releases have them. `encode_document` ignores them, because those
    # models always have a prompt "document", too.
    unused = [name for name in ("passage", "corpus") if own_prompts.get(name)]
    if unused and document not in own_prompts:
        logging.warning(
            "%s: encode_document writes the prompt 'document', which is missing, and "
            "not %r; passages are written without a prompt",
            path,
            unused[0],
        )
    prompts = {query: "", document: "", **own_prompts}
    prompts = prompts if any(prompts.values()) else {}
    return dataclasses.replace(text_formats.PLAIN, prompts=prompts)
