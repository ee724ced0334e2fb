"""Averages of models: the checkpoints of one run, or runs that share a start.

Fine-tunings of one checkpoint lie in one basin, and a point between them is often
better than each of them (model soups, Wortsman et al. 2022; the merged checkpoints of
EmbeddingGemma and Qwen3-Embedding). Models that did not start from the same parameters
have nothing between them but noise.

Two averages, both weighted, both of one parameter array after the other:

    mean   sum of w_i a_i
    slerp  the direction is that of the point on the sphere with the least weighted sum
           of squared angles to all a_i (for two models: SLERP, Shoemake 1985), and the
           length is sum of w_i |a_i|: the mean of vectors that point apart is shorter
           than they are, this is not. The order of the models does not matter.

Either is a sum of c_i a_i. So two arrays and one sum are in memory, never a model.
"""

import dataclasses
import hashlib
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from gecko_jax.formats import checkpoints, detection, model_folder, parameters, tensors

METHODS = ("mean", "slerp")

# Of the parameters of two models; those of one basin are above 0.9, strangers near 0.
_LEAST_COSINE = 0.5

# Numbers of an array that are in memory in float64 at once.
_BLOCK = 2**20

# The mean on the sphere: steps at most, and the step in radians that is none.
_MOST_STEPS = 100
_STILL = 1e-9

# What may differ, since it decides how a model was trained and no embedding.
_OF_TRAINING = ("dropout_rate", "scan_layers", "remat")


@dataclasses.dataclass(frozen=True)
class Average:
    """What went into an average and came out.

    Attributes:
        model_files: The average as it was written.
        inputs: Source, revision, step and weight of each model.
        cosines: Of all parameters of each model with those of the one before it.
    """

    model_files: model_folder.ModelFiles
    inputs: tuple[dict[str, Any], ...]
    cosines: tuple[float, ...]


def average(
    sources: Sequence[str],
    output: str | pathlib.Path,
    *,
    method: str = "mean",
    weights: Sequence[float] = (),
    steps: Sequence[int] = (),
) -> Average:
    """Averages models into a model folder, whole or not at all.

    Args:
        sources: Two or more models of any format that `gecko_jax.load` takes, of a
            workdir its newest checkpoint; or one workdir, for its own checkpoints.
        output: The folder to write.
        method: One of `METHODS`.
        weights: One for each model, in any unit; none are equal weights.
        steps: Checkpoints of the one workdir; none are all that it holds.

    Raises:
        ValueError: The models do not fit each other; lists every difference.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    opened = _open(sources, steps)
    _refuse_twice(opened)
    for source, _ in opened:
        if pathlib.Path(source).resolve() == pathlib.Path(output).resolve():
            raise ValueError(
                f"{output}: is one of the models; write the average somewhere else"
            )
    shares = _shares(weights, len(opened))
    (name, first), *others = opened
    for other_name, other in others:
        _check_alike(name, first, other_name, other)
    inputs = tuple(
        {
            "source": source,
            "revision": files.revision,
            "step": files.step,
            "weight": share,
        }
        for (source, files), share in zip(opened, shares, strict=True)
    )
    flat = [parameters.flatten(files.params) for _, files in opened]
    seen = _Cosines(len(opened))
    params = {
        leaf: _combine(
            [tensors.as_tensor(of_model[leaf]) for of_model in flat],
            shares,
            method,
            seen,
        )
        for leaf in flat[0]
    }
    written = model_folder.save_model(
        output,
        dataclasses.replace(
            first,
            params=parameters.unflatten(params),
            step=max(files.step for _, files in opened),
            revision="",
            provenance=_provenance(method, inputs, [files for _, files in opened]),
        ),
    )
    cosines = seen.values()
    for (before, after), cosine in zip(
        itertools.pairwise(inputs), cosines, strict=True
    ):
        if cosine < _LEAST_COSINE:
            logging.warning(
                "the parameters of %s and %s have a cosine of %.2f: such models did "
                "not start from the same checkpoint, and their average means nothing",
                describe(before),
                describe(after),
                cosine,
            )
    return Average(written, inputs, cosines)


def describe(model: dict[str, Any]) -> str:
    """Names one of the inputs for people."""
    return f"{model['source']} (step {model['step']:,})"


def _open(
    sources: Sequence[str], steps: Sequence[int]
) -> list[tuple[str, model_folder.ModelFiles]]:
    """Opens the models that are meant, with the source of each."""
    if len(sources) > 1:
        if steps:
            raise ValueError(
                f"steps={','.join(map(str, steps))}: chooses checkpoints of one run, "
                f"and {len(sources)} models are named; leave it out"
            )
        return [(source, detection.open_model(source)) for source in sources]
    (source,) = sources
    there = checkpoints.all_steps(source)
    if not there:
        raise ValueError(
            f"{source}: one model, and no run with checkpoints; name a run's workdir, "
            "or two models"
        )
    chosen = sorted(steps) or there
    if len(chosen) < 2:
        raise ValueError(
            f"{source}: one checkpoint, step {chosen[0]}, is no average; name more of "
            f"{', '.join(map(str, there))}, or train with a larger checkpoint.keep"
        )
    return [(source, model_folder.open_step(source, step)) for step in chosen]


def _refuse_twice(opened: Sequence[tuple[str, model_folder.ModelFiles]]) -> None:
    seen = set()
    for source, files in opened:
        place = (pathlib.Path(source).resolve(), files.step)
        if place in seen:
            raise ValueError(
                f"{source}, step {files.step}: named twice; give it a larger weight "
                "instead"
            )
        seen.add(place)


def _shares(weights: Sequence[float], number: int) -> tuple[float, ...]:
    """Returns weights that add up to 1."""
    if not weights:
        weights = (1.0,) * number
    shown = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != number:
        raise ValueError(f"weights={shown}: {len(weights)} for {number} models")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights={shown}: must be numbers of 0 or more, one above 0")
    return tuple(weight / math.fsum(weights) for weight in weights)


def _check_alike(
    name: str,
    first: model_folder.ModelFiles,
    other_name: str,
    other: model_folder.ModelFiles,
) -> None:
    """Refuses models that do not write, cut or encode texts alike."""

    def facts(files: model_folder.ModelFiles) -> dict[str, Any]:
        settings = model_folder.settings(files)
        shapes = parameters.flatten(files.params)
        return {
            **{key: value for key, value in settings.items() if key != "model"},
            **{
                f"model.{key}": value
                for key, value in settings["model"].items()
                if key not in _OF_TRAINING
            },
            "vocabulary": hashlib.sha256(files.vocabulary_proto).hexdigest()[:12],
            **{leaf: tuple(found.shape) for leaf, found in shapes.items()},
        }

    ours, theirs = facts(first), facts(other)
    differences = [
        f"{key}: {ours.get(key, 'none')!r}, and {theirs.get(key, 'none')!r}"
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise ValueError(
            f"{name} and {other_name} cannot be averaged; only models of one shape, "
            "vocabulary and text format can:\n  " + "\n  ".join(differences)
        )


def _provenance(
    method: str,
    inputs: Sequence[dict[str, Any]],
    models: Sequence[model_folder.ModelFiles],
) -> dict[str, Any]:
    """Returns what the average is made of; the data is all that any of them saw."""
    found: dict[str, Any] = {"average": {"method": method, "models": list(inputs)}}
    tasks = {
        task: facts
        for files in models
        for task, facts in (files.provenance.get("tasks") or {}).items()
    }
    if tasks:
        found["tasks"] = tasks
    # The settings that all of them share; of several runs none stands for the others.
    configs = [files.provenance.get("config") for files in models]
    if configs[0] and all(config == configs[0] for config in configs):
        found["config"] = configs[0]
    starts = {files.provenance.get("started_from") for files in models}
    if len(starts) == 1 and starts != {None}:
        found["started_from"] = starts.pop()
    return found


class _Cosines:
    """Sums over all arrays what the cosine of neighbouring models needs."""

    def __init__(self, number: int):
        self._squares = np.zeros(number)
        self._products = np.zeros(number - 1)

    def add(self, squares: np.ndarray, products: np.ndarray) -> None:
        self._squares += squares
        self._products += products

    def values(self) -> tuple[float, ...]:
        lengths = np.sqrt(self._squares)
        both = np.maximum(lengths[1:] * lengths[:-1], np.finfo(np.float64).tiny)
        return tuple((self._products / both).tolist())


def _combine(
    leaves: Sequence[tensors.Tensor],
    shares: Sequence[float],
    method: str,
    seen: _Cosines,
) -> tensors.Tensor:
    """Returns the average of one array, which is computed when it is read."""

    def read() -> Float[np.ndarray, "..."]:
        coefficients = np.asarray(shares)
        if method == "slerp":
            coefficients = spherical_coefficients(_gram(leaves), coefficients)
        return _sum(leaves, coefficients, seen)

    return tensors.Tensor(leaves[0].shape, read)


def _sum(
    leaves: Sequence[tensors.Tensor],
    coefficients: Float[np.ndarray, " N"],
    seen: _Cosines,
) -> Float[np.ndarray, "..."]:
    """Adds up in float64 and rounds once: equal models give themselves, to the bit."""
    total = np.zeros(tensors.num_values(leaves[0].shape))
    squares, products = np.zeros(len(leaves)), np.zeros(len(leaves) - 1)
    before = None
    for number, (leaf, coefficient) in enumerate(
        zip(leaves, coefficients, strict=True)
    ):
        array = leaf.read().reshape(-1)
        for part in _blocks(array.size):
            total[part] += coefficient * array[part].astype(np.float64)
        squares[number] = _inner(array, array)
        if before is not None:
            products[number - 1] = _inner(before, array)
        before = array
    seen.add(squares, products)
    return total.astype(np.float32).reshape(leaves[0].shape)


def _gram(leaves: Sequence[tensors.Tensor]) -> Float[np.ndarray, "N N"]:
    """Returns the inner products of all pairs, with two arrays in memory."""
    gram = np.zeros((len(leaves), len(leaves)))
    for row, left in enumerate(leaves):
        array = left.read().reshape(-1)
        gram[row, row] = _inner(array, array)
        for column in range(row + 1, len(leaves)):
            product = _inner(array, leaves[column].read().reshape(-1))
            gram[row, column] = gram[column, row] = product
    return gram


def _inner(left: Float[np.ndarray, " E"], right: Float[np.ndarray, " E"]) -> float:
    parts = (
        np.dot(left[part].astype(np.float64), right[part].astype(np.float64))
        for part in _blocks(left.size)
    )
    return math.fsum(parts)


def _blocks(size: int) -> list[slice]:
    return [slice(first, first + _BLOCK) for first in range(0, size, _BLOCK)]


def spherical_coefficients(
    gram: Float[np.ndarray, "N N"], shares: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Returns c with sum of c_i a_i the weighted mean of vectors on the sphere.

    The mean lies in the span of the vectors, so their inner products are enough.

    Args:
        gram: Inner products of the vectors a_i.
        shares: Their weights, which add up to 1.

    Raises:
        ValueError: Two vectors point in opposite directions: any direction is as near.
    """
    lengths = np.sqrt(np.diag(gram))
    if not np.all(lengths):  # A vector of zeros has no direction.
        return shares
    cosines = gram / np.outer(lengths, lengths)
    if np.any(cosines < -1 + 1e-9):
        raise ValueError(
            "an array of two models points in opposite directions, which have no mean "
            "on the sphere; use the method mean"
        )

    def on_sphere(mean: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return mean / np.sqrt(mean @ cosines @ mean)

    mean = on_sphere(shares)
    for _ in range(_MOST_STEPS):
        towards = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(towards)
        # The logarithm map of each vector at the mean, and their weighted sum.
        pulls = shares / np.sinc(angles / np.pi)
        step = pulls - np.sum(pulls * towards) * mean
        length = np.sqrt(max(step @ cosines @ step, 0.0))
        if length < _STILL:
            break
        mean = on_sphere(np.cos(length) * mean + np.sinc(length / np.pi) * step)
    return mean / lengths * np.sum(shares * lengths)
