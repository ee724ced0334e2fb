"""Tokenizers of decoders: byte-level BPE (SmolLM2, Qwen), SentencePiece (Gemma 3).

    tokenizer = from_gguf(file.setting, place)
    tokenizer.encode("Query: how to list files")     appends no token
    tokenizer.decode([5325, 28, 638])

Prompts hold untrusted passages, so what looks like a control token (`<|im_end|>`) is
encoded as plain characters. A generated control token ends the text.
"""

import contextlib
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from gecko_jax.io import field_rules, reading
from gecko_jax.text import json_vocabularies

# Words of the Qwen 2 and 3 tokenizers; from their tokenizer.json.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of the supported pre-tokenizers.
_PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2")

_NEEDS = ("the in-process decoder", "llm-local")
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


def _named(place: object) -> contextlib.AbstractContextManager[None]:
    return json_vocabularies.named_errors(place, _REMEDY)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer."""

    place: object  # the file, for errors
    encode_text: Callable[[str], list[int]]  # encodes text without special tokens
    decode_ids: Callable[[list[int]], str]  # decodes ids
    begin_id: int | None  # id before every prompt, or None if the model uses none
    end_ids: frozenset[int]  # control tokens, each of which ends a generated text
    num_ids: int  # number of ids

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """Returns the ids of a plain text; `begin` puts `begin_id` first.

        Raises ValueError for a lone surrogate, which is not Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"not Unicode ({error.reason} at character {error.start}); clean the "
                "text"
            ) from error
        with _named(self.place):
            ids = self.encode_text(text)
        return [self.begin_id, *ids] if begin and self.begin_id is not None else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text before the first control token."""
        ids = itertools.takewhile(lambda n: n not in self.end_ids, map(int, tokens))
        with _named(self.place):
            return self.decode_ids(list(ids))


def from_gguf(setting: Callable[..., Any], place: str) -> Tokenizer:
    """Builds the tokenizer that a GGUF header describes; see `gguf.Gguf.setting`."""
    header = {name: setting(f"tokenizer.ggml.{name}", None) for name in _HEADER}
    field_rules.check(place, header, _HEADER, _REMEDY)
    model, pieces, kinds = header["model"], header["tokens"], header["token_type"]
    begin, end = header["bos_token_id"], header["eos_token_id"]
    if len(kinds) != len(pieces) or max(begin or 0, end or 0) >= len(pieces):
        raise ValueError(
            f"{place}: {len(pieces):,} tokens, {len(kinds):,} types, first and last id "
            f"{begin} and {end}, which do not match; {_REMEDY}"
        )
    if model == "gpt2":
        functions = _byte_level_bpe(place, header)
    elif model == "llama":
        with _named(place):
            functions = _sentencepiece(header)
    else:
        raise ValueError(
            f"{place}: a tokenizer of the model {model!r}; the in-process decoder "
            "supports gpt2 and llama: choose another model"
        )
    adds_begin = header["add_bos_token"]
    if adds_begin is None:
        adds_begin = model == "llama"
    # llama.cpp's token type of control tokens is 3.
    ends = {number for number, kind in enumerate(kinds) if kind == 3}
    ends |= set() if end is None else {end}
    return Tokenizer(
        place, *functions, begin if adds_begin else None, frozenset(ends), len(pieces)
    )


def from_folder(folder: pathlib.Path) -> Tokenizer:
    """Builds the tokenizer in the `tokenizer.json` of a Hugging Face folder."""
    path = folder / "tokenizer.json"
    tokenizers = json_vocabularies.import_tokenizers(*_NEEDS)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; copy it from where the model came, or give a .gguf "
            "file, which holds its tokenizer"
        )
    with _named(path):
        settings = reading.parse_json(path.read_text(encoding="utf-8"))
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        added = tokenizer.encode("").ids  # The special tokens around any text.
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    kinds = {"added_tokens": field_rules.list_of(_TOKEN)}
    field_rules.check(path, settings, kinds, _REMEDY)
    if not vocabulary or len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(f"{path}: no vocabulary, or two tokens share an id; {_REMEDY}")
    ends = {token["id"] for token in settings["added_tokens"] if token["special"]}
    begin = added[0] if added and added[0] in ends else None
    num_ids = max(*vocabulary.values(), *ends, 0) + 1
    return Tokenizer(path, *_functions(tokenizer), begin, frozenset(ends), num_ids)


_Functions = tuple[Callable[[str], list[int]], Callable[[list[int]], str]]


def _functions(tokenizer: Any) -> _Functions:
    """Returns the functions of a tokenizer of the `tokenizers` package."""
    tokenizer.encode_special_tokens = True  # As plain text.
    return (
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
    )


def _byte_level_bpe(place: str, header: dict[str, Any]) -> _Functions:
    tokenizers = json_vocabularies.import_tokenizers(*_NEEDS)
    pieces, kind = header["tokens"], header["pre"] or "gpt-2"
    if kind not in _PRE_TOKENIZERS:
        raise ValueError(
            f"{place}: a tokenizer of the kind {kind!r}; from GGUF the in-process "
            f"decoder supports {', '.join(_PRE_TOKENIZERS)}: give the model as a "
            "folder with tokenizer.json and *.safetensors"
        )
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ", 1)) for merge in header["merges"] or []]
    if len(vocabulary) < len(pieces) or any(len(merge) < 2 for merge in merges):
        raise ValueError(f"{place}: two equal tokens, or a malformed merge; {_REMEDY}")
    with _named(place):
        model = tokenizers.models.BPE(vocab=vocabulary, merges=merges)
    tokenizer = tokenizers.Tokenizer(model)
    cuts = tokenizers.pre_tokenizers
    steps = [cuts.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")]
    if kind == "smollm":
        steps.insert(0, cuts.Digits(individual_digits=True))
    elif kind == "qwen2":
        steps.insert(0, cuts.Split(tokenizers.Regex(_QWEN_WORDS), "isolated"))
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = cuts.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _functions(tokenizer)


def _sentencepiece(header: dict[str, Any]) -> _Functions:
    """Rebuilds the SentencePiece model that a GGUF header was made from."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf creates at import.
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    types = proto.SentencePiece
    proto.trainer_spec.model_type = 2  # BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = header["add_space_prefix"] is not False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    columns = (header["tokens"], header["scores"] or [], header["token_type"])
    for piece, score, kind in zip(*columns, strict=True):
        if piece == "<unk>":
            kind = types.UNKNOWN  # A control token in GGUF.
        elif kind == types.USER_DEFINED:
            # SentencePiece compares these pieces with escaped text.
            piece = piece.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
        proto.pieces.add(piece=piece, score=score, type=kind)
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto.SerializeToString())
    return processor.EncodeAsIds, processor.DecodeIds
