"""A SentencePiece vocabulary as the `tokenizer.json` that Hugging Face opens.

The ids are those of `text.vocabularies` on the texts of `text.text_formats`, cleaning
included: NFC and single spaces are part of the tokenizer's normalizer, because nobody
calls `text_formats.clean` there. Where the common converters differ from
SentencePiece, this one does not:

- The `Precompiled` normalizer looks up whole grapheme clusters by their first
  character, which drops accents ("½" with an accent). A control character before each
  mark keeps clusters apart; the normalizer itself removes it again.
- Every piece of a `Unigram` model can match, `</s>` and byte pieces too; in
  SentencePiece a text that says "</s>" is four characters. So "<" is written as a space
  inside the model, which no normalized text and no reserved piece holds.

What is left, in a text in ten thousand or fewer: a compatibility letter (fullwidth,
mathematical) right before an accent that Unicode composes it with is not composed; of
two segmentations with equal scores, float32 in SentencePiece and float64 there may
choose differently; accents younger than the Unicode of the `tokenizers` library keep
the order they came in; and a sentinel that a text spells with SentencePiece's own mark
of a space (`▁<extra_id_0>`) loses the space before it.
"""

import base64
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from gecko_jax.text import vocabularies

# What `str.split` takes for whitespace, which is more than a regex's \s.
_WHITESPACE = "".join(
    re.escape(chr(code)) for code in range(sys.maxunicode + 1) if chr(code).isspace()
)

# Characters that join the cluster before them.
_JOINING = r"[\p{M}\x{200c}\x{200d}\x{0e33}\x{0eb3}\x{ff9e}\x{ff9f}]"
_SEPARATOR = "\x01"

_SPACE = "▁"  # SentencePiece's mark of a space.

# Types of pieces in a SentencePiece model, and its type of model.
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5
_UNIGRAM = 1


# What `write_tokenizer` writes.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
)


def write_tokenizer(
    folder: pathlib.Path, vocab: vocabularies.Vocabulary, max_length: int
) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `spiece.model`.

    Args:
        folder: Where to.
        vocab: The vocabulary.
        max_length: Tokens a text is cut to, EOS included.

    Raises:
        ValueError: The vocabulary is no unigram model.
    """
    tokenizer = build_tokenizer(vocab)
    _write_json(folder / "tokenizer.json", tokenizer)
    reserved = [token for token in tokenizer["added_tokens"] if token["special"]]
    special = {
        f"{name}_token": token["content"]
        for name, token in zip(("pad", "eos", "unk"), reserved, strict=True)
    }
    cuts_reserved = {t.id for t in vocab.added_tokens} & {t["id"] for t in reserved}
    _write_json(
        folder / "tokenizer_config.json",
        {
            # The classes made for T5 would build a normalizer of their own.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special,
            "model_max_length": max_length,
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            # "</s>" in a text is text, but where the model came with another habit.
            "split_special_tokens": not cuts_reserved,
        },
    )
    _write_json(folder / "special_tokens_map.json", special)
    (folder / "spiece.model").write_bytes(vocab.model_proto)


def build_tokenizer(vocab: vocabularies.Vocabulary) -> dict[str, Any]:
    """Returns the contents of `tokenizer.json`.

    Raises:
        ValueError: The vocabulary is no unigram model.
    """
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf makes at import.
    model_class: Any = vars(sentencepiece_model_pb2)["ModelProto"]
    proto = model_class.FromString(vocab.full_proto)
    spec = proto.trainer_spec
    if spec.model_type != _UNIGRAM or spec.treat_whitespace_as_suffix:
        raise ValueError(
            "the vocabulary is not a unigram model that marks the space before a word, "
            "as those of all T5 encoders: a tokenizer for Hugging Face can be made of "
            "those only; export with --to=t5x, or train on another vocabulary"
        )
    reserved = [
        {
            "id": index,
            "content": proto.pieces[index].piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index in (vocab.pad_id, vocab.eos_id, spec.unk_id)
    ]
    reserved_ids = {token["id"] for token in reserved}
    added = [
        # Looked for in the raw text alone: the normalizer below writes for the model.
        reserved[0]
        | {
            "id": token.id,
            "content": token.content,
            "single_word": token.single_word,
            "special": False,
        }
        for token in vocab.added_tokens
        if token.id not in reserved_ids
    ]
    eos = reserved[1]
    close = {"SpecialToken": {"id": eos["content"], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(reserved + added, key=lambda token: token["id"]),
        "normalizer": {
            "type": "Sequence",
            "normalizers": _normalizers(proto.normalizer_spec),
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, close],
            "pair": [first, close, second, close],
            "special_tokens": {
                eos["content"]: {
                    "id": eos["content"],
                    "ids": [eos["id"]],
                    "tokens": [eos["content"]],
                }
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(" ", "<"),
                *([{"type": "ByteFallback"}] if spec.byte_fallback else []),
                _replace(_SPACE, " "),
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": spec.unk_id,
            "vocab": _scored_pieces(proto.pieces, vocab.added_tokens),
            "byte_fallback": spec.byte_fallback,
        },
    }


def _scored_pieces(
    pieces: Any, added_tokens: Sequence[vocabularies.AddedToken]
) -> list[tuple[str, float]]:
    """Returns the vocabulary; reserved pieces keep the "<" that no text has there.

    A piece that is an added token has the token's name, by which the library finds its
    id.
    """
    matchable = (_NORMAL, _USER_DEFINED, _UNUSED)
    names = [
        p.piece.replace("<", " ") if p.type in matchable else p.piece for p in pieces
    ]
    for token in added_tokens:
        if token.id < len(names):
            names[token.id] = token.content
    return [(name, p.score) for name, p in zip(names, pieces, strict=True)]


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "NFC"},
        _replace_regex(f"[{_WHITESPACE}]+", " "),
    ]
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        steps += [
            _replace_regex(f"(?={_JOINING})", _SEPARATOR),
            {"type": "Precompiled", "precompiled_charsmap": charsmap},
            _replace(_SEPARATOR, ""),
        ]
    if spec.remove_extra_whitespaces:
        steps += [_replace_regex("^ +", ""), _replace_regex(" {2,}", " ")]
    steps.append(_replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        # As SentencePiece: a space that the text itself wrote as the mark goes too.
        steps.append(_replace_regex(f"{_SPACE}+$", ""))
    steps.append(_replace("<", " "))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return steps


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _replace_regex(pattern: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": new}


def _write_json(path: pathlib.Path, values: Any) -> None:
    path.write_text(
        json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
