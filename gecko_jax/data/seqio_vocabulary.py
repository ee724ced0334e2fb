"""Vocabularies as seqio's class, through which its preprocessors tokenize.

seqio appends the EOS itself, so `encode_tf` returns the rest: what opens a text, and
its pieces.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gecko_jax.data import load_seqio
from gecko_jax.text import json_vocabularies, vocabularies


def wrap(vocabulary: vocabularies.Vocabulary) -> Any:
    """Returns the seqio Vocabulary of one from `vocabularies.load`.

    Raises ValueError if the file, which seqio reads again, has changed.
    """
    if isinstance(vocabulary, json_vocabularies.JsonVocabulary):
        return _json_class()(vocabulary)
    if not vocabulary.path:
        raise ValueError(
            "the vocabulary is not from a file; write it to a `.model` file, and give "
            "the result of vocabularies.load"
        )
    seqio = load_seqio()
    pieces = seqio.SentencePieceVocabulary(vocabulary.path, vocabulary.extra_ids)
    # seqio reads a path once in a process and never sees later changes.
    if pieces.tokenizer.serialized_model_proto() != vocabulary.full_proto:
        raise ValueError(
            f"{vocabulary.path}: has changed since it was read; start again, or give "
            "the new vocabulary another name"
        )
    return pieces


@functools.cache
def _json_class() -> Any:
    seqio = load_seqio()
    import tensorflow as tf

    ragged: Any = tf.RaggedTensor  # Its type stubs lack its methods.

    class JsonVocabulary(seqio.Vocabulary):
        """A `tokenizer.json`.

        seqio pads with 0 and says so in `pad_id`, also where 0 is a piece. Training
        reads the lengths of texts, not their ids, to find the padding.
        """

        def __init__(self, vocabulary: json_vocabularies.JsonVocabulary):
            super().__init__()
            self._vocabulary = vocabulary

        @property
        def bos_id(self) -> int | None:
            return (*self._vocabulary.opening, None)[0]

        @property
        def eos_id(self) -> int:
            return self._vocabulary.eos_id

        @property
        def unk_id(self) -> int | None:
            return self._vocabulary.unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self._vocabulary.size

        def _encode(self, s: str) -> list[int]:
            return self._vocabulary.encode([s])[0][:-1]

        def _decode(self, ids: Sequence[int]) -> str:
            return self._vocabulary.decode(ids)

        def _encode_tf(self, s: Any) -> Any:
            texts = tf.reshape(s, [-1])
            signature = (tf.int32, tf.int64)
            arrays = tf.numpy_function(self._encode_array, [texts], signature)
            ids, lengths = (tf.ensure_shape(array, [None]) for array in arrays)
            is_text = s.shape.rank == 0
            return ids if is_text else ragged.from_row_lengths(ids, lengths)

        def _encode_array(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            encoded = self._vocabulary.encode([text.decode() for text in texts])
            ids = [number for tokens in encoded for number in tokens[:-1]]
            lengths = [len(tokens) - 1 for tokens in encoded]
            return np.array(ids, np.int32), np.array(lengths, np.int64)

        def _decode_tf(self, ids: Any) -> Any:
            def decode(row: np.ndarray) -> bytes:
                # `decode_tf` of seqio writes padding after the first EOS.
                return self.decode(row.tolist()).encode()

            return tf.numpy_function(decode, [ids], tf.string)

        def __eq__(self, other: object) -> bool:
            if not isinstance(other, JsonVocabulary):
                return False
            return self._vocabulary.fingerprint == other._vocabulary.fingerprint

    return JsonVocabulary
