"""Vocabularies: texts in, token ids out.

    load("t5.model").encode(["a code search"]) -> [[9, 350, 1231, 1]]

A vocabulary is a SentencePiece model (`Vocabulary`) or a `tokenizer.json`
(`json_vocabularies`). Every text ends in the vocabulary's EOS. The ids of a
SentencePiece model equal those of `seqio.SentencePieceVocabulary`, but this module
needs neither seqio nor TensorFlow, so a trained model runs without them.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

# T5's reserved ids: 0 pads encoder inputs and 1 ends them. Rows of every vocabulary are
# padded with 0, even where 0 is a piece: segment ids, not token ids, mark padding.
PAD_ID = 0
EOS_ID = 1

MODEL_FILE, JSON_FILE = "vocabulary.model", "tokenizer.json"
JSON_CONFIG = "tokenizer_config.json"

_SPACE = "▁"  # SentencePiece's mark of a space.


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token of an imported tokenizer that SentencePiece does not know.

    The token is cut out of a text before SentencePiece encodes the parts around it,
    each as a text of its own.
    """

    content: str  # the characters that become this token
    id: int
    single_word: bool = False  # not cut next to letters or digits
    normalized: bool = False  # matched in the normalized text

    def __post_init__(self):
        if not self.content.strip() or self.id < 0:
            raise ValueError(
                f"added token {self.content!r} with id {self.id}: it needs a visible "
                "character and an id of 0 or more"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class Vocabulary:
    """A SentencePiece model with T5's reserved ids."""

    pad_id: ClassVar[int] = PAD_ID
    # Whether texts are encoded without `text_formats.clean`.
    verbatim: ClassVar[bool] = False

    model_proto: bytes  # bytes of the file: a `.model` here
    extra_ids: int = 0  # sentinels `<extra_id_0>`, ... at the end; T5 has 100
    # Tokens of an imported tokenizer. Their ids are ids of pieces, or follow the
    # sentinels without a gap.
    added_tokens: tuple[AddedToken, ...] = ()
    # The file that `load` read, which seqio reads again; "" without a file.
    path: str = dataclasses.field(default="", compare=False)
    tokenizer_config: bytes = b""  # bytes of the file next to a `tokenizer.json`

    def __post_init__(self):
        if self.extra_ids < 0:
            raise ValueError(
                f"extra_ids={self.extra_ids}: must be 0 or more (T5 trained with 100)"
            )
        for name, expected in (("pad_id", PAD_ID), ("eos_id", EOS_ID)):
            value = getattr(self._processor, name)()
            if value != expected:
                raise ValueError(
                    f"the vocabulary has {name}={value}; Gecko's encoder needs "
                    f"{name}={expected}, like T5: train one with `gecko data "
                    "vocabulary`"
                )
        pieces = self._processor.GetPieceSize()
        if self._ids_after_pieces != list(range(pieces, self.size)):
            ids = ", ".join(map(str, self._ids_after_pieces))
            raise ValueError(
                f"the added tokens have the ids {ids}; they must follow the {pieces:,} "
                "pieces and sentinels without a gap"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # Leave the cached processor out of pickles.
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self), tuple(values)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            proto = _add_sentinels(self.model_proto, self.extra_ids)
            processor.LoadFromSerializedProto(proto)
        except Exception as error:  # sentencepiece and protobuf raise several kinds
            raise ValueError(
                f"not a SentencePiece model ({len(self.model_proto):,} bytes); give a "
                "whole `.model` file"
            ) from error
        return processor

    @functools.cached_property
    def _ids_after_pieces(self) -> list[int]:
        pieces = self._processor.GetPieceSize()
        return sorted({token.id for token in self.added_tokens if token.id >= pieces})

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every text."""
        return EOS_ID

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids before every text, such as BOS."""
        return ()

    @property
    def size(self) -> int:
        """Number of ids in use, including sentinels and added tokens."""
        return self._processor.GetPieceSize() + len(self._ids_after_pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that are equal for equal vocabularies."""
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
        """Returns the id of a piece or sentinel, or None."""
        number = self._processor.PieceToId(piece)
        return number if self._processor.IdToPiece(number) == piece else None

    def spell(self, tokens: Sequence[int]) -> tuple[str, float]:
        """Returns the pieces of token ids as one string, and the sum of their scores.

        Two segmentations with the same string and sum are equally good.
        """
        num_pieces = self._processor.GetPieceSize()
        added = {token.id: token.content for token in self.added_tokens}
        spelled = [
            self._processor.IdToPiece(t) if t < num_pieces else added.get(t, f"<{t}>")
            for t in tokens
        ]
        scores = [self._processor.GetScore(t) for t in tokens if t < num_pieces]
        return "".join(spelled), sum(scores)

    def encode(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[list[int]]:
        """Returns the ids of formatted texts, between `opening` and `eos_id`.

        Args:
            texts: Formatted texts, see `text_formats`.
            max_length: Tokens to keep of each text, `opening` and the final `eos_id`
                included; must leave room for a token. None keeps all.
        """
        around = len(self.opening) + 1
        if max_length is not None and max_length <= around:
            raise ValueError(
                f"max_length={max_length}: must be at least {around + 1}, a token and "
                "the end" + (" and the beginning" if around > 1 else "")
            )
        keep = None if max_length is None else max_length - around
        encoded = self._encode_pieces(list(texts))
        return [[*self.opening, *tokens[:keep], self.eos_id] for tokens in encoded]

    def _encode_pieces(self, texts: list[str]) -> list[list[int]]:
        """Returns the ids of the texts alone."""
        # A call has few texts: starting threads would cost more than they save.
        if not self.added_tokens:
            return self._processor.EncodeAsIds(texts, num_threads=1)
        return [self._encode_around_added(text) for text in texts]

    def _encode_around_added(self, text: str) -> list[int]:
        """Cuts added tokens out of the raw text, then out of the normalized rest."""
        raw, normalized = self._added_patterns
        ids: list[int] = []
        for part in _cut(text, raw):
            parts: Iterable[str | AddedToken] = [part]
            if isinstance(part, str):
                parts = _cut(self._normalize(part) if normalized else part, normalized)
            for inner in parts:
                is_added = isinstance(inner, AddedToken)
                ids += [inner.id] if is_added else self._processor.EncodeAsIds(inner)
        return ids

    def _normalize(self, text: str) -> str:
        return self._processor.Normalize(text).replace(_SPACE, " ")

    @functools.cached_property
    def _added_patterns(self) -> tuple[dict[str, AddedToken], dict[str, AddedToken]]:
        """Returns the tokens to match in raw and in normalized text, longest first."""
        raw: dict[str, AddedToken] = {}
        normalized: dict[str, AddedToken] = {}
        for token in self.added_tokens:
            if not token.normalized:
                raw[token.content] = token
            elif content := self._normalize(token.content).strip():
                normalized[content] = token
        raw, normalized = (
            {content: tokens[content] for content in sorted(tokens, key=len)[::-1]}
            for tokens in (raw, normalized)
        )
        return raw, normalized

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids, without padding and `eos_id`."""
        contents = {token.id: token.content for token in self.added_tokens}
        parts: list[str] = []
        pieces: list[int] = []
        for token in map(int, tokens):
            if token in (PAD_ID, EOS_ID):
                continue
            if token in contents:
                parts += [self._processor.DecodeIds(pieces), contents[token]]
                pieces = []
            else:
                pieces.append(token)
        parts.append(self._processor.DecodeIds(pieces))
        return " ".join(filter(None, parts))


def _cut(text: str, tokens: dict[str, AddedToken]) -> Iterator[str | AddedToken]:
    """Yields the added tokens of a text and the text between them, in order."""
    begin = 0
    matches = re.finditer("|".join(map(re.escape, tokens)), text) if tokens else ()
    for match in matches:
        token = tokens[match[0]]
        start, end = match.span()
        neighbours = text[max(start - 1, 0) : start] + text[end : end + 1]
        if token.single_word and re.search(r"\w", neighbours):
            continue
        yield text[begin:start]
        yield token
        begin = end
    yield text[begin:]


def build(
    content: bytes,
    extra_ids: int = 0,
    added_tokens: tuple[AddedToken, ...] = (),
    path: str = "",
    tokenizer_config: bytes = b"",
) -> Vocabulary:
    """Returns the vocabulary of a file's bytes; JSON is recognized by its first byte.

    Raises ValueError if the bytes are not those of a supported vocabulary.
    """
    # The kinds of vocabularies import this module.
    from gecko_jax.text import json_vocabularies

    kind = json_vocabularies.JsonVocabulary if content[:1] == b"{" else Vocabulary
    return kind(content, extra_ids, added_tokens, path, tokenizer_config)


def load(path: str | os.PathLike, extra_ids: int = 0) -> Vocabulary:
    """Reads a `.model` file or a `tokenizer.json`, or the one in a folder.

    A `tokenizer_config.json` next to a `tokenizer.json` is read, too. A tokenizer that
    does not end texts gets an EOS (`json_vocabularies.with_end`). Raises ValueError if
    the file is missing or is no supported vocabulary.
    """
    from gecko_jax.text import json_vocabularies

    file = pathlib.Path(path)
    if file.is_dir():
        names = [name for name in (MODEL_FILE, JSON_FILE) if (file / name).is_file()]
        file = file / (names or [JSON_FILE])[0]
    config = b""
    try:
        content = file.read_bytes()
        if content[:1] == b"{" and (file.parent / JSON_CONFIG).is_file():
            config = (file.parent / JSON_CONFIG).read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{file}: no such vocabulary; train one with `gecko data vocabulary` or "
            "give the path of a SentencePiece `.model` file or of a tokenizer.json"
        ) from None
    try:
        if content[:1] == b"{":
            content = json_vocabularies.with_end(content)
        return build(content, extra_ids, (), os.fspath(file), config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def parse_proto(model_proto: bytes) -> Any:
    """Returns the fields of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf creates at import.
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
