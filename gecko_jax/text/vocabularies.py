"""The SentencePiece vocabulary: texts in, token ids out.

    Vocabulary(model_proto).encode(["a code search"]) -> [[9, 350, 1231, 1]]

Every text ends in `EOS_ID`. The ids are those of `seqio.SentencePieceVocabulary`, but
neither seqio nor TensorFlow is needed, so a trained model can be used without them.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

# T5's reserved ids: encoder inputs are padded with 0 and closed by 1.
PAD_ID = 0
EOS_ID = 1


_SPACE = "▁"  # SentencePiece's mark of a space.


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token of another library's tokenizer that SentencePiece does not know.

    It is cut out of a text before SentencePiece reads the parts between such tokens,
    each as a text of its own.

    Attributes:
        content: The characters of a text that become this token.
        id: Token id.
        single_word: Whether letters and digits beside it make it part of a word, which
            is then not cut.
        normalized: Whether it is looked for in the normalized text.
    """

    content: str
    id: int
    single_word: bool = False
    normalized: bool = False

    def __post_init__(self):
        if not self.content.strip() or self.id < 0:
            raise ValueError(
                f"added token {self.content!r} with id {self.id}: it needs a visible "
                "character and an id of 0 or more"
            )


class Vocabulary:
    """A SentencePiece model with T5's reserved ids.

    Attributes:
        model_proto: The bytes of the `.model` file, as read.
        extra_ids: Sentinels `<extra_id_0>`, ... added at the end, as T5's 100.
        added_tokens: Tokens of an imported tokenizer. Their ids are those of pieces, or
            follow the sentinels without a gap.
        pad_id: Fills rows.
        eos_id: Closes every text.
    """

    pad_id: int = PAD_ID
    eos_id: int = EOS_ID

    def __init__(
        self,
        model_proto: bytes,
        extra_ids: int = 0,
        added_tokens: Sequence[AddedToken] = (),
    ):
        if extra_ids < 0:
            raise ValueError(
                f"extra_ids={extra_ids}: must be 0 or more (T5 trained with 100)"
            )
        self.model_proto = model_proto
        self.extra_ids = extra_ids
        self.added_tokens = tuple(added_tokens)
        for name, has, wants in (
            ("pad_id", self._processor.pad_id(), PAD_ID),
            ("eos_id", self._processor.eos_id(), EOS_ID),
        ):
            if has != wants:
                raise ValueError(
                    f"the vocabulary has {name}={has}; Gecko's encoder needs "
                    f"{name}={wants}, as T5's: train one with `gecko data vocabulary`"
                )
        pieces = self._processor.GetPieceSize()
        beyond = sorted({t.id for t in self.added_tokens if t.id >= pieces})
        if beyond != list(range(pieces, pieces + len(beyond))):
            raise ValueError(
                f"the added tokens have the ids {', '.join(map(str, beyond))}; they "
                f"must follow the {pieces:,} pieces and sentinels without a gap"
            )
        self._size = pieces + len(beyond)

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
        return {
            "model_proto": self.model_proto,
            "extra_ids": self.extra_ids,
            "added_tokens": self.added_tokens,
            "_size": self._size,
        }

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.__getstate__() == other.__getstate__()
        )

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def size(self) -> int:
        """Number of ids, sentinels and added tokens included: table rows in use."""
        return self._size

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits by which equal vocabularies are known."""
        digest = hashlib.sha256(self.model_proto)
        digest.update(f"extra_ids={self.extra_ids}".encode())
        if self.added_tokens:
            digest.update(repr(self.added_tokens).encode())
        return digest.hexdigest()[:16]

    @property
    def full_proto(self) -> bytes:
        """The model with its sentinels, as SentencePiece runs it; no added tokens."""
        return self._processor.serialized_model_proto()

    def find_piece(self, piece: str) -> int | None:
        """Returns the id of a piece or sentinel, None where there is none."""
        number = self._processor.PieceToId(piece)
        return number if self._processor.IdToPiece(number) == piece else None

    def spell(self, tokens: Sequence[int]) -> tuple[str, float]:
        """Returns the pieces of token ids in one string, and the sum of their scores.

        Two segmentations that agree in both are equally good.
        """
        known = self._processor.GetPieceSize()
        added = {token.id: token.content for token in self.added_tokens}
        spelled = [
            self._processor.IdToPiece(t) if t < known else added.get(t, f"<{t}>")
            for t in tokens
        ]
        scores = [self._processor.GetScore(t) for t in tokens if t < known]
        return "".join(spelled), sum(scores)

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
        if not self.added_tokens:
            encoded = self._processor.EncodeAsIds(list(texts), num_threads=1)
        else:
            encoded = [self._encode_around_added(text) for text in texts]
        return [[*tokens[:keep], EOS_ID] for tokens in encoded]

    def _encode_around_added(self, text: str) -> list[int]:
        """Cuts out the added tokens: first of the raw text, then of what is between."""
        raw, normalized = self._added_patterns
        ids: list[int] = []
        for part in _cut(text, raw):
            if isinstance(part, AddedToken):
                ids.append(part.id)
                continue
            if normalized:
                part = self._normalize(part)
            for inner in _cut(part, normalized):
                if isinstance(inner, AddedToken):
                    ids.append(inner.id)
                else:
                    ids += self._processor.EncodeAsIds(inner)
        return ids

    def _normalize(self, text: str) -> str:
        return self._processor.Normalize(text).replace(_SPACE, " ")

    @functools.cached_property
    def _added_patterns(self) -> tuple[dict[str, AddedToken], dict[str, AddedToken]]:
        """Returns the tokens to find in raw and in normalized text, the longest first.

        A normalized token is itself looked for as it is normalized.
        """
        raw = {t.content: t for t in self.added_tokens if not t.normalized}
        normalized = {
            self._normalize(t.content).strip(): t
            for t in self.added_tokens
            if t.normalized
        }
        normalized.pop("", None)
        raw, normalized = (
            {content: found[content] for content in sorted(found, key=len)[::-1]}
            for found in (raw, normalized)
        )
        return raw, normalized

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids; padding and the end are left out."""
        kept = [int(token) for token in tokens if token not in (PAD_ID, EOS_ID)]
        contents = {token.id: token.content for token in self.added_tokens}
        if not contents.keys() & set(kept):
            return self._processor.DecodeIds(kept)
        parts: list[str] = []
        pieces: list[int] = []
        for token in kept:
            if token not in contents:
                pieces.append(token)
                continue
            parts += [self._processor.DecodeIds(pieces), contents[token]]
            pieces = []
        parts.append(self._processor.DecodeIds(pieces))
        return " ".join(part for part in parts if part)


def _cut(text: str, tokens: dict[str, AddedToken]) -> Iterator[str | AddedToken]:
    """Yields the added tokens of a text and the text between them, in order."""
    begin = 0
    matches = re.finditer("|".join(map(re.escape, tokens)), text) if tokens else ()
    for match in matches:
        token = tokens[match[0]]
        start, end = match.span()
        beside = text[max(start - 1, 0) : start] + text[end : end + 1]
        if token.single_word and re.search(r"\w", beside):
            continue
        yield text[begin:start]
        yield token
        begin = end
    yield text[begin:]


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


def parse_proto(model_proto: bytes) -> Any:
    """Returns the fields of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf makes at import.
    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(model_proto)


def _add_sentinels(model_proto: bytes, extra_ids: int) -> bytes:
    """Appends T5's sentinels, the highest first, as seqio does."""
    if not extra_ids:
        return model_proto
    model = parse_proto(model_proto)
    user_defined = type(model).SentencePiece.USER_DEFINED
    for number in reversed(range(extra_ids)):
        model.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=user_defined)
    return model.SerializeToString()
