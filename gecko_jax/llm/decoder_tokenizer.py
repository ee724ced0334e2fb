"""The decoder's tokens: byte-level BPE (SmolLM2, Llama 3) or SentencePiece (Gemma 3).

    tokenizer = from_gguf(file.setting, place)
    tokenizer.encode("Query: how to list files")     no token is added at the end
    tokenizer.decode([5325, 28, 638])

Prompts hold passages, which are text of strangers: what looks like a control token in
them (`<|im_end|>`) is read as the characters it is written with. A generated control
token ends the text.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gecko_jax.io import field_rules, reading, wording

# The token type of llama.cpp that text must not reach.
_CONTROL = 3

# How a pre-tokenizer of llama.cpp cuts text before BPE merges bytes.
_CUTS_DIGITS = {"smollm": True, "gpt-2": False}

# SentencePiece writes a space so.
_META = "\N{LOWER ONE EIGHTH BLOCK}"


_REMEDY = "copy it again, or choose another model"
_HEADER = {
    "model": field_rules.NAME,
    "pre": field_rules.optional(field_rules.NAME),
    "tokens": field_rules.list_of(field_rules.TEXT, 1),
    "token_type": field_rules.list_of(field_rules.integer(0, 6), 1),
    "merges": field_rules.optional(field_rules.list_of(field_rules.TEXT)),
    "scores": field_rules.optional(field_rules.list_of(field_rules.number())),
    "add_space_prefix": field_rules.optional(field_rules.FLAG),
    "add_bos_token": field_rules.optional(field_rules.FLAG),
    "bos_token_id": field_rules.optional(field_rules.COUNT),
    "eos_token_id": field_rules.optional(field_rules.COUNT),
}
_TOKEN = field_rules.object_of(
    {"id": field_rules.COUNT, "content": field_rules.TEXT, "special": field_rules.FLAG}
)


@contextlib.contextmanager
def _named(place: object) -> Iterator[None]:
    """Names the file in whatever a tokenizer's own library raises.

    `tokenizers` raises bare exceptions, and panics of its Rust that no `except
    Exception` sees; `sentencepiece` raises RuntimeError.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        told = wording.printable(str(error))
        raise ValueError(f"{place}: not a tokenizer ({told}); {_REMEDY}") from error


class _Tokenizers:
    """A tokenizer of the `tokenizers` package."""

    def __init__(self, tokenizer: Any, place: object):
        tokenizer.encode_special_tokens = True  # as plain text
        self._tokenizer = tokenizer
        self._place = place

    def encode(self, text: str) -> list[int]:
        with _named(self._place):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        with _named(self._place):
            return self._tokenizer.decode(tokens, skip_special_tokens=False)


class _SentencePiece:
    """A SentencePiece model."""

    def __init__(self, model_proto: bytes):
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model_proto)

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, tokens: list[int]) -> str:
        return self._processor.DecodeIds(tokens)


class Tokenizer:
    """Text to ids and back.

    Attributes:
        begin_id: Put before every prompt; None where the model was trained without.
        end_ids: Control tokens: each ends a generated text.
        num_ids: Ids are below this number.
    """

    def __init__(
        self,
        backend: _Tokenizers | _SentencePiece,
        begin_id: int | None,
        end_ids: frozenset[int],
        num_ids: int,
    ):
        self._backend = backend
        self.num_ids = num_ids
        self.begin_id = begin_id
        self.end_ids = end_ids

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: Plain text.
            begin: It is the start of a prompt, which may need `begin_id`.

        Raises:
            ValueError: The text holds half a surrogate pair, so is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"not Unicode ({error.reason} at character {error.start}); clean the "
                "text"
            ) from error
        ids = self._backend.encode(text)
        return [self.begin_id, *ids] if begin and self.begin_id is not None else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text before the first control token."""
        kept = []
        for token in map(int, tokens):
            if token in self.end_ids:
                break
            kept.append(token)
        return self._backend.decode(kept)


def from_gguf(setting: Callable[..., Any], place: str) -> Tokenizer:
    """Builds the tokenizer that a GGUF header describes.

    Args:
        setting: Reads a value of the header, see `gguf.Gguf.setting`.
        place: The file, for errors.

    Raises:
        ValueError: It is of a kind that is not known here.
    """
    header = {name: setting(f"tokenizer.ggml.{name}", None) for name in _HEADER}
    field_rules.check(place, header, _HEADER, _REMEDY)
    model, pieces, kinds = header["model"], header["tokens"], header["token_type"]
    begin, end = header["bos_token_id"], header["eos_token_id"]
    if len(kinds) != len(pieces) or max(begin or 0, end or 0) >= len(pieces):
        raise ValueError(
            f"{place}: {len(pieces):,} tokens, {len(kinds):,} types, and the ids "
            f"{begin} and {end} of the first and the last; {_REMEDY}"
        )
    if model == "gpt2":
        cut = header["pre"] or "gpt-2"
        if cut not in _CUTS_DIGITS:
            raise ValueError(
                f"{place}: a tokenizer of the kind {cut!r}; from GGUF the in-process "
                f"decoder knows {' and '.join(_CUTS_DIGITS)}: give the model as a "
                "folder with tokenizer.json and *.safetensors"
            )
        backend = _byte_level_bpe(
            place, pieces, header["merges"] or [], _CUTS_DIGITS[cut]
        )
    elif model == "llama":
        has_prefix = header["add_space_prefix"]
        with _named(place):
            backend = _SentencePiece(
                _sentencepiece_proto(
                    pieces,
                    header["scores"] or [],
                    kinds,
                    space_prefix=True if has_prefix is None else has_prefix,
                )
            )
    else:
        raise ValueError(
            f"{place}: a tokenizer of the model {model!r}; the in-process decoder "
            "knows gpt2 and llama: choose another model"
        )
    add_begin = header["add_bos_token"]
    add_begin = model == "llama" if add_begin is None else add_begin
    ends = {number for number, kind in enumerate(kinds) if kind == _CONTROL}
    ends |= set() if end is None else {end}
    first = begin if add_begin else None
    return Tokenizer(backend, first, frozenset(ends), len(pieces))


def from_folder(folder: pathlib.Path) -> Tokenizer:
    """Builds the tokenizer of a Hugging Face folder from its `tokenizer.json`.

    Raises:
        ImportError: The `tokenizers` package is missing.
        ValueError: The file is missing or damaged.
    """
    path = folder / "tokenizer.json"
    tokenizers = _import_tokenizers()
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; copy it from where the model came, or give a .gguf "
            "file, which holds its tokenizer"
        )
    with _named(path):
        settings = reading.parse_json(path.read_text(encoding="utf-8"))
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # What the tokenizer itself puts before an empty text.
        added = tokenizer.encode("").ids
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    kinds = {"added_tokens": field_rules.list_of(_TOKEN)}
    field_rules.check(path, settings, kinds, _REMEDY)
    if not vocabulary or len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{path}: no vocabulary, or an id of two tokens; {_REMEDY}")
    ends = {token["id"] for token in settings["added_tokens"] if token["special"]}
    begin = added[0] if added and added[0] in ends else None
    num_ids = max(*vocabulary.values(), *ends, 0) + 1
    return Tokenizer(_Tokenizers(tokenizer, path), begin, frozenset(ends), num_ids)


def _byte_level_bpe(
    place: str, pieces: Sequence[str], merges: Sequence[str], cuts_digits: bool
) -> _Tokenizers:
    tokenizers = _import_tokenizers()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if len(vocabulary) < len(pieces) or any(len(pair) < 2 for pair in pairs):
        raise ValueError(
            f"{place}: two tokens are the same, or a merge is none; {_REMEDY}"
        )
    with _named(place):
        model = tokenizers.models.BPE(vocab=vocabulary, merges=pairs)
    tokenizer = tokenizers.Tokenizer(model)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level]
        if cuts_digits
        else [byte_level]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _Tokenizers(tokenizer, place)


def _sentencepiece_proto(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    space_prefix: bool,
) -> bytes:
    """Rebuilds the SentencePiece model that a GGUF header was made from."""
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf makes at import.
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    types = proto.SentencePiece
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = space_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        if piece == "<unk>":
            # Written as a control token, but SentencePiece insists.
            kind = types.UNKNOWN
        elif kind == types.USER_DEFINED:
            # Written as it reads; SentencePiece compares with escaped text.
            piece = piece.replace(" ", _META)
        proto.pieces.add(piece=piece, score=score, type=kind)
    return proto.SerializeToString()


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "the in-process decoder needs the tokenizers package: "
            'pip install "gecko-jax[llm-local]"'
        ) from error
    return tokenizers
