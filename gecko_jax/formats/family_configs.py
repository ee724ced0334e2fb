"""`config.json` of the encoder families other than T5, read and written.

    family           model_type
    gemma            gemma3_text, bidirectional (EmbeddingGemma); t5gemma2 and
                     t5gemma2_encoder (only the text encoder is read)
    embeddinggemma2  embedding_gemma2 (only the text part), embedding_gemma2_text
    qwen3            qwen3

Only settings that Gecko computes are read; all others are refused by name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gecko_jax.formats import source_files
from gecko_jax.io import field_rules
from gecko_jax.models import dual_encoder

_REMEDY = (
    "Gecko computes nothing else: take another model, or add what is missing from the "
    "original config.json"
)
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


class ModelType(NamedTuple):
    """What a `model_type` of transformers holds."""

    family: str
    path: tuple[str, ...] = ()  # keys of the text encoder's settings in `config.json`
    prefix: str = r"(model\.)?"  # regex of the text before tensor names
    unread: str = r"lm_head\."  # regex of other names that Gecko ignores


_VISION = r"vision_tower\.|multi_modal_projector\.|embed_tokens\.eoi_embedding"
MODEL_TYPES = {
    "gemma3_text": ModelType("gemma"),
    "t5gemma2": ModelType(
        "gemma",
        ("encoder", "text_config"),
        r"(model\.)?encoder\.(text_model\.)?",
        rf"(model\.)?decoder\.|lm_head\.|{_VISION}",
    ),
    "t5gemma2_encoder": ModelType(
        "gemma", ("text_config",), r"(text_model\.)?", _VISION
    ),
    "embedding_gemma2": ModelType(
        "embeddinggemma2",
        ("text_config",),
        r"language_model\.",
        r"(vision|audio)_tower\.|embed_(vision|audio)\.",
    ),
    "embedding_gemma2_text": ModelType("embeddinggemma2", (), "", "$"),
    "qwen3": ModelType("qwen3"),
}

# Sizes in `config.json` -> fields of `EncoderConfig`.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
}
_GLOBAL_HEADS = {
    "head_dim": "global_head_dim",
    "num_key_value_heads": "global_num_kv_heads",
}


_only = field_rules.only
# Larger sizes are damage, and nothing is allocated for them.
SIZE = field_rules.integer(1, 2**24)
# Every layer has a name of its own for each of its arrays. T5X has the same limit.
NUM_LAYERS = field_rules.integer(1, 1_000)
_OBJECT = field_rules.optional(field_rules.OBJECT)
_BASE = field_rules.optional(field_rules.number(above=0))
_ID = field_rules.optional(field_rules.COUNT)
_SETTINGS = {
    **dict.fromkeys(_SIZES, SIZE),
    "num_hidden_layers": NUM_LAYERS,
    "rms_norm_eps": field_rules.number(above=0),
    "attention_bias": _only(False),
    "attn_logit_softcapping": field_rules.Kind("null", lambda v: v is None, True),
    # Mixtures of experts have model types of their own; forks may not.
    **dict.fromkeys(("num_experts", "num_local_experts"), _only(0)),
    "partial_rotary_factor": _only(1.0, 1),
    "layer_types": field_rules.optional(
        field_rules.list_of(field_rules.one_of(_LOCAL, _GLOBAL))
    ),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _BASE),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), _OBJECT),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _ID),
    "eos_token_id": field_rules.optional(
        field_rules.Kind(
            "a token id, or a list of them",
            lambda v: _ID.holds(v) or (isinstance(v, list) and all(map(_ID.holds, v))),
        )
    ),
}
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")
_GEMMA = {
    "hidden_activation": field_rules.one_of("gelu_pytorch_tanh"),
    "sliding_window": SIZE,
    **dict.fromkeys(_PATTERNS, field_rules.optional(SIZE)),
}
_OWN_SETTINGS = {
    "gemma": {**_GEMMA, "query_pre_attn_scalar": field_rules.number(above=0)},
    "embeddinggemma2": {
        **_GEMMA,
        **dict.fromkeys(("hidden_size_per_layer_input", "embedding_dim"), SIZE),
        "per_layer_config": field_rules.optional(
            field_rules.map_of(
                field_rules.object_of(dict.fromkeys(_GLOBAL_HEADS, SIZE), only=True)
            )
        ),
        "num_kv_shared_layers": _only(0),
        **dict.fromkeys(("attention_k_eq_v", "enable_moe_block"), _only(False)),
    },
    "qwen3": {
        "hidden_act": field_rules.one_of("silu"),
        "use_sliding_window": _only(False),
        "is_causal": _only(True),
    },
}
_ROPE = {
    **dict.fromkeys(("rope_type", "type"), _only("default", "linear")),
    **dict.fromkeys(("rope_theta", "factor"), _BASE),
    "partial_rotary_factor": _only(1.0, 1),
    "original_max_position_embeddings": _BASE,  # Of other kinds of scaling.
}
_LOCAL_ROPE = _ROPE | dict.fromkeys(("rope_type", "type"), _only("default"))


def read(values: Mapping[str, Any], source: str) -> dual_encoder.EncoderConfig:
    """Returns the encoder's config from a `config.json`.

    Raises ValueError, which names each setting that Gecko does not compute.
    """
    name = values["model_type"]
    family, text = MODEL_TYPES[name].family, text_settings(values, source)
    if name == "gemma3_text" and text.get("use_bidirectional_attention") is not True:
        raise ValueError(
            f"{source}: use_bidirectional_attention is not true, so this Gemma 3 is a "
            "causal language model, not an encoder; take EmbeddingGemma or T5Gemma 2"
        )
    field_rules.check(source, text, _SETTINGS | _OWN_SETTINGS[family], _REMEDY)
    fields = {ours: text[theirs] for theirs, ours in _SIZES.items()}
    fields |= {"family": family, "norm_epsilon": float(text["rms_norm_eps"])}
    fields |= {"embedding_dim": text["hidden_size"], "projection": False}
    fields |= _read_rope(text, family, source)
    if family == "qwen3":
        fields |= {"mlp_activations": ("silu", "linear"), "pooling": "last"}
        if _LOCAL in (text.get("layer_types") or ()):
            raise ValueError(f"{source}: layer_types has {_LOCAL}; {_REMEDY}")
    else:
        fields |= _read_windows(text, name, source)
    if family == "gemma" and text["query_pre_attn_scalar"] != text["head_dim"]:
        fields["query_scale"] = text["query_pre_attn_scalar"] ** -0.5
    if family == "embeddinggemma2":
        fields |= {
            "query_scale": 1.0,
            "per_layer_dim": text["hidden_size_per_layer_input"],
            "embedding_dim": text["embedding_dim"],
            "projection": True,
            **_read_global_heads(text, fields["global_every"], source),
        }
    try:
        return dual_encoder.EncoderConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}; take another model") from None


def text_settings(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the settings of the text encoder in a `config.json`."""
    path = MODEL_TYPES[values["model_type"]].path
    text: Any = values
    for key in path:
        text = text.get(key)
        if not isinstance(text, dict):
            raise source_files.damaged(source, f"has no object {'.'.join(path)}")
    return text


def _read_rope(text: Mapping[str, Any], family: str, source: str) -> dict[str, float]:
    """Reads the rotary positions, in the form of transformers 5 or of 4."""
    global_rope, local_rope = text.get("rope_parameters") or {}, {}
    if {_GLOBAL, _LOCAL} & global_rope.keys():
        local_rope = global_rope.get(_LOCAL) or {}
        global_rope = global_rope.get(_GLOBAL) or {}
    elif global_rope and family != "qwen3":
        raise ValueError(
            f"{source}: rope_parameters has no {_GLOBAL} and no {_LOCAL}, and models "
            f"of the family {family!r} have one entry for each; {_REMEDY}"
        )
    scaling = text.get("rope_scaling") or {}
    place = f"{source}, rotary positions"
    for rope, kinds in (
        (global_rope, _ROPE),
        (local_rope, _LOCAL_ROPE),
        (scaling, _ROPE),
    ):
        field_rules.check(place, rope, kinds, _REMEDY, only=True)
    global_rope = global_rope | scaling
    is_linear = "linear" in (global_rope.get("rope_type"), global_rope.get("type"))
    if is_linear and not global_rope.get("factor"):
        raise source_files.damaged(place, "linear scaling without a factor")
    # Defaults of transformers.
    base = 1e4 if family == "qwen3" else 1e6
    local_base = local_rope.get("rope_theta") or text.get("rope_local_base_freq") or 1e4
    return {
        "rope_base": float(
            global_rope.get("rope_theta") or text.get("rope_theta") or base
        ),
        "rope_factor": float(global_rope["factor"]) if is_linear else 1.0,
        "local_rope_base": 1e4 if family == "qwen3" else float(local_base),
    }


def _read_windows(
    text: Mapping[str, Any], model_type: str, source: str
) -> dict[str, Any]:
    """Reads which layers are local, and how far these reach."""
    num_layers, window = text["num_hidden_layers"], text["sliding_window"]
    patterns = [text[name] for name in _PATTERNS if text.get(name)]
    types = text.get("layer_types") or _layer_types(num_layers, [*patterns, 6][0])
    # Without a global layer, the period is beyond the last one.
    every = types.index(_GLOBAL) + 1 if _GLOBAL in types else num_layers + 1
    if types != _layer_types(num_layers, every):
        raise ValueError(
            f"{source}: layer_types must repeat some local layers and a global one in "
            f"{num_layers} layers; {_REMEDY}"
        )
    # Gemma 3 attends at distances < window // 2 + 1. So does T5Gemma 2 to the right;
    # to the left, at distances < (window + 1) // 2.
    left = (window - 1) // 2 if model_type.startswith("t5gemma2") else window // 2
    reach = (left, window // 2)
    if model_type.startswith("embedding_gemma2"):
        reach = (window, window)
    return {"global_every": every, "local_window": reach if every > 1 else ()}


def _layer_types(num_layers: int, every: int) -> list[str]:
    return [_LOCAL if (n + 1) % every else _GLOBAL for n in range(num_layers)]


def _read_global_heads(
    text: Mapping[str, Any], every: int, source: str
) -> dict[str, int]:
    """Reads the heads of EmbeddingGemma 2's global layers."""
    layers = text.get("per_layer_config") or {}
    expected = {str(n - 1) for n in range(every, text["num_hidden_layers"] + 1, every)}
    heads = list(layers.values())
    if layers and (layers.keys() != expected or heads != heads[:1] * len(heads)):
        raise ValueError(
            f"{source}: per_layer_config must give all global layers the same heads, "
            f"and no others; {_REMEDY}"
        )
    return {ours: heads[0][name] for name, ours in _GLOBAL_HEADS.items() if heads}


_ARCHITECTURES = {
    "gemma3_text": "Gemma3TextModel",
    "t5gemma2_encoder": "T5Gemma2Encoder",
    "embedding_gemma2_text": "EmbeddingGemma2TextModel",
    "qwen3": "Qwen3Model",
}

# transformers has no class for T5Gemma 2's text encoder alone: an export has the
# smallest vision tower, which no text reaches, and opens with a plain tokenizer.
_NO_VISION = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        **dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 1),
        **dict.fromkeys(("patch_size", "num_attention_heads"), 1),
        "num_hidden_layers": 0,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 1,
    "processor_class": "PreTrainedTokenizerFast",
}


def write(
    config: dual_encoder.EncoderConfig, max_length: int, special_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the `config.json` of an encoder of another family than T5.

    `max_length` is in tokens, and `special_ids` has the ids of special tokens by the
    keys of `config.json`. Raises ValueError if no model of transformers computes this
    encoder.
    """
    activation, family = config.mlp_activations[0], config.family
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    reach = sum(config.local_window)
    text: dict[str, Any] = {
        **{theirs: getattr(config, ours) for theirs, ours in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "max_position_embeddings": max_length,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act" if family == "qwen3" else "hidden_activation": activation,
        "layer_types": _layer_types(config.num_layers, config.global_every),
        "use_cache": False,
        "tie_word_embeddings": True,
        **special_ids,
    }
    values: dict[str, Any] = {"model_type": "qwen3"}
    if family == "gemma":
        scale = config.query_scale or config.head_dim**-0.5
        text["query_pre_attn_scalar"] = round(scale**-2)
        if config.is_symmetric:
            values["model_type"] = "gemma3_text"
            text["use_bidirectional_attention"] = True
            text["sliding_window"] = max(reach, 2)
        else:
            values |= {"model_type": "t5gemma2_encoder", **_NO_VISION}
            text |= {"model_type": "t5gemma2_text", "dropout_rate": 0.0}
            text["sliding_window"] = reach + 1
    elif family == "embeddinggemma2":
        values["model_type"] = "embedding_gemma2_text"
        _, *heads = config.heads(False)
        heads = dict(zip(reversed(_GLOBAL_HEADS), heads, strict=True))
        wide = [n for n, is_local in enumerate(config.is_local) if not is_local]
        text |= {
            "sliding_window": max(reach // 2, 1),
            "hidden_size_per_layer_input": config.per_layer_dim,
            "embedding_dim": config.embedding_dim,
            "per_layer_config": {str(n): heads for n in wide},
        }
    base, local_base, scaling = config.rope_base, config.local_rope_base, None
    if config.rope_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    if values["model_type"] in ("gemma3_text", "qwen3"):
        # The form of transformers 4, which 5 and other servers read, too.
        text |= {"rope_theta": base, "rope_scaling": scaling}
        text |= {"rope_local_base_freq": local_base} if family == "gemma" else {}
    else:
        plain = {"rope_type": "default"}
        text["rope_parameters"] = {
            _GLOBAL: {**(scaling or plain), "rope_theta": base},
            _LOCAL: {**plain, "rope_theta": local_base},
        }
    values["architectures"] = [_ARCHITECTURES[values["model_type"]]]
    values |= {"text_config": text} if "vision_config" in values else text
    values["dtype"] = "float32"
    ours = _facts(config)
    read_back = _facts(read(values, f"an export of the family {family!r}"))
    lost = [f"{key}={ours[key]!r}" for key in ours if ours[key] != read_back[key]]
    if lost:
        raise ValueError(
            f"{', '.join(lost)}: transformers has no encoder of the family {family!r} "
            "with this setting; export with --to=gecko"
        )
    return values


def _facts(config: dual_encoder.EncoderConfig) -> dict[str, Any]:
    """Returns what `config.json` must say about an encoder."""
    sizes = {ours: getattr(config, ours) for ours in _SIZES.values()}
    return sizes | {
        "num_kv_heads": [config.heads(is_local)[1:] for is_local in config.is_local],
        "mlp_activations": config.mlp_activations,
        "local_window": config.local_window,
        "global_every": config.is_local,
        "rope_base": config.rope_base,
        "rope_factor": config.rope_factor,
        "local_rope_base": any(config.is_local) and config.local_rope_base,
        "query_scale": f"{config.query_scale or config.head_dim**-0.5:.6g}",
        "norm_epsilon": config.norm_epsilon,
        "per_layer_dim": config.per_layer_dim,
        "projection": config.family == "embeddinggemma2" and config.projection,
    }


def placeholders(config: dual_encoder.EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the zeros that fill `_NO_VISION` in an export."""
    if config.is_symmetric:
        return {}
    vision = "vision_tower.embeddings"
    return {
        "embed_tokens.eoi_embedding": (config.model_dim,),
        "multi_modal_projector.mm_input_projection_weight": (1, config.model_dim),
        "multi_modal_projector.mm_soft_emb_norm.weight": (1,),
        f"{vision}.patch_embedding.bias": (1,),
        f"{vision}.patch_embedding.weight": (1, 3, 1, 1),
        f"{vision}.position_embedding.weight": (1, 1),
        "vision_tower.post_layernorm.bias": (1,),
        "vision_tower.post_layernorm.weight": (1,),
    }
