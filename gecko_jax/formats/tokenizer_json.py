"""`tokenizer.json` files of Unigram tokenizers, rebuilt as SentencePiece models.

{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "..."},
 "pre_tokenizer": {"type": "Metaspace", ...},
 "model": {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0.0], ...]},
 "post_processor": {...}}
"""

import base64
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gecko_jax.formats import source_files
from gecko_jax.io import field_rules
from gecko_jax.text import json_vocabularies, vocabularies

SENTINEL = r"▁?<extra_id_(\d+)>"

# Remedy for tokenizers that SentencePiece cannot reproduce.
GIVE_VOCABULARY = "give its `.model` file with --vocabulary and --extra-ids"

_SCORE = field_rules.number()


def to_sentencepiece(
    values: Mapping[str, Any], path: pathlib.Path
) -> tuple[bytes, int]:
    """Rebuilds the SentencePiece model of a Unigram `tokenizer.json`.

    Returns the serialized model, and the number of sentinels after it.
    """
    model = values.get("model") or {}
    pieces = _read_pieces(model, path)
    extra_ids = 0
    while pieces and pieces[-1][0].removeprefix("▁") == f"<extra_id_{extra_ids}>":
        extra_ids += 1
        pieces.pop()
    proto = vocabularies.parse_proto(b"")
    types = proto.SentencePiece
    unk_id, byte_fallback = model.get("unk_id"), bool(model.get("byte_fallback"))
    for number, (piece, score) in enumerate(pieces):
        piece_type = types.NORMAL
        if number == unk_id:
            piece_type = types.UNKNOWN
        elif number in (vocabularies.PAD_ID, vocabularies.EOS_ID):
            piece_type = types.CONTROL
        elif byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            piece_type = types.BYTE
        elif re.fullmatch(SENTINEL, piece):
            piece_type = types.USER_DEFINED
        proto.pieces.add(piece=piece, score=score, type=piece_type)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.pad_id, trainer.eos_id = vocabularies.PAD_ID, vocabularies.EOS_ID
    trainer.unk_id, trainer.bos_id = -1 if unk_id is None else unk_id, -1
    trainer.byte_fallback = byte_fallback
    # SentencePiece looks the reserved pieces up by name.
    for name in ("pad", "eos", "unk"):
        number = getattr(trainer, f"{name}_id")
        if 0 <= number < len(pieces):
            setattr(trainer, f"{name}_piece", pieces[number][0])
    charsmap = _charsmap(values, path)
    proto.normalizer_spec.name = "identity" if charsmap is None else "nmt_nfkc"
    if charsmap is not None:
        proto.normalizer_spec.precompiled_charsmap = charsmap
    return proto.SerializeToString(), extra_ids


def _read_pieces(
    model: Mapping[str, Any], path: pathlib.Path
) -> list[tuple[str, float]]:
    vocab, model_type = model.get("vocab"), model.get("type", "Unigram")
    if not isinstance(vocab, list) or model_type != "Unigram":
        raise ValueError(
            f"{path}: a {model.get('type')} tokenizer; a T5 encoder needs Unigram "
            f"pieces, {GIVE_VOCABULARY}"
        )
    for entry in vocab:
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not (is_pair and isinstance(entry[0], str) and _SCORE.holds(entry[1])):
            raise source_files.damaged(
                path, f"model.vocab holds {str(entry)[:80]}, not a piece and its score"
            )
    return [(piece, float(score)) for piece, score in vocab]


def _charsmap(values: Mapping[str, Any], path: pathlib.Path) -> bytes | None:
    """Returns the table of the normalizer, None if it has none."""
    for step in json_vocabularies.flatten(values.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            try:
                return base64.b64decode(step["precompiled_charsmap"] or "")
            except ValueError:
                problem = "precompiled_charsmap is not base64"
                raise source_files.damaged(path, problem) from None
    return None


def check_steps(values: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuses the steps of a `tokenizer.json` that SentencePiece does not have."""
    for step in json_vocabularies.flatten(values.get("normalizer"), "normalizers"):
        if not _is_of_sentencepiece(step):
            raise ValueError(
                f"{path}: its normalizer has a step {_describe([step])}, which "
                f"SentencePiece does not have; {GIVE_VOCABULARY}"
            )
    if "model" not in values:
        return
    words = json_vocabularies.flatten(values.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in words]
    is_known = kinds in (["Metaspace"], ["WhitespaceSplit", "Metaspace"])
    if not is_known or not _marks_every_word(words[-1]):
        raise ValueError(
            f"{path}: its pre_tokenizer is {_describe(words)}, and not Metaspace, "
            "which marks the space before every word as SentencePiece does; "
            f"{GIVE_VOCABULARY}"
        )
    processor = values.get("post_processor") or {}
    tokens = [
        part["SpecialToken"]["id"] if "SpecialToken" in part else "text"
        for part in processor.get("single") or ()
    ]
    ids = [n for t in tokens[1:] for n in processor["special_tokens"][t]["ids"]]
    if tokens[:1] != ["text"] or ids != [vocabularies.EOS_ID]:
        raise ValueError(
            f"{path}: its post_processor writes {' '.join(tokens) or 'nothing'}; "
            f"Gecko's encoder reads a text closed by the token {vocabularies.EOS_ID}, "
            f"</s>; {GIVE_VOCABULARY}"
        )
    if (values.get("truncation") or {}).get("direction", "Right") != "Right":
        raise ValueError(
            f"{path}: truncation cuts at the left; Gecko cuts texts at their end"
        )


def _is_of_sentencepiece(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        is_run = step["pattern"] == {"Regex": " {2,}"}
        return is_run and step["content"] in (" ", "▁")
    return step["type"] in ("Precompiled", "Strip")


def _marks_every_word(step: Mapping[str, Any]) -> bool:
    return (
        step.get("replacement", "▁") == "▁"
        and step.get("prepend_scheme", "always") in ("always", "first")
        and step.get("add_prefix_space", True) is True
    )


def check_words(
    values: Mapping[str, Any],
    path: pathlib.Path,
    added: Iterable[vocabularies.AddedToken],
) -> None:
    """Refuses added tokens if spaces next to them would become tokens."""
    words = json_vocabularies.flatten(values.get("pre_tokenizer"), "pretokenizers")
    is_split = [step["type"] for step in words] == ["WhitespaceSplit", "Metaspace"]
    if words and (not is_split or words[-1].get("prepend_scheme") == "first"):
        contents = ", ".join(repr(token.content) for token in list(added)[:5])
        raise ValueError(
            f"{path}: has added tokens ({contents}) and the pre_tokenizer "
            f"{_describe(words)}, which keeps the spaces next to them; only "
            "WhitespaceSplit and Metaspace are supported with added tokens. Save the "
            f"tokenizer again with transformers 5, or {GIVE_VOCABULARY}"
        )


def check_same_pieces(
    values: Mapping[str, Any], path: pathlib.Path, proto: bytes, spiece: pathlib.Path
) -> None:
    """Refuses a `tokenizer.json` and a SentencePiece model that differ."""
    pieces = _read_pieces(values.get("model") or {}, path)
    model = vocabularies.parse_proto(proto)
    remedy = "the two files do not belong together, remove the wrong one"
    for number, (piece, (name, score)) in enumerate(
        zip(model.pieces, pieces, strict=False)
    ):
        if piece.piece != name or abs(piece.score - score) > 1e-3 * (1 + abs(score)):
            raise ValueError(
                f"{path}: piece {number} is {name!r} with score {score:g}, and "
                f"{piece.piece!r} with {piece.score:g} in {spiece.name}; {remedy}"
            )
    charsmap = _charsmap(values, path) or b""
    has_all = len(pieces) >= len(model.pieces)
    if not has_all or charsmap != model.normalizer_spec.precompiled_charsmap:
        raise ValueError(
            f"{path}: not the pieces and the normalizer of {spiece.name}; {remedy}"
        )


def _describe(steps: Sequence[Mapping[str, Any]]) -> str:
    """Names steps, with their settings where these matter."""
    described = []
    for step in steps:
        kind, settings = step["type"], {k: v for k, v in step.items() if k != "type"}
        is_short = settings and kind in ("Replace", "Metaspace", "Prepend", "Strip")
        described.append(f"{kind} {settings}" if is_short else kind)
    return " and ".join(described) or "none"
