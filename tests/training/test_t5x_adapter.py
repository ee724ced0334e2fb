"""The t5x adapter: losses, parameters and logical axes.

t5x is not on PyPI, so most tests use a stand-in with the abstract methods of
`t5x.models.BaseModel`. One test needs t5x itself.
"""

import abc
import dataclasses
import importlib.util
import sys
import types

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from gecko_jax.data import registration, t5x_features
from gecko_jax.formats import parameters
from gecko_jax.losses import contrastive
from gecko_jax.models import dual_encoder
from gecko_jax.training import t5x_adapter
from tests import tiny_encoders

HAS_T5X = importlib.util.find_spec("t5x") is not None
CONFIG = dual_encoder.EncoderConfig(
    vocab_size=8_064,
    model_dim=16,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    embedding_dim=8,
    dropout_rate=0.1,
)
LOSS = {
    "mrl_dims": (4, 8),
    "mrl_weights": (1.0, 1.0),
    "temperature": 0.05,
    "same_tower": True,
}


class _BaseModel(abc.ABC):
    """The methods of t5x's base class, with its names and arguments."""

    def __init__(self, optimizer_def):
        self.optimizer_def = optimizer_def

    @abc.abstractmethod
    def loss_fn(self, params, batch, dropout_rng, flax_mutables=None): ...

    def eval_fn(self, params, batch, flax_mutables=None):
        return self.loss_fn(
            params=params, batch=batch, dropout_rng=None, flax_mutables=flax_mutables
        )

    @abc.abstractmethod
    def predict_batch_with_aux(self, params, batch, rng=None, flax_mutables=None): ...

    @abc.abstractmethod
    def score_batch(
        self, params, batch, return_intermediates=False, flax_mutables=None
    ): ...

    @abc.abstractmethod
    def get_initial_variables(self, rng, input_shapes, input_types=None): ...


@pytest.fixture
def adapted(monkeypatch):
    if not HAS_T5X:
        package = types.ModuleType("t5x")
        package.models = types.ModuleType("t5x.models")
        package.models.BaseModel = _BaseModel
        monkeypatch.setitem(sys.modules, "t5x", package)
        monkeypatch.setitem(sys.modules, "t5x.models", package.models)
    t5x_adapter._model_class.cache_clear()
    yield t5x_adapter.build_model(CONFIG, "an optimizer", num_negatives=2, **LOSS)
    t5x_adapter._model_class.cache_clear()


@pytest.fixture(scope="module")
def batch():
    """A batch of a seqio task, converted as t5x does."""
    converter = t5x_features.feature_converter(2)(pack=False)
    task = registration.register("quickstart_docs")
    lengths = {"query": 16, "positive": 32, "negatives": 32}
    dataset = task.get_dataset(lengths, split="train", shuffle=False)
    rows = list(converter(dataset, lengths).take(3).as_numpy_iterator())
    return {
        name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]
    }


def test_the_converter_pads_texts_and_keeps_ids(batch):
    shapes = {name: value.shape for name, value in batch.items()}
    assert shapes == {
        "query_tokens": (3, 16),
        "positive_tokens": (3, 32),
        "negative_tokens": (3, 2, 32),
        "negative_mask": (3, 2),
        "negative_id": (3, 2, 2),
        "query_id": (3, 2),
        "passage_id": (3, 2),
        "negative_group": (3,),
    }
    assert not batch["negative_mask"].any()  # These are pairs.
    assert len(np.unique(batch["query_id"], axis=0)) == 3
    lengths = (batch["query_tokens"] > 0).sum(1)
    last = batch["query_tokens"][np.arange(3), lengths - 1]
    np.testing.assert_array_equal(last, 1)


def test_the_converter_keeps_existing_negatives():
    import tensorflow as tf

    converter = t5x_features.feature_converter(2)(pack=False)
    dataset = tf.data.Dataset.from_tensors(
        {
            "query": tf.constant([5, 6, 1]),
            "positive": tf.constant([7, 9]),
            "negatives": tf.constant([[8, 8, 1]]),
            "negative_ids": tf.constant([[3, 4]], tf.uint32),
            "query_id": tf.constant([1, 2], tf.uint32),
            "passage_id": tf.constant([2, 3], tf.uint32),
            "negative_group": tf.constant(0),
        }
    )
    # Trimming has removed the EOS of the positive.
    lengths = {"query": 4, "positive": 2, "negatives": 4}
    (row,) = converter(dataset, lengths).as_numpy_iterator()
    np.testing.assert_array_equal(row["negative_tokens"], [[8, 8, 1, 0], [0] * 4])
    np.testing.assert_array_equal(row["positive_tokens"], [7, 1])
    np.testing.assert_array_equal(row["negative_mask"], [True, False])
    np.testing.assert_array_equal(row["negative_id"], [[3, 4], [0, 0]])
    with pytest.raises(ValueError, match="pack=True: t5x reads one text per row"):
        t5x_features.feature_converter(2)(pack=True)


def test_without_negatives_there_are_no_negative_features(adapted, batch):
    """TensorFlow 2.21 crashes when t5x's evaluation unbatches empty features."""
    converter = t5x_features.feature_converter(0)(pack=False)
    task = registration.register("quickstart_docs")
    lengths = {"query": 16, "positive": 32, "negatives": 32}
    dataset = converter(
        task.get_dataset(lengths, split="validation", shuffle=False), lengths
    )
    row = next(dataset.batch(1).unbatch().as_numpy_iterator())
    assert row.keys() == {
        *("query_tokens", "positive_tokens"),
        *("query_id", "passage_id", "negative_group"),
    }
    params = dual_encoder.init_params(CONFIG, jax.random.key(1))
    bare = {k: v for k, v in batch.items() if k not in t5x_features.NEGATIVE_FEATURES}
    loss, _ = adapted.eval_fn(params, bare)
    # The negatives of this batch are all masked.
    np.testing.assert_allclose(loss, adapted.eval_fn(params, batch)[0], rtol=1e-6)


def test_another_family_is_refused():
    with pytest.raises(ValueError, match=r"family='gemma'.*gecko train"):
        t5x_adapter.build_model(
            tiny_encoders.GEMMA,
            None,
            mrl_dims=(8,),
            mrl_weights=(1.0,),
            temperature=1.0,
        )


def test_variables_have_axes_that_t5x_accepts(adapted):
    # t5x passes an old-style key.
    variables = adapted.get_initial_variables(jax.random.PRNGKey(0), {})
    assert isinstance(variables, flax.core.FrozenDict)
    params = parameters.flatten(variables["params"])
    axes = parameters.flatten(variables["params_axes"])
    assert {f"{name}_axes" for name in params} == axes.keys()
    for name, leaf in params.items():
        metadata = axes[f"{name}_axes"]
        assert isinstance(metadata, partitioning.AxisMetadata)
        assert len(metadata.names) == leaf.ndim
    # PjitPartitioner calls this function.
    names = partitioning.get_axis_names(variables["params_axes"])
    assert jax.tree.structure(names) == jax.tree.structure(variables["params"])


def test_the_loss_equals_mrl_loss(adapted, batch):
    params = dual_encoder.init_params(CONFIG, jax.random.key(1))
    loss, metrics = adapted.eval_fn(params, batch)

    def embed(tokens):
        rows = dual_encoder.DualEncoder(CONFIG).apply(
            {"params": params}, tokens, (tokens > 0).astype(np.int32)
        )
        return rows[:, 0]

    size = len(batch["query_tokens"])
    ids = contrastive.BatchIds(
        **{n: batch[n] for n in contrastive.BatchIds._fields if n != "example_mask"},
        example_mask=np.ones(size, bool),
    )
    negatives = embed(batch["negative_tokens"].reshape(-1, 32)).reshape(size, 2, -1)
    expected, terms = contrastive.mrl_loss(
        embed(batch["query_tokens"]),
        embed(batch["positive_tokens"]),
        negatives,
        ids,
        **LOSS,
    )
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].compute(), loss, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["loss_4"].compute(), np.mean(terms[4].loss), rtol=1e-6
    )
    scores = adapted.score_batch(params, batch)
    np.testing.assert_allclose(scores, terms[8].positive_similarity, atol=1e-6)
    vectors, _ = adapted.predict_batch_with_aux(params, batch)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_dropout_depends_on_the_key_from_t5x(adapted, batch):
    params = dual_encoder.init_params(CONFIG, jax.random.key(1))
    first, again, other = (
        float(adapted.loss_fn(params, batch, jax.random.PRNGKey(seed))[0])
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_missing_t5x_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "t5x", None)
    t5x_adapter._model_class.cache_clear()
    with pytest.raises(
        ImportError, match=r"not installed.*--no-deps -r requirements-t5x"
    ):
        t5x_adapter.build_model(CONFIG, None, **LOSS)
    t5x_adapter._model_class.cache_clear()


@pytest.mark.t5x
def test_t5x_partitions_and_trains_the_model(batch):
    from t5x import adafactor, trainer, utils
    from t5x import partitioning as t5x_partitioning

    # On CPU t5x splits the heads over all 8 devices of the tests.
    config = dataclasses.replace(CONFIG, num_heads=8)
    optimizer = adafactor.Adafactor(
        logical_factor_rules=t5x_adapter.logical_factor_rules()
    )
    adapted = t5x_adapter.build_model(config, optimizer, num_negatives=2, **LOSS)
    partitioner = t5x_partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=t5x_adapter.logical_axis_rules()
    )
    shapes = {name: value.shape for name, value in batch.items()}
    types_ = {name: value.dtype for name, value in batch.items()}
    initializer = utils.TrainStateInitializer(
        adapted.optimizer_def,
        adapted.get_initial_variables,
        shapes,
        partitioner,
        types_,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    loop = trainer.Trainer(
        adapted,
        state,
        partitioner,
        [],
        None,
        initializer.train_state_axes,
        jax.random.PRNGKey(1),
        lambda step: 1e-2,
        None,
    )
    before = float(adapted.eval_fn(state.params, batch)[0])
    for _ in range(5):
        loop.train(iter([batch]), num_steps=1)
    assert float(adapted.eval_fn(loop.train_state.params, batch)[0]) < before
