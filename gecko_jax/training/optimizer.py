"""Optimizers and learning-rate schedules, from optax.

The paper names neither. The defaults are GTR's (Ni et al. 2021): Adafactor at 1e-3 with
linear decay.
"""

import jax
import jax.numpy as jnp
import optax

_TOKENS = "token_embedder"


def build_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Returns a function from the step to the learning rate.

    Args:
        name: Schedule after the warm-up: "constant", "linear" or "cosine" decay to 0 at
            `num_steps`, or T5's "rsqrt" decay.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of linear warm-up from 0.
        num_steps: Steps of the run.
    """
    decay_steps = max(num_steps - warmup_steps, 1)
    timescale = max(warmup_steps, 1)

    def rsqrt(step):
        # `join_schedules` evaluates every schedule at every step, so also at negative
        # steps of this one.
        return learning_rate * (timescale / (jnp.maximum(step, 0) + timescale)) ** 0.5

    decays = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
        "rsqrt": lambda: rsqrt,
    }
    if warmup_steps == 0:
        return decays[name]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
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
    """Returns the optimizer, including gradient clipping.

    Args:
        name: "adafactor" (T5's: factored second moments; updates are clipped and scaled
            by each parameter's size) or "adamw".
        schedule: Function from the step to the learning rate.
        token_rate: Learning rate of the token embeddings, relative to the others. T5's
            token embeddings have variance 1 and its matrices have variance 1/width, so
            with one rate the tokens of a small model from scratch hardly change.
        weight_decay: Decay of matrices; norms and biases never decay. Each step
            subtracts `learning_rate * weight_decay` of a weight.
        clip_norm: Largest global gradient norm; 0 for no clipping.
        beta1: First-moment decay. Adafactor has no first moment at 0.
        beta2: Second-moment decay of AdamW; Adafactor has its own schedule.
    """

    def is_matrix(params):
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    def scale_tokens(updates, params):
        del params
        tokens = jax.tree.map(lambda leaf: token_rate * leaf, updates[_TOKENS])
        return {**updates, _TOKENS: tokens}

    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    # From gradients to updates of unit learning rate.
    if name == "adafactor":
        # The parts of `optax.adafactor`, which does not multiply its weight decay by
        # the learning rate.
        parts += [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ]
    else:
        parts.append(optax.scale_by_adam(b1=beta1, b2=beta2))
    # The token rate applies to the update, but not to the decay.
    if token_rate != 1:
        parts.append(optax.stateless(scale_tokens))
    parts += [
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
        optax.scale_by_learning_rate(schedule),
    ]
    if name == "adafactor" and beta1:
        parts.append(optax.ema(beta1, debias=False))
    return optax.chain(*parts)
