"""A Hugging Face folder: `config.json` and `*.safetensors`, read without torch."""

import functools
import os
import pathlib

import numpy as np
from jaxtyping import Float

from gecko_jax.formats import safetensors_files, tensors
from gecko_jax.io import field_rules, reading
from gecko_jax.llm import decoder_settings, decoder_tokenizer, decoder_weights
from gecko_jax.models import transformer

_OUTPUT = "lm_head.weight"


class SafetensorsFolder:
    """An open folder; its tensors fit the settings. See `decoder_weights.ModelFile`."""

    file_format: decoder_weights.Format = "hugging_face"

    def __init__(self, path: str | os.PathLike):
        self._path = path = pathlib.Path(path)
        place = path / "config.json"
        try:
            fields, remedy = {"model_type": field_rules.NAME}, decoder_settings.REMEDY
            settings = reading.read_object(place, fields, remedy=remedy)
        except FileNotFoundError:
            raise ValueError(
                f"{place}: no such file; give the folder of a Hugging Face model, or a "
                ".gguf file"
            ) from None
        family = settings["model_type"]
        known = decoder_settings.FAMILIES
        decoder_settings.check_family(path, "model_type", family, known)
        self._is_gemma = family == "gemma3_text"
        paths = sorted(path.glob("*.safetensors"))
        if not paths:
            raise ValueError(
                f"{path}: no *.safetensors; give the folder of a model, or a .gguf file"
            )
        self._tensors: dict[str, tensors.Tensor] = {}
        for file in paths:
            self._tensors |= safetensors_files.open_file(file)
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        settings = {"tie_word_embeddings": _OUTPUT not in shapes} | settings
        self.config: transformer.DecoderConfig = decoder_settings.build(place, settings)
        ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
        ignored |= {_OUTPUT} if self.config.tied else set()
        decoder_weights.check(path, self.config, self.file_format, shapes, ignored)

    @functools.cached_property
    def tokenizer(self) -> decoder_tokenizer.Tokenizer:
        """The tokenizer in `tokenizer.json`."""
        return decoder_tokenizer.from_folder(self._path)

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """Returns a tensor in float32."""
        values = self._tensors[name].read()
        # Gemma stores norm weights less 1.
        return 1 + values if self._is_gemma and values.ndim == 1 else values
