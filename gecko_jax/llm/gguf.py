"""GGUF: a decoder and its tokenizer in one file, as llama.cpp reads it.

The `gguf` package reads the container and dequantizes tensors. This module translates
the header into the keys of `decoder_settings`, and undoes llama.cpp's layout of Llama's
query and key rows, which interleaves the rotary pairs.
"""

import functools
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from gecko_jax.io import wording
from gecko_jax.llm import (
    decoder_settings,
    decoder_tokenizer,
    decoder_weights,
    gguf_header,
)
from gecko_jax.models import transformer

# Architecture -> `model_type`.
_MODEL_TYPES = {n: n for n in ("llama", "qwen2", "qwen3")} | {"gemma3": "gemma3_text"}
# Key of `config.json` -> key of the header, after the architecture.
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OPTIONAL_KEYS = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
# Llama 3's divisors of the rotary frequencies are stored as a tensor.
_ROPE_FACTORS = "rope_freqs.weight"
# Values of Gemma 3 that the header lacks.
_GEMMA = {"sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0}


class Gguf:
    """An open file whose tensors fit its settings; see `decoder_weights.ModelFile`."""

    file_format: decoder_weights.Format = "gguf"

    def __init__(self, path: str | os.PathLike):
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "reading GGUF needs the gguf package: "
                'pip install "gecko-jax[llm-local]"'
            ) from error
        self._path = path = pathlib.Path(path)
        gguf_header.check(path)
        try:
            reader = gguf.GGUFReader(path, "r")  # Mapped, not read.
        except Exception as error:  # Damaged files raise many types.
            problem = wording.printable(str(error))
            raise ValueError(
                f"{path}: not a complete GGUF file ({problem}); copy it again"
            ) from error
        self._fields: dict[str, Any] = dict(reader.fields)
        self._tensors: dict[str, Any] = {t.name: t for t in reader.tensors}
        self._dequantize: Any = gguf.dequantize
        self._architecture = kind = self.setting("general.architecture")
        decoder_settings.check_family(path, "architecture", kind, _MODEL_TYPES)
        shapes = {  # GGUF lists the innermost dimension first.
            name: tuple(int(size) for size in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self.config: transformer.DecoderConfig = self._read_config(shapes)
        decoder_weights.check(
            self._path, self.config, self.file_format, shapes, {_ROPE_FACTORS}
        )

    @functools.cached_property
    def tokenizer(self) -> decoder_tokenizer.Tokenizer:
        """The tokenizer of the header."""
        return decoder_tokenizer.from_gguf(self.setting, str(self._path))

    def setting(self, key: str, default: Any = ...) -> Any:
        """Returns a value of the header; one without a default must be there."""
        if key in self._fields:
            try:
                return self._fields[key].contents()
            except Exception as error:  # Damaged files raise many types.
                raise ValueError(
                    f"{self._path}: {key} cannot be read "
                    f"({wording.printable(str(error))}); copy the file again"
                ) from error
        if default is ...:
            raise ValueError(f"{self._path}: no setting {key}; copy the file again")
        return default

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """Returns a dequantized tensor."""
        values = self._dequantized(name)
        heads = {"attn_q": self.config.num_heads, "attn_k": self.config.num_kv_heads}
        kind = name.split(".")[-2]
        if self._architecture == "llama" and kind in heads:
            pairs = values.reshape(heads[kind], -1, 2, values.shape[1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        return values

    def _dequantized(self, name: str) -> Float[np.ndarray, "..."]:
        tensor = self._tensors[name]
        try:
            return self._dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{self._path}: {name} is quantized as {tensor.tensor_type.name}, "
                "which the gguf package cannot read; choose a file in Q4_K_M, Q8_0 or "
                "F16"
            ) from error

    def _read_config(self, shapes: dict[str, Any]) -> transformer.DecoderConfig:
        def own(key: str, default: Any = ...) -> Any:
            return self.setting(f"{self._architecture}.{key}", default)

        settings = {key: own(name) for key, name in _KEYS.items()}
        settings |= {key: own(name, None) for key, name in _OPTIONAL_KEYS.items()}
        settings |= {
            "model_type": _MODEL_TYPES[self._architecture],
            "vocab_size": (*shapes.get("token_embd.weight", ()), 1)[0],
            "tie_word_embeddings": "output.weight" not in shapes,
            "rope_theta": own("rope.freq_base", 10_000.0),
        }
        if (scaling := own("rope.scaling.type", "none")) != "none":
            factor = own("rope.scaling.factor", None)
            settings["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        if self._architecture == "gemma3":
            is_27b = settings["num_hidden_layers"] == 62
            scalar = 168 if is_27b else own("attention.key_length")
            settings |= _GEMMA | {
                "sliding_window": own("attention.sliding_window"),
                "query_pre_attn_scalar": scalar,
            }
        factors = None
        if _ROPE_FACTORS in shapes:
            factors = tuple(np.ravel(self._dequantized(_ROPE_FACTORS)).tolist())
        return decoder_settings.build(self._path, settings, factors)
