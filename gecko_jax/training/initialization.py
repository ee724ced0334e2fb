"""The parameters a run begins with: those of a checkpoint, or fresh ones.

The paper starts from a pre-trained T5. A small model that starts from scratch is given
what the data can say without training: which tokens are rare, and along which
directions queries and positives agree.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Key

import gecko_jax.config
from gecko_jax.data import pipeline, task_table
from gecko_jax.formats import detection, model_folder, parameters, pretrained
from gecko_jax.io import progress, wording
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import sharding
from gecko_jax.text import text_formats, vocabularies


def load_start(config: ml_collections.ConfigDict) -> model_folder.ModelFiles | None:
    """Reads `init.checkpoint`, if there is one, and checks that it fits the config.

    It may be of any format. An encoder that comes without a projection gets a fresh one
    where the config has one. One without layers, a bag of tokens, gets those of the
    config; they add nothing until they are trained.

    Raises:
        ValueError: The checkpoint cannot be read, or its sizes are not the config's.
    """
    if not config.init.checkpoint:
        return None
    source = config.init.checkpoint
    vocab: dict[str, Any] = {}
    if detection.find_format(source)[0] is detection.Format.T5X:  # It holds none.
        vocab = {
            "vocabulary": task_table.vocabulary_path(config.data.vocabulary),
            "extra_ids": config.data.extra_ids,
        }
    start = model_folder.read_params(detection.open_model(source, **vocab))
    encoder_config = gecko_jax.config.encoder_config(config)
    if encoder_config.projection and not start.encoder_config.projection:
        logging.info("%s has no projection: it gets a fresh one", source)
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        fresh = np.asarray(dual_encoder.init_projection(encoder_config, key))
        params = {**start.params, "projection_layer": {"kernel": fresh}}
        start = dataclasses.replace(start, params=params)
    if encoder_config.num_layers and not start.encoder_config.num_layers:
        layers = wording.counted(encoder_config.num_layers, "layer")
        logging.info("%s is a bag of tokens: it gets %s", source, layers)
        key = jax.random.fold_in(jax.random.key(config.seed), 3)
        params = _add_layers(start.params, encoder_config, key)
        start = dataclasses.replace(start, params=params)
    parameters.check(start.params, encoder_config, source=source)
    _check_settings(encoder_config, start.encoder_config, source)
    return start


def _add_layers(
    params: Mapping[str, Any], config: dual_encoder.EncoderConfig, key: Key[Array, ""]
) -> dict[str, Any]:
    """Returns the parameters with layers whose last matrices are 0."""
    flat = parameters.flatten(params)
    for name, leaf in parameters.flatten(dual_encoder.init_params(config, key)).items():
        if name.startswith("encoder/layers_"):
            is_last = name.endswith(("/out/kernel", "/wo/kernel"))
            flat[name] = np.zeros_like(leaf) if is_last else np.asarray(leaf)
    return parameters.unflatten(flat)


def text_format(
    start: model_folder.ModelFiles | None, style: str
) -> text_formats.TextFormat:
    """Returns how a run writes its texts: as its start did, or else as the paper does.

    A plain encoder, which writes texts as they are, has no format to keep.

    Args:
        start: What the run begins with, if anything.
        style: `data.text_format`: "gecko" as above; "plain" writes texts as they are
            whatever the start did, to tell what the format is worth.
    """
    if style == "plain":
        return detection.PLAIN_FORMAT
    if start is None or start.text_format == detection.PLAIN_FORMAT:
        return text_formats.TextFormat()
    return start.text_format


def _check_settings(
    config: dual_encoder.EncoderConfig, theirs: dual_encoder.EncoderConfig, source: str
) -> None:
    """Compares what decides a result and is not to be seen in any shape."""
    faults = [
        f"model.{name}={getattr(config, name)!r}, and it has {getattr(theirs, name)!r}"
        for name in ("num_heads", "mlp_activations", "relpos_max_distance")
        if getattr(config, name) != getattr(theirs, name)
    ]
    if faults:
        raise ValueError(
            f"{source}: its settings are not the config's; set them so: "
            + "; ".join(faults)
        )


def check_vocabulary(
    vocab: vocabularies.Vocabulary,
    config: ml_collections.ConfigDict,
    start: model_folder.ModelFiles | None,
) -> None:
    """Refuses a vocabulary that does not fit the model or the checkpoint.

    Raises:
        ValueError: Names both, and the setting that would fit.
    """
    if vocab.size > config.model.vocab_size:
        raise ValueError(
            f"data.vocabulary={config.data.vocabulary}: it has {vocab.size} ids, "
            f"model.vocab_size={config.model.vocab_size} has no room for them; raise "
            "model.vocab_size or train a smaller vocabulary"
        )
    if start is None:
        return
    if start.added_tokens:
        contents = ", ".join(repr(token.content) for token in start.added_tokens[:5])
        raise ValueError(
            f"init.checkpoint={config.init.checkpoint}: its tokenizer has added tokens "
            f"({contents}), which training does not cut out of texts; start from a "
            "model without them"
        )
    theirs = start.build_vocabulary()
    if theirs.fingerprint != vocab.fingerprint:
        source = config.init.checkpoint
        file, first = f"{source}/{model_folder.VOCABULARY}", ""
        if pretrained.find(source) != source:
            file = source
        elif not pathlib.Path(file).exists():
            file = f"DIR/{model_folder.VOCABULARY}"
            first = f"`gecko import {source} --output DIR` and "
        raise ValueError(
            f"data.vocabulary={config.data.vocabulary}: not the vocabulary that "
            f"{source} was trained with, so its token embeddings would mean nothing; "
            f"{first}set data.vocabulary={file} and data.extra_ids={start.extra_ids}"
        )


def init_params(
    config: ml_collections.ConfigDict,
    encoder: dual_encoder.DualEncoder,
    batches: pipeline.Batches,
    key: Key[Array, ""],
    mesh: jax.sharding.Mesh,
    shardings: Any,
) -> dict[str, Any]:
    """Returns fresh parameters on their shardings, as `config.init` asks for.

    Args:
        config: The training config.
        encoder: The model.
        batches: The training data: its token counts, and the pairs to align on.
        key: Randomness of the run.
        mesh: Where batches go.
        shardings: Of each parameter.
    """
    is_weighed = config.init.token_weights == "idf"
    weights = batches.idf_weights(encoder.config.vocab_size) if is_weighed else None
    draw = functools.partial(_draw_params, encoder.config, weights)
    params = jax.jit(draw, out_shardings=shardings)(jax.random.fold_in(key, 0))
    if config.init.align_steps:
        covariance = _pair_covariance(
            params, encoder, batches, mesh, config.init.align_steps
        )
        align = jax.jit(dual_encoder.align_projection, out_shardings=shardings)
        params = align(params, covariance)
    return params


def _draw_params(
    config: dual_encoder.EncoderConfig,
    token_weights: Float[np.ndarray, " V"] | None,
    key: Key[Array, ""],
) -> dict[str, Any]:
    params = dual_encoder.init_params(config, key)
    if token_weights is None:
        return params
    return dual_encoder.weight_tokens(params, token_weights, jax.random.fold_in(key, 1))


def _pair_covariance(
    params: Any,
    encoder: dual_encoder.DualEncoder,
    batches: pipeline.Batches,
    mesh: jax.sharding.Mesh,
    num_steps: int,
) -> Float[Array, "D D"]:
    """Covariance of query embeddings with their positives, over the first batches."""

    @jax.jit
    def sums(params: Any, batch: Mapping[str, Array]) -> tuple[Array, ...]:
        mask = batch["example_mask"].astype(jnp.float32)[:, None]

        def embed(side: str) -> Array:
            texts = dual_encoder.embed_texts(
                encoder, params, batch, side, num_segments=batches.num_segments
            )
            return dual_encoder.normalize(texts[: len(mask)]).astype(jnp.float32) * mask

        queries, positives = embed("query"), embed("passage")
        return queries.T @ positives, queries.sum(0), positives.sum(0), mask.sum()

    total: Any = None
    for batch in progress.track(
        batches.iterate(0, num_steps), "Aligning dims", num_steps
    ):
        found = sums(params, sharding.place_batch(batch, mesh))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    products, queries, positives, count = total
    return products / count - jnp.outer(queries / count, positives / count)
