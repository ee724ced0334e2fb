"""Decoder settings, read from the keys of a Hugging Face `config.json`.

`gguf` translates its header into the same keys. Everything that the decoder does not
implement is an error.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from gecko_jax.io import field_rules
from gecko_jax.models import transformer

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
REMEDY = "copy the file again, or choose another model"
_SERVE = "serve this model and give the server's address"

# The limits are far beyond any model and protect from damaged files.
_WIDTH = field_rules.integer(1, 1 << 24)
_HEADS = field_rules.integer(1, 65_536)
_LENGTH = field_rules.integer(1, 1 << 31)
_ABOVE_ZERO = field_rules.number(above=0)
_maybe = field_rules.optional
_NUMBER = _maybe(field_rules.number())
_NAME, _FLAG = _maybe(field_rules.NAME), _maybe(field_rules.FLAG)
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_ROPE = {
    "partial_rotary_factor": field_rules.only(1.0, 1),
    **dict.fromkeys(("rope_type", "type"), _NAME),
    **dict.fromkeys(
        ("rope_theta", "factor", "original_max_position_embeddings"),
        _maybe(_ABOVE_ZERO),
    ),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), _NUMBER),
}
# transformers 5 stores rotary settings per kind of layer.
_LOCAL_ROPE = _ROPE | dict.fromkeys(("rope_type", "type"), field_rules.only("default"))
_ROPES = _ROPE | {
    _GLOBAL: _maybe(field_rules.object_of(_ROPE)),
    _LOCAL: _maybe(field_rules.object_of(_LOCAL_ROPE)),
}
_UNSUPPORTED = {
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "use_bidirectional_attention": _FLAG,
    "attn_logit_softcapping": _NUMBER,
    "final_logit_softcapping": _NUMBER,
    "use_sliding_window": _FLAG,
}
_SETTINGS = {
    "vocab_size": _WIDTH,
    "hidden_size": _WIDTH,
    "num_hidden_layers": field_rules.integer(1, 4_096),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _maybe(_HEADS),
    "head_dim": _maybe(field_rules.integer(2, 65_536)),
    "intermediate_size": _WIDTH,
    "max_position_embeddings": _LENGTH,
    "rms_norm_eps": _ABOVE_ZERO,
    "rope_theta": _maybe(_ABOVE_ZERO),
    "partial_rotary_factor": field_rules.only(1.0, 1),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling"), _maybe(field_rules.object_of(_ROPES))
    ),
    "tie_word_embeddings": field_rules.FLAG,
    **_UNSUPPORTED,
}
_PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")
_GEMMA_SETTINGS = {
    "query_pre_attn_scalar": _ABOVE_ZERO,
    "sliding_window": _LENGTH,
    **dict.fromkeys(_PATTERNS, _maybe(field_rules.integer(1, 4_096))),
    "rope_local_base_freq": _maybe(_ABOVE_ZERO),
    "layer_types": _maybe(field_rules.list_of(field_rules.TEXT)),
}


def check_family(place: object, key: str, name: Any, known: Collection[str]) -> None:
    """Raises for a model family that the decoder does not implement."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{place}: {key} {name!r:.80}; the in-process decoder runs "
            f"{', '.join(known)}: choose such a model, or {_SERVE}"
        )


def build(
    place: object,
    settings: Mapping[str, Any],
    rope_factors: tuple[float, ...] | None = None,
) -> transformer.DecoderConfig:
    """Returns the decoder's settings from values by the keys of `config.json`.

    `rope_factors` are divisors of the rotary frequencies; None reads the settings.
    Raises ValueError for a setting that is missing, out of range or unsupported, or
    contradicts another.
    """
    family = settings["model_type"]
    is_gemma = family == "gemma3_text"
    kinds = _SETTINGS | (_GEMMA_SETTINGS if is_gemma else {})
    field_rules.check(place, settings, kinds, REMEDY)
    for key in _UNSUPPORTED:
        if (value := settings.get(key)) is not None and value is not False:
            raise ValueError(
                f"{place}: {key}={value}; the in-process decoder does not support it: "
                f"{_SERVE}"
            )
    model_dim, num_heads = settings["hidden_size"], settings["num_attention_heads"]
    num_kv_heads = settings.get("num_key_value_heads") or num_heads
    head_dim = settings.get("head_dim") or model_dim // num_heads
    if num_heads % num_kv_heads or head_dim % 2 or not head_dim:
        raise ValueError(
            f"{place}: {num_heads} query heads, {num_kv_heads} key heads, head_dim "
            f"{head_dim}; the first must be a multiple of the second, and head_dim "
            f"even: {REMEDY}"
        )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    local_rope = rope.get(_LOCAL) or {}
    per_layer = (settings.get("rope_parameters") or {}).keys()
    if is_gemma and per_layer and not per_layer & {_GLOBAL, _LOCAL}:
        raise ValueError(
            f"{place}: rope_parameters has no {_GLOBAL} and no {_LOCAL}, and Gemma 3 "
            f"has one entry for each: {REMEDY}"
        )
    rope = rope.get(_GLOBAL) or rope
    default_base = 1e6 if is_gemma else 1e4
    base = float(rope.get("rope_theta") or settings.get("rope_theta") or default_base)
    if rope_factors is None:
        rope_factors = _rope_factors(place, rope, base, head_dim)
    elif len(rope_factors) != head_dim // 2 or not all(
        0 < factor < math.inf for factor in rope_factors
    ):
        raise ValueError(
            f"{place}: {len(rope_factors)} divisors of rotary frequencies; there must "
            f"be {head_dim // 2}, all above 0: {REMEDY}"
        )
    switches: dict[str, Any] = {}
    if is_gemma:
        local_base = local_rope.get("rope_theta")
        local_base = local_base or settings.get("rope_local_base_freq") or 1e4
        switches = {
            "activation": "gelu",
            "embedding_scale": model_dim**0.5,
            "query_scale": settings["query_pre_attn_scalar"] ** -0.5,
            "sandwich_norms": True,
            "local_window": settings["sliding_window"],
            "global_every": _global_every(place, settings),
            "local_rope_base": float(local_base),
        }
    return transformer.DecoderConfig(
        vocab_size=settings["vocab_size"],
        model_dim=model_dim,
        num_layers=settings["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_dim=settings["intermediate_size"],
        context_length=settings["max_position_embeddings"],
        norm_epsilon=float(settings["rms_norm_eps"]),
        rope_base=base,
        rope_factors=rope_factors,
        tied=settings["tie_word_embeddings"],
        qkv_bias=family == "qwen2",
        head_norms=family in ("qwen3", "gemma3_text"),
        **switches,
    )


def _global_every(place: object, settings: Mapping[str, Any]) -> int:
    """Returns the period of the global layers; `layer_types` must agree."""
    every = next(filter(None, map(settings.get, _PATTERNS)), 6)
    layers = range(1, settings["num_hidden_layers"] + 1)
    expected = [_LOCAL if layer % every else _GLOBAL for layer in layers]
    if settings.get("layer_types") not in (None, expected):
        raise ValueError(
            f"{place}: layer_types do not repeat {every - 1} local layers and a global "
            f"one, which is all that the in-process decoder supports: {_SERVE}"
        )
    return every


def _rope_factors(
    place: object, rope: Mapping[str, Any], base: float, head_dim: int
) -> tuple[float, ...] | None:
    """Returns the divisor of each rotary frequency; None for no scaling."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = rope.get("factor")
    if kind == "default":
        return None
    if kind == "linear" and factor is not None:
        return (float(factor),) * (head_dim // 2)
    if kind != "llama3":
        raise ValueError(
            f"{place}: rotary positions scaled by {kind!r}; the in-process decoder "
            "supports linear scaling and Llama 3's: choose another model"
        )
    names = ("factor", "original_max_position_embeddings")
    names += ("low_freq_factor", "high_freq_factor")
    missing = [name for name in names if rope.get(name) is None]
    factor, original, low, high = (rope.get(name) or 0 for name in names)
    if missing or low >= high:
        problem = f"no {', '.join(missing)}" if missing else f"{low} not below {high}"
        raise ValueError(f"{place}: Llama 3's rotary scaling has {problem}; {REMEDY}")
    factors = []
    for pair in range(head_dim // 2):
        turns = original * base ** (-2 * pair / head_dim) / (2 * math.pi)
        # Frequencies with few turns in the original context are divided by the factor;
        # those with many stay.
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
