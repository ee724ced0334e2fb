"""Hugging Face folders of T5, mT5, umT5 and FLAN-T5: `config.json` and safetensors.

The encoder of an encoder-decoder is taken and its decoder left where it is. Nothing is
ever unpickled, and neither transformers nor PyTorch is needed.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from gecko_jax.formats import names, tensors
from gecko_jax.io import inputs, reading, writing
from gecko_jax.models import dual_encoder

_FAMILY = ("t5", "mt5", "umt5")

# transformers' name of an activation -> ours. Its "gelu" is the exact form with erf,
# which no published T5 has, and which this encoder does not compute.
_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu_python_tanh": "gelu",
    "gelu_pytorch_tanh": "gelu",
}

_SIZES = ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")

# No size of a model is near this; larger ones are damage, and never allocated.
_MOST = 2**24

# Second names of the sizes, which transformers reads too.
_ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "d_kv",
}

# RMS norms add this in T5X and here; another value would change every vector.
_NORM_EPSILON = 1e-6

# Names of the one embedding table. Where a file holds several, transformers gives the
# encoder the first of them.
_EMBEDDING_NAMES = (
    "encoder.embed_tokens.weight",
    "shared.weight",
    "decoder.embed_tokens.weight",
)

# Models with a head keep the encoder under this prefix.
_HEAD_PREFIX = "transformer."

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.bin")


def open_params(
    folder: pathlib.Path, config: dual_encoder.EncoderConfig
) -> dict[str, tensors.Tensor]:
    """Opens the encoder of a folder, under our names.

    A parameter of the encoder that has no name here keeps its own, so that
    `parameters.check` lists it.
    """
    refuse_pickle(folder)
    theirs = {
        name.removeprefix(_HEAD_PREFIX): tensor
        for name, tensor in tensors.read(folder).items()
    }
    theirs = {
        name: tensor
        for name, tensor in theirs.items()
        if name.startswith(("shared.", "encoder.")) or name in _EMBEDDING_NAMES
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
    architectures = values.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ValueError(
            f"{path}: architectures is {inputs.kind(architectures)}, not a list; the "
            "file is damaged, copy it again"
        )
    named = map(str, architectures)
    is_causal = any(re.search(r"ForCausalLM|LMHeadModel", name) for name in named)
    # transformers gives the encoder of such a config a causal mask.
    if is_causal or values.get("is_decoder"):
        raise ValueError(
            f"{path}: a decoder-only model (model_type {kind!r}); Gecko needs an "
            f"encoder, take one of {', '.join(_FAMILY)}"
        )
    if kind not in _FAMILY:
        raise ValueError(
            f"{path}: model_type {kind!r} has no T5 encoder; take one of "
            f"{', '.join(_FAMILY)}"
        )
    if values.get("quantization_config"):
        raise ValueError(
            f"{path}: quantization_config is set; take the model without quantization"
        )
    return values


def encoder_config(
    values: Mapping[str, Any], source: str
) -> dual_encoder.EncoderConfig:
    """Returns sizes and settings out of a `config.json`; without a projection.

    The other keys of transformers' T5Config do not reach the encoder: those of the
    decoder (`num_decoder_layers`, `decoder_start_token_id`, `use_cache`,
    `scale_decoder_outputs`, `tie_word_embeddings`), of training (`dropout_rate`,
    `initializer_factor`, `classifier_dropout`) and of the tokenizer.

    Raises:
        ValueError: A key is missing, or has a value that this encoder cannot follow.
    """
    sizes, faults = _read_sizes(values)
    if faults:
        raise ValueError(
            f"{source}: {', '.join(faults)}; the file is damaged, copy it again"
        )
    epsilon = values.get("layer_norm_epsilon", _NORM_EPSILON)
    if epsilon != _NORM_EPSILON:
        raise ValueError(
            f"{source}: layer_norm_epsilon={epsilon}, must be {_NORM_EPSILON} as T5's; "
            "no other value is computed here"
        )
    return dual_encoder.EncoderConfig(
        vocab_size=sizes["vocab_size"],
        model_dim=sizes["d_model"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["d_kv"],
        mlp_dim=sizes["d_ff"],
        mlp_activations=_read_activations(values, source),
        shared_relative_bias=values["model_type"] != "umt5",
        relpos_num_buckets=sizes["relative_attention_num_buckets"],
        relpos_max_distance=sizes["relative_attention_max_distance"],
        embedding_dim=sizes["d_model"],
        projection=False,
    )


def _read_sizes(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the sizes by transformers' first name of each, and all their faults."""
    sizes: dict[str, Any] = {
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }
    sizes |= {name: values.get(name) for name in (*sizes, *_SIZES) if name in values}
    faults = []
    for alias, name in _ALIASES.items():
        if alias in values and values[alias] != sizes.setdefault(name, values[alias]):
            faults.append(f"{name}={sizes[name]!r} and {alias}={values[alias]!r}")
    wrong = [
        f"{name}={sizes.get(name)!r}"
        for name in (*_SIZES, *sizes.keys() - set(_SIZES))
        if type(sizes.get(name)) is not int or not 0 < sizes[name] <= _MOST
    ]
    if wrong:
        faults.append(
            f"{', '.join(wrong)[:300]}, must be a whole number above 0 and at most "
            f"{_MOST:,}"
        )
    return sizes, faults


def _read_activations(values: Mapping[str, Any], source: str) -> tuple[str, ...]:
    """Returns `mlp_activations`, as transformers finds them.

    `feed_forward_proj` says "gelu_new" or "gated-silu"; `dense_act_fn` and
    `is_gated_act`, which transformers derives from it and saves, take precedence.
    """
    is_first = values["model_type"] == "t5"
    form = values.get("feed_forward_proj", "relu" if is_first else "gated-gelu")
    # A rule of its own: "gated-gelu" means gelu_new.
    spelled = "gated-gelu_new" if form == "gated-gelu" else str(form)
    gate, _, act = spelled.rpartition("-")
    if not isinstance(form, str) or gate not in ("", "gated"):
        raise ValueError(
            f"{source}: feed_forward_proj={form!r}, must be an activation or "
            "'gated-' and an activation"
        )
    act = values.get("dense_act_fn", act)
    is_gated = values.get("is_gated_act", gate == "gated")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        key = "dense_act_fn" if "dense_act_fn" in values else "feed_forward_proj"
        raise ValueError(
            f"{source}: {key}={values.get(key)!r}, this encoder has no such "
            f"activation; it must be one of {', '.join(_ACTIVATIONS)}"
        )
    if not isinstance(is_gated, bool):
        raise ValueError(
            f"{source}: is_gated_act is {inputs.kind(is_gated)}, must be true or false"
        )
    return (_ACTIVATIONS[act], "linear") if is_gated else (_ACTIVATIONS[act],)


def refuse_adapter(folder: pathlib.Path) -> None:
    """Refuses a folder that holds an adapter (PEFT, LoRA), alone or beside weights.

    Raises:
        ValueError: Names the file, and the lines that merge it.
    """
    for name in _ADAPTERS:
        if not (folder / name).exists():
            continue
        base = "BASE MODEL"
        if (folder / _ADAPTERS[0]).exists():
            values = read_json(folder / _ADAPTERS[0])
            base = values.get("base_model_name_or_path") or base
        raise ValueError(
            f"{folder / name}: an adapter (PEFT, LoRA), which changes the weights of "
            "its base model and is not applied here; merge it with peft: `from peft "
            "import PeftModel; from transformers import T5EncoderModel; "
            f"PeftModel.from_pretrained(T5EncoderModel.from_pretrained({base!r}), "
            f"{str(folder)!r}).merge_and_unload().save_pretrained('MERGED')`, copy the "
            "other files of this folder into MERGED, without adapter_*, and name "
            "MERGED here"
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
    path = writing.member(path.parent, path.name)
    try:
        values = reading.parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; copy it from where the rest is") from None
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: not a JSON object; the file is damaged, copy it again"
        )
    return values
