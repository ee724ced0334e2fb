"""Optimizers and learning-rate schedules, from optax.

The paper names neither; the defaults are GTR's (Ni et al. 2021): Adafactor, 1e-3,
linear decay.
"""

import jax
import jax.numpy as jnp
import optax

_TOKENS = "token_embedder"


def build_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Returns step -> learning rate.

    Args:
        name: After the warm-up: "constant", "linear" or "cosine" decay to 0 at
            `num_steps`, or T5's "rsqrt" decay.
        learning_rate: The peak.
        warmup_steps: Steps of linear warm-up from 0.
        num_steps: Steps of the run.
    """
    decay_steps = max(num_steps - warmup_steps, 1)
    timescale = max(warmup_steps, 1)

    def rsqrt(step):
        # `join_schedules` asks every schedule at every step, so also before its own 0.
        return learning_rate * (timescale / (jnp.maximum(step, 0) + timescale)) ** 0.5

    decays = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
        "rsqrt": lambda: rsqrt,
    }
    warmup = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    if warmup_steps == 0:
        return decays[name]()
    return optax.join_schedules([warmup, decays[name]()], [warmup_steps])


def build_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    token_rate: float,
    weight_decay: float,
    clip_norm: float,
    beta1: float,
    beta2: float,
) -> optax.GradientTransformation:
    """Returns the optimizer, gradient clipping included.

    Args:
        name: "adafactor" (T5's: factored second moments, updates clipped and scaled by
            each parameter's size) or "adamw".
        schedule: Step -> learning rate.
        token_rate: Of token embeddings, times the learning rate. T5's have entries of
            variance 1, those of other matrices 1 over their width, so one rate moves
            the tokens of a small model from scratch by next to nothing.
        weight_decay: Of matrices alone; norms and biases never decay. Per step this
            takes `learning_rate * weight_decay` of a weight.
        clip_norm: Largest global gradient norm; 0 for no clipping.
        beta1: First-moment decay of AdamW; Adafactor has none at 0.
        beta2: Second-moment decay of AdamW; Adafactor has its own schedule.
    """

    def is_matrix(params):
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    def scale_tokens(updates, params):
        del params
        tokens = jax.tree.map(lambda leaf: token_rate * leaf, updates[_TOKENS])
        return {**updates, _TOKENS: tokens}

    scale = [optax.stateless(scale_tokens)] if token_rate != 1 else []
    decay = optax.add_decayed_weights(weight_decay, mask=is_matrix)
    if name == "adafactor":
        # The pieces of `optax.adafactor`, which scales its decay by neither the
        # learning rate nor a schedule of it.
        parts = [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            *scale,
            decay,
            optax.scale_by_learning_rate(schedule),
        ]
        if beta1:
            parts.append(optax.ema(beta1, debias=False))
    else:
        parts = [
            optax.scale_by_adam(b1=beta1, b2=beta2),
            *scale,
            decay,
            optax.scale_by_learning_rate(schedule),
        ]
    if clip_norm:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    return optax.chain(*parts)
