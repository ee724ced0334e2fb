"""A Gecko as a folder that `sentence_transformers.SentenceTransformer` opens.

    modules.json  config_sentence_transformers.json  sentence_bert_config.json
    config.json  model.safetensors      a T5 encoder under Hugging Face's names
    tokenizer.json  ...                 see `to_hugging_face_tokenizer`
    1_Pooling/  2_Dense/                mean, then the projection, if there is one
    README.md                           the model card
    gecko.json  vocabulary.model        our own settings, so that nothing is lost

`encode(texts, prompt_name=task)` there is `encode_queries(texts, task)` here, up to the
length of a query: there is one length for all texts there, the greater of ours, so that
no passage is cut too early. A prompt can only stand before the text; a format that
writes after it cannot be exported.
"""

import json
import pathlib
from typing import Any

from gecko_jax.formats import (
    model_card,
    model_folder,
    names,
    parameters,
    tensors,
    to_hugging_face_tokenizer,
)
from gecko_jax.io import writing
from gecko_jax.models import dual_encoder
from gecko_jax.text import text_formats, vocabularies

QUERY, DOCUMENT = text_formats.QUERY_PROMPT, text_formats.DOCUMENT_PROMPT
MODULES = "modules.json"

# What may lie in an export, as patterns.
_FILES = (
    "README.md",
    "config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    *to_hugging_face_tokenizer.FILES,
    *model_folder.FILES,
    f"2_Dense/*{tensors.SUFFIX}",
)

# Ours -> the name in Hugging Face's table of activations. Its "gelu" is the exact one.
_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu"}


def save(
    path: pathlib.Path,
    model_files: model_folder.ModelFiles,
    *,
    truncate_dim: int | None = None,
    scores: dict[str, Any] | None = None,
) -> None:
    """Writes the folder, whole or not at all; an export that is there is replaced.

    Args:
        path: The folder.
        model_files: The model.
        truncate_dim: The dim that `encode` gives there unless told otherwise; None is
            the largest that was trained.
        scores: Results of `gecko evaluate`, for the model card.

    Raises:
        ValueError: The folder holds something else, or the model cannot be written
            so (says what is in the way).
    """
    # Other people's models have a modules.json too.
    writing.check_replaceable(path, [MODULES, model_folder.MODEL_JSON], _FILES)
    config = model_files.encoder_config
    if max(model_files.mrl_dims) < config.embedding_dim:
        truncate_dim = truncate_dim or max(model_files.mrl_dims)
    vocab = model_files.build_vocabulary()
    modules = ["Transformer", "Pooling", *(["Dense"] * config.projection), "Normalize"]
    folders = ["", *(f"{n}_{name}" for n, name in enumerate(modules[1:], start=1))]
    max_length = max(model_files.query_length, model_files.passage_length)
    contents = {
        MODULES: [
            {
                "idx": n,
                "name": str(n),
                "path": folder,
                # The names of every release; later ones forward them.
                "type": f"sentence_transformers.models.{name}",
            }
            for n, (name, folder) in enumerate(zip(modules, folders, strict=True))
        ],
        "config_sentence_transformers.json": {
            "__version__": model_folder.versions(),
            "prompts": build_prompts(model_files.text_format),
            # The one side that needs no task.
            "default_prompt_name": DOCUMENT,
            "similarity_fn_name": "cosine",
        }
        | ({"truncate_dim": truncate_dim} if truncate_dim else {}),
        "sentence_bert_config.json": {
            "max_seq_length": max_length,
            "do_lower_case": False,
        },
        "config.json": build_config(config),
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.model_dim,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "include_prompt": True,
        },
    }
    if config.projection:
        contents["2_Dense/config.json"] = {
            "in_features": config.model_dim,
            "out_features": config.embedding_dim,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
    card = model_card.write(model_files, contents, truncate_dim, scores)
    with writing.write_folder(path) as folder:
        for name, values in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(
                json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            )
        to_hugging_face_tokenizer.write_tokenizer(folder, vocab, max_length)
        _write_params(folder, model_files)
        weights = tensors.names(folder)
        if config.projection:
            weights += [f"2_Dense/{name}" for name in tensors.names(folder / "2_Dense")]
        model_folder.write_model_json(folder, model_files, weights)
        (folder / "README.md").write_text(card, encoding="utf-8")


def build_prompts(text_format: text_formats.TextFormat) -> dict[str, str]:
    """Returns what stands before a text: by task, and for any query or document.

    Raises:
        ValueError: The format writes something after the text.
    """
    if text_format.prompts:
        return dict(text_format.prompts)
    tasks = {
        task: _prefix(text_format.query, task_description=description)
        for task, description in text_format.task_descriptions.items()
    }
    return tasks | {
        QUERY: _prefix(
            text_format.query,
            task_description=text_format.describe(text_formats.DEFAULT_TASK),
        ),
        DOCUMENT: _prefix(text_format.passage, title=text_format.no_title),
    }


def build_config(config: dual_encoder.EncoderConfig) -> dict[str, Any]:
    """Returns Hugging Face's `config.json` of the encoder.

    Raises:
        ValueError: Its T5 has no such MLP.
    """
    activation, *gate = config.mlp_activations
    if activation not in _ACTIVATIONS or gate not in ([], ["linear"]):
        raise ValueError(
            f"mlp_activations={config.mlp_activations}: Hugging Face's T5 has an "
            f"activation of {', '.join(_ACTIVATIONS)}, alone or with a linear gate "
            "after it; export with --to=t5x"
        )
    act = _ACTIVATIONS[activation]
    # "gated-gelu" stands for gelu_new there, by a rule of its own.
    gated = "gated-gelu" if activation == "gelu" else f"gated-{act}"
    is_shared = config.shared_relative_bias
    return {
        "architectures": ["T5EncoderModel" if is_shared else "UMT5EncoderModel"],
        "model_type": "t5" if is_shared else "umt5",
        "vocab_size": config.vocab_size,
        "d_model": config.model_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": gated if gate else act,
        "dense_act_fn": act,
        "is_gated_act": bool(gate),
        "relative_attention_num_buckets": config.relpos_num_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
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


def _write_params(folder: pathlib.Path, model_files: model_folder.ModelFiles) -> None:
    params = parameters.flatten(model_files.params)
    projection = params.pop(names.PROJECTION, None)
    encoder = {}
    for name, there in names.hugging_face_names(model_files.encoder_config).items():
        leaf = tensors.as_tensor(params[name])
        encoder[there.name] = leaf.transpose() if there.transposed else leaf
    tensors.write(folder, encoder)
    if projection is not None:
        kernel = tensors.as_tensor(projection).transpose()
        tensors.write(folder / "2_Dense", {names.DENSE_WEIGHT: kernel})


def _prefix(template: str, **fields: str) -> str:
    prefix, _, suffix = template.partition("{text}")
    if suffix.strip():
        raise ValueError(
            f"text format {template!r}: sentence-transformers can only write before a "
            "text, not after it; use a format that ends in {text}"
        )
    for name, value in fields.items():
        prefix = prefix.replace("{" + name + "}", value)
    return prefix
