"""A vocabulary as the `tokenizer.json` that Hugging Face opens.

What follows is about SentencePiece models; a `tokenizer.json` is written unchanged.

The ids equal those of `text.vocabularies` on the texts of `text.text_formats`. NFC and
single spaces, which `text_formats.clean` does here, are part of the normalizer there.
This converter avoids two errors of the usual converters:

- The `Precompiled` normalizer looks up whole grapheme clusters by their first
  character, which drops accents ("½" with an accent). A control character before each
  mark separates the clusters; the normalizer removes it again.
- Every piece of a `Unigram` model can match, `</s>` and byte pieces included; in
  SentencePiece, "</s>" in a text is four characters. So "<" becomes a space inside the
  model, which is in no normalized text and no reserved piece.

The remaining differences concern one text in ten thousand or fewer: a compatibility
letter (fullwidth, mathematical) right before an accent that Unicode composes it with is
not composed; of two segmentations with equal scores, float32 in SentencePiece and
float64 there may choose different ones; accents newer than the Unicode version of the
`tokenizers` library keep their order; and a sentinel that a text writes with
SentencePiece's mark of a space (`▁<extra_id_0>`) loses the space before it.
"""

import base64
import json
import pathlib
import re
import sys
from typing import Any

from gecko_jax.text import json_vocabularies, vocabularies

# `str.isspace` is true for more characters than \s of a regex.
_WHITESPACE = "".join(
    re.escape(chr(code)) for code in range(sys.maxunicode + 1) if chr(code).isspace()
)

# Characters that belong to the cluster before them.
_JOINING = r"[\p{M}\x{200c}\x{200d}\x{0e33}\x{0eb3}\x{ff9e}\x{ff9f}]"
_SEPARATOR = "\x01"

_SPACE = "▁"  # SentencePiece's mark of a space.

# Files that `write_tokenizer` writes.
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "spiece.model",
)


def write_tokenizer(
    folder: pathlib.Path, vocab: vocabularies.Vocabulary, max_length: int
) -> None:
    """Writes `FILES`, which cut texts to `max_length` tokens, EOS included.

    A `tokenizer.json` is written as it was read, with its `tokenizer_config.json`.
    """
    if isinstance(vocab, json_vocabularies.JsonVocabulary):
        eos = vocab.decode([vocab.eos_id, vocab.eos_id])
        default = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "pad_token": eos,  # Any token does: a mask marks the padding.
            "model_max_length": max_length,
        }
        config = vocab.tokenizer_config or json.dumps(default).encode()
        (folder / vocabularies.JSON_FILE).write_bytes(vocab.model_proto)
        (folder / vocabularies.JSON_CONFIG).write_bytes(config)
        return
    tokenizer = build_tokenizer(vocab)
    reserved = [token for token in tokenizer["added_tokens"] if token["special"]]
    special = {
        f"{name}_token": token["content"]
        for name, token in zip(("pad", "eos", "unk"), reserved, strict=True)
    }
    cuts_reserved = {t.id for t in vocab.added_tokens} & {t["id"] for t in reserved}
    config = {
        # The T5 classes would build another normalizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # "</s>" in a text is text, unless the imported tokenizer cut it out.
        "split_special_tokens": not cuts_reserved,
    }
    for name, values in zip(FILES, (tokenizer, config, special), strict=False):
        content = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(content, encoding="utf-8")
    (folder / "spiece.model").write_bytes(vocab.model_proto)


def build_tokenizer(vocab: vocabularies.Vocabulary) -> dict[str, Any]:
    """Returns the contents of `tokenizer.json`.

    Raises ValueError if the vocabulary is not a unigram model.
    """
    proto = vocabularies.parse_proto(vocab.full_proto)
    spec = proto.trainer_spec
    if spec.model_type != spec.UNIGRAM or spec.treat_whitespace_as_suffix:
        raise ValueError(
            "the vocabulary is not a unigram model that marks the space before a word, "
            "as T5's is, and Hugging Face's format supports no other; export with "
            "--to=t5x, or train on another vocabulary"
        )
    reserved = {
        index: _added_token(index, proto.pieces[index].piece, special=True)
        for index in (vocab.pad_id, vocab.eos_id, spec.unk_id)
    }
    added = [
        _added_token(token.id, token.content, single_word=token.single_word)
        for token in vocab.added_tokens
        if token.id not in reserved
    ]
    eos = proto.pieces[vocab.eos_id].piece
    close = {"SpecialToken": {"id": eos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    decoders = [
        _replace(" ", "<"),
        *([{"type": "ByteFallback"}] if spec.byte_fallback else []),
        _replace(_SPACE, " "),
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    tokens = sorted([*reserved.values(), *added], key=lambda token: token["id"])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
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
                eos: {"id": eos, "ids": [vocab.eos_id], "tokens": [eos]}
            },
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "Unigram",
            "unk_id": spec.unk_id,
            "vocab": _scored_pieces(proto, vocab),
            "byte_fallback": spec.byte_fallback,
        },
    }


def _added_token(
    token_id: int, content: str, *, special: bool = False, single_word: bool = False
) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": single_word,
        "lstrip": False,
        "rstrip": False,
        # The normalizer is that of the model, so tokens are found in the raw text.
        "normalized": False,
        "special": special,
    }


def _scored_pieces(
    proto: Any, vocab: vocabularies.Vocabulary
) -> list[tuple[str, float]]:
    """Returns the pieces and scores of the `Unigram` model.

    Reserved pieces keep their "<", which no text has there. A piece that is an added
    token gets the token's name, by which the library finds its id.
    """
    types = proto.SentencePiece
    matchable = (types.NORMAL, types.USER_DEFINED, types.UNUSED)
    added = {token.id: token.content for token in vocab.added_tokens}
    scored = []
    for number, piece in enumerate(proto.pieces):
        own = piece.piece.replace("<", " ") if piece.type in matchable else piece.piece
        scored.append((added.get(number, own), piece.score))
    return scored


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [
        {"type": "NFC"},
        _replace(f"[{_WHITESPACE}]+", " ", "Regex"),
    ]
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode("ascii")
        steps += [
            _replace(f"(?={_JOINING})", _SEPARATOR, "Regex"),
            {"type": "Precompiled", "precompiled_charsmap": charsmap},
            _replace(_SEPARATOR, ""),
        ]
    if spec.remove_extra_whitespaces:
        steps += [_replace("^ +", "", "Regex"), _replace(" {2,}", " ", "Regex")]
    steps.append(_replace(" ", _SPACE))
    if spec.remove_extra_whitespaces:
        # As in SentencePiece, a trailing mark that the text itself contains goes, too.
        steps.append(_replace(f"{_SPACE}+$", "", "Regex"))
    steps.append(_replace("<", " "))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    return steps


def _replace(old: str, new: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}
