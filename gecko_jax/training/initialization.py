"""Initial parameters of a run: those of `init.checkpoint`, or fresh ones.

The paper starts from a pre-trained T5. A small model that starts from scratch gets two
statistics of its data instead: how rare each token is, and in which directions queries
and positives agree (`models.from_scratch`).
"""

import dataclasses
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
from gecko_jax.models import dual_encoder, families, from_scratch
from gecko_jax.parallel import sharding
from gecko_jax.text import text_formats, vocabularies


def open_start(
    config: ml_collections.ConfigDict, vocab: vocabularies.Vocabulary
) -> model_folder.ModelFiles | None:
    """Opens `init.checkpoint`, if it is set, and checks that it fits the config.

    The checkpoint can have any format. Its parameters are read by `read_start`. Raises
    ValueError if it cannot be opened, or its sizes or vocabulary are not the config's.
    """
    start, source = None, config.init.checkpoint
    if source:
        options: dict[str, Any] = {}
        # A T5X checkpoint has no vocabulary.
        if detection.find_format(source)[0] is detection.Format.T5X:
            options = {
                "vocabulary": task_table.vocabulary_path(config.data.vocabulary),
                "extra_ids": config.data.extra_ids,
            }
        start = detection.open_model(source, **options)
        encoder_config = gecko_jax.config.encoder_config(config)
        _check_settings(encoder_config, start.encoder_config, source)
    check_vocabulary(vocab, config, start)
    return start


def read_start(
    config: ml_collections.ConfigDict, start: model_folder.ModelFiles
) -> model_folder.ModelFiles:
    """Reads the parameters of an opened start, and adds what it lacks.

    If the config has a projection and the checkpoint has none, it gets a fresh one. A
    bag of tokens gets the config's layers, whose output is 0 until they are trained.
    """
    source = config.init.checkpoint
    encoder_config = gecko_jax.config.encoder_config(config)
    start = model_folder.read_params(start)
    # Add what the checkpoint lacks, each part with its own key.
    if encoder_config.projection and not start.encoder_config.projection:
        logging.info("%s has no projection; adding a fresh one", source)
        key = jax.random.fold_in(jax.random.key(config.seed), 2)
        shape = (encoder_config.model_dim, encoder_config.embedding_dim)
        fresh = np.asarray(dual_encoder.PROJECTION_INIT(key, shape, jnp.float32))
        params = {**start.params, "projection_layer": {"kernel": fresh}}
        start = dataclasses.replace(start, params=params)
    if encoder_config.num_layers and not start.encoder_config.num_layers:
        layers = wording.counted(encoder_config.num_layers, "layer")
        logging.info("%s is a bag of tokens; adding %s", source, layers)
        key = jax.random.fold_in(jax.random.key(config.seed), 3)
        params = _add_layers(start.params, encoder_config, key)
        start = dataclasses.replace(start, params=params)
    # Lists missing, extra and wrongly shaped parameters in one error.
    parameters.check(start.params, encoder_config, source=source)
    return start


def _add_layers(
    params: Mapping[str, Any], config: dual_encoder.EncoderConfig, key: Key[Array, ""]
) -> dict[str, Any]:
    """Adds layers whose residual branches end in zeros."""
    # The branches end in `out` and `wo`, or in a norm after them. With zeros there, the
    # new layers do not change the hidden states of the bag of tokens at first.
    switches, ends = config.switches, ("/out/kernel", "/wo/kernel")
    if switches.sandwich_norms:
        ends = tuple(
            f"/post_{name}_layer_norm/scale"
            for name in ("attention", "mlp", "per_layer")
        )
    flat = parameters.flatten(params)
    # Token embeddings, projection and final norm stay those of the checkpoint.
    for name, leaf in parameters.flatten(dual_encoder.init_params(config, key)).items():
        if name.startswith(("encoder/layers_", "encoder/per_layer_")):
            # A norm that scales by 1 + w is zero at w = -1.
            zero = -switches.norm_offset if switches.sandwich_norms else 0.0
            is_last = name.endswith(ends)
            flat[name] = np.full_like(leaf, zero) if is_last else np.asarray(leaf)
    return parameters.unflatten(flat)


def text_format(
    start: model_folder.ModelFiles | None, style: str
) -> text_formats.TextFormat:
    """Returns the text format of a run: that of its start, or the paper's.

    `style` is `data.text_format`: "plain" uses texts without a format in any case. A
    plain encoder has no format to keep.
    """
    if style == "plain":
        return text_formats.PLAIN
    plain = dataclasses.replace(text_formats.PLAIN, verbatim=True)
    if start is None or start.text_format in (text_formats.PLAIN, plain):
        return text_formats.TextFormat()
    return start.text_format


def expected_format(
    config: ml_collections.ConfigDict, vocab: vocabularies.Vocabulary
) -> text_formats.TextFormat:
    """Returns the text format of a run whose `init.checkpoint` may not exist yet."""
    source, start = config.init.checkpoint, None
    if source and not pathlib.Path(pretrained.find(source)).exists():
        logging.warning(
            "init.checkpoint=%s: not on this machine; the texts are written in the "
            "format of the paper, which may not be that of the checkpoint",
            source,
        )
    else:
        start = open_start(config, vocab)
    return text_format(start, config.data.text_format)


def _check_settings(
    config: dual_encoder.EncoderConfig, start: dual_encoder.EncoderConfig, source: str
) -> None:
    """Compares sizes, and settings that affect results but no shape."""
    # Layers and projection are compared only if the checkpoint has them. Otherwise the
    # run adds new ones.
    names = ["family", "vocab_size", "model_dim"]
    if start.num_layers:
        names += ["num_layers", "head_dim", "mlp_dim"]
    if start.projection:
        names += ["projection", "embedding_dim"]
    names += ["num_heads", "mlp_activations", "relpos_max_distance"]
    differences = [
        f"model.{name}={getattr(start, name)!r} (now {getattr(config, name)!r})"
        for name in (*names, *families.ROTARY_FIELDS)
        if getattr(config, name) != getattr(start, name)
    ]
    if differences:
        raise ValueError(
            f"{source}: differs from the config; choose the preset of its size, "
            "or set " + ", ".join(differences)
        )


def check_vocabulary(
    vocab: vocabularies.Vocabulary,
    config: ml_collections.ConfigDict,
    start: model_folder.ModelFiles | None,
) -> None:
    """Refuses a vocabulary that does not fit the model or the checkpoint."""
    # A table may have unused rows at its end (T5: 32,128 rows for 32,100 ids).
    if vocab.size > config.model.vocab_size:
        raise ValueError(
            f"data.vocabulary={config.data.vocabulary}: its {vocab.size} ids exceed "
            f"model.vocab_size={config.model.vocab_size}; raise model.vocab_size or "
            "train a smaller vocabulary"
        )
    if start is None:
        return
    if start.added_tokens:
        contents = ", ".join(repr(token.content) for token in start.added_tokens[:5])
        raise ValueError(
            f"init.checkpoint={config.init.checkpoint}: its tokenizer has added tokens "
            f"({contents}), which training does not support; start from a model "
            "without them"
        )
    if start.build_vocabulary().fingerprint != vocab.fingerprint:
        source = config.init.checkpoint
        name = model_folder.vocabulary_name(start.vocabulary_proto)
        file, first = f"{source}/{name}", ""
        if pretrained.find(source) != source:
            file = source
        elif not pathlib.Path(file).exists():
            file = f"DIR/{name}"
            first = f"`gecko import {source} --output DIR` and "
        raise ValueError(
            f"data.vocabulary={config.data.vocabulary}: not the vocabulary of "
            f"init.checkpoint={source}, whose token embeddings need it; "
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
    """Returns fresh, sharded parameters, as `config.init` describes them.

    The batches give the token counts and the pairs to align on.
    """
    # Rare tokens get more weight, as in TF-IDF.
    weights = None
    if config.init.token_weights == "idf":
        weights = batches.idf_weights(encoder.config.vocab_size)

    def draw(key: Key[Array, ""]) -> dict[str, Any]:
        params = dual_encoder.init_params(encoder.config, key)
        if weights is None:
            return params
        key, share = jax.random.fold_in(key, 1), config.init.token_weight_dims
        return from_scratch.weight_tokens(
            params, weights, key, share, encoder.config.embedding_scale
        )

    # Draw inside a jit with output shardings: no device holds all parameters.
    params = jax.jit(draw, out_shardings=shardings)(jax.random.fold_in(key, 0))
    # Order the dims by what pairs share, before the first step.
    if config.init.align_steps:
        covariance = _pair_covariance(
            params, encoder, batches, mesh, config.init.align_steps
        )
        align = jax.jit(from_scratch.align_projection, out_shardings=shardings)
        params = align(params, covariance)
    return params


def _pair_covariance(
    params: Any,
    encoder: dual_encoder.DualEncoder,
    batches: pipeline.Batches,
    mesh: jax.sharding.Mesh,
    num_steps: int,
) -> Float[Array, "D D"]:
    """Returns the covariance of queries and positives over the first batches."""

    @jax.jit
    def sums(params: Any, batch: Mapping[str, Array]) -> tuple[Array, ...]:
        mask = batch["example_mask"].astype(jnp.float32)[:, None]

        def embed(side: str) -> Array:
            # Padding rows must not add to the sums.
            texts = dual_encoder.embed_texts(
                encoder, params, batch, side, num_segments=batches.shape.num_segments
            )
            # The first passages are the positives; hard negatives follow.
            return dual_encoder.normalize(texts[: len(mask)]).astype(jnp.float32) * mask

        queries, positives = embed("query"), embed("passage")
        return queries.T @ positives, queries.sum(0), positives.sum(0), mask.sum()

    # The batches are those that training begins with; they are encoded without dropout.
    total: Any = None
    for batch in progress.track(
        batches.iterate(0, num_steps), "Ordering the dims", num_steps
    ):
        step = sums(params, sharding.place_batch(batch, mesh))
        total = step if total is None else jax.tree.map(jnp.add, total, step)
    # Cov(q, p) = E[q p^T] - E[q] E[p]^T, over all pairs.
    products, queries, positives, count = total
    return products / count - jnp.outer(queries / count, positives / count)
