"""A model as a folder that `sentence_transformers.SentenceTransformer` opens.

    modules.json  config_sentence_transformers.json  sentence_bert_config.json
    config.json  model.safetensors      encoder under Hugging Face's names
    tokenizer.json  ...                 see `to_hugging_face_tokenizer`
    1_Pooling/  2_Dense/                pooling, and the projection, if there is one
    README.md                           model card
    gecko.json  vocabulary.model        our settings, so that nothing is lost

The export's `encode(texts, prompt_name=task)` equals `encode_queries(texts, task)`
up to the length of a query: sentence-transformers has one length for all texts, so the
greater of ours is written. A prompt is always before the text; a format that writes
something after it cannot be exported.
"""

import json
import pathlib
from typing import Any

import numpy as np

from gecko_jax.formats import (
    family_configs,
    model_card,
    model_folder,
    names,
    parameters,
    safetensors_files,
    tensors,
    to_hugging_face_tokenizer,
)
from gecko_jax.io import writing
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats, vocabularies

_MODULES = "modules.json"

# Patterns of the files in an export.
_FILES = (
    *("README.md", "config.json", "1_Pooling/config.json", "2_Dense/config.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json"),
    *to_hugging_face_tokenizer.FILES,
    *model_folder.FILES,
    f"2_Dense/*{safetensors_files.SUFFIX}",
)

# Our activations -> Hugging Face's, whose "gelu" is the exact form.
_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu"}


def save(
    path: pathlib.Path,
    model_files: model_folder.ModelFiles,
    *,
    truncate_dim: int | None = None,
    scores: dict[str, Any] | None = None,
) -> None:
    """Writes a complete folder or none; an earlier export is replaced.

    `truncate_dim` is the default width of the embeddings; None takes the largest
    trained one. `scores` are results of `gecko evaluate`, for the model card. Raises
    ValueError if the folder contains other files, or sentence-transformers cannot
    represent the model.
    """
    # Models of other people have a modules.json, too.
    writing.check_replaceable(path, [_MODULES, model_folder.MODEL_JSON], _FILES)
    config = model_files.encoder_config
    if max(model_files.mrl_dims) < config.embedding_dim:
        truncate_dim = truncate_dim or max(model_files.mrl_dims)
    vocab = model_files.build_vocabulary()
    max_length = max(model_files.query_length, model_files.passage_length)
    contents = _build_contents(model_files, truncate_dim, max_length)
    card = model_card.write(model_files, contents, truncate_dim, scores)
    params = parameters.flatten_to_tensors(model_files.params)
    encoder = {
        name: tensors.as_tensor(np.zeros(shape, np.float32))
        for name, shape in family_configs.placeholders(config).items()
    }
    for name, (theirs, is_transposed) in names.hugging_face_names(config).items():
        tensor = params.pop(name)
        encoder[theirs] = tensor.transpose() if is_transposed else tensor
    with writing.write_folder(path) as folder:
        for name, values in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text)
        to_hugging_face_tokenizer.write_tokenizer(folder, vocab, max_length)
        safetensors_files.write(folder, encoder)
        weights = safetensors_files.names(folder)
        if names.PROJECTION in params:
            dense = folder / "2_Dense"
            kernel = params[names.PROJECTION].transpose()
            safetensors_files.write(dense, {names.DENSE_WEIGHT: kernel})
            weights += [f"2_Dense/{name}" for name in safetensors_files.names(dense)]
        model_folder.write_model_json(folder, model_files, weights)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _build_contents(
    model_files: model_folder.ModelFiles, truncate_dim: int | None, max_length: int
) -> dict[str, Any]:
    """Returns the contents of the JSON files by name."""
    config = model_files.encoder_config
    # EmbeddingGemma 2 projects each token, inside its Transformer.
    has_dense = config.projection and config.family != "embeddinggemma2"
    pooled_width = config.model_dim if has_dense else config.embedding_dim
    modules = ["Transformer", "Pooling", *(["Dense"] * has_dense), "Normalize"]
    paths = ["", *(f"{n}_{modules[n]}" for n in range(1, len(modules)))]
    # Every release knows these names.
    types = [f"sentence_transformers.models.{name}" for name in modules]
    contents: dict[str, Any] = {
        _MODULES: [
            {"idx": n, "name": str(n), "path": paths[n], "type": types[n]}
            for n in range(len(modules))
        ],
        "config_sentence_transformers.json": {
            "__version__": model_folder.versions(),
            "prompts": build_prompts(model_files.text_format),
            # Passages need no task.
            "default_prompt_name": text_formats.DOCUMENT_PROMPT,
            "similarity_fn_name": "cosine",
            **({"truncate_dim": truncate_dim} if truncate_dim else {}),
        },
        "sentence_bert_config.json": {
            "max_seq_length": max_length,
            "do_lower_case": False,
        },
        "config.json": build_config(model_files, max_length),
        "1_Pooling/config.json": {
            "word_embedding_dimension": pooled_width,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": config.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            **({"pooling_mode_lasttoken": True} if config.pooling == "last" else {}),
            "include_prompt": True,
        },
    }
    if has_dense:
        contents["2_Dense/config.json"] = {
            "in_features": config.model_dim,
            "out_features": config.embedding_dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    return contents


def build_prompts(text_format: text_formats.TextFormat) -> dict[str, str]:
    """Returns the prompt of each task, and those of other queries and documents.

    Raises ValueError if the format writes something after the text.
    """
    if text_format.has_only_prompts:
        return dict(text_format.prompts)
    descriptions = {
        **text_format.task_descriptions,
        text_formats.QUERY_PROMPT: text_format.describe(text_formats.DEFAULT_TASK),
    }
    query, passage = _prefix(text_format.query), _prefix(text_format.passage)
    prompts = {
        task: query.replace("{task_description}", description)
        for task, description in descriptions.items()
    }
    document = passage.replace("{title}", text_format.no_title)
    prompts[text_formats.DOCUMENT_PROMPT] = document
    return prompts | dict(text_format.prompts)


def _prefix(template: str) -> str:
    prefix, _, suffix = template.partition("{text}")
    if suffix.strip():
        raise ValueError(
            f"text format {template!r}: sentence-transformers can only write before a "
            "text, not after it; use a format that ends in {text}"
        )
    return prefix


def build_config(
    model_files: model_folder.ModelFiles, max_length: int
) -> dict[str, Any]:
    """Returns Hugging Face's `config.json` of the encoder.

    vLLM reads `matryoshka_dimensions`. Raises ValueError if transformers does not have
    this encoder.
    """
    config = model_files.encoder_config
    if config.family == "t5":
        values = _build_t5_config(config)
    else:
        vocab = model_files.build_vocabulary()
        # Qwen pads with its EOS; the id 0 is "!".
        pad_id = vocab.eos_id if config.family == "qwen3" else vocab.pad_id
        special_ids = {
            "pad_token_id": pad_id,
            "eos_token_id": vocab.eos_id,
            # Without the key, transformers takes the BOS of Gemma.
            "bos_token_id": vocab.opening[0] if vocab.opening else None,
        }
        values = family_configs.write(config, max_length, special_ids)
    return values | {"matryoshka_dimensions": sorted(model_files.mrl_dims)}


def _build_t5_config(config: dual_encoder.EncoderConfig) -> dict[str, Any]:
    activation, *gate = config.mlp_activations
    if activation not in _ACTIVATIONS or gate not in ([], ["linear"]):
        raise ValueError(
            f"mlp_activations={config.mlp_activations}: Hugging Face's T5 has an "
            f"activation of {', '.join(_ACTIVATIONS)}, alone or with a linear gate "
            "after it; export with --to=t5x"
        )
    act = _ACTIVATIONS[activation]
    # In transformers, "gated-gelu" means gelu_new.
    gated = "gated-gelu" if activation == "gelu" else f"gated-{act}"
    is_shared = config.shared_relative_bias
    sizes = names.HUGGING_FACE_SIZES.items()
    return {
        "architectures": ["T5EncoderModel" if is_shared else "UMT5EncoderModel"],
        "model_type": "t5" if is_shared else "umt5",
        **{name: getattr(config, ours) for name, ours in sizes},
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": gated if gate else act,
        "dense_act_fn": act,
        "is_gated_act": bool(gate),
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "dropout_rate": config.dropout_rate,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": True,
        "pad_token_id": vocabularies.PAD_ID,
        "eos_token_id": vocabularies.EOS_ID,
        "dtype": "float32",
    }
