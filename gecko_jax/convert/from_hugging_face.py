"""Hugging Face folders of T5, mT5, umT5 and FLAN-T5: `config.json` and safetensors.

The encoder of an encoder-decoder is taken and its decoder left where it is. Nothing is
ever unpickled, and neither transformers nor PyTorch is needed.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from gecko_jax import files, model, tensors
from gecko_jax.convert import names

_FAMILY = ("t5", "mt5", "umt5")

# `feed_forward_proj` -> our activations. Their plain "gelu" is the erf form, which no
# T5 checkpoint has; "gated-gelu" means the tanh form.
_ACTIVATIONS = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gelu_new": ("gelu",),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
}

# RMS norms add this in T5X and here; another value would change every vector.
_NORM_EPSILON = 1e-6

# Under these names two files hold the same table.
_EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin")


def open_params(
    folder: pathlib.Path, config: model.EncoderConfig
) -> dict[str, tensors.Tensor]:
    """Opens the encoder of a folder, under our names.

    A parameter of the encoder that has no name here keeps its own, so that
    `parameters.check` lists it.
    """
    refuse_pickle(folder)
    theirs = {
        name: tensor
        for name, tensor in tensors.read(folder).items()
        if name.startswith(("shared.", "encoder."))
    }
    params = {}
    for ours, (name, is_transposed) in names.hugging_face_names(config).items():
        spelled = _EMBEDDING_NAMES if name in _EMBEDDING_NAMES else (name,)
        found = [theirs.pop(n) for n in spelled if n in theirs]
        if found:
            tensor = found[0]
            params[ours] = tensor.transpose() if is_transposed else tensor
    return params | theirs


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        ValueError: It is damaged, or describes a model that has no T5 encoder.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    names_there = [str(name) for name in values.get("architectures") or ()]
    is_causal = any(re.search(r"ForCausalLM|LMHeadModel", n) for n in names_there)
    lacks_encoder = values.get("is_decoder") and not values.get("is_encoder_decoder")
    if is_causal or lacks_encoder:
        raise ValueError(
            f"{path}: a decoder-only model (model_type {kind!r}); Gecko needs an "
            f"encoder, take one of {', '.join(_FAMILY)}"
        )
    if kind not in _FAMILY:
        raise ValueError(
            f"{path}: model_type {kind!r} has no T5 encoder; take one of "
            f"{', '.join(_FAMILY)}"
        )
    return values


def encoder_config(values: Mapping[str, Any], source: str) -> model.EncoderConfig:
    """Returns sizes and settings out of a `config.json`; without a projection.

    Raises:
        ValueError: A key is missing, or has a value that this encoder cannot follow.
    """
    activation = values.get("feed_forward_proj", "relu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{source}: feed_forward_proj={activation!r}, must be one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    epsilon = values.get("layer_norm_epsilon", _NORM_EPSILON)
    if epsilon != _NORM_EPSILON:
        raise ValueError(
            f"{source}: layer_norm_epsilon={epsilon}, must be {_NORM_EPSILON} as T5's"
        )
    wanted = ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")
    faults = [
        f"{key}={values.get(key)!r}"
        for key in wanted
        if not isinstance(values.get(key), int) or values[key] < 1
    ]
    if faults:
        raise ValueError(
            f"{source}: {', '.join(faults)}, must be a whole number above 0; the file "
            "is damaged, copy it again"
        )
    return model.EncoderConfig(
        vocab_size=values["vocab_size"],
        model_dim=values["d_model"],
        num_layers=values["num_layers"],
        num_heads=values["num_heads"],
        head_dim=values["d_kv"],
        mlp_dim=values["d_ff"],
        mlp_activations=_ACTIVATIONS[activation],
        shared_relative_bias=values["model_type"] != "umt5",
        relpos_num_buckets=values.get("relative_attention_num_buckets", 32),
        relpos_max_distance=values.get("relative_attention_max_distance", 128),
        embedding_dim=values["d_model"],
        projection=False,
    )


def refuse_pickle(folder: pathlib.Path, stem: str = "model") -> None:
    """Refuses a folder whose weights are only there as a pickle.

    Raises:
        ValueError: Names the file and the safe way.
    """
    if tensors.has_tensors(folder, stem):
        return
    for pattern in _PICKLES:
        for path in sorted(folder.glob(pattern)):
            raise ValueError(
                f"{path}: a pickle, which can run any program when it is opened, so it "
                "is never read here. Take the safetensors of the same model from the "
                "hub, or, where you trust the file, write them with transformers: "
                'AutoModel.from_pretrained("...", weights_only=True)'
                ".save_pretrained(folder)"
            )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: The file is missing or damaged.
    """
    try:
        values = files.parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy it from where the rest is") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: not a JSON object; the file is damaged, copy it again"
        )
    return values
