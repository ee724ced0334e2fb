"""Hugging Face folders of encoders: `config.json` and safetensors.

T5, mT5, umT5 and FLAN-T5 are described here, other families in `family_configs`. Only
the encoder of an encoder-decoder is read. Nothing is ever unpickled, and neither
transformers nor PyTorch is needed.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from gecko_jax.formats import (
    family_configs,
    names,
    safetensors_files,
    source_files,
    tensors,
)
from gecko_jax.io import field_rules
from gecko_jax.models import dual_encoder

_T5 = ("t5", "mt5", "umt5")

# transformers' name of an activation -> ours. Its "gelu" is the exact form with erf,
# which no published T5 uses and this encoder does not compute.
_ACTIVATIONS = {
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
    **{f"gelu_{form}": "gelu" for form in ("new", "fast", "accurate")},
    **{f"gelu_{form}_tanh": "gelu" for form in ("python", "pytorch")},
}

_SIZES = {
    **dict.fromkeys(names.HUGGING_FACE_SIZES, family_configs.SIZE),
    "num_layers": family_configs.NUM_LAYERS,
}
# Other names of the sizes that transformers also reads.
_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
}

# What the encoder computes, where `config.json` says it.
_SETTINGS = {
    "layer_norm_epsilon": field_rules.one_of(1e-6),  # T5X's, which is not a setting
    "feed_forward_proj": field_rules.Kind(
        "an activation, or 'gated-' and an activation",
        lambda v: isinstance(v, str) and bool(re.fullmatch("(gated-)?[^-]+", v)),
    ),
    "dense_act_fn": field_rules.one_of(*_ACTIVATIONS),
    "is_gated_act": field_rules.FLAG,
}

# Names of the one embedding table. transformers gives the encoder the first of them
# that a file holds.
_EMBEDDING_NAMES = (
    "encoder.embed_tokens.weight",
    "shared.weight",
    "decoder.embed_tokens.weight",
)

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin")


def open_params(
    folder: pathlib.Path, config: dual_encoder.EncoderConfig, model_type: str
) -> dict[str, tensors.Tensor]:
    """Opens the encoder of a folder, under the package's names.

    Encoder parameters without such a name keep their own, so that `parameters.check`
    lists them as unexpected. `model_type` is that of `config.json`. Raises ValueError
    if a parameter is there under two names.
    """
    refuse_pickle(folder)
    weights: dict[str, tensors.Tensor] = {}
    stored_as: dict[str, str] = {}
    for stored, tensor in safetensors_files.read(folder).items():
        name = _encoder_name(stored, model_type)
        if name is None:
            continue
        if name in weights:
            raise ValueError(
                f"{folder}: {stored_as[name]} and {stored} are the same parameter; "
                "keep the one that belongs to the model"
            )
        weights[name], stored_as[name] = tensor, stored
    params = {}
    table = names.hugging_face_names(config, model_type)
    for t5x_name, (name, is_transposed) in table.items():
        aliases = _EMBEDDING_NAMES if name in _EMBEDDING_NAMES else (name,)
        candidates = [weights.pop(alias) for alias in aliases if alias in weights]
        if candidates:
            tensor = candidates[0]
            params[t5x_name] = tensor.transpose() if is_transposed else tensor
    return params | weights


def _encoder_name(name: str, model_type: str) -> str | None:
    """Returns the name of a tensor inside the encoder, None if it is not of one."""
    if model_type in family_configs.MODEL_TYPES:
        row = family_configs.MODEL_TYPES[model_type]
        name = re.sub(rf"^(?:{row.prefix})", "", name)
        return None if re.match(row.unread, name) else name
    name = name.removeprefix("transformer.")  # In models with a head.
    is_encoder = name.startswith(("shared.", "encoder.")) or name in _EMBEDDING_NAMES
    return name if is_encoder else None


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `config.json` and refuses models without an encoder that Gecko has."""
    path = folder / "config.json"
    values = source_files.read_json(path)
    model_type = values.get("model_type")
    take = f"take one of {', '.join((*_T5, *family_configs.MODEL_TYPES))}"
    if str(model_type) not in family_configs.MODEL_TYPES:
        architectures = str(values.get("architectures"))
        is_causal = re.search(r"ForCausalLM|LMHeadModel", architectures)
        # transformers gives the encoder of such a config a causal mask.
        if is_causal or values.get("is_decoder"):
            raise ValueError(
                f"{path}: a decoder-only model (model_type {model_type!r}); Gecko "
                f"needs an encoder, {take}"
            )
        if model_type not in _T5:
            raise ValueError(
                f"{path}: model_type {model_type!r} has no encoder of Gecko's; {take}"
            )
    if values.get("quantization_config"):
        raise ValueError(
            f"{path}: quantization_config is set; take the unquantized model"
        )
    return values


def encoder_config(
    values: Mapping[str, Any], source: str
) -> dual_encoder.EncoderConfig:
    """Returns the encoder's config from a `config.json`.

    Only EmbeddingGemma 2 has a projection there. The other keys of transformers'
    T5Config concern the decoder, training and the tokenizer.
    """
    if values["model_type"] in family_configs.MODEL_TYPES:
        return family_configs.read(values, source)
    sizes = {"relative_attention_num_buckets": 32, **values}
    sizes.setdefault("relative_attention_max_distance", 128)
    for alias, name in _ALIASES.items():
        if alias in values and sizes.setdefault(name, values[alias]) != values[alias]:
            given = f"{name}={sizes[name]!r} and {alias}={values[alias]!r}"
            raise source_files.damaged(source, given)
    field_rules.check(source, sizes, _SIZES, source_files.DAMAGED)
    kinds = {name: kind for name, kind in _SETTINGS.items() if name in values}
    field_rules.check(source, values, kinds, "take another model")
    return dual_encoder.EncoderConfig(
        **{ours: sizes[name] for name, ours in names.HUGGING_FACE_SIZES.items()},
        mlp_activations=_read_activations(values, source),
        shared_relative_bias=values["model_type"] != "umt5",
        embedding_dim=sizes["d_model"],
        projection=False,
    )


def _read_activations(values: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Returns `mlp_activations`, resolved as transformers does.

    `feed_forward_proj` is "gelu_new" or "gated-silu", for example; `dense_act_fn` and
    `is_gated_act`, which transformers derives from it and saves, take precedence.
    """
    default = "relu" if values["model_type"] == "t5" else "gated-gelu"
    form = values.get("feed_forward_proj", default)
    # In transformers, "gated-gelu" means gelu_new.
    full_form = "gated-gelu_new" if form == "gated-gelu" else form
    gate, _, act = full_form.rpartition("-")
    act = _ACTIVATIONS.get(values.get("dense_act_fn", act))
    if act is None:
        raise ValueError(
            f"{source}: feed_forward_proj={form!r} is not supported; the activation "
            f"must be one of {', '.join(_ACTIVATIONS)}"
        )
    return (act, "linear") if values.get("is_gated_act", gate == "gated") else (act,)


def refuse_adapter(folder: pathlib.Path) -> None:
    """Refuses a folder with an adapter (PEFT, LoRA), with or without model weights."""
    for name in _ADAPTERS:
        if not (folder / name).exists():
            continue
        base, kind = "BASE MODEL", "AutoModel"
        if (folder / _ADAPTERS[0]).exists():
            config = source_files.read_json(folder / _ADAPTERS[0])
            base = config.get("base_model_name_or_path") or base
            if config.get("task_type") == "CAUSAL_LM":
                kind = "AutoModelForCausalLM"
        raise ValueError(
            f"{folder / name}: an adapter (PEFT, LoRA), which changes the weights of "
            "its base model and is not applied here; merge it with peft: `from peft "
            f"import PeftModel; from transformers import {kind}; PeftModel."
            f"from_pretrained({kind}.from_pretrained({base!r}),"
            f" {str(folder)!r}).merge_and_unload().save_pretrained('MERGED')`, copy "
            "the other files of this folder into MERGED, without adapter_*, and use "
            "MERGED here"
        )


def refuse_pickle(folder: pathlib.Path) -> None:
    """Refuses a folder whose only weights are a pickle."""
    if safetensors_files.has_tensors(folder):
        return
    for path in (path for ending in _PICKLES for path in sorted(folder.glob(ending))):
        raise ValueError(
            f"{path}: a pickle, which can run any program when it is opened, so it is "
            "never read here; take the safetensors of the same model from the hub, or, "
            "where you trust the file, write them with transformers: "
            'AutoModel.from_pretrained("...", weights_only=True)'
            ".save_pretrained(folder)"
        )
