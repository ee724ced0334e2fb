"""The encoder: a stack of layers of one family, unrolled or as a scan.

Parameters are stacked only inside a step: the names on disk, the optimizer and the
result do not depend on `scan_layers` (docs/decisions.md). A step of the scan runs one
layer, or a period of layers if global and local layers have different shapes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gecko_jax.models import families, layers, rotary_encoder, t5

# Name of the stacked layers in a parameter tree.
_STACKED = "layers"


class Encoder(nn.Module):
    """Stack of layers, from token embeddings to hidden states."""

    config: families.EncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L M"],
        segment_ids: Int[Array, "R L"],
        dropout_keys: Key[Array, " R"] | None = None,
    ) -> Float[Array, "R L M"]:
        """Returns normalized hidden states; those of padding are undefined."""
        config = self.config
        dtype = jnp.dtype(config.dtype)

        def layer_keys(index: int | Array) -> Array | None:
            # Fold in the layer's index, so that a scan draws the same masks.
            if dropout_keys is None:
                return None
            return jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, index)

        x = x.astype(dtype)
        run, per_layer = self._inputs(x, segment_ids, layer_keys)
        x = layers.dropout(x, config.dropout_rate, layer_keys(config.num_layers))
        # Initialization always unrolls, so parameters have T5X's names `layers_{i}`.
        if config.scan_layers and not self.is_initializing():
            x = self._scan_layers(x, run, per_layer)
        else:
            for i, is_local in enumerate(config.is_local):
                layer = _build_layer(config, is_local, name=f"layers_{i}")
                x = run(layer, x, i, None if per_layer is None else per_layer[i])
        norm = layers.LayerNorm(
            dtype, config.norm_epsilon, config.switches.norm_offset, name="encoder_norm"
        )
        return layers.dropout(
            norm(x), config.dropout_rate, layer_keys(config.num_layers + 1)
        )

    def _inputs(
        self,
        x: Float[Array, "R L M"],
        segment_ids: Int[Array, "R L"],
        layer_keys: Callable[[Any], Array | None],
    ) -> tuple[Callable[..., Array], Float[Array, "layers M P"] | None]:
        """Returns a function that runs a layer, and an input that each has of its own.

        The function takes the layer, its hidden states, its index and that input.
        """
        config = self.config
        if config.family != "t5":
            context = rotary_encoder.build_context(config, segment_ids)
            per_layer = None
            if config.switches.per_layer:
                specs = rotary_encoder.per_layer_specs(config)
                kernel, scale = rotary_encoder.declare(
                    self, {spec.path: spec for spec in specs}
                ).values()
                # The checkpoint stores the projections of all layers as one matrix. The
                # scan needs the layer axis first.
                per_layer = kernel.reshape(specs[0].view).swapaxes(0, 1)
                context = context._replace(embedded=x, per_layer_norm=scale)

            def run_rotary(layer: Any, x: Array, index: Any, own: Any) -> Array:
                return layer(x, context, index, own, layer_keys(index))

            return run_rotary, per_layer
        # Added to the logits: 0 inside a segment, a large negative number elsewhere.
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        segment_mask = jnp.where(same, 0.0, layers.MASKED_LOGIT)[:, None]
        shared_bias = None
        if config.shared_relative_bias:
            bias = t5.RelativePositionBias(config, name="relpos_bias")
            shared_bias = bias(x.shape[1])

        def run(layer: Any, x: Array, index: Any, own: None) -> Array:
            return layer(x, segment_mask, shared_bias, layer_keys(index))

        return run, None

    def _scan_layers(
        self,
        x: Float[Array, "R L M"],
        run: Callable[..., Array],
        per_layer: Float[Array, "layers M P"] | None,
    ) -> Float[Array, "R L M"]:
        """Runs the layers as a scan over stacked parameters."""
        config, period = self.config, self.config.scan_period
        # Training stacks once per step (`compute_params`); other callers do it here.
        params: Any = self.variables["params"]
        if _STACKED not in params:
            params = stack_layers(params, config)
        starts = jnp.arange(0, config.num_layers, period)
        # Layers of equal shapes share one program, which selects by index whether it is
        # local. Otherwise a step runs a whole period, each layer with its own program.
        if per_layer is not None:
            per_layer = per_layer.reshape(-1, period, *per_layer.shape[1:])
        has_both = len(set(config.is_local)) > 1
        kinds = [None] if period == 1 and has_both else config.is_local[:period]
        modules = [_build_layer(config, is_local, parent=None) for is_local in kinds]

        def step(x: Array, inputs: tuple) -> tuple[Array, None]:
            group, start, own = inputs
            for i, module in enumerate(modules):

                def apply(*arguments: Any, i: int = i, module: Any = module) -> Array:
                    return module.apply({"params": group[i]}, *arguments)

                x = run(apply, x, start + i, None if own is None else own[i])
            return x, None

        x, _ = jax.lax.scan(step, x, (params[_STACKED], starts, per_layer))
        return x


def stack_layers(
    params: Mapping[str, Any],
    config: families.EncoderConfig,
    stack: Callable[..., Any] = lambda *leaves: jnp.stack(leaves),
) -> dict[str, Any]:
    """Stacks the layers of the encoder's parameters, or of a tree like them.

    The stack is a tuple of the layers of a period; each leaf has an axis of periods.
    """
    period = config.scan_period
    all_layers = [params[f"layers_{i}"] for i in range(config.num_layers)]
    groups = [
        tuple(all_layers[i : i + period]) for i in range(0, len(all_layers), period)
    ]
    # A per-model parameter, such as T5's shared position bias, is not stacked.
    others = {k: v for k, v in params.items() if not k.startswith("layers_")}
    return others | {_STACKED: jax.tree.map(stack, *groups)}


def unstack_layers(
    params: Mapping[str, Any], config: families.EncoderConfig
) -> dict[str, Any]:
    """Undoes `stack_layers`."""
    unstacked = {}
    for i in range(config.num_layers):
        group, position = divmod(i, config.scan_period)
        unstacked[f"layers_{i}"] = jax.tree.map(
            lambda leaf, group=group: leaf[group], params[_STACKED][position]
        )
    return {k: v for k, v in params.items() if k != _STACKED} | unstacked


def _build_layer(
    config: families.EncoderConfig, is_local: bool | None, **scope: Any
) -> nn.Module:
    is_t5, policies = config.family == "t5", jax.checkpoint_policies
    layer: Any = t5.EncoderLayer if is_t5 else rotary_encoder.EncoderLayer
    # "dots" keeps the results of matrix products with weights and recomputes the rest,
    # attention included; "full" keeps nothing but the layer's input.
    saveable = {"full": None, "dots": policies.dots_with_no_batch_dims_saveable}
    if config.remat != "none":
        layer = nn.remat(layer, policy=saveable[config.remat], prevent_cse=True)
    return layer(config, **scope) if is_t5 else layer(config, is_local, **scope)
