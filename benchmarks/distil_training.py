"""Training of a table of token vectors, for `distil.py`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import time
import typing
from collections.abc import Sequence
from typing import Any

import distil_texts
import jax
import jax.numpy as jnp
import numpy as np

from gecko_jax.io import writing

if typing.TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

DIMS = (64, 128, 256)
# Longest sides of a pair, in tokens.
QUERY_LENGTH = 32
PAIR_LENGTH = 128
# Updates after which the state is stored.
STORED = 250
# Room in a batch for texts that are longer than the mean.
ROOM = 1.15

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Losses, rates and length of the training of one variant.

    Attributes:
        start: Name of the table that training starts from.
        steps: Number of updates.
        rate: Peak learning rate of the rows.
        weight_rate: Peak learning rate of the logarithms of the token weights.
        shares: Weight of the loss at each of `DIMS`.
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
    steps: int = 6_000
    rate: float = 2e-3
    weight_rate: float = 3e-3
    shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
    match: float = 1.0
    contrast: float = 1.0
    relate: float = 0.0
    pairs: float = 0.0
    temperature: float = 0.07
    relate_temperature: float = 0.07
    pair_temperature: float = 0.05


class Tokens:
    """Token ids of many texts, one text after the other."""

    def __init__(self, rows: Sequence[Int[np.ndarray, " L"]], longest: int):
        """Joins the texts, each cut to the longest number of tokens."""
        rows = [row[:longest] for row in rows]
        self.lengths = np.array([len(row) for row in rows])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        self.ids = np.concatenate(rows)

    def of(self, chosen: Int[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens of some texts, and the text of each token."""
        lengths = self.lengths[chosen]
        texts = np.repeat(np.arange(len(chosen)), lengths)
        within = np.arange(len(texts)) - np.repeat(
            np.cumsum(lengths) - lengths, lengths
        )
        return self.ids[self.starts[chosen][texts] + within], texts


def embed(
    table: Float[Array, "R D+1"],
    places: Int[Array, " N"],
    texts: Int[Array, " N"],
    size: int,
) -> Float[Array, "B D"]:
    """Returns the weighted sum of the rows of each text's tokens.

    Args:
        table: Rows, with the logarithm of the token's weight in the last column.
        places: Row of each token.
        texts: Text of each token, in order; `size` for a token of no text.
        size: Number of texts.
    """
    rows = table[:, :-1] * jnp.exp(table[:, -1:])
    return jax.ops.segment_sum(rows[places], texts, size, indices_are_sorted=True)


def unit(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Returns the vectors at length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


def distil_loss(
    student: Float[Array, "B D"],
    teacher: Float[Array, "B D"],
    turned: Float[Array, "B D"],
    recipe: Recipe,
) -> Float[Array, ""]:
    """Returns the loss of a batch of texts, the weighted sum over the MRL dims.

    Args:
        student: The student's vectors.
        teacher: The teacher's vectors, whose similarities the student learns.
        turned: The same, turned so that their prefixes are those of the student.
        recipe: Weights and temperatures.
    """
    total = jnp.zeros(())
    whole = unit(teacher)
    # Leave out the similarity of a text with itself: it is always 1.
    own = jnp.eye(len(student), dtype=bool)
    targets = masked_softmax(whole @ whole.T / recipe.relate_temperature, own)
    for dim, share in zip(DIMS, recipe.shares, strict=True):
        s, t = unit(student[:, :dim]), unit(turned[:, :dim])
        if recipe.match:
            total += share * recipe.match * jnp.mean(2 - 2 * jnp.sum(s * t, axis=1))
        if recipe.contrast:
            logits = s @ t.T / recipe.temperature
            terms = jax.nn.logsumexp(logits, 1) - jnp.sum(s * t, 1) / recipe.temperature
            total += share * recipe.contrast * jnp.mean(terms)
        if recipe.relate:
            logits = masked_softmax(s @ s.T / recipe.relate_temperature, own)
            terms = jnp.where(own, 0.0, jnp.exp(targets) * (targets - logits))
            total += share * recipe.relate * jnp.mean(jnp.sum(terms, axis=1))
    return total


def masked_softmax(
    logits: Float[Array, "B B"], mask: Float[Array, "B B"]
) -> Float[Array, "B B"]:
    """Returns logarithms of probabilities; those of masked entries are tiny."""
    return jax.nn.log_softmax(jnp.where(mask, -1e9, logits))


def pair_loss(
    queries: Float[Array, "B D"],
    passages: Float[Array, "B D"],
    ids: Int[Array, "B 2"],
    recipe: Recipe,
) -> Float[Array, ""]:
    """Returns the contrastive loss of pairs in both directions.

    Args:
        queries: Query vectors.
        passages: Passage vectors.
        ids: Text indices of query and passage. Another row with an equal text is no
            negative.
        recipe: Temperature, and shares of the MRL dims.
    """
    total = jnp.zeros(())
    equal = (ids[:, None, :] == ids[None, :, :]).any(-1)
    others = equal & ~jnp.eye(len(ids), dtype=bool)
    for dim, share in zip(DIMS, recipe.shares, strict=True):
        q, p = unit(queries[:, :dim]), unit(passages[:, :dim])
        logits = q @ p.T / recipe.pair_temperature
        for one in (logits, logits.T):
            chosen = jnp.diagonal(masked_softmax(one, others))
            total -= share * jnp.mean(chosen) / 2
    return total


class Trainer:
    """Trains tables. Texts and teacher's vectors stay on the host."""

    def __init__(
        self,
        options: argparse.Namespace,
        tokens: Sequence[Int[np.ndarray, " L"]],
        targets: Float[np.ndarray, "N D"],
        target_of: Int[np.ndarray, " T"],
        pairs: Sequence[Sequence[Int[np.ndarray, " L"]]],
        ids: Int[np.ndarray, "P 2"],
        turn: Float[np.ndarray, "D D"],
    ):
        """Keeps the texts with their targets, and the two sides of the pairs.

        Args:
            options: Sizes of the batches and the seed.
            tokens: Token ids of each text.
            targets: The teacher's vectors, projected.
            target_of: Row of `targets` of each text.
            pairs: Token ids of the queries and of the passages.
            ids: Text indices of query and passage; equal texts have equal ones.
            turn: Matrix from the teacher's dims to those of the student.
        """
        self.options = options
        self.turn = turn
        self.targets = targets
        self.target_of = target_of
        self.texts = Tokens(tokens, distil_texts.LENGTH)
        self.pairs = [
            Tokens(side, longest)
            for side, longest in zip(pairs, (QUERY_LENGTH, PAIR_LENGTH), strict=True)
        ]
        self.ids = ids
        # Long texts are rare and carry more than short ones: raise their share.
        shares = np.cumsum(np.sqrt(self.texts.lengths))
        self.shares = shares / shares[-1]

    def train(
        self, table: Float[np.ndarray, "V D"], recipe: Recipe, stored: pathlib.Path
    ) -> tuple[Float[np.ndarray, "V D"], dict[str, Any]]:
        """Trains for the recipe's updates.

        Args:
            table: First table.
            recipe: Losses and rates.
            stored: File of the state of an unfinished training, which resumes from it.

        Returns:
            The table, with each row times its weight, and facts about the training.
        """
        begun = reported = time.monotonic()
        scale = 1 / np.mean(np.linalg.norm(table, axis=1))
        table = np.pad(table * scale, ((0, 0), (0, 1))).astype(np.float32)
        state = {
            "table": jnp.asarray(table),
            "mean": jnp.zeros(table.shape),
            "square": jnp.zeros(table.shape),
            "updates": jnp.zeros((len(table), 1)),
        }
        update = functools.partial(jax.jit, donate_argnums=0)(
            functools.partial(self.update, recipe)
        )
        first, losses = 0, []
        if stored.exists():
            with np.load(stored) as saved:
                state = {name: jnp.asarray(saved[name]) for name in state}
                first = int(saved["step"])
        for step in range(first, recipe.steps):
            if step % STORED == 0 and step > first:
                with writing.write_file(stored) as path, path.open("wb") as out:
                    np.savez(out, step=step, **jax.device_get(state))
            random = np.random.default_rng((self.options.seed, step))
            # The learning rate rises for 100 updates, then follows a cosine to 0.
            rate = 0.5 * (1 + np.cos(np.pi * step / recipe.steps))
            rate *= min(1.0, (step + 1) / 100)
            state, loss = update(
                state, jnp.float32(rate), self.batch(random, recipe, len(table))
            )
            losses.append(loss)
            if time.monotonic() - reported > 10:
                reported = time.monotonic()
                mean = np.mean(jax.device_get(losses[-50:]))
                distil_texts.say(f"step {step + 1:,} loss {mean:.4f} rate {rate:.2f}")
        loss = float(np.mean(jax.device_get(losses[-50:])))
        elapsed = time.monotonic() - begun
        distil_texts.say(f"{len(losses):,} steps in {elapsed:.1f} s, loss {loss:.4f}")
        stored.unlink(missing_ok=True)
        rows = np.asarray(state["table"])
        facts = {"loss": round(loss, 4)}
        return rows[:, :-1] * np.exp(rows[:, -1:]), facts

    def batch(
        self, random: np.random.Generator, recipe: Recipe, count: int
    ) -> dict[str, Any]:
        """Returns random texts with their targets, and random pairs with their ids.

        Args:
            random: Generator of the choice.
            recipe: Whether there are pairs.
            count: Number of rows of the table.
        """
        size = self.options.batch
        chosen = np.searchsorted(self.shares, random.random(size))
        chosen = np.minimum(chosen, len(self.shares) - 1)
        groups = [(self.texts, chosen)]
        batch: dict[str, Any] = {
            "targets": self.targets[self.target_of[chosen]].astype(np.float32)
        }
        if recipe.pairs:
            pairs = random.integers(0, len(self.ids), self.options.pair_batch)
            groups += [(side, pairs) for side in self.pairs]
            batch["ids"] = self.ids[pairs]
        tokens, texts, before = [], [], 0
        for source, chosen in groups:
            ids, places = source.of(chosen)
            tokens.append(ids)
            texts.append(places + before)
            before += len(chosen)
        # All batches have the same shape: a few tokens too many are left out.
        most = round(ROOM * self.mean(recipe))
        tokens = pad(np.concatenate(tokens), most, 0)
        batch["texts"] = pad(np.concatenate(texts), most, before)
        # Rows of the tokens of this batch. The other rows do not change, which saves
        # most of the time of an update.
        rows, places = np.unique(tokens, return_inverse=True)
        batch["rows"] = pad(rows, min(-(-len(rows) // 4_096) * 4_096, count), count)
        batch["places"] = places.astype(np.int32)
        return batch

    def mean(self, recipe: Recipe) -> float:
        """Returns the mean number of tokens of a batch."""
        lengths = self.texts.lengths
        # Longer texts are drawn more often.
        tokens = self.options.batch * np.sum(lengths**1.5) / np.sum(lengths**0.5)
        if recipe.pairs:
            sides = sum(np.mean(side.lengths) for side in self.pairs)
            tokens += self.options.pair_batch * sides
        return float(tokens)

    def update(self, recipe: Recipe, state: State, rate, batch: dict[str, Any]):
        """Returns the state after an update, and the loss before it."""
        rows = batch["rows"]
        teacher = batch["targets"]
        size = len(teacher)
        sides = len(batch["ids"]) if recipe.pairs else 0

        def loss_of(table):
            vectors = embed(table, batch["places"], batch["texts"], size + 2 * sides)
            loss = distil_loss(vectors[:size], teacher, teacher @ self.turn, recipe)
            if recipe.pairs:
                queries, passages = jnp.split(vectors[size:], 2)
                loss += recipe.pairs * pair_loss(
                    queries, passages, batch["ids"], recipe
                )
            return loss

        part = {name: value[rows] for name, value in state.items()}
        loss, gradient = jax.value_and_grad(loss_of)(part["table"])
        rates = jnp.full((1, part["table"].shape[1]), recipe.rate)
        rates = rate * rates.at[:, -1].set(recipe.weight_rate)
        part = adam(part, gradient, rates)
        state = {
            name: value.at[rows].set(part[name], mode="drop", unique_indices=True)
            for name, value in state.items()
        }
        return state, loss


def adam(part: State, gradient: Float[Array, "R D"], rates: Float[Array, "1 D"]):
    """Returns rows after an update of Adam. The moments count a row's own updates."""
    updates = part["updates"] + 1
    mean = 0.9 * part["mean"] + 0.1 * gradient
    square = 0.999 * part["square"] + 0.001 * jnp.square(gradient)
    direction = mean / (1 - 0.9**updates)
    size = jnp.sqrt(square / (1 - 0.999**updates))
    table = part["table"] - rates * direction / (size + 1e-8)
    return {"table": table, "mean": mean, "square": square, "updates": updates}


def pad(values: Int[np.ndarray, " N"], length: int, rest: int) -> np.ndarray:
    """Returns the first values, filled up with the rest to a length."""
    values = values[:length].astype(np.int32)
    return np.pad(values, (0, length - len(values)), constant_values=rest)
