"""GGUF: a decoder and its tokenizer in one file, as llama.cpp reads it.

The `gguf` package reads the container and undoes the quantization; here is what the
settings and the names mean, and where llama.cpp stores a tensor otherwise than Hugging
Face: Llama's query and key rows are interleaved for its rotary positions. Norms are
stored as what they multiply with, Gemma's too.
"""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from gecko_jax.io import field_rules, wording
from gecko_jax.llm import decoder_settings, decoder_weights, gguf_header
from gecko_jax.models import transformer

_LLAMA: decoder_weights.Names = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{}.attn_norm.weight",
    "query": "blk.{}.attn_q.weight",
    "key": "blk.{}.attn_k.weight",
    "value": "blk.{}.attn_v.weight",
    "out": "blk.{}.attn_output.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "output": "output.weight",
}
NAMES: dict[str, decoder_weights.Names] = {
    "llama": _LLAMA,
    "gemma3": _LLAMA
    | {
        "query_norm": "blk.{}.attn_q_norm.weight",
        "key_norm": "blk.{}.attn_k_norm.weight",
        "post_attention_norm": "blk.{}.post_attention_norm.weight",
        "post_mlp_norm": "blk.{}.post_ffw_norm.weight",
    },
}

# Llama 3's frequency divisors, which belong to the settings.
_ROPE_FACTORS = "rope_freqs.weight"

# Not in the file: Gemma 3's local layers, and its 27B model, known by its depth.
_GEMMA3_LOCAL_ROPE_BASE = 10_000.0
_GEMMA3_GLOBAL_EVERY = 6
_GEMMA3_27B_LAYERS = 62


class Gguf:
    """An open file: settings, and tensors by name.

    Attributes:
        path: The file.
        architecture: "llama" or "gemma3".
        config: The decoder's settings.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads settings and names, and checks them against each other.

        Raises:
            ImportError: The `gguf` package is missing.
            ValueError: No whole GGUF file, or another family of models.
        """
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "reading GGUF needs the gguf package: "
                'pip install "gecko-jax[llm-local]"'
            ) from error
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; give a .gguf file")
        gguf_header.check(self.path)
        try:
            # With "r" the file is mapped, so that only what is used is read.
            reader = gguf.GGUFReader(self.path, "r")
        except Exception as error:  # A damaged file ends in any of a dozen of them.
            raise ValueError(
                f"{self.path}: not a whole GGUF file "
                f"({wording.printable(str(error))}); copy it again"
            ) from error
        self._fields: dict[str, Any] = dict(reader.fields)
        self._tensors: dict[str, Any] = {t.name: t for t in reader.tensors}
        self._dequantize: Callable[..., np.ndarray] = gguf.dequantize
        self.architecture: str = self._typed("general.architecture", field_rules.NAME)
        decoder_settings.check_family(
            str(self.path), "architecture", self.architecture, NAMES
        )
        self.config: transformer.DecoderConfig = self._read_config()
        shapes = {
            # GGUF counts dimensions from the innermost.
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        decoder_weights.check(
            str(self.path),
            self.config,
            NAMES[self.architecture],
            shapes,
            ignored=(_ROPE_FACTORS,),
        )

    def setting(self, key: str, default: Any = ...) -> Any:
        """Returns a value of the header; `{}` in a key is the architecture.

        Raises:
            ValueError: It is not there and there is no default.
        """
        if "{}" in key:
            key = key.format(self.architecture)
        if key in self._fields:
            try:
                return self._fields[key].contents()
            except Exception as error:  # See above.
                raise ValueError(
                    f"{self.path}: {key} cannot be read "
                    f"({wording.printable(str(error))}); copy the file again"
                ) from error
        if default is ...:
            raise ValueError(f"{self.path}: no setting {key}; copy the file again")
        return default

    def _typed(self, key: str, kind: field_rules.Kind, default: Any = ...) -> Any:
        value = self.setting(key, default)
        if default is None and value is None:
            return None
        remedy = "copy the file again, or choose another model"
        field_rules.check(self.path, {key: value}, {key: kind}, remedy)
        return value

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """Returns a tensor, not quantized any more, as `decoder_weights.load` wants."""
        tensor = self._tensors[name]
        try:
            values = self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: {name} is quantized as {tensor.tensor_type.name}, which "
                "the gguf package cannot undo; choose a file in Q4_K_M, Q8_0 or F16"
            ) from error
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}
        kind = name.split(".")[-2]
        if self.architecture == "llama" and kind in heads:
            pairs = values.reshape(heads[kind], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    def _read_config(self) -> transformer.DecoderConfig:
        kinds = decoder_settings.KINDS

        def whole(key: str, name: str, default: Any = ...) -> int:
            return self._typed(f"{{}}.{key}", kinds[name], default)

        num_heads = whole("attention.head_count", "num_heads")
        model_dim = whole("embedding_length", "model_dim")
        num_layers = whole("block_count", "num_layers")
        head_dim = whole("attention.key_length", "head_dim", model_dim // num_heads)
        tokens = field_rules.list_of(field_rules.TEXT)
        embedding = self._tensors.get("token_embd.weight")
        common = {
            "vocab_size": int(embedding.shape[1])
            if embedding is not None and len(embedding.shape) == 2
            else len(self._typed("tokenizer.ggml.tokens", tokens)),
            "model_dim": model_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": whole("attention.head_count_kv", "num_kv_heads", num_heads),
            "head_dim": head_dim,
            "mlp_dim": whole("feed_forward_length", "mlp_dim"),
            "context_length": whole("context_length", "context_length"),
            "norm_epsilon": self._typed(
                "{}.attention.layer_norm_rms_epsilon", kinds["norm_epsilon"]
            ),
            "rope_base": float(
                self._typed("{}.rope.freq_base", kinds["rope_base"], 10_000.0)
            ),
            "rope_factors": self._read_rope_factors(head_dim),
            "tied": "output.weight" not in self._tensors,
        }
        gemma = None
        if self.architecture == "gemma3":
            is_27b = num_layers == _GEMMA3_27B_LAYERS
            gemma = decoder_settings.Gemma3(
                query_scalar=model_dim / num_heads if is_27b else head_dim,
                local_window=whole("attention.sliding_window", "local_window"),
                global_every=_GEMMA3_GLOBAL_EVERY,
                local_rope_base=_GEMMA3_LOCAL_ROPE_BASE,
            )
        return decoder_settings.build(str(self.path), common, gemma)

    def _read_rope_factors(self, head_dim: int) -> tuple[float, ...] | None:
        if _ROPE_FACTORS in self._tensors:
            return tuple(np.ravel(self.read(_ROPE_FACTORS)).tolist())
        kind = self._typed("{}.rope.scaling.type", field_rules.NAME, "none")
        if kind == "none":
            return None
        above_zero = field_rules.number(above=0)
        factor = self._typed("{}.rope.scaling.factor", above_zero, None)
        return decoder_settings.linear_rope(str(self.path), kind, factor, head_dim)
