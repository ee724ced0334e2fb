"""Sizes and settings of the dual encoder, and what each encoder family fixes.

A family fixes the switches of `Family`; what differs between the released sizes of a
family is a field of `EncoderConfig`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

REMAT_POLICIES = ("none", "full", "dots")
ATTENTIONS = ("xla", "cudnn")
DTYPES = ("float32", "bfloat16")
POOLINGS = ("mean", "last")


class Family(NamedTuple):
    """Switches of a family with rotary positions, RMS norms and gated MLPs."""

    norm_offset: float = 0.0  # added to the stored scale of each norm (Gemma 3: 1)
    sandwich_norms: bool = False  # norms also follow the attention and the MLP
    value_norm: bool = False  # value heads are normalized, without a scale
    scaled_embedding: bool = False  # token embeddings are multiplied by sqrt(M)
    causal: bool = False  # a token attends only to tokens before it
    # Each layer also reads the token embeddings, through a gate (EmbeddingGemma 2's
    # per-layer embeddings), and scales its output.
    per_layer: bool = False


# Families other than T5, whose layers are in `models.t5`.
FAMILIES: dict[str, Family] = {
    # Gemma 3 without the causal mask: EmbeddingGemma, T5Gemma 2's encoder.
    "gemma": Family(norm_offset=1.0, sandwich_norms=True, scaled_embedding=True),
    "embeddinggemma2": Family(
        sandwich_norms=True, value_norm=True, scaled_embedding=True, per_layer=True
    ),
    "qwen3": Family(causal=True),
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and settings of the dual encoder."""

    vocab_size: int  # rows of the embedding table (T5: 32,128; mT5: 250,112)
    model_dim: int  # encoder width M
    num_layers: int
    num_heads: int  # attention heads H
    head_dim: int  # head width K; H * K need not be M
    mlp_dim: int  # MLP width F
    # ("gelu", "linear") is gated GELU (T5 1.1, mT5, umT5, Gemma); ("silu", "linear") is
    # Qwen 3; ("relu",) is T5 1.0.
    mlp_activations: Sequence[str] = ("gelu", "linear")
    # One relative bias for all layers (T5, mT5), or one each (umT5).
    shared_relative_bias: bool = True
    relpos_num_buckets: int = 32  # buckets of both directions together
    relpos_max_distance: int = 128  # distance in tokens from which all share one
    embedding_dim: int = 768  # width D of the embedding
    # Whether a matrix maps the pooled width M to D. Without one D is M (a plain T5
    # encoder, or a Sentence-T5 without its dense layer).
    projection: bool = True
    dropout_rate: float = 0.0  # share of activations dropped in training
    # Activation dtype, "float32" or "bfloat16". Parameters, norms, softmax, pooling and
    # similarities are always float32.
    dtype: str = "float32"
    scan_layers: bool = False  # one program for all layers, compiled faster
    # Recomputed in the backward pass: "none", everything ("full"), or all but matrix
    # products ("dots").
    remat: str = "none"
    # Added under the root when a trained model normalizes embeddings; t5x_retrieval
    # uses 1e-6. Losses use 1e-12.
    l2_epsilon: float = 1e-12
    # "cudnn" runs T5's attention as one cuDNN kernel on a GPU, in bfloat16 and without
    # dropout. In all other cases it is the same as "xla".
    attention: str = "xla"
    residual_init_scale: float = 0.1  # factor of T5X's residual initializers
    family: str = "t5"  # "t5", or one of `FAMILIES`; T5 uses none of the fields below
    pooling: str = "mean"  # "mean" over the tokens of a text, or its "last" token
    num_kv_heads: int = 0  # key and value heads, a divisor of H; 0 for H
    # Heads and width in global layers (EmbeddingGemma 2); 0 for those of local layers.
    global_num_kv_heads: int = 0
    global_head_dim: int = 0
    # Largest distances to the left and right, in tokens, at which a token of a local
    # layer attends; empty if all layers are global.
    local_window: Sequence[int] = ()
    global_every: int = 1  # the last of every `global_every` layers is global
    rope_base: float = 1e6  # base of the rotary frequencies in global layers
    rope_factor: float = 1.0  # divisor of these frequencies (linear scaling)
    local_rope_base: float = 1e4  # base of those in local layers
    query_scale: float = 0.0  # factor of the attention logits; 0 for K ** -0.5
    norm_epsilon: float = 1e-6  # added to the mean square in norms
    per_layer_dim: int = 0  # width P of the per-layer embeddings (EmbeddingGemma 2)

    def __post_init__(self):
        # JSON and ml_collections pass lists, but the config must be hashable.
        for name in ("mlp_activations", "local_window"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if errors := find_errors(dataclasses.asdict(self)):
            raise ValueError("; ".join(errors))

    @property
    def switches(self) -> Family:
        """What the family fixes; T5 has none of these switches."""
        return FAMILIES.get(self.family, Family())

    @property
    def embedding_scale(self) -> float:
        """Factor of the token embeddings."""
        return self.model_dim**0.5 if self.switches.scaled_embedding else 1.0

    @property
    def is_local(self) -> tuple[bool, ...]:
        """Whether each layer is local."""
        return tuple(
            bool(self.local_window) and (layer + 1) % self.global_every != 0
            for layer in range(self.num_layers)
        )

    @property
    def is_symmetric(self) -> bool:
        """Whether a local layer reaches equally far to both sides."""
        return len(set(self.local_window)) < 2

    @property
    def scan_period(self) -> int:
        """Layers of one step of the scan: all layers or groups have equal shapes."""
        has_wide_layers = self.global_head_dim or self.global_num_kv_heads
        return self.global_every if has_wide_layers else 1

    def heads(self, is_local: bool) -> tuple[int, int, int]:
        """Query heads, key heads and head width of a local or a global layer."""
        num_kv_heads, head_dim = self.num_kv_heads or self.num_heads, self.head_dim
        if not is_local:
            num_kv_heads = self.global_num_kv_heads or num_kv_heads
            head_dim = self.global_head_dim or head_dim
        return self.num_heads, num_kv_heads, head_dim


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}
# Defaults of the fields of all families but T5, and names of those of T5 alone.
ROTARY_FIELDS = dict(tuple(_DEFAULTS.items())[tuple(_DEFAULTS).index("pooling") :])
_T5_FIELDS = ("shared_relative_bias", "relpos_num_buckets", "relpos_max_distance")


def find_errors(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns a line for each field that contradicts another.

    `values` has every field of `EncoderConfig`, of the right type. `prefix`, such as
    "model.", stands before the names of the fields.
    """
    family, width = values["family"], values["embedding_dim"]
    errors = []

    def add(name: str, rule: str) -> None:
        errors.append(f"{prefix}{name}={values[name]!r}: {rule}")

    if not values["projection"] and width != values["model_dim"]:
        add(
            "embedding_dim",
            f"without a projection it must equal {prefix}model_dim="
            f"{values['model_dim']}; change one of them, or set "
            f"{prefix}projection=True",
        )
    # A field that the family would ignore must not look as if it had an effect.
    unused = ROTARY_FIELDS if family == "t5" else _T5_FIELDS
    for name in unused:
        if values[name] != _DEFAULTS[name]:
            add(
                name,
                f"family {family!r} does not have this setting; set it to "
                f"{_DEFAULTS[name]!r}, or change {prefix}family",
            )
    if family == "t5":
        return errors
    switches = FAMILIES[family]
    if values["attention"] == "cudnn":
        add("attention", f"family {family!r} has no cuDNN kernel here; set it to 'xla'")
    activations = tuple(values["mlp_activations"])
    if len(activations) != 2 or activations[1] != "linear":
        add(
            "mlp_activations", f"family {family!r} has a gated MLP; set (..., 'linear')"
        )
    for name in ("num_kv_heads", "global_num_kv_heads"):
        if values[name] and values["num_heads"] % values[name]:
            add(name, f"must divide {prefix}num_heads={values['num_heads']}")
    for name in ("head_dim", "global_head_dim"):
        if values[name] % 2:
            add(name, "must be even, because rotary positions rotate pairs of dims")
    if bool(values["local_window"]) != (values["global_every"] > 1):
        add(
            "local_window",
            f"needs {prefix}global_every above 1, and 1 needs an empty window; it is "
            f"{values['global_every']}",
        )
    is_wide = values["global_head_dim"] or values["global_num_kv_heads"]
    if is_wide and values["num_layers"] % values["global_every"]:
        add(
            "num_layers",
            f"must be a multiple of {prefix}global_every={values['global_every']}, "
            "because global layers have shapes of their own",
        )
    if bool(values["per_layer_dim"]) != switches.per_layer:
        remedy = (
            "needs a width above 0" if switches.per_layer else "has none; set it to 0"
        )
        add("per_layer_dim", f"family {family!r} {remedy}")
    return errors
