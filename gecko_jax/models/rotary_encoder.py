"""The layers of an encoder with rotary positions: Gemma 3, EmbeddingGemma 2, Qwen 3.

The computation is `transformer_layer.run_layer`, which FRet's language model uses too.
This module declares the parameters, under T5X's names where T5 has the same part:

    encoder/layers_0/attention/query/kernel  [M, H * K]
    encoder/layers_0/post_mlp_layer_norm/scale  [M]

A packed text has exactly the embedding that it has alone: a token attends only to its
own segment, and positions start at 0 in each segment.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from gecko_jax.models import families, layers, transformer_layer


class Spec(NamedTuple):
    """A parameter of a layer."""

    path: str  # its name in the tree of the layer
    shape: tuple[int, ...]  # shape in the tree
    axes: tuple[str, ...]  # logical axes
    init: layers.Initializer
    view: tuple[int, ...]  # shape in `transformer_layer.run_layer`


class Context(NamedTuple):
    """What all layers share; pairs are for global layers and for local layers."""

    # Whether a token attends to another, and its angles (`transformer_layer.rotary`).
    masks: tuple[Bool[Array, "R L L"], Bool[Array, "R L L"]]
    angles: tuple[tuple[Array, Array], tuple[Array, Array]]
    # With per-layer embeddings: token embeddings, and the scale of the norm.
    embedded: Float[Array, "R L M"] | None = None
    per_layer_norm: Float[Array, " P"] | None = None


def build_context(
    config: families.EncoderConfig, segment_ids: Int[Array, "R L"]
) -> Context:
    """Returns masks and rotary angles of rows whose segments are contiguous."""
    index = jnp.arange(segment_ids.shape[1])
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    distance = (index[None, :] - index[:, None])[None]  # to the right
    # The segments of a packed row are contiguous, so the distance inside a segment is
    # that of the text alone, and so is the local window.
    if config.switches.causal:
        same &= distance <= 0
    near = same
    if config.local_window:
        left, right = config.local_window
        near = same & (distance >= -left) & (distance <= right)
    # The index of the first token of its segment, for each token.
    is_first = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    first = jax.lax.cummax(jnp.where(is_first, index[None], 0), axis=1)
    positions = index[None] - first
    _, _, width = config.heads(is_local=False)
    # Linear scaling divides every frequency, and applies to global layers only.
    factors = None
    if config.rope_factor != 1.0:
        factors = (config.rope_factor,) * (width // 2)
    angles = transformer_layer.rotary(positions, config.rope_base, factors, width)
    local_angles = angles
    if config.local_window:
        base = config.local_rope_base
        local_angles = transformer_layer.rotary(positions, base, None, config.head_dim)
    return Context((same, near), (angles, local_angles))


class EncoderLayer(nn.Module):
    """One layer of `transformer_layer.run_layer`."""

    config: families.EncoderConfig
    is_local: bool | None  # None if that depends on the layer's index

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L M"],
        context: Context,
        index: int | Int[Array, ""],
        per_layer_projection: Float[Array, "M P"] | None,
        dropout_keys: Key[Array, " R"] | None,
    ) -> Float[Array, "R L M"]:
        """Runs layer `index`."""
        config, switches = self.config, self.config.switches
        dtype = jnp.dtype(config.dtype)
        # One dropout key each for the attention weights, the attention's output, the
        # MLP's hidden units and its output.
        keys: Any = [None] * 4
        if dropout_keys is not None:
            keys = list(jax.vmap(lambda key: jax.random.split(key, 4))(dropout_keys).T)
        kinds = tuple(zip(context.masks, context.angles, strict=True))
        # In a scan with one layer per step, the index is traced: select at run time.
        if self.is_local is None:
            is_local = (index + 1) % config.global_every != 0
            mask, angles = jax.tree.map(
                lambda full, near: jnp.where(is_local, near, full), *kinds
            )
        else:
            mask, angles = kinds[self.is_local]
        specs = layer_specs(config, bool(self.is_local))
        values = declare(self, {spec.path: spec for spec in specs.values()})
        weights = {}
        for name, spec in specs.items():
            value = values[spec.path].reshape(spec.view)
            if name == "layer_scalar":
                value = jax.lax.stop_gradient(value)  # a constant of the checkpoint
            elif name.endswith("norm"):
                # Gemma 3 stores w and scales by 1 + w. Norms stay float32.
                value = value + switches.norm_offset if switches.norm_offset else value
            else:
                value = value.astype(dtype)
            weights[name] = value
        if switches.per_layer:
            assert per_layer_projection is not None
            weights["per_layer_projection"] = per_layer_projection.astype(dtype)
            weights["per_layer_norm"] = context.per_layer_norm
        # All tokens in one row: XLA:CPU sums the gradient of a weight over two leading
        # axes with a transpose (see `layers.Dense`).
        rows = x.shape[:2]

        def join(y: Array) -> Array:
            return y.reshape(1, -1, *y.shape[2:])

        def split(y: Array) -> Array:
            return y.reshape(*rows, *y.shape[2:])

        def drop(site: int, y: Array) -> Array:
            return join(layers.dropout(split(y), config.dropout_rate, keys[site + 1]))

        def attend(query: Array, key: Array, value: Array) -> Array:
            heads = (split(query), split(key), split(value))
            return join(_attend(*heads, mask, config.dropout_rate, keys[0]))

        hidden, _ = transformer_layer.run_layer(
            weights,
            join(x),
            jax.tree.map(join, angles),
            attend,
            activation=config.mlp_activations[0],
            query_scale=config.query_scale or specs["query"].view[-1] ** -0.5,
            norm_epsilon=config.norm_epsilon,
            value_norm=switches.value_norm,
            drop=drop,
            embedded=None if context.embedded is None else join(context.embedded),
        )
        return hidden.reshape(x.shape)


def layer_specs(config: families.EncoderConfig, is_local: bool) -> dict[str, Spec]:
    """Returns the parameters of a layer by their names in `run_layer`."""
    width, mlp_dim, per_layer = config.model_dim, config.mlp_dim, config.per_layer_dim
    num_heads, num_kv_heads, head_dim = config.heads(is_local)
    # A norm that scales by offset + w begins at a scale of 1 with w = 1 - offset.
    residual, offset = config.residual_init_scale, config.switches.norm_offset

    def matrix(
        path: str,
        fan_in: int,
        fan_out: int,
        axes: tuple[str, str],
        *view: int,
        scale: float = 1.0,
    ) -> Spec:
        init = nn.initializers.normal(scale * fan_in**-0.5)
        shape = (fan_in, fan_out)
        return Spec(f"{path}/kernel", shape, axes, init, view or shape)

    def norm(path: str, size: int, axis: str = "embed", scale: float = 1.0) -> Spec:
        init = nn.initializers.constant(scale - offset)
        return Spec(f"{path}/scale", (size,), (axis,), init, (size,))

    def heads(name: str, number: int) -> Spec:
        axes = ("embed", "joined_kv")
        view = (width, number, head_dim)
        return matrix(f"attention/{name}", width, number * head_dim, axes, *view)

    into, out_of = ("embed", "mlp"), ("mlp", "embed")
    specs = {
        "query": heads("query", num_heads),
        "key": heads("key", num_kv_heads),
        "value": heads("value", num_kv_heads),
        "out": matrix(
            "attention/out",
            num_heads * head_dim,
            width,
            ("joined_kv", "embed"),
            *(num_heads, head_dim, width),
            scale=residual,
        ),
        "query_norm": norm("attention/query_norm", head_dim, "kv"),
        "key_norm": norm("attention/key_norm", head_dim, "kv"),
        "attention_norm": norm("pre_attention_layer_norm", width),
        "mlp_norm": norm("pre_mlp_layer_norm", width),
        "gate": matrix("mlp/wi_0", width, mlp_dim, into),
        "up": matrix("mlp/wi_1", width, mlp_dim, into),
        "down": matrix("mlp/wo", mlp_dim, width, out_of, scale=residual),
    }
    after = ("attention", "mlp") if config.switches.sandwich_norms else ()
    if config.switches.per_layer:
        specs |= {
            "per_layer_gate": matrix("per_layer/gate", width, per_layer, into),
            "per_layer_out": matrix("per_layer/out", per_layer, width, out_of),
            "layer_scalar": norm("layer_scalar", 1),
        }
        after += ("per_layer",)
    # These norms, and not `out` and `wo`, set the size of a residual branch.
    for name in after:
        path = f"post_{name}_layer_norm"
        specs[f"post_{name}_norm"] = norm(path, width, scale=residual)
    return specs


def per_layer_specs(config: families.EncoderConfig) -> list[Spec]:
    """Returns the encoder's parameters of the per-layer embeddings."""
    width, num_layers, size = config.model_dim, config.num_layers, config.per_layer_dim
    init, ones = nn.initializers.normal(1.0), nn.initializers.ones
    projection, norm = "per_layer_projection/kernel", "per_layer_norm/scale"
    shape, view = (width, num_layers * size), (width, num_layers, size)
    return [
        Spec(projection, shape, ("embed", "mlp"), init, view),
        Spec(norm, (size,), ("mlp",), ones, (size,)),
    ]


def declare(module: nn.Module, specs: Mapping[str, Spec]) -> dict[str, Array]:
    """Declares parameters named by paths below a module; returns their values."""
    # Linen names a parameter by its modules: each level of a path becomes a module.
    values, groups = {}, {}
    for path, spec in specs.items():
        head, _, tail = path.partition("/")
        if tail:
            groups.setdefault(head, {})[tail] = spec
        else:
            values[path] = layers.param(module, path, spec.init, spec.axes, spec.shape)
    for head, members in groups.items():
        inner = _Group(name=head, parent=module)(members)
        values |= {f"{head}/{tail}": value for tail, value in inner.items()}
    return values


class _Group(nn.Module):
    """A level of a parameter's path."""

    @nn.compact
    def __call__(self, specs: Mapping[str, Spec]) -> dict[str, Array]:
        return declare(self, specs)


def _attend(
    query: Float[Array, "R L H K"],
    key: Float[Array, "R L G K"],
    value: Float[Array, "R L G K"],
    mask: Bool[Array, "R L L"],
    dropout_rate: float,
    dropout_keys: Key[Array, " R"] | None,
) -> Float[Array, "R L H K"]:
    """Grouped-query attention; logits and softmax are float32 in every dtype."""
    rows, length, num_heads, width = query.shape
    # H / G query heads share a key head, so the keys are never repeated in memory.
    grouped = query.reshape(rows, length, key.shape[2], -1, width)
    logits = jnp.einsum(
        "rlghk,rsgk->rghls", grouped, key, preferred_element_type=jnp.float32
    )
    logits = jnp.where(mask[:, None, None], logits, layers.MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1)
    weights = layers.dropout(weights, dropout_rate, dropout_keys)
    mixed = jnp.einsum("rghls,rsgk->rlghk", weights.astype(value.dtype), value)
    return mixed.reshape(rows, length, num_heads, width)
