"""The SentencePiece vocabulary: texts in, token ids out.

    Vocabulary(model_proto).encode(["a code search"]) -> [[9, 350, 1231, 1]]

Every text ends in `EOS_ID`. The ids are those of `seqio.SentencePieceVocabulary`, but
neither seqio nor TensorFlow is needed, so a trained model can be used without them.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# T5's reserved ids: encoder inputs are padded with 0 and closed by 1.
PAD_ID = 0
EOS_ID = 1


class Vocabulary:
    """A SentencePiece model with T5's reserved ids.

    Attributes:
        model_proto: The bytes of the `.model` file, as read.
        extra_ids: Sentinels `<extra_id_0>`, ... added at the end, as T5's 100.
        pad_id: Fills rows.
        eos_id: Closes every text.
    """

    pad_id: int = PAD_ID
    eos_id: int = EOS_ID

    def __init__(self, model_proto: bytes, extra_ids: int = 0):
        if extra_ids < 0:
            raise ValueError(
                f"extra_ids={extra_ids}: must be 0 or more (T5 trained with 100)"
            )
        self.model_proto = model_proto
        self.extra_ids = extra_ids
        for name, has, wants in (
            ("pad_id", self._processor.pad_id(), PAD_ID),
            ("eos_id", self._processor.eos_id(), EOS_ID),
        ):
            if has != wants:
                raise ValueError(
                    f"the vocabulary has {name}={has}; Gecko's encoder needs "
                    f"{name}={wants}, as T5's: train one with `gecko data vocabulary`"
                )

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(
                _add_sentinels(self.model_proto, self.extra_ids)
            )
        except Exception as error:  # sentencepiece and protobuf raise several kinds
            raise ValueError(
                f"not a SentencePiece model ({len(self.model_proto):,} bytes): give a "
                "whole `.model` file"
            ) from error
        return processor

    def __getstate__(self) -> dict[str, Any]:
        return {"model_proto": self.model_proto, "extra_ids": self.extra_ids}

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.__getstate__() == other.__getstate__()
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def size(self) -> int:
        """Number of ids, sentinels included: the rows of the token table in use."""
        return self._processor.GetPieceSize()

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits by which equal vocabularies are known."""
        digest = hashlib.sha256(self.model_proto)
        digest.update(f"extra_ids={self.extra_ids}".encode())
        return digest.hexdigest()[:16]

    @property
    def full_proto(self) -> bytes:
        """The model with its sentinels, as SentencePiece runs it."""
        return self._processor.serialized_model_proto()

    def encode(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[list[int]]:
        """Returns the token ids of each text, closed by `eos_id`.

        Args:
            texts: Formatted texts, see `gecko_jax.text`.
            max_length: Tokens to keep of each text; the last of them is `eos_id`.
                None keeps all.

        Raises:
            ValueError: `max_length` is below 2, which leaves no room for text.
        """
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"max_length={max_length}: must be at least 2, a token and the end"
            )
        keep = None if max_length is None else max_length - 1
        # One thread: the texts of a call are few, and threads cost more than they save.
        encoded = self._processor.EncodeAsIds(list(texts), num_threads=1)
        return [[*tokens[:keep], EOS_ID] for tokens in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids; padding and the end are left out."""
        kept = [int(token) for token in tokens if token not in (PAD_ID, EOS_ID)]
        return self._processor.DecodeIds(kept)


def load(path: str | os.PathLike, extra_ids: int = 0) -> Vocabulary:
    """Reads a `.model` file.

    Raises:
        ValueError: The file is missing, is no SentencePiece model, or lacks T5's ids.
    """
    try:
        model_proto = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such vocabulary; train one with `gecko data vocabulary` or "
            "give the path of a SentencePiece `.model` file"
        ) from None
    try:
        return Vocabulary(model_proto, extra_ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _add_sentinels(model_proto: bytes, extra_ids: int) -> bytes:
    """Appends T5's sentinels, the highest first, as seqio does."""
    if not extra_ids:
        return model_proto
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf makes at import.
    model_class: Any = vars(sentencepiece_model_pb2)["ModelProto"]
    model = model_class.FromString(model_proto)
    for number in reversed(range(extra_ids)):
        model.pieces.add(
            piece=f"▁<extra_id_{number}>",
            score=0.0,
            type=model_class.SentencePiece.USER_DEFINED,
        )
    return model.SerializeToString()
