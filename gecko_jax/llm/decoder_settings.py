"""Settings of a decoder that every format of files spells in its own way.

`gguf` and `safetensors_folder` read the numbers; what a family of models does with them
is said here, once.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from gecko_jax.io import field_rules
from gecko_jax.models import transformer

# What a setting can be, by its name here. The limits are far beyond any model: they
# keep a damaged file from being taken at its word.
_WIDTH = field_rules.integer(1, 1 << 24)
KINDS = {
    "vocab_size": _WIDTH,
    "model_dim": _WIDTH,
    "num_layers": field_rules.integer(1, 4_096),
    "num_heads": field_rules.integer(1, 65_536),
    "num_kv_heads": field_rules.integer(1, 65_536),
    "head_dim": field_rules.integer(2, 65_536),
    "mlp_dim": _WIDTH,
    "context_length": field_rules.integer(1, 1 << 31),
    "norm_epsilon": field_rules.number(above=0),
    "rope_base": field_rules.number(above=0),
    "local_window": field_rules.integer(1, 1 << 31),
    "global_every": field_rules.integer(1, 4_096),
    "local_rope_base": field_rules.number(above=0),
    "query_scalar": field_rules.number(above=0),
}


@dataclasses.dataclass(frozen=True)
class Gemma3:
    """What only Gemma 3 has.

    Attributes:
        query_scalar: Queries are divided by its square root.
        local_window: Keys that a local layer sees.
        global_every: Of so many layers the last is global.
        local_rope_base: Rotary base of the local layers.
    """

    query_scalar: float
    local_window: int
    global_every: int
    local_rope_base: float


def check_family(place: str, name: str, found: str, known: Collection[str]) -> None:
    """Refuses a family that the decoder does not run.

    Args:
        place: The file, for the error.
        name: How its format calls the family.
        found: In the file.
        known: Those that the decoder runs.
    """
    if found not in known:
        raise ValueError(
            f"{place}: {name} {found!r}; the in-process decoder runs "
            f"{' and '.join(known)}: choose such a model, or serve this one and give "
            "the server's address"
        )


def build(
    place: str, common: dict[str, Any], gemma: Gemma3 | None
) -> transformer.DecoderConfig:
    """Returns the decoder's settings.

    Args:
        place: The file, for the error.
        common: Fields of `decoder.DecoderConfig` that both families have.
        gemma: Settings of Gemma 3; None for the Llama family.

    Raises:
        ValueError: A setting is out of its range, or two contradict each other.
    """
    values = common | (dataclasses.asdict(gemma) if gemma else {})
    kinds = {name: kind for name, kind in KINDS.items() if name in values}
    remedy = "copy the file again, or choose another model"
    field_rules.check(place, values, kinds, remedy)
    heads, kv_heads = common["num_heads"], common["num_kv_heads"]
    if heads % kv_heads or common["head_dim"] % 2:
        raise ValueError(
            f"{place}: {heads} query heads for {kv_heads} key heads of the width "
            f"{common['head_dim']}; the first must be a multiple of the second, and "
            f"the width even: {remedy}"
        )
    factors = common["rope_factors"]
    if factors is not None and (
        len(factors) != common["head_dim"] // 2
        or not all(0 < factor < float("inf") for factor in factors)
    ):
        raise ValueError(
            f"{place}: {len(factors)} divisors of rotary frequencies; there must be "
            f"{common['head_dim'] // 2}, all above 0: {remedy}"
        )
    if gemma is None:
        return transformer.DecoderConfig(**common)
    return transformer.DecoderConfig(
        **common,
        activation="gelu",
        embedding_scale=common["model_dim"] ** 0.5,
        query_scale=gemma.query_scalar**-0.5,
        sandwich_norms=True,
        head_norms=True,
        local_window=gemma.local_window,
        global_every=gemma.global_every,
        local_rope_base=gemma.local_rope_base,
    )


def linear_rope(
    place: str, kind: str, factor: float | None, head_dim: int
) -> tuple[float, ...]:
    """Returns what divides each rotary frequency, where all are divided alike.

    Args:
        place: The file, for the error.
        kind: Of scaling, as the file calls it.
        factor: Of linear scaling.
        head_dim: Width of a head.

    Raises:
        ValueError: Another kind.
    """
    if kind != "linear" or factor is None:
        raise ValueError(
            f"{place}: rotary positions scaled by {kind!r}; the in-process decoder "
            "knows linear scaling and Llama 3's: choose another model"
        )
    return (float(factor),) * (head_dim // 2)
