"""The vocabulary of a Hugging Face folder: `spiece.model`, or `tokenizer.json`.

`tokenizer.json` holds the same pieces and scores as the SentencePiece model it was made
from, and its normalizer's table, so the model is written again from it: one tokenizer
at run time, whatever a folder carries.

A tokenizer may do more than its SentencePiece model: normalize in steps of its own, cut
texts into words otherwise, close them with other tokens, know added tokens. Added
tokens are carried (`vocabulary.AddedToken`), and everything else is refused by name,
whichever files lie beside each other. Where the `tokenizers` library is installed, its
ids and ours are compared on some texts, too.
"""

import base64
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

import gecko_jax.config
from gecko_jax.formats import from_hugging_face, model_folder
from gecko_jax.io import field_rules, inputs, writing
from gecko_jax.text import text_formats, vocabularies

_SPIECE = ("spiece.model", "sentencepiece.model", "tokenizer.model")
_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_ADDED = "added_tokens.json"

_GIVE_VOCABULARY = "give its `.model` file with --vocabulary and --extra-ids"

# T5 rounds the rows of its table up to a multiple of this.
_ROUNDED_TO = 128

_SENTINEL = r"▁?<extra_id_(\d+)>"

# Those that read a text as SentencePiece does, or as `tokenizer.json` says.
_CLASSES = ("T5", "MT5", "PreTrained", "TokenizersBackend", "SentencePieceBackend")
_DAMAGED = "the file is damaged, copy it again"
# SentencePiece takes no half of a surrogate pair.
_CONTENT = field_rules.Kind(
    "text", lambda v: isinstance(v, str) and not re.search(r"[\ud800-\udfff]", v)
)
# A token that a file lists with its id.
_TOKEN = {
    "content": _CONTENT,
    "special": field_rules.optional(field_rules.FLAG),
    "single_word": field_rules.optional(field_rules.FLAG),
    "normalized": field_rules.optional(field_rules.FLAG),
}
_SCORE = field_rules.number()
_CONFIG_RULES = {
    "tokenizer_class": gecko_jax.config.Rule(
        str,
        "reads texts in a way of its own; Gecko's tokenizer is T5's",
        lambda name: (
            re.fullmatch(rf"({'|'.join(_CLASSES)})(Tokenizer)?(Fast)?", name)
            is not None
        ),
    ),
    "truncation_side": gecko_jax.config.Rule(
        str, "Gecko cuts texts at their end", lambda side: side == "right"
    ),
    "split_special_tokens": gecko_jax.config.Rule(bool),
    "added_tokens_decoder": gecko_jax.config.Rule(dict),
    "extra_ids": gecko_jax.config.Rule(
        int, "must be 0 or more", lambda count: count >= 0
    ),
}

# Texts on which two tokenizers differ that are not one: case, digits, punctuation,
# spaces of all kinds, compatibility characters, accents, characters nobody knows.
_PROBES = (
    "a",
    "A",
    "what is a Gecko? It's a LIZARD.",
    "MiXeD CaSe, 3.14159 and 1,000,000",
    "two  spaces,\ttabs\nand lines ",
    "a\u00a0b\u2003c\u3000d",
    "ＡＢＣ ﬁne ½ x²",
    "café naïve Ünïcödé",
    "日本語のテキスト",
    "def f(x):\n    return x**2  # <square>",
    "snake_case-and/paths.py",
    "“quoted” — dashed…",
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What cuts texts into tokens; see `vocabulary.Vocabulary`."""

    proto: bytes
    extra_ids: int
    added_tokens: tuple[vocabularies.AddedToken, ...] = ()

    def build(self) -> vocabularies.Vocabulary:
        """Returns the vocabulary."""
        return vocabularies.Vocabulary(self.proto, self.extra_ids, self.added_tokens)


@dataclasses.dataclass(frozen=True)
class _Listed:
    """A token that a tokenizer lists by itself, as it does its reserved tokens."""

    token: vocabularies.AddedToken
    is_special: bool
    source: pathlib.Path


def read(folder: pathlib.Path, prompts: Iterable[str] = ()) -> Tokenizer:
    """Returns the tokenizer of a folder.

    Args:
        folder: Folder of the encoder.
        prompts: Texts that the model writes before others. Where one spells a reserved
            token such as "</s>", the tokenizer's habit of reading it as that token is
            kept; in other models it is text.

    Raises:
        ValueError: There is none, it is not a SentencePiece Unigram model, or it does
            what SentencePiece does not.
    """
    config = _read_if_there(folder / _CONFIG)
    faults = gecko_jax.config.find_wrong_values(_without_null(config), _CONFIG_RULES)
    if faults:
        raise ValueError(f"{folder / _CONFIG}: {'; '.join(faults)}")
    path = folder / _TOKENIZER
    values = _read_if_there(path)
    names = (model_folder.VOCABULARY, *_SPIECE)
    spiece = next(
        (writing.member(folder, n) for n in names if (folder / n).is_file()), None
    )
    try:
        if values:
            _check_steps(values, path)
        if spiece is not None:
            proto = _read_spiece(spiece)
            has_sentinels = b"<extra_id_0>" in proto  # mT5's and umT5's own pieces
            extra_ids = 0 if has_sentinels else _count_sentinels(values, config)
            if "model" in values:
                _check_same_pieces(values, proto, path, spiece)
        elif values:
            proto, extra_ids = from_tokenizer_json(values, path)
        else:
            raise ValueError(
                f"{folder}: no vocabulary here ({_SPIECE[0]} or {_TOKENIZER}); copy "
                "it, or name a SentencePiece file with --vocabulary and --extra-ids"
            )
        listed = _read_listed(folder, values, config)
        named = _named(folder, config)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"{path if values else folder / _CONFIG}: not the settings of a tokenizer; "
            "the file is damaged, copy it again"
        ) from None
    is_split = bool(config.get("split_special_tokens"))
    plain = vocabularies.Vocabulary(proto, extra_ids)
    _check_end(plain, folder, config)
    added = _choose_added(plain, listed, named, list(prompts), is_split=is_split)
    found = Tokenizer(proto, extra_ids, tuple(added))
    if added and values:
        _check_words(values, path, added)
    try:
        vocab = found.build()
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; {_GIVE_VOCABULARY}") from None
    if "model" in values:
        _compare(vocab, path, is_split=is_split)
    return found


def _read_spiece(path: pathlib.Path) -> bytes:
    """Returns a SentencePiece model that marks the space before every word."""
    proto = vocabularies.load(path).model_proto
    model = vocabularies.parse_proto(proto)
    spec, trainer = model.normalizer_spec, model.trainer_spec
    if not spec.add_dummy_prefix or trainer.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path}: does not mark the space before every word, as T5's tokenizer "
            "does; take a model that was trained with its own SentencePiece model"
        )
    return proto


def _check_end(
    plain: vocabularies.Vocabulary, folder: pathlib.Path, config: Mapping[str, Any]
) -> None:
    """Refuses another token at the end of a text than the one that closes ours."""
    ours = plain.spell([vocabularies.EOS_ID])[0]
    for path, values in (
        (folder / _CONFIG, config),
        (folder / _SPECIAL, _read_if_there(folder / _SPECIAL)),
    ):
        token = values.get("eos_token")
        content = token["content"] if isinstance(token, dict) else token
        if content not in (None, ours):
            raise ValueError(
                f"{path}: eos_token is {content!r}, and token {vocabularies.EOS_ID} of "
                f"the vocabulary is {ours!r}; a text must be closed by that token"
            )


def _read_if_there(path: pathlib.Path) -> dict[str, Any]:
    return from_hugging_face.read_json(path) if path.is_file() else {}


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def from_tokenizer_json(
    values: Mapping[str, Any], path: pathlib.Path
) -> tuple[bytes, int]:
    """Writes the SentencePiece model that a Unigram `tokenizer.json` was made from.

    Returns:
        The serialized model, and the number of sentinels after it.
    """
    model = values.get("model") or {}
    pieces = _read_pieces(model, path)
    extra_ids = 0
    while pieces and _is_sentinel(pieces[-1][0], extra_ids):
        extra_ids += 1
        pieces.pop()
    from sentencepiece import sentencepiece_model_pb2

    # pyright does not see the classes that protobuf makes at import.
    proto = vars(sentencepiece_model_pb2)["ModelProto"]()
    kinds = proto.SentencePiece
    unk_id = model.get("unk_id")
    for number, (piece, score) in enumerate(pieces):
        kind = kinds.NORMAL
        if number == unk_id:
            kind = kinds.UNKNOWN
        elif number in (vocabularies.PAD_ID, vocabularies.EOS_ID):
            kind = kinds.CONTROL
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        elif re.fullmatch(_SENTINEL, piece):
            kind = kinds.USER_DEFINED
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.UNIGRAM
    trainer.vocab_size = len(pieces)
    trainer.pad_id, trainer.eos_id = vocabularies.PAD_ID, vocabularies.EOS_ID
    trainer.unk_id, trainer.bos_id = -1 if unk_id is None else unk_id, -1
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    _set_pieces_named(trainer, pieces)
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    charsmap = _charsmap(values, path)
    if charsmap is not None:
        normalizer.name = "nmt_nfkc"
        normalizer.precompiled_charsmap = charsmap
    return proto.SerializeToString(), extra_ids


def _read_pieces(
    model: Mapping[str, Any], path: pathlib.Path
) -> list[tuple[str, float]]:
    if not isinstance(model.get("vocab"), list) or model.get("type", "Unigram") != (
        "Unigram"
    ):
        raise ValueError(
            f"{path}: a {model.get('type')} tokenizer; a T5 encoder needs Unigram "
            f"pieces, {_GIVE_VOCABULARY}"
        )
    for entry in model["vocab"]:
        is_pair = isinstance(entry, list) and len(entry) == 2
        if not (is_pair and isinstance(entry[0], str) and _SCORE.holds(entry[1])):
            raise ValueError(
                f"{path}: model.vocab holds {str(entry)[:80]}, not a piece and its "
                "score; the file is damaged, copy it again"
            )
    return [(piece, float(score)) for piece, score in model["vocab"]]


def _charsmap(values: Mapping[str, Any], path: pathlib.Path) -> bytes | None:
    for step in _flatten(values.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            try:
                return base64.b64decode(step["precompiled_charsmap"] or "")
            except ValueError:
                raise ValueError(
                    f"{path}: precompiled_charsmap is not base64; the file is damaged, "
                    "copy it again"
                ) from None
    return None


def _check_steps(values: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuses the steps of a `tokenizer.json` that SentencePiece does not take."""
    for step in _flatten(values.get("normalizer"), "normalizers"):
        if not _is_of_sentencepiece(step):
            raise ValueError(
                f"{path}: its normalizer has a step {_name(step)}, which "
                f"SentencePiece has not; {_GIVE_VOCABULARY}"
            )
    if "model" not in values:
        return
    words = _flatten(values.get("pre_tokenizer"), "pretokenizers")
    if [step["type"] for step in words] not in (
        ["Metaspace"],
        ["WhitespaceSplit", "Metaspace"],
    ) or not _marks_every_word(words[-1]):
        raise ValueError(
            f"{path}: its pre_tokenizer is {' and '.join(map(_name, words)) or 'none'}"
            ", and not Metaspace, which marks the space before every word as "
            f"SentencePiece does; {_GIVE_VOCABULARY}"
        )
    closing = values.get("post_processor") or {}
    tokens = [
        part["SpecialToken"]["id"] if "SpecialToken" in part else "text"
        for part in closing.get("single") or ()
    ]
    ids = [
        number
        for token in tokens[1:]
        for number in closing["special_tokens"][token]["ids"]
    ]
    if tokens[:1] != ["text"] or ids != [vocabularies.EOS_ID]:
        raise ValueError(
            f"{path}: its post_processor writes {' '.join(tokens) or 'nothing'}; "
            f"Gecko's encoder reads a text closed by the token {vocabularies.EOS_ID}, "
            f"</s>; {_GIVE_VOCABULARY}"
        )
    if (values.get("truncation") or {}).get("direction", "Right") != "Right":
        raise ValueError(f"{path}: truncation cuts at the left; Gecko cuts at the end")


def _is_of_sentencepiece(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        is_run = step["pattern"] == {"Regex": " {2,}"}
        return is_run and step["content"] in (" ", "▁")
    return step["type"] in ("Precompiled", "Strip")


def _marks_every_word(step: Mapping[str, Any]) -> bool:
    scheme = step.get("prepend_scheme", "always")
    return (
        step.get("replacement", "▁") == "▁"
        and scheme in ("always", "first")
        and step.get("add_prefix_space", True) is True
    )


def _check_words(
    values: Mapping[str, Any],
    path: pathlib.Path,
    added: Sequence[vocabularies.AddedToken],
) -> None:
    """Refuses added tokens beside which a space would be a token of its own."""
    words = _flatten(values.get("pre_tokenizer"), "pretokenizers")
    is_split = [step["type"] for step in words] == ["WhitespaceSplit", "Metaspace"]
    if words and (not is_split or words[-1].get("prepend_scheme") == "first"):
        contents = ", ".join(repr(token.content) for token in added[:5])
        raise ValueError(
            f"{path}: has added tokens ({contents}) and the pre_tokenizer "
            f"{' and '.join(map(_name, words))}, which keeps the spaces beside them; "
            "only WhitespaceSplit and Metaspace with added tokens are read. Save the "
            "tokenizer again with transformers 5, or " + _GIVE_VOCABULARY
        )


def _check_same_pieces(
    values: Mapping[str, Any],
    proto: bytes,
    path: pathlib.Path,
    spiece: pathlib.Path,
) -> None:
    """Refuses files side by side that hold two vocabularies."""
    theirs = _read_pieces(values.get("model") or {}, path)
    model = vocabularies.parse_proto(proto)
    for number, (piece, (name, score)) in enumerate(
        zip(model.pieces, theirs, strict=False)
    ):
        if piece.piece != name or abs(piece.score - score) > 1e-3 * (1 + abs(score)):
            raise ValueError(
                f"{path}: piece {number} is {name!r} with score {score:g}, and "
                f"{piece.piece!r} with {piece.score:g} in {spiece.name}; the two files "
                "do not belong together, remove the wrong one"
            )
    charsmap = _charsmap(values, path) or b""
    if len(theirs) < len(model.pieces) or charsmap != (
        model.normalizer_spec.precompiled_charsmap
    ):
        raise ValueError(
            f"{path}: not the pieces and the normalizer of {spiece.name}; the two "
            "files do not belong together, remove the wrong one"
        )


def _read_listed(
    folder: pathlib.Path, values: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, _Listed]:
    """Returns the tokens that any file of the folder lists with an id, by content.

    Raises:
        ValueError: Two files give a token two ids.
    """
    special = {content for content, _ in _named(folder, config)}
    listed: dict[str, _Listed] = {}

    def add(entry: Mapping[str, Any], number: Any, source: pathlib.Path) -> None:
        field_rules.check(f"{source}, an added token", entry, _TOKEN, _DAMAGED)
        content = entry["content"]
        is_special = bool(entry.get("special", content in special))
        read_id = _read_id(number, content, source)
        try:
            token = vocabularies.AddedToken(
                content,
                read_id,
                bool(entry.get("single_word", False)),
                # transformers' rule for a token that says nothing.
                bool(entry.get("normalized", not is_special)),
            )
        except ValueError as error:
            raise ValueError(f"{source}: {error}; {_GIVE_VOCABULARY}") from None
        same = listed.setdefault(content, _Listed(token, is_special, source))
        if same.token.id != token.id:
            raise ValueError(
                f"{source}: the token {content!r} has the id {token.id}, and "
                f"{same.token.id} in {same.source.name}; mend the files"
            )

    for token in values.get("added_tokens") or ():
        add(token, token["id"], folder / _TOKENIZER)
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        add(token, number, folder / _CONFIG)
    for content, number in _read_if_there(folder / _ADDED).items():
        add({"content": content}, number, folder / _ADDED)
    return listed


def _read_id(number: Any, content: str, source: pathlib.Path) -> int:
    """Returns the id of an added token; as a key of JSON, it is a text of digits."""
    is_digits = isinstance(number, str) and number.isdecimal() and len(number) < 16
    if not is_digits and not field_rules.COUNT.holds(number):
        raise ValueError(
            f"{source}: the id of the token {content!r} is not a whole number from 0; "
            f"{_DAMAGED}"
        )
    return int(number)


def _named(
    folder: pathlib.Path, config: Mapping[str, Any]
) -> list[tuple[str, pathlib.Path]]:
    """Returns the contents of the special tokens that a folder names without an id."""
    found = []
    for path, values in (
        (folder / _CONFIG, config),
        (folder / _SPECIAL, _read_if_there(folder / _SPECIAL)),
    ):
        for key, value in values.items():
            if key in ("additional_special_tokens", "extra_special_tokens"):
                entries = value.values() if isinstance(value, dict) else value or ()
            elif key.endswith("_token") and isinstance(value, str | dict):
                entries = [value]
            else:
                continue
            for entry in entries:
                content = entry if isinstance(entry, str) else entry["content"]
                if not _CONTENT.holds(content):
                    raise ValueError(
                        f"{path}: {key} holds {inputs.kind(content)} that is not the "
                        f"text of a token; {_DAMAGED}"
                    )
                found.append((content, path))
    return found


def _choose_added(
    plain: vocabularies.Vocabulary,
    listed: Mapping[str, _Listed],
    named: Sequence[tuple[str, pathlib.Path]],
    prompts: Sequence[str],
    *,
    is_split: bool,
) -> list[vocabularies.AddedToken]:
    """Returns the tokens that must be cut out of texts, in the order of their ids.

    Args:
        plain: The vocabulary without them.
        listed: What the files list with an id.
        named: What they name without one.
        prompts: See `read`.
        is_split: Whether special tokens in a text are text there, too.

    Raises:
        ValueError: An id is not that of the piece, or a token has none.
    """
    everything = dict(listed)
    for content, path in named:
        number = _find(plain, content)
        if content not in everything and number is None:
            raise ValueError(
                f"{path}: names the special token {content!r}, which has an id in no "
                f"file here; save the tokenizer again, or {_GIVE_VOCABULARY}"
            )
        if content not in everything:
            token = vocabularies.AddedToken(content, number or 0)
            everything[content] = _Listed(token, True, path)
    reserved = {
        plain.spell([vocabularies.PAD_ID])[0],
        plain.spell([vocabularies.EOS_ID])[0],
    }
    reserved.add("<unk>")
    kept, left = [], []
    for content, entry in everything.items():
        number = _find(plain, content)
        if number is not None and number != entry.token.id:
            raise ValueError(
                f"{entry.source}: the token {content!r} has the id {entry.token.id}, "
                f"and is piece {number} of the vocabulary; mend the file"
            )
        if is_split and entry.is_special:
            continue
        is_usual = content in reserved or re.fullmatch(_SENTINEL, content)
        (left if is_usual else kept).append(entry.token)
    # What T5's tokenizer cuts out whether a file lists it or not.
    for content in (*reserved, *(f"<extra_id_{n}>" for n in range(plain.extra_ids))):
        number = _find(plain, content)
        if number is not None and content not in everything and not is_split:
            left.append(vocabularies.AddedToken(content, number))
    if any(token.content in prompt for token in left for prompt in prompts):
        kept += left
    return sorted(kept, key=lambda token: token.id)


def _find(plain: vocabularies.Vocabulary, content: str) -> int | None:
    """Returns the id of a piece; sentinels have a mark of their own in ours."""
    number = plain.find_piece(content)
    if number is None and re.fullmatch(_SENTINEL, content):
        return plain.find_piece(f"▁{content}")
    return number


def _compare(
    vocab: vocabularies.Vocabulary, path: pathlib.Path, *, is_split: bool
) -> None:
    """Compares the ids of the `tokenizers` library with ours, where it is installed.

    Raises:
        ValueError: They differ; names the text and both.
    """
    try:
        import tokenizers
    except ImportError:
        return
    try:
        theirs = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower kind
        logging.warning(
            "%s: the tokenizers library cannot read it (%s), so its ids are not "
            "compared with ours",
            path,
            error,
        )
        return
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic of the library is no `Exception`.
        raise ValueError(
            f"{path}: the tokenizers library fails on it ({error}); {_DAMAGED}"
        ) from None
    theirs.no_truncation()
    theirs.no_padding()
    theirs.encode_special_tokens = is_split
    probes = list(_PROBES)
    for token in vocab.added_tokens:
        content = token.content
        probes += [
            content,
            f"a {content} b",
            f"a{content}b",
            f"{content}{content}",
            content.upper(),
            content.lower(),
        ]
    # As Gecko reads them: its cleaning is part of the model here.
    probes = [text_formats.clean(probe) for probe in probes]
    for probe, ours in zip(probes, vocab.encode(probes), strict=True):
        try:
            found = theirs.encode(probe).ids
        except Exception as error:  # the library raises no narrower kind
            raise ValueError(
                f"{path}: the tokenizers library cannot cut {probe!r} into tokens "
                f"({error}); {_DAMAGED}"
            ) from None
        if found == ours or _are_equally_good(vocab, found, ours):
            continue
        raise ValueError(
            f"{path}: cuts {probe!r} into {found}, and its SentencePiece model into "
            f"{ours}; it does what SentencePiece does not, {_GIVE_VOCABULARY}"
        )


def _are_equally_good(
    vocab: vocabularies.Vocabulary, first: Sequence[int], second: Sequence[int]
) -> bool:
    """Whether two segmentations tie: rounding decides between them."""
    if max(first, default=0) >= vocab.size:
        return False
    (spelled, score), (other, other_score) = vocab.spell(first), vocab.spell(second)
    return spelled == other and abs(score - other_score) < 1e-3


def check_size(found: Tokenizer, rows: int, *, source: str, is_given: bool) -> None:
    """Compares a vocabulary with the rows of the embedding table.

    Args:
        found: The tokenizer.
        rows: Rows of the embedding table.
        source: The model, for errors.
        is_given: Whether the user named the vocabulary: then rows too many are an
            error too, because they mean another vocabulary or missing sentinels.

    Raises:
        ValueError: They disagree; says both numbers.
    """
    size = found.build().size
    numbers = f"the vocabulary has {size:,} ids ({found.extra_ids} of them sentinels)"
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


def _count_sentinels(values: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Counts the sentinels that a tokenizer adds after the pieces of `spiece.model`."""
    if values:
        return _count_names(
            token["content"] for token in values.get("added_tokens") or ()
        )
    if not config:
        return 0
    if config.get("added_tokens_decoder"):
        tokens = config["added_tokens_decoder"].values()
        return _count_names(token["content"] for token in tokens)
    if config.get("extra_ids") is not None:
        return config["extra_ids"]
    # T5's tokenizers add 100 unless they say otherwise.
    return _count_names(config.get("additional_special_tokens") or ()) or 100


def _count_names(contents: Iterable[Any]) -> int:
    return sum(bool(re.fullmatch(_SENTINEL, str(content))) for content in contents)


def _is_sentinel(piece: str, number: int) -> bool:
    return piece.removeprefix("▁") == f"<extra_id_{number}>"


def _set_pieces_named(trainer: Any, pieces: list[tuple[str, float]]) -> None:
    """Names the reserved pieces as the table does; SentencePiece looks them up."""
    for field, number in (
        ("pad_piece", vocabularies.PAD_ID),
        ("eos_piece", vocabularies.EOS_ID),
        ("unk_piece", trainer.unk_id),
    ):
        if 0 <= number < len(pieces):
            setattr(trainer, field, pieces[number][0])


def _flatten(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a sequence, those of sequences inside it in their place."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _flatten(part, key)]


def _name(step: Mapping[str, Any]) -> str:
    """Names a step, and its settings where they decide."""
    settings = {key: value for key, value in step.items() if key != "type"}
    is_short = step["type"] in ("Replace", "Metaspace", "Prepend", "Strip")
    return f"{step['type']} {settings}" if is_short and settings else step["type"]
