"""Schedules and optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gecko_jax.training import optimizer

RATE, WARMUP, STEPS = 1e-3, 10, 110


def rates(name, steps, warmup_steps=WARMUP):
    schedule = optimizer.build_schedule(
        name, learning_rate=RATE, warmup_steps=warmup_steps, num_steps=STEPS
    )
    return [float(np.asarray(schedule(step))) for step in steps]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1]),
        ("linear", [1, 0.5, 0]),
        ("cosine", [1, 0.5, 0]),
        ("rsqrt", [1, (10 / 60) ** 0.5, (10 / 110) ** 0.5]),
    ],
)
def test_schedules_warm_up_and_decay(name, expected):
    np.testing.assert_allclose(rates(name, [0, 5]), [0, RATE / 2])
    np.testing.assert_allclose(
        rates(name, [10, 60, 110]), np.multiply(expected, RATE), atol=1e-9
    )
    # Without a warm-up the first step has the peak rate.
    np.testing.assert_allclose(rates(name, [0], warmup_steps=0), [RATE], rtol=1e-6)


def update(name, grads, params, **overrides):
    settings = {"token_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0}
    settings |= {"beta1": 0.0, "beta2": 0.99}
    tx = optimizer.build_optimizer(name, lambda _: RATE, **(settings | overrides))
    return tx.update(grads, tx.init(params), params)[0]


PARAMS = {"kernel": jnp.full((4, 4), 2.0), "scale": jnp.full((4,), 2.0)}
NO_GRADS = {"kernel": jnp.zeros((4, 4)), "scale": jnp.zeros((4,))}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_only_matrices_decay_by_rate_times_decay(name):
    updates = update(name, NO_GRADS, PARAMS, weight_decay=0.1)
    np.testing.assert_allclose(updates["kernel"], -RATE * 0.1 * PARAMS["kernel"])
    np.testing.assert_array_equal(updates["scale"], 0.0)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_the_gradient_is_clipped_by_its_global_norm(name):
    """The first update does not depend on the gradient's scale, but the moments do."""
    grads = {"kernel": jnp.full((4, 4), 30.0), "scale": jnp.full((4,), 40.0)}
    seventh = {key: value / 7.0 for key, value in grads.items()}
    norm = float(optax.tree.norm(seventh))

    def moments(grads, clip_norm):
        settings = {"token_rate": 1.0, "weight_decay": 0.0}
        settings |= {"beta1": 0.5, "beta2": 0.99}
        tx = optimizer.build_optimizer(
            name, lambda _: RATE, clip_norm=clip_norm, **settings
        )
        return jax.tree.leaves(tx.update(grads, tx.init(PARAMS), PARAMS)[1])

    expected = moments(seventh, 0.0)
    for got, want in zip(moments(grads, norm), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(moments(seventh, 2 * norm), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_adafactor_scales_updates_by_the_size_of_the_parameter():
    big = {"kernel": jnp.full((4, 4), 2.0)}
    small = {"kernel": jnp.full((4, 4), 0.2)}
    grads = {"kernel": jnp.ones((4, 4))}
    np.testing.assert_allclose(
        update("adafactor", grads, big)["kernel"],
        10 * update("adafactor", grads, small)["kernel"],
        rtol=1e-5,
    )


def test_momentum_averages_the_updates():
    grads = {"kernel": jnp.ones((4, 4))}
    params = {"kernel": PARAMS["kernel"]}
    plain = update("adafactor", grads, params)["kernel"]
    with_momentum = update("adafactor", grads, params, beta1=0.9)["kernel"]
    np.testing.assert_allclose(with_momentum, 0.1 * plain, rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_tokens_have_their_own_rate(name):
    params = {"token_embedder": {"embedding": jnp.ones((4, 4))}, "kernel": jnp.eye(4)}
    grads = jax.tree.map(jnp.ones_like, params)
    plain = update(name, grads, params, weight_decay=0.1)
    fast = update(name, grads, params, weight_decay=0.1, token_rate=20.0)
    np.testing.assert_array_equal(fast["kernel"], plain["kernel"])
    # The token rate does not apply to the decay.
    decay = -RATE * 0.1
    np.testing.assert_allclose(
        fast["token_embedder"]["embedding"] - decay,
        20 * (plain["token_embedder"]["embedding"] - decay),
        rtol=1e-5,
    )
