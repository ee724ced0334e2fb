"""The decoder's tokens: byte-level BPE (SmolLM2, Llama 3) or SentencePiece (Gemma 3).

    tokenizer = from_gguf(file.setting, place)
    tokenizer.encode("Query: how to list files")     no token is added at the end
    tokenizer.decode([5325, 28, 638])

Prompts hold passages, which are text of strangers: what looks like a control token in
them (`<|im_end|>`) is read as the characters it is written with. A generated control
token ends the text.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gecko_jax import files

# The token type of llama.cpp that text must not reach.
_CONTROL = 3

# How a pre-tokenizer of llama.cpp cuts text before BPE merges bytes.
_CUTS_DIGITS = {"smollm": True, "gpt-2": False}

# SentencePiece writes a space so.
_META = "\N{LOWER ONE EIGHTH BLOCK}"


class _Tokenizers:
    """A tokenizer of the `tokenizers` package."""

    def __init__(self, tokenizer: Any):
        tokenizer.encode_special_tokens = True  # as plain text
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)


class _SentencePiece:
    """A SentencePiece model, loaded at first use."""

    def __init__(self, model_proto: bytes):
        self._model_proto = model_proto

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self._model_proto)
        return processor

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, tokens: list[int]) -> str:
        return self._processor.DecodeIds(tokens)


class Tokenizer:
    """Text to ids and back.

    Attributes:
        begin_id: Put before every prompt; None where the model was trained without.
        end_ids: Control tokens: each ends a generated text.
    """

    def __init__(
        self,
        backend: _Tokenizers | _SentencePiece,
        begin_id: int | None,
        end_ids: frozenset[int],
    ):
        self._backend = backend
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
    model = setting("tokenizer.ggml.model")
    pieces = setting("tokenizer.ggml.tokens")
    kinds = setting("tokenizer.ggml.token_type")
    if model == "gpt2":
        cut = setting("tokenizer.ggml.pre", "gpt-2")
        if cut not in _CUTS_DIGITS:
            raise ValueError(
                f"{place}: a tokenizer of the kind {cut!r}; from GGUF the in-process "
                f"decoder knows {' and '.join(_CUTS_DIGITS)}: give the model as a "
                "folder with tokenizer.json and *.safetensors"
            )
        backend = _byte_level_bpe(
            pieces, setting("tokenizer.ggml.merges"), _CUTS_DIGITS[cut]
        )
    elif model == "llama":
        backend = _SentencePiece(
            _sentencepiece_proto(
                pieces,
                setting("tokenizer.ggml.scores"),
                kinds,
                space_prefix=setting("tokenizer.ggml.add_space_prefix", True),
            )
        )
    else:
        raise ValueError(
            f"{place}: a tokenizer of the model {model!r}; the in-process decoder "
            "knows gpt2 and llama: choose another model"
        )
    add_begin = setting("tokenizer.ggml.add_bos_token", model == "llama")
    begin = setting("tokenizer.ggml.bos_token_id", None) if add_begin else None
    ends = {number for number, kind in enumerate(kinds) if kind == _CONTROL}
    end = setting("tokenizer.ggml.eos_token_id", None)
    return Tokenizer(backend, begin, frozenset(ends | ({end} - {None})))


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
    try:
        settings = files.parse_json(path.read_text(encoding="utf-8"))
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error}); copy it again") from error
    ends = {token["id"] for token in settings["added_tokens"] if token["special"]}
    # What the tokenizer itself puts before an empty text.
    added = tokenizer.encode("").ids
    begin = added[0] if added and added[0] in ends else None
    return Tokenizer(_Tokenizers(tokenizer), begin, frozenset(ends))


def _byte_level_bpe(
    pieces: Sequence[str], merges: Sequence[str], cuts_digits: bool
) -> _Tokenizers:
    tokenizers = _import_tokenizers()
    model = tokenizers.models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[tuple(merge.split(" ", 1)) for merge in merges],
    )
    tokenizer = tokenizers.Tokenizer(model)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level]
        if cuts_digits
        else [byte_level]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _Tokenizers(tokenizer)


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
