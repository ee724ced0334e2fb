"""The feature converter with which t5x reads the seqio tasks of this package.

    {"query": [5, 6, 1], "positive": [7, 1], "negatives": [[8, 8, 1]], ...}
 -> {"query_tokens": [5, 6, 1, 0], "positive_tokens": [7, 1, 0, 0],
     "negative_tokens": [[8, 8, 1, 0]], "negative_mask": [True], ...}

Every text has its own row, because t5x splits every array along the batch. The command
`gecko train` reads through `pipeline` instead, with random access by step.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from gecko_jax.data import load_seqio
from gecko_jax.text import vocabularies

NEGATIVE_FEATURES = ("negative_tokens", "negative_mask", "negative_id")


def feature_converter(num_negatives: int) -> Any:
    """Returns the converter class for t5x.

    An example has its first `num_negatives` hard negatives (G), and `negative_mask` is
    False where it has fewer. 0 omits all `NEGATIVE_FEATURES`.
    """
    return functools.partial(_converter_class(), num_negatives)


@functools.cache
def _converter_class() -> Any:
    seqio = load_seqio()
    import tensorflow as tf

    spec = seqio.FeatureConverter.FeatureSpec

    class DualEncoderFeatureConverter(seqio.FeatureConverter):
        """Pads the texts of an example, and passes on its ids."""

        TASK_FEATURES: ClassVar = {
            "query": spec(tf.int32),
            "positive": spec(tf.int32),
            "negatives": spec(tf.int32, rank=2, sequence_dim=1),
        }
        MODEL_FEATURES: ClassVar = {
            "query_tokens": spec(tf.int32),
            "positive_tokens": spec(tf.int32),
            "negative_tokens": spec(tf.int32, rank=2, sequence_dim=1),
            "negative_mask": spec(tf.bool),
            "query_id": spec(tf.uint32),
            "passage_id": spec(tf.uint32),
            "negative_id": spec(tf.uint32, rank=2),
            "negative_group": spec(tf.int32, rank=0),
        }
        PACKING_FEATURE_DTYPES = None

        def __init__(self, num_negatives: int, pack: bool = False, **options: Any):
            if pack:
                raise ValueError(
                    "pack=True: t5x reads one text per row; set it to False, or "
                    "train with `gecko train`, which packs"
                )
            self._num_negatives = num_negatives
            # t5x splits batches, and TensorFlow 2.21 crashes when it splits an empty
            # array. So without negatives, these features are missing.
            features = {
                name: feature
                for name, feature in self.MODEL_FEATURES.items()
                if num_negatives or name not in NEGATIVE_FEATURES
            }
            # seqio reads the attribute of the instance, not of the class.
            self.MODEL_FEATURES = features  # pyright: ignore[reportAttributeAccessIssue]
            super().__init__(pack=False, **options)

        def _convert_features(
            self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
        ) -> tf.data.Dataset:
            num = self._num_negatives

            def pad(values: Any, *shape: int) -> Any:
                values = values[tuple(slice(size) for size in shape)]
                short = [[0, n - tf.shape(values)[d]] for d, n in enumerate(shape)]
                return tf.ensure_shape(tf.pad(values, short), shape)

            def close(tokens: Any) -> Any:
                # seqio truncates long texts without keeping their EOS.
                is_last = tf.range(tokens.shape[-1]) == tokens.shape[-1] - 1
                is_full = is_last & (tokens != vocabularies.PAD_ID)
                return tf.where(is_full, vocabularies.EOS_ID, tokens)

            def convert(example: dict[str, Any]) -> dict[str, Any]:
                negatives = example["negatives"]
                if isinstance(negatives, tf.RaggedTensor):
                    negatives = negatives.to_tensor(vocabularies.PAD_ID)
                length = task_feature_lengths["negatives"]
                features = {
                    "query_tokens": close(
                        pad(example["query"], task_feature_lengths["query"])
                    ),
                    "positive_tokens": close(
                        pad(example["positive"], task_feature_lengths["positive"])
                    ),
                    "negative_tokens": close(pad(negatives, num, length)),
                    "negative_mask": tf.range(num) < tf.shape(negatives)[0],
                    "query_id": tf.ensure_shape(example["query_id"], (2,)),
                    "passage_id": tf.ensure_shape(example["passage_id"], (2,)),
                    "negative_id": pad(example["negative_ids"], num, 2),
                    "negative_group": example["negative_group"],
                }
                return {name: features[name] for name in self.MODEL_FEATURES}

            return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

        def get_model_feature_lengths(
            self, task_feature_lengths: Mapping[str, int]
        ) -> Mapping[str, int]:
            lengths = {
                "query_tokens": task_feature_lengths["query"],
                "positive_tokens": task_feature_lengths["positive"],
                "negative_tokens": task_feature_lengths["negatives"],
                "negative_mask": self._num_negatives,
                "query_id": 2,
                "passage_id": 2,
                "negative_id": self._num_negatives,
                "negative_group": 1,  # A scalar, so the length has no effect.
            }
            return {name: lengths[name] for name in self.MODEL_FEATURES}

    return DualEncoderFeatureConverter
