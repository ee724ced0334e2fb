"""The vocabulary of a Hugging Face folder: `spiece.model`, or `tokenizer.json`.

`tokenizer.json` holds the same pieces and scores as the SentencePiece model it was made
from, and its normalizer's table, so the model is written again from it: one tokenizer
at run time, whatever a folder carries.
"""

import base64
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from gecko_jax import files, model_folder, vocabulary

_SPIECE = ("spiece.model", "sentencepiece.model", "tokenizer.model")
_TOKENIZER = "tokenizer.json"

# T5 rounds the rows of its table up to a multiple of this.
_ROUNDED_TO = 128


def read(folder: pathlib.Path) -> tuple[bytes, int]:
    """Returns (serialized SentencePiece model, number of sentinels after it).

    Raises:
        ValueError: There is none, or it is not a SentencePiece Unigram model.
    """
    for name in (model_folder.VOCABULARY, *_SPIECE):
        if (folder / name).is_file():
            proto = (folder / name).read_bytes()
            has_sentinels = b"<extra_id_0>" in proto  # mT5's and umT5's own pieces
            return proto, 0 if has_sentinels else _count_sentinels(folder)
    if (folder / _TOKENIZER).is_file():
        return from_tokenizer_json(folder / _TOKENIZER)
    raise ValueError(
        f"{folder}: no vocabulary here ({_SPIECE[0]} or {_TOKENIZER}); copy it, or "
        "name a SentencePiece file with --vocabulary and --extra-ids"
    )


def from_tokenizer_json(path: pathlib.Path) -> tuple[bytes, int]:
    """Writes the SentencePiece model that a Unigram `tokenizer.json` was made from."""
    values = _read_json(path)
    model = values.get("model") or {}
    if not isinstance(model.get("vocab"), list) or model.get("type", "Unigram") != (
        "Unigram"
    ):
        raise ValueError(
            f"{path}: a {model.get('type')} tokenizer; a T5 encoder needs Unigram "
            "pieces, give its `.model` file with --vocabulary and --extra-ids"
        )
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    extra_ids = 0
    while pieces and _is_sentinel(pieces[-1][0], extra_ids):
        extra_ids += 1
        pieces.pop()
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf makes at import.
    proto = vars(sentencepiece_model_pb2)["ModelProto"]()
    kinds = proto.SentencePiece
    special = {
        token["content"]
        for token in values.get("added_tokens") or ()
        if token["special"]
    }
    unk_id = model.get("unk_id")
    for number, (piece, score) in enumerate(pieces):
        kind = kinds.NORMAL
        if number == unk_id:
            kind = kinds.UNKNOWN
        elif number in (vocabulary.PAD_ID, vocabulary.EOS_ID):
            kind = kinds.CONTROL
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        elif piece in special:
            kind = kinds.USER_DEFINED
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.pad_id, trainer.eos_id = vocabulary.PAD_ID, vocabulary.EOS_ID
    trainer.unk_id, trainer.bos_id = -1 if unk_id is None else unk_id, -1
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    _set_pieces_named(trainer, pieces)
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    for step in _flatten(values.get("normalizer")):
        if step["type"] == "Precompiled":
            normalizer.name = "nmt_nfkc"
            normalizer.precompiled_charsmap = base64.b64decode(
                step["precompiled_charsmap"] or ""
            )
        # `Replace` and `Strip` do what SentencePiece does with every text.
        elif step["type"] not in ("Replace", "Strip"):
            raise ValueError(
                f"{path}: its normalizer has a step {step['type']}, which "
                "SentencePiece has not; give the `.model` file with --vocabulary and "
                "--extra-ids"
            )
    return proto.SerializeToString(), extra_ids


def check_size(
    proto: bytes, extra_ids: int, rows: int, *, source: str, is_given: bool
) -> None:
    """Compares a vocabulary with the rows of the embedding table.

    Args:
        proto: The SentencePiece model.
        extra_ids: Sentinels after it.
        rows: Of the embedding table.
        source: The model, for errors.
        is_given: Whether the user named the vocabulary: then rows too many are an
            error too, because they mean another vocabulary or missing sentinels.

    Raises:
        ValueError: They disagree; says both numbers.
    """
    size = vocabulary.Vocabulary(proto, extra_ids).size
    numbers = f"the vocabulary has {size:,} ids ({extra_ids} of them sentinels)"
    if size > rows:
        raise ValueError(
            f"{source}: {numbers}, and the embedding table {rows:,} rows: they do not "
            "belong together; use the vocabulary the model was trained with"
        )
    if rows - size < _ROUNDED_TO:
        return
    if is_given:
        raise ValueError(
            f"{source}: {numbers}, and the embedding table {rows:,} rows: give the "
            "vocabulary the model was trained with, and its sentinels with "
            "--extra-ids (T5: 100)"
        )
    logging.warning("%s: %s, and the table %s rows", source, numbers, f"{rows:,}")


def _count_sentinels(folder: pathlib.Path) -> int:
    """Counts the sentinels that a tokenizer adds after the pieces of `spiece.model`."""
    config = folder / "tokenizer_config.json"
    if (folder / _TOKENIZER).is_file():
        added = _read_json(folder / _TOKENIZER).get("added_tokens") or ()
        return _count_names(token["content"] for token in added)
    if not config.is_file():
        return 0
    values = _read_json(config)
    if values.get("added_tokens_decoder"):
        tokens = values["added_tokens_decoder"].values()
        return _count_names(token["content"] for token in tokens)
    if "extra_ids" in values:
        return int(values["extra_ids"] or 0)
    # T5's tokenizers add 100 unless they say otherwise.
    return _count_names(values.get("additional_special_tokens") or ()) or 100


def _count_names(contents: Any) -> int:
    return sum(bool(re.fullmatch(r"▁?<extra_id_\d+>", str(c))) for c in contents)


def _is_sentinel(piece: str, number: int) -> bool:
    return piece.removeprefix("▁") == f"<extra_id_{number}>"


def _set_pieces_named(trainer: Any, pieces: list[tuple[str, float]]) -> None:
    """Names the reserved pieces as the table does; SentencePiece looks them up."""
    for field, number in (
        ("pad_piece", vocabulary.PAD_ID),
        ("eos_piece", vocabulary.EOS_ID),
        ("unk_piece", trainer.unk_id),
    ):
        if 0 <= number < len(pieces):
            setattr(trainer, field, pieces[number][0])


def _flatten(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [step for part in normalizer["normalizers"] for step in _flatten(part)]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return files.parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(
            f"{path}: not JSON; the file is damaged, copy it again"
        ) from None
