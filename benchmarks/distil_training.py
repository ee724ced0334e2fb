"""Training of a table of token vectors, for `distil.py`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
import typing
from collections.abc import Sequence
from typing import Any

import distil_texts
import jax
import jax.numpy as jnp
import numpy as np
import optax

if typing.TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

DIMS = (64, 128, 256)
# Texts whose lengths fall into the same bucket share an array; in tokens.
BUCKETS = (16, 32, 64, 128, 256)
# Lengths of the two sides of a pair, in tokens.
QUERY_LENGTH = 32
PAIR_LENGTH = 128

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Losses, rates and length of the training of one variant.

    Attributes:
        start: Name of the table that training starts from.
        share: Share of the training time, relative to the other variants.
        steps: Largest number of updates.
        rate: Peak learning rate of the table.
        weight_rate: Peak learning rate of the logarithms of the token weights.
        match: Weight of the loss 2 - 2 cos(student, teacher).
        contrast: Weight of the contrastive loss that picks a text's own teacher vector
            among those of the batch.
        relate: Weight of the divergence between the student's and the teacher's
            similarities within a batch.
        pairs: Weight of the contrastive loss between queries and passages.
        temperature: Temperature of `contrast`.
        relate_temperature: Temperature of `relate`, for student and teacher.
        pair_temperature: Temperature of `pairs`.
    """

    start: str = "start"
    share: float = 1.0
    steps: int = 6_000
    rate: float = 2e-3
    weight_rate: float = 3e-3
    match: float = 1.0
    contrast: float = 1.0
    relate: float = 0.0
    pairs: float = 0.0
    temperature: float = 0.07
    relate_temperature: float = 0.07
    pair_temperature: float = 0.05


def embed(params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B D"]:
    """Returns the weighted sum of the rows of each text's tokens."""
    ids = tokens.astype(jnp.int32)
    weights = jnp.exp(params["weights"])[ids] * (ids != 0)
    return jnp.einsum("blm,bl->bm", params["table"][ids], weights)


def unit(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Returns the vectors at length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def distil_loss(
    student: Float[Array, "B D"], teacher: Float[Array, "B D"], recipe: Recipe
) -> Float[Array, ""]:
    """Returns the loss of a batch of texts, the mean over the MRL dims."""
    total = jnp.zeros(())
    whole = unit(teacher)
    for dim in DIMS:
        s, t = unit(student[:, :dim]), unit(teacher[:, :dim])
        if recipe.match:
            total += recipe.match * jnp.mean(2 - 2 * jnp.sum(s * t, axis=1))
        if recipe.contrast:
            logits = s @ t.T / recipe.temperature
            chosen = jnp.diagonal(logits)
            total += recipe.contrast * jnp.mean(jax.nn.logsumexp(logits, 1) - chosen)
        if recipe.relate:
            # Leave out the similarity of a text with itself: it is always 1.
            own = jnp.eye(len(s)) * 1e9
            wanted = jax.nn.log_softmax(
                whole @ whole.T / recipe.relate_temperature - own
            )
            logits = jax.nn.log_softmax(s @ s.T / recipe.relate_temperature - own)
            terms = jnp.where(own > 0, 0.0, jnp.exp(wanted) * (wanted - logits))
            total += recipe.relate * jnp.mean(jnp.sum(terms, axis=1))
    return total / len(DIMS)


def pair_loss(
    queries: Float[Array, "B D"],
    passages: Float[Array, "B D"],
    ids: Int[Array, "B 2"],
    temperature: float,
) -> Float[Array, ""]:
    """Returns the contrastive loss of pairs in both directions.

    Args:
        queries: Query vectors.
        passages: Passage vectors.
        ids: Text indices of query and passage. Another row with an equal text is no
            negative.
        temperature: Divides the similarities.
    """
    total = jnp.zeros(())
    equal = (ids[:, None, :] == ids[None, :, :]).any(-1)
    masked = jnp.where(equal & ~jnp.eye(len(ids), dtype=bool), -1e9, 0.0)
    for dim in DIMS:
        q, p = unit(queries[:, :dim]), unit(passages[:, :dim])
        logits = q @ p.T / temperature + masked
        for one in (logits, logits.T):
            total -= jnp.mean(jnp.diagonal(jax.nn.log_softmax(one))) / 2
    return total / len(DIMS)


class Trainer:
    """Trains tables. The texts and the teacher's vectors stay on the device."""

    def __init__(
        self,
        options: argparse.Namespace,
        tokens: Sequence[Int[np.ndarray, " L"]],
        targets: Float[np.ndarray, "N D"],
        pairs: Int[np.ndarray, "P 2"],
    ):
        """Groups the texts by length and places all arrays on the device."""
        self.options = options
        lengths = np.array([len(row) for row in tokens])
        self.data = []
        counts, shares = [], []
        least = 0
        for bucket in BUCKETS:
            chosen = np.flatnonzero((lengths > least) & (lengths <= bucket))
            least = bucket
            if len(chosen):
                rows = pad([tokens[int(i)] for i in chosen], bucket)
                self.data.append((jnp.asarray(rows), jnp.asarray(targets[chosen])))
                counts.append(len(chosen))
                # Long texts are rare and carry more than short ones: raise their share.
                shares.append(len(chosen) * bucket**0.5)
        sizes = np.array(shares) / sum(shares) * options.batch
        self.sizes = tuple(max(1, round(size)) for size in sizes)
        distil_texts.say("texts by length", counts, "in a batch", self.sizes)
        self.pair_data = None
        if len(pairs):
            self.pair_data = (
                jnp.asarray(pad([tokens[i] for i in pairs[:, 0]], QUERY_LENGTH)),
                jnp.asarray(pad([tokens[i] for i in pairs[:, 1]], PAIR_LENGTH)),
                jnp.asarray(pairs),
            )

    def train(
        self, table: Float[np.ndarray, "V D"], recipe: Recipe, seconds: float
    ) -> tuple[Float[np.ndarray, "V D"], dict[str, Any]]:
        """Trains until the recipe's updates or the seconds are used up.

        Returns:
            The table, with each row times its weight, and facts about the training.
        """
        begun = time.monotonic()
        scale = 1 / np.mean(np.linalg.norm(table, axis=1))
        params = {
            "table": jnp.asarray(table * scale, jnp.float32),
            "weights": jnp.zeros(len(table), jnp.float32),
        }
        adam = optax.scale_by_adam(b1=0.9, b2=0.999)
        state = adam.init(params)
        run = functools.partial(jax.jit, donate_argnums=(0, 1))(
            functools.partial(self.chunk, recipe, adam)
        )
        step, said, loss = 0, 0.0, 0.0
        while True:
            done = max(step / recipe.steps, (time.monotonic() - begun) / seconds)
            if done >= 1:
                break
            # The learning rate rises for four chunks, then follows a cosine to 0.
            rise = min(1.0, (step + 1) / (4 * self.options.chunk))
            rate = rise * 0.5 * (1 + np.cos(np.pi * min(done, 1.0)))
            params, state, loss = run(
                params, state, jnp.float32(rate), step, self.data, self.pair_data
            )
            loss = float(loss)
            step += self.options.chunk
            if time.monotonic() - said > 10:
                said = time.monotonic()
                distil_texts.say(f"step {step:,} loss {loss:.4f} rate {rate:.2f}")
        elapsed = time.monotonic() - begun
        distil_texts.say(f"{step:,} steps in {elapsed:.1f} s, loss {loss:.4f}")
        weighted = params["table"] * jnp.exp(params["weights"])[:, None]
        return np.asarray(weighted), {"steps": step, "seconds": elapsed, "loss": loss}

    def chunk(self, recipe, adam, params, state, rate, step, data, pair_data):
        """Runs updates as one program."""

        def loss_of(params, key):
            students, teachers = [], []
            for number, (size, (tokens, targets)) in enumerate(
                zip(self.sizes, data, strict=True)
            ):
                draw = jax.random.fold_in(key, number)
                rows = jax.random.randint(draw, (size,), 0, len(tokens))
                students.append(embed(params, tokens[rows]))
                teachers.append(targets[rows].astype(jnp.float32))
            student, teacher = jnp.concatenate(students), jnp.concatenate(teachers)
            loss = distil_loss(student, teacher, recipe)
            if recipe.pairs and pair_data is not None:
                draw = jax.random.fold_in(key, 99)
                size = min(self.options.pair_batch, len(pair_data[0]))
                rows = jax.random.randint(draw, (size,), 0, len(pair_data[0]))
                queries, passages, ids = (one[rows] for one in pair_data)
                loss += recipe.pairs * pair_loss(
                    embed(params, queries),
                    embed(params, passages),
                    ids,
                    recipe.pair_temperature,
                )
            return loss

        def one(carry, number):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(self.options.seed), step + number)
            loss, gradient = jax.value_and_grad(loss_of)(params, key)
            update, state = adam.update(gradient, state)
            params = {
                "table": params["table"] - rate * recipe.rate * update["table"],
                "weights": params["weights"]
                - rate * recipe.weight_rate * update["weights"],
            }
            return (params, state), loss

        numbers = jnp.arange(self.options.chunk)
        (params, state), losses = jax.lax.scan(one, (params, state), numbers)
        return params, state, jnp.mean(losses)


def pad(rows: Sequence[Int[np.ndarray, " L"]], length: int) -> Int[np.ndarray, "N L"]:
    """Returns rows of one length: long ones are cut, short ones padded with zeros."""
    padded = np.zeros((len(rows), length), np.uint16)
    for place, row in enumerate(rows):
        if len(row) > length:
            row = np.append(row[: length - 1], np.uint16(distil_texts.EOS))
        padded[place, : len(row)] = row
    return padded
