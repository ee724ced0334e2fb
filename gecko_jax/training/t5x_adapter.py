r"""The dual encoder as a `t5x.models.BaseModel`, for t5x's own trainer.

    python -m t5x.train --gin_search_paths=configs \
        --gin_file=t5x/quickstart.gin --gin.MODEL_DIR=\"runs/t5x\"

`configs/t5x/quickstart.gin` has every binding that a run needs, `configs/t5x/start.gin`
has those to start from a checkpoint, and `docs/t5x.md` explains them.

The parameters have T5X's names, so checkpoints of either trainer load into the other's
model (`gecko import`, `gecko export --to=t5x`). Install t5x from its repository
(`requirements-t5x.txt`): the package of that name on PyPI is empty.
"""

import functools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import core as flax_core
from flax.linen import partitioning
from jaxtyping import Array, Bool, Float, Int

from gecko_jax.data import registration, t5x_features
from gecko_jax.formats import model_folder, parameters, to_t5x
from gecko_jax.losses import contrastive
from gecko_jax.models import dual_encoder


def logical_axis_rules() -> list[tuple[str, str | None]]:
    """Returns the rules for t5x's partitioner.

    `affinity`, the width of the projection, is added to t5x's standard rules, as in
    t5x_retrieval.
    """
    from t5x import partitioning as t5x_partitioning

    return list(
        t5x_partitioning.standard_logical_axis_rules(
            additional_rules=(("affinity", None),)
        )
    )


def logical_factor_rules() -> Mapping[str, Any]:
    """Returns the rules for t5x's Adafactor, with `affinity` added."""
    from t5x import adafactor

    return flax_core.freeze(
        {
            **adafactor.standard_logical_factor_rules(),
            "affinity": adafactor.FactorDim.COLUMN,
        }
    )


def summarize_config(
    model_dir: str,
    summary_writer: Any,
    step: int,
    *,
    t5x_model: Any,
    mixture_or_task: Any,
    task_feature_lengths: Mapping[str, int],
) -> None:
    """Writes t5x's summary of the config, and the settings for `gecko import`.

    A T5X checkpoint has only parameters. The folder `gecko/` in `model_dir` has the
    text format, the vocabulary, the sizes, the MRL dims and the lengths. The first
    three arguments are those of `t5x.gin_utils.summarize_gin_config`.
    """
    from t5x import gin_utils

    gin_utils.summarize_gin_config(model_dir, summary_writer, step)
    if jax.process_index():  # Every process calls this, and `model_dir` is shared.
        return
    text_format, vocabulary = registration.describe(mixture_or_task)
    settings = model_folder.ModelFiles(
        params={},
        encoder_config=t5x_model.module.config,
        text_format=text_format,
        vocabulary_proto=vocabulary.model_proto,
        extra_ids=vocabulary.extra_ids,
        mrl_dims=tuple(t5x_model.loss_settings["mrl_dims"]),
        query_length=task_feature_lengths["query"],
        passage_length=task_feature_lengths["positive"],
        # `gecko import` takes step and revision from the checkpoint.
        step=0,
        revision="",
        provenance={"trained_by": "t5x"},
    )
    # `model_dir` may be a bucket, but `write_model_json` needs a local folder.
    folder = epath.Path(model_dir) / to_t5x.SETTINGS
    with tempfile.TemporaryDirectory() as local:
        model_folder.write_model_json(pathlib.Path(local), settings)
        folder.mkdir(parents=True, exist_ok=True)
        for file in pathlib.Path(local).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


def build_model(
    config: dual_encoder.EncoderConfig,
    optimizer_def: Any,
    *,
    num_negatives: int = 0,
    mrl_dims: tuple[int, ...],
    mrl_weights: tuple[float, ...],
    temperature: float,
    **switches: bool,
) -> Any:
    """Returns a `t5x.models.BaseModel`; its batches come from `data.t5x_features`.

    Keep t5x's `num_microbatches` at None: each of t5x's microbatches would see only its
    own in-batch negatives.

    `optimizer_def` is one of `t5x.optimizers`. The MRL settings, the temperature and
    the switches are keyword arguments of `contrastive.mrl_loss`. Raises ImportError
    with the remedy if t5x is not installed, and ValueError if the encoder is not T5's.
    """
    if config.family != "t5":
        raise ValueError(
            f"family={config.family!r}: T5X checkpoints hold T5 encoders only; train "
            "this family with `gecko train`"
        )
    loss_settings = {
        "mrl_dims": tuple(mrl_dims),
        "mrl_weights": tuple(mrl_weights),
        "temperature": temperature,
        **switches,
    }
    # The converter pads to G negatives, which fixes the shapes that t5x compiles.
    converter = t5x_features.feature_converter(num_negatives)
    return _model_class()(config, optimizer_def, loss_settings, converter)


@functools.cache
def _model_class() -> Any:
    try:
        import t5x.models as t5x_models
    except ImportError as error:
        raise ImportError(
            f"t5x is not installed, or only in part ({error}); run `pip install "
            "--no-deps -r requirements-t5x.txt`, which installs it from its repository "
            "(the package of that name on PyPI is empty)"
        ) from error
    from clu import metrics as clu_metrics

    class GeckoModel(t5x_models.BaseModel):
        """The dual encoder and its loss behind t5x's interface."""

        def __init__(
            self,
            config: dual_encoder.EncoderConfig,
            optimizer_def: Any,
            loss_settings: Mapping[str, Any],
            feature_converter_cls: Any,
        ):
            super().__init__(optimizer_def=optimizer_def)
            self.FEATURE_CONVERTER_CLS = feature_converter_cls
            self.module = dual_encoder.DualEncoder(config)
            self.loss_settings = loss_settings

        def get_initial_variables(
            self,
            rng: Any,
            input_shapes: Mapping[str, Any],
            input_types: Mapping[str, Any] | None = None,
        ) -> Any:
            """Returns `params`, and `params_axes` with their logical axes."""
            del input_shapes, input_types  # No parameter depends on them.
            config = self.module.config
            # t5x looks up the logical axes of the parameter NAME under NAME_axes.
            flat_axes = parameters.flatten(dual_encoder.abstract_params(config)[1])
            axes = {
                f"{name}_axes": partitioning.AxisMetadata(names=tuple(spec))
                for name, spec in flat_axes.items()
            }
            params = dual_encoder.init_params(config, _typed_key(rng))
            return flax_core.freeze(
                {"params": params, "params_axes": parameters.unflatten(axes)}
            )

        def loss_fn(
            self,
            params: Any,
            batch: Mapping[str, Array],
            dropout_rng: Any,
            flax_mutables: Any = None,
        ) -> tuple[Array, Mapping[str, Any]]:
            """Returns the mean MRL loss of the batch, and clu metrics.

            t5x's partitioner compiles this for the global batch, so in-batch negatives
            come from all devices without explicit collectives.
            """
            del flax_mutables
            key = None
            if dropout_rng is not None and self.module.config.dropout_rate:
                key = _typed_key(dropout_rng)
            values, mask = _loss(self.module, params, batch, key, self.loss_settings)
            metrics = {
                name: clu_metrics.Average.from_model_output(value, mask=mask)
                for name, value in values.items()
            }
            # The mean over examples; padding rows have a loss of 0.
            count = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
            return jnp.sum(values["loss"]) / count, metrics

        def score_batch(
            self,
            params: Any,
            batch: Mapping[str, Array],
            return_intermediates: bool = False,
            flax_mutables: Any = None,
        ) -> Float[Array, " B"]:
            """Returns the cosine similarity of each query and its positive."""
            del return_intermediates, flax_mutables
            queries, positives = (
                dual_encoder.normalize(
                    _embed(self.module, params, batch[f"{side}_tokens"])
                )
                for side in ("query", "positive")
            )
            return jnp.sum(queries * positives, axis=-1)

        def predict_batch_with_aux(
            self,
            params: Any,
            batch: Mapping[str, Array],
            rng: Any = None,
            flax_mutables: Any = None,
        ) -> tuple[Float[Array, "B D"], Mapping[str, Array]]:
            """Returns the normalized query embeddings at full width."""
            del rng, flax_mutables
            queries = _embed(self.module, params, batch["query_tokens"])
            epsilon = self.module.config.l2_epsilon
            return dual_encoder.normalize(queries, epsilon), {}

    return GeckoModel


def _loss(
    module: dual_encoder.DualEncoder,
    params: Any,
    batch: Mapping[str, Array],
    key: Any,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Float[Array, " B"]], Bool[Array, " B"]]:
    """Returns the loss and other values of each example, and the examples' mask."""
    # One dropout key each for queries, positives and hard negatives.
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    queries = _embed(module, params, batch["query_tokens"], keys[0])
    positives = _embed(module, params, batch["positive_tokens"], keys[1])
    # Hard negatives are optional features; without them G is 0.
    size = queries.shape[0]
    negatives = None
    negative_id = jnp.zeros((size, 0, 2), jnp.uint32)
    negative_mask = jnp.zeros((size, 0), bool)
    if "negative_tokens" in batch:
        # Encode [B, G, L] as B * G texts.
        _, num, length = batch["negative_tokens"].shape
        flat = batch["negative_tokens"].reshape(size * num, length)
        negatives = _embed(module, params, flat, keys[2]).reshape(size, num, -1)
        negative_id, negative_mask = batch["negative_id"], batch["negative_mask"]
    ids = contrastive.BatchIds(
        query_id=batch["query_id"],
        passage_id=batch["passage_id"],
        negative_id=negative_id,
        negative_mask=negative_mask,
        # A row of zeros is padding.
        example_mask=jnp.any(batch["query_tokens"] > 0, axis=1),
        negative_group=batch["negative_group"],
    )
    loss, terms = contrastive.mrl_loss(queries, positives, negatives, ids, **settings)
    # Accuracy and similarity are reported at the largest dim.
    full = terms[max(terms)]
    values = {
        "loss": loss,
        "accuracy": full.accuracy,
        "positive_similarity": full.positive_similarity,
        **{f"loss_{dim}": terms[dim].loss for dim in terms},
    }
    return values, ids.example_mask


def _embed(
    module: dual_encoder.DualEncoder,
    params: Any,
    tokens: Int[Array, "B L"],
    key: Any = None,
) -> Float[Array, "B D"]:
    """Embeds one text per row: t5x's batches are not packed."""
    rows: Any = module.apply(
        {"params": flax_core.unfreeze(params)},
        tokens,
        (tokens > 0).astype(jnp.int32),
        dropout_keys=None if key is None else jax.random.split(key, tokens.shape[0]),
    )
    return rows[:, 0]


def _typed_key(key: Any) -> Any:
    """Returns a new-style key; t5x passes raw uint32 keys."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
