"""A folder of Hugging Face's: `config.json` and `*.safetensors`, read without torch."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Num

from gecko_jax import files
from gecko_jax.fret import decoder, decoder_settings, decoder_weights

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
        settings = _read_json(self.path / "config.json")
        self.architecture: str = settings.get("model_type", "unknown")
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
        try:
            self.config: decoder.DecoderConfig = _read_config(
                {"tie_word_embeddings": _LLAMA["output"] not in shapes} | settings
            )
        except KeyError as error:
            raise ValueError(
                f"{self.path}/config.json: no {error}; copy the file again"
            ) from error
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


def _read_config(settings: Mapping[str, Any]) -> decoder.DecoderConfig:
    is_gemma = settings["model_type"] == "gemma3_text"
    model_dim, num_heads = settings["hidden_size"], settings["num_attention_heads"]
    head_dim = settings.get("head_dim") or model_dim // num_heads
    # transformers 5 keeps one set of rotary settings per kind of layer.
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    local_rope = rope.get("sliding_attention", {})
    rope = rope.get("full_attention", rope)
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if settings.get(key):
            raise ValueError(
                f"config.json: {key}={settings[key]}; the in-process decoder has no "
                "such thing: serve this model and give the server's address"
            )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings.get(key) is not None:
            raise ValueError(
                f"config.json: {key}={settings[key]}; the in-process decoder caps no "
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
        "norm_epsilon": settings["rms_norm_eps"],
        "rope_base": float(
            rope.get("rope_theta")
            or settings.get("rope_theta")
            or (1e6 if is_gemma else 1e4)
        ),
        "rope_factors": _rope_factors(rope, settings, head_dim),
        "tied": settings["tie_word_embeddings"],
    }
    gemma = None
    if is_gemma:
        gemma = decoder_settings.Gemma3(
            query_scalar=float(settings["query_pre_attn_scalar"]),
            local_window=settings["sliding_window"],
            global_every=_global_every(settings),
            local_rope_base=float(
                local_rope.get("rope_theta")
                or settings.get("rope_local_base_freq")
                or 1e4
            ),
        )
    return decoder_settings.build(common, gemma)


def _global_every(settings: Mapping[str, Any]) -> int:
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
            f"config.json: layer_types are not {every - 1} local ones and a global one "
            "in turn, which is all that the in-process decoder knows"
        )
    return every


def _rope_factors(
    rope: Mapping[str, Any], settings: Mapping[str, Any], head_dim: int
) -> tuple[float, ...] | None:
    """Returns what divides each rotary frequency; None for nothing."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        factor = rope.get("factor")
        return decoder_settings.linear_rope("config.json", kind, factor, head_dim)
    base = float(rope.get("rope_theta") or settings.get("rope_theta") or 1e4)
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for pair in range(head_dim // 2):
        turns = original * base ** (-2 * pair / head_dim) / (2 * math.pi)
        # Few turns within the original context: slowed; many: as they were.
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; give the folder of a Hugging Face model, or a "
            ".gguf file"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from error
