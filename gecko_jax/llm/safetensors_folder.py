"""A folder of Hugging Face's: `config.json` and `*.safetensors`, read without torch."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Num

from gecko_jax.io import field_rules, reading
from gecko_jax.llm import decoder_settings, decoder_weights
from gecko_jax.models import transformer

_LLAMA: decoder_weights.Names = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{}.input_layernorm.weight",
    "query": "model.layers.{}.self_attn.q_proj.weight",
    "key": "model.layers.{}.self_attn.k_proj.weight",
    "value": "model.layers.{}.self_attn.v_proj.weight",
    "out": "model.layers.{}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
NAMES: dict[str, decoder_weights.Names] = {
    "llama": _LLAMA,
    "gemma3_text": _LLAMA
    | {
        "query_norm": "model.layers.{}.self_attn.q_norm.weight",
        "key_norm": "model.layers.{}.self_attn.k_norm.weight",
        "post_attention_norm": "model.layers.{}.post_attention_layernorm.weight",
        "mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
        "post_mlp_norm": "model.layers.{}.post_feedforward_layernorm.weight",
    },
}

_KINDS = decoder_settings.KINDS
_ABOVE_ZERO = field_rules.number(above=0)
_ROPE = {
    "rope_type": field_rules.optional(field_rules.NAME),
    "type": field_rules.optional(field_rules.NAME),
    "rope_theta": field_rules.optional(_ABOVE_ZERO),
    "factor": field_rules.optional(_ABOVE_ZERO),
    "original_max_position_embeddings": field_rules.optional(_ABOVE_ZERO),
    "low_freq_factor": field_rules.optional(field_rules.number()),
    "high_freq_factor": field_rules.optional(field_rules.number()),
}
_OPTIONAL_ROPE = field_rules.optional(
    field_rules.object_of(
        _ROPE
        | {
            "full_attention": field_rules.optional(field_rules.object_of(_ROPE)),
            "sliding_attention": field_rules.optional(field_rules.object_of(_ROPE)),
        }
    )
)
_OPTIONAL_FLAG = field_rules.optional(field_rules.FLAG)
_SETTINGS = {
    "vocab_size": _KINDS["vocab_size"],
    "hidden_size": _KINDS["model_dim"],
    "num_hidden_layers": _KINDS["num_layers"],
    "num_attention_heads": _KINDS["num_heads"],
    "num_key_value_heads": field_rules.optional(_KINDS["num_kv_heads"]),
    "head_dim": field_rules.optional(_KINDS["head_dim"]),
    "intermediate_size": _KINDS["mlp_dim"],
    "max_position_embeddings": _KINDS["context_length"],
    "rms_norm_eps": _KINDS["norm_epsilon"],
    "rope_theta": field_rules.optional(_ABOVE_ZERO),
    "rope_parameters": _OPTIONAL_ROPE,
    "rope_scaling": _OPTIONAL_ROPE,
    "tie_word_embeddings": field_rules.FLAG,
    "attention_bias": _OPTIONAL_FLAG,
    "mlp_bias": _OPTIONAL_FLAG,
    "use_bidirectional_attention": _OPTIONAL_FLAG,
    "attn_logit_softcapping": field_rules.optional(field_rules.number()),
    "final_logit_softcapping": field_rules.optional(field_rules.number()),
}
_GEMMA_SETTINGS = {
    "query_pre_attn_scalar": _KINDS["query_scalar"],
    "sliding_window": _KINDS["local_window"],
    "sliding_window_pattern": field_rules.optional(_KINDS["global_every"]),
    "_sliding_window_pattern": field_rules.optional(_KINDS["global_every"]),
    "rope_local_base_freq": field_rules.optional(_ABOVE_ZERO),
    "layer_types": field_rules.optional(field_rules.list_of(field_rules.TEXT)),
}


class SafetensorsFolder:
    """An open folder: settings, and tensors by name.

    Attributes:
        path: The folder.
        architecture: "llama" or "gemma3_text".
        config: The decoder's settings.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads settings and names, and checks them against each other.

        Raises:
            ValueError: Files are missing or damaged, or of another family of models.
        """
        import safetensors

        self.path = pathlib.Path(path)
        place = self.path / "config.json"
        remedy = "copy it again, or choose another model"
        settings = _read_json(place)
        field_rules.check(place, settings, {"model_type": field_rules.NAME}, remedy)
        self.architecture: str = settings["model_type"]
        decoder_settings.check_family(
            str(self.path), "model_type", self.architecture, NAMES
        )
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.weight_files:
            try:
                opened = safetensors.safe_open(file, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file}: not a whole safetensors file ({error}); copy it again"
                ) from error
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                self._files[name] = opened
                shapes[name] = tuple(opened.get_slice(name).get_shape())
        settings = {"tie_word_embeddings": _LLAMA["output"] not in shapes} | settings
        kinds = _SETTINGS
        if self.architecture == "gemma3_text":
            kinds = kinds | _GEMMA_SETTINGS
        field_rules.check(place, settings, kinds, remedy)
        self.config: transformer.DecoderConfig = _read_config(str(place), settings)
        ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
        if self.config.tied:
            ignored.add(_LLAMA["output"])
        decoder_weights.check(
            str(self.path), self.config, NAMES[self.architecture], shapes, ignored
        )

    @property
    def weight_files(self) -> list[pathlib.Path]:
        """The files of weights, in order."""
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            raise ValueError(
                f"{self.path}: no *.safetensors; give the folder of a model, or a "
                ".gguf file"
            )
        return found

    def read(self, name: str) -> Num[np.ndarray, "..."]:
        """Returns a tensor as `decoder_weights.load` wants it."""
        values = self._files[name].get_tensor(name)
        if self.architecture == "gemma3_text" and values.ndim == 1:
            # Stored as what is added to 1.
            values = 1 + values.astype(np.float32)
        return values


def _read_config(place: str, settings: Mapping[str, Any]) -> transformer.DecoderConfig:
    is_gemma = settings["model_type"] == "gemma3_text"
    model_dim, num_heads = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or model_dim // num_heads
    # transformers 5 keeps one set of rotary settings per kind of layer.
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    local_rope = rope.get("sliding_attention") or {}
    rope = rope.get("full_attention") or rope
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if settings.get(key):
            raise ValueError(
                f"{place}: {key}={settings[key]}; the in-process decoder has no "
                "such thing: serve this model and give the server's address"
            )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings.get(key) is not None:
            raise ValueError(
                f"{place}: {key}={settings[key]}; the in-process decoder caps no "
                "logits: serve this model and give the server's address"
            )
    common = {
        "vocab_size": settings["vocab_size"],
        "model_dim": model_dim,
        "num_layers": settings["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": settings.get("num_key_value_heads") or num_heads,
        "head_dim": head_dim,
        "mlp_dim": settings["intermediate_size"],
        "context_length": settings["max_position_embeddings"],
        "norm_epsilon": float(settings["rms_norm_eps"]),
        "rope_base": float(
            rope.get("rope_theta")
            or settings.get("rope_theta")
            or (1e6 if is_gemma else 1e4)
        ),
        "rope_factors": _rope_factors(place, rope, settings, head_dim),
        "tied": settings["tie_word_embeddings"],
    }
    gemma = None
    if is_gemma:
        gemma = decoder_settings.Gemma3(
            query_scalar=float(settings["query_pre_attn_scalar"]),
            local_window=settings["sliding_window"],
            global_every=_global_every(place, settings),
            local_rope_base=float(
                local_rope.get("rope_theta")
                or settings.get("rope_local_base_freq")
                or 1e4
            ),
        )
    return decoder_settings.build(place, common, gemma)


def _global_every(place: str, settings: Mapping[str, Any]) -> int:
    """Returns of how many layers one is global; `layer_types` must say the same."""
    every = (
        settings.get("sliding_window_pattern")
        or settings.get("_sliding_window_pattern")
        or 6
    )
    kinds = settings.get("layer_types")
    expected = [
        "sliding_attention" if (layer + 1) % every else "full_attention"
        for layer in range(settings["num_hidden_layers"])
    ]
    if kinds is not None and kinds != expected:
        raise ValueError(
            f"{place}: layer_types are not {every - 1} local ones and a global one "
            "in turn, which is all that the in-process decoder knows"
        )
    return every


def _rope_factors(
    place: str, rope: Mapping[str, Any], settings: Mapping[str, Any], head_dim: int
) -> tuple[float, ...] | None:
    """Returns what divides each rotary frequency; None for nothing."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        factor = rope.get("factor")
        return decoder_settings.linear_rope(place, kind, factor, head_dim)
    base = float(rope.get("rope_theta") or settings.get("rope_theta") or 1e4)
    names = ("factor", "original_max_position_embeddings")
    names += ("low_freq_factor", "high_freq_factor")
    absent = [name for name in names if rope.get(name) is None]
    factor, original, low, high = (rope.get(name) or 0 for name in names)
    if absent or low >= high:
        told = f"no {', '.join(absent)}" if absent else f"not {low} below {high}"
        raise ValueError(
            f"{place}: Llama 3's rotary scaling with {told}; copy the file again"
        )
    factors = []
    for pair in range(head_dim // 2):
        turns = original * base ** (-2 * pair / head_dim) / (2 * math.pi)
        # Few turns within the original context: slowed; many: as they were.
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return reading.parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; give the folder of a Hugging Face model, or a "
            ".gguf file"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from error
