"""Averages of models: checkpoints of one run, or runs that share a start.

Fine-tunings of one checkpoint are in one basin of the loss, and a point between them is
often better than each of them (model soups, Wortsman et al. 2022; the merged
checkpoints of EmbeddingGemma and Qwen3-Embedding). The average of models that did not
start from the same parameters is noise.

Both methods compute a weighted average of each parameter array:

    mean   sum of w_i a_i
    slerp  the direction is the point on the sphere with the smallest weighted sum of
           squared angles to all a_i (for two models: SLERP, Shoemake 1985), and the
           length is sum of w_i |a_i|: the mean of vectors with different directions is
           shorter than they are. The order of the models does not matter.

Each is a sum of c_i a_i, so two arrays and one sum are in memory, never a model.
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

# Values of an array that are converted to float64 at a time.
_BLOCK = 2**20

# Settings that affect training and no embedding.
_TRAINING_SETTINGS = ("dropout_rate", "scan_layers", "remat")
# Settings whose difference is reason enough.
_ARCHITECTURE = (
    *("model.family", "model.model_dim", "model.num_layers", "model.vocab_size"),
    "vocabulary",
)


@dataclasses.dataclass(frozen=True)
class Average:
    """An average as it was written, and its inputs."""

    model_files: model_folder.ModelFiles
    inputs: tuple[dict[str, Any], ...]  # source, revision, step, weight of each model
    cosines: tuple[float, ...]  # similarity of each model to the previous one


def average(
    sources: Sequence[str],
    output: str | pathlib.Path,
    *,
    method: str = "mean",
    weights: Sequence[float] = (),
    steps: Sequence[int] = (),
) -> Average:
    """Averages models into a model folder, which is complete or not written at all.

    Raises a ValueError that lists every difference between models that do not fit.

    Args:
        sources: Two or more models of any format that `gecko_jax.load` reads, a workdir
            for its newest checkpoint; or one workdir, for its own checkpoints.
        output: The folder to write.
        method: One of `METHODS`.
        weights: Weight of each model, in any unit; () for equal weights.
        steps: Checkpoints of the one workdir; () for all that it holds.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    opened = _open(sources, steps)
    _check_sources(opened, output)
    shares = _normalize(weights, len(opened))
    models = [files for _, files in opened]
    for source, files in opened[1:]:
        _check_same_kind(*opened[0], source, files)
    inputs = tuple(
        dict(source=source, revision=files.revision, step=files.step, weight=share)
        for (source, files), share in zip(opened, shares, strict=True)
    )
    flat = [parameters.flatten_to_tensors(files.params) for files in models]
    gram = np.zeros((len(models), len(models)))
    params = {
        name: _average_array([params[name] for params in flat], shares, method, gram)
        for name in flat[0]
    }
    averaged = dataclasses.replace(
        models[0],
        params=parameters.unflatten(params),
        step=max(files.step for files in models),
        revision="",
        provenance=_provenance(method, inputs, models),
    )
    written = model_folder.save_model(output, averaged)
    lengths = np.sqrt(np.diag(gram))
    products = np.maximum(lengths[1:] * lengths[:-1], np.finfo(np.float64).tiny)
    cosines = tuple((np.diag(gram, k=1) / products).tolist())
    pairs = itertools.pairwise(inputs)
    for (first, second), cosine in zip(pairs, cosines, strict=True):
        # In one basin it is above 0.9, otherwise near 0.
        if cosine < 0.5:
            logging.warning(
                "the parameters of %s and %s have a cosine of %.2f: such models did "
                "not start from the same checkpoint, and their average is noise",
                describe(first),
                describe(second),
                cosine,
            )
    return Average(written, inputs, cosines)


def describe(model: dict[str, Any]) -> str:
    """Returns the name of an input for messages."""
    return f"{model['source']} (step {model['step']:,})"


def _open(
    sources: Sequence[str], steps: Sequence[int]
) -> list[tuple[str, model_folder.ModelFiles]]:
    """Opens the models, each with its source."""
    if len(sources) > 1:
        if steps:
            raise ValueError(
                f"steps={','.join(map(str, steps))}: selects checkpoints of one run, "
                f"and there are {len(sources)} models; leave it out"
            )
        return [(source, detection.open_model(source)) for source in sources]
    (source,) = sources
    available = checkpoints.all_steps(source)
    if not available:
        raise ValueError(
            f"{source}: one model, and no run with checkpoints; name a run's workdir, "
            "or two models"
        )
    steps = sorted(steps) or available
    if len(steps) < 2:
        raise ValueError(
            f"{source}: one checkpoint, step {steps[0]}, is no average; name more of "
            f"{', '.join(map(str, available))}, or train with a larger checkpoint.keep"
        )
    return [(source, model_folder.open_model(source, step=step)) for step in steps]


def _check_sources(
    opened: Sequence[tuple[str, model_folder.ModelFiles]], output: str | pathlib.Path
) -> None:
    """Refuses a model that is named twice or would be overwritten."""
    seen = set()
    for source, files in opened:
        path = pathlib.Path(source).resolve()
        if path == pathlib.Path(output).resolve():
            raise ValueError(
                f"{output}: is one of the models; write the average somewhere else"
            )
        if (path, files.step) in seen:
            raise ValueError(
                f"{source}, step {files.step}: named twice; give it a larger weight "
                "instead"
            )
        seen.add((path, files.step))


def _normalize(weights: Sequence[float], number: int) -> tuple[float, ...]:
    """Returns weights that sum to 1."""
    weights = weights or (1.0,) * number
    shown = ",".join(f"{weight:g}" for weight in weights)
    if len(weights) != number:
        raise ValueError(f"weights={shown}: {len(weights)} for {number} models")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights={shown}: must be numbers of 0 or more, one above 0")
    return tuple(weight / math.fsum(weights) for weight in weights)


def _check_same_kind(
    first_source: str,
    first: model_folder.ModelFiles,
    second_source: str,
    second: model_folder.ModelFiles,
) -> None:
    """Refuses models that format, tokenize or encode texts differently."""

    def settings(files: model_folder.ModelFiles) -> dict[str, Any]:
        values = model_folder.settings(files)
        # The sizes say the shapes of all arrays.
        for name, skipped in (("model", _TRAINING_SETTINGS), ("text_format", ())):
            fields = values.pop(name).items()
            values |= {f"{name}.{k}": v for k, v in fields if k not in skipped}
        content = files.vocabulary_proto + files.tokenizer_config
        return values | {"vocabulary": hashlib.sha256(content).hexdigest()[:12]}

    left, right = settings(first), settings(second)
    keys = [k for k in (left | right) if left.get(k) != right.get(k)]
    # Models of unlike architecture differ in everything else, too.
    keys = [k for k in _ARCHITECTURE if k in keys] or keys
    if keys:
        differences = "; ".join(
            f"{key}: {left.get(key)!r:.60}, and {right.get(key)!r:.60}" for key in keys
        )
        raise ValueError(
            f"{first_source} and {second_source} cannot be averaged, because these "
            f"settings differ; only models from the same start can: {differences}"
        )


def _provenance(
    method: str,
    inputs: Sequence[dict[str, Any]],
    models: Sequence[model_folder.ModelFiles],
) -> dict[str, Any]:
    """Returns the provenance of the average: its inputs, and the data of all of them.

    Config and start are those of the inputs if these are equal.
    """
    provenance: dict[str, Any] = {"average": {"method": method, "models": list(inputs)}}
    for files in models:
        if tasks := files.provenance.get("tasks"):
            provenance["tasks"] = provenance.get("tasks", {}) | tasks
    for key in ("config", "started_from"):
        first, *others = [files.provenance.get(key) for files in models]
        if first and all(value == first for value in others):
            provenance[key] = first
    return provenance


def _average_array(
    leaves: Sequence[tensors.Tensor],
    shares: Sequence[float],
    method: str,
    gram: Float[np.ndarray, "N N"],
) -> tensors.Tensor:
    """Returns the average of one array, which is computed when it is read.

    Reading it adds the inner products of neighbouring models to `gram`.
    """

    def read() -> Float[np.ndarray, "..."]:
        coefficients = np.asarray(shares)
        if method == "slerp":
            coefficients = spherical_coefficients(_gram(leaves), coefficients)
        # Sums in float64 are rounded once: the average of equal models is exact.
        total = np.zeros(leaves[0].size)
        previous = np.zeros(0, np.float32)
        for number, leaf in enumerate(leaves):
            array = leaf.read().reshape(-1)
            for first in range(0, array.size, _BLOCK):
                part = array[first : first + _BLOCK].astype(np.float64)
                total[first : first + _BLOCK] += coefficients[number] * part
            gram[number, number] += _inner(array, array)
            if number:
                gram[number - 1, number] += _inner(previous, array)
            previous = array
        return total.astype(np.float32).reshape(leaves[0].shape)

    return tensors.Tensor(leaves[0].shape, read)


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
    total = 0.0
    for first in range(0, left.size, _BLOCK):
        part = slice(first, first + _BLOCK)
        total += np.dot(left[part].astype(np.float64), right[part].astype(np.float64))
    return float(total)


def spherical_coefficients(
    gram: Float[np.ndarray, "N N"], shares: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Returns c for which sum of c_i a_i is the weighted mean on the sphere.

    The mean is in the span of the vectors, so their inner products (`gram`) are
    sufficient. Raises ValueError if two vectors have opposite directions, so that the
    mean is not unique.
    """
    lengths = np.sqrt(np.diag(gram))
    if not np.all(lengths):  # A zero vector has no direction.
        return shares
    cosines = gram / np.outer(lengths, lengths)
    if np.any(cosines < -1 + 1e-9):
        raise ValueError(
            "an array of two models has opposite directions, which have no mean on the "
            "sphere; use the method mean"
        )

    def on_sphere(mean: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        return mean / np.sqrt(mean @ cosines @ mean)

    mean = on_sphere(shares)
    for _ in range(100):
        towards = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(towards)
        # Logarithm map of each vector at the mean, and their weighted sum.
        pulls = shares / np.sinc(angles / np.pi)
        step = pulls - np.sum(pulls * towards) * mean
        length = np.sqrt(max(step @ cosines @ step, 0.0))
        if length < 1e-9:  # radians
            break
        mean = on_sphere(np.cos(length) * mean + np.sinc(length / np.pi) * step)
    return mean / lengths * np.sum(shares * lengths)
