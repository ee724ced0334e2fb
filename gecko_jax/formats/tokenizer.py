"""The vocabulary of a Hugging Face folder: `spiece.model` or `tokenizer.json`.

`tokenizer.json` holds the pieces, scores and normalizer table of the SentencePiece
model it was made from. That model is rebuilt from it (`tokenizer_json`), so
SentencePiece is the only tokenizer at run time.

A tokenizer may differ from its SentencePiece model: it may normalize or split texts in
other ways, close them with other tokens, or have added tokens. Added tokens are
supported (`added_tokens`); everything else is refused by name, in whichever file it is.
Where the `tokenizers` library is installed, its ids are also compared with ours on some
texts.
"""

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from absl import logging

from gecko_jax.formats import added_tokens, model_folder, source_files, tokenizer_json
from gecko_jax.io import field_rules, writing
from gecko_jax.text import json_vocabularies, text_formats, vocabularies

_SPIECE = ("spiece.model", "sentencepiece.model", "tokenizer.model")

# Tokenizer classes that behave as SentencePiece does, or as `tokenizer.json` says.
_CLASS = re.compile(
    "(T5|MT5|PreTrained|TokenizersBackend|SentencePieceBackend)(Tokenizer)?(Fast)?"
)
_CONFIG = {
    "tokenizer_class": field_rules.Kind(
        "the class of a T5 tokenizer or null",
        lambda v: isinstance(v, str) and bool(_CLASS.fullmatch(v)),
        is_optional=True,
    ),
    "truncation_side": field_rules.only("right"),
    "split_special_tokens": field_rules.optional(field_rules.FLAG),
    "added_tokens_decoder": field_rules.optional(field_rules.OBJECT),
    "extra_ids": field_rules.optional(field_rules.integer(0, 100_000)),
}

# Texts on which different tokenizers usually differ: case, digits, punctuation, spaces
# of all kinds, compatibility characters, accents, unknown characters.
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


def read(folder: pathlib.Path, prompts: Iterable[str] = ()) -> vocabularies.Vocabulary:
    """Returns the vocabulary of an encoder's folder.

    If one of the prompts, which the model writes before other texts, contains a
    reserved token such as "</s>", reserved tokens in a text are cut out of it;
    otherwise they are text. Raises ValueError if there is no vocabulary, it is not a
    SentencePiece Unigram model, or the tokenizer does something that SentencePiece does
    not.
    """
    files = added_tokens.read_files(folder)
    values, config = files.tokenizer, files.config
    path, config_path = files.path("tokenizer"), files.path("config")
    field_rules.check(config_path, config, _CONFIG, tokenizer_json.GIVE_VOCABULARY)
    names = (model_folder.VOCABULARY, *_SPIECE)
    spiece = next(
        (writing.member(folder, n) for n in names if (folder / n).is_file()), None
    )
    try:
        if values:
            tokenizer_json.check_steps(values, path)
        if spiece is not None:
            proto = _read_spiece(spiece)
            extra_ids = added_tokens.count_sentinels(files)
            if b"<extra_id_0>" in proto:  # mT5 and umT5 have sentinel pieces.
                extra_ids = 0
            if "model" in values:
                tokenizer_json.check_same_pieces(values, path, proto, spiece)
        elif values:
            proto, extra_ids = tokenizer_json.to_sentencepiece(values, path)
        else:
            raise ValueError(
                f"{folder}: no vocabulary here ({_SPIECE[0]} or tokenizer.json); copy "
                "it, or name a SentencePiece file with --vocabulary and --extra-ids"
            )
        listed = added_tokens.read_listed(files)
        special = added_tokens.read_special(files)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise source_files.damaged(
            path if values else config_path, "not the settings of a tokenizer"
        ) from None
    plain = vocabularies.Vocabulary(proto, extra_ids)
    _check_end(plain, files)
    is_split = bool(config.get("split_special_tokens"))
    prompts = list(prompts)
    added = added_tokens.choose(plain, listed, special, prompts, is_split=is_split)
    if added and values:
        tokenizer_json.check_words(values, path, added)
    try:
        vocab = vocabularies.Vocabulary(proto, extra_ids, tuple(added))
    except ValueError as error:
        raise ValueError(
            f"{folder}: {error}; {tokenizer_json.GIVE_VOCABULARY}"
        ) from None
    if "model" in values:
        _compare(vocab, path, is_split=is_split)
    return vocab


def read_json(folder: pathlib.Path, *, is_base: bool) -> vocabularies.Vocabulary:
    """Returns the vocabulary of a folder's `tokenizer.json`.

    With `is_base`, the model is not an embedding model yet. Then a tokenizer that does
    not end texts gets an EOS, which would change the vectors of others. Raises
    ValueError if there is no supported `tokenizer.json`, or another file lists a token
    that it lacks.
    """
    path = folder / vocabularies.JSON_FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: missing; save the tokenizer again with transformers 5, which "
            "writes it"
        )
    files = added_tokens.read_files(folder)
    try:
        _check_listed(files)
    except (KeyError, TypeError, AttributeError):
        raise source_files.damaged(folder, "not the settings of a tokenizer") from None
    if is_base:
        return vocabularies.load(path)
    content = writing.member(folder, path.name).read_bytes()
    config = files.path("config")
    config = config.read_bytes() if config.is_file() else b""
    try:
        return vocabularies.build(content, path=str(path), tokenizer_config=config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_listed(files: added_tokens.Files) -> None:
    """Refuses tokens that another file adds to those of `tokenizer.json`."""
    ids = dict(files.tokenizer["model"]["vocab"])
    ids |= {t["content"]: t["id"] for t in files.tokenizer["added_tokens"]}
    decoder = files.config.get("added_tokens_decoder") or {}
    config = files.path("config")
    for content, number, source in (
        *((token["content"], int(n), config) for n, token in decoder.items()),
        *((content, n, files.path("added")) for content, n in files.added.items()),
        *((content, None, path) for content, path in added_tokens.read_special(files)),
    ):
        if content not in ids or number not in (None, ids[content]):
            raise ValueError(
                f"{source}: the token {content!r} has another id in tokenizer.json, or "
                "none; save the tokenizer again with transformers 5"
            )


def _read_spiece(path: pathlib.Path) -> bytes:
    """Returns a SentencePiece model that marks the space before every word."""
    proto = vocabularies.load(path).model_proto
    model = vocabularies.parse_proto(proto)
    spec, trainer = model.normalizer_spec, model.trainer_spec
    if not spec.add_dummy_prefix or trainer.treat_whitespace_as_suffix:
        raise ValueError(
            f"{path}: does not mark the space before every word, as T5's tokenizer "
            "does; take a model with T5's tokenizer"
        )
    return proto


def _check_end(plain: vocabularies.Vocabulary, files: added_tokens.Files) -> None:
    """Refuses a token at the end of texts that is not the vocabulary's EOS."""
    eos = plain.spell([vocabularies.EOS_ID])[0]
    for name, values in (("config", files.config), ("special", files.special)):
        token = values.get("eos_token")
        content = token["content"] if isinstance(token, dict) else token
        if content not in (None, eos):
            raise ValueError(
                f"{files.path(name)}: eos_token is {content!r}, and token "
                f"{vocabularies.EOS_ID} of the vocabulary is {eos!r}; the two must be "
                "equal"
            )


def _compare(
    vocab: vocabularies.Vocabulary, path: pathlib.Path, *, is_split: bool
) -> None:
    """Compares ids with those of the `tokenizers` library, where it is installed."""
    library = _open_in_library(path)
    if library is None:
        return
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = is_split
    probes = list(_PROBES)
    for token in vocab.added_tokens:
        content = token.content
        probes += [content, f"a {content} b", f"a{content}b", f"{content}{content}"]
        probes += [content.upper(), content.lower()]
    # Gecko cleans all texts.
    probes = [text_formats.clean(probe) for probe in probes]
    for probe, ids in zip(probes, vocab.encode(probes), strict=True):
        with json_vocabularies.named_errors(path, source_files.DAMAGED):
            library_ids = library.encode(probe).ids
        if library_ids != ids and not _are_equally_good(vocab, library_ids, ids):
            raise ValueError(
                f"{path}: cuts {probe!r} into {library_ids}, and its SentencePiece "
                f"model into {ids}; it differs from SentencePiece, "
                f"{tokenizer_json.GIVE_VOCABULARY}"
            )


def _open_in_library(path: pathlib.Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a file, None if there is no comparison."""
    try:
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(path))
    except ImportError:
        return None
    except Exception as error:  # The library raises no narrower type.
        logging.warning(
            "%s: the tokenizers library cannot read it (%s), so its ids are not "
            "compared with ours",
            path,
            error,
        )
        return None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic of the library is not an `Exception`.
        raise source_files.damaged(
            path, f"the tokenizers library fails on it ({error})"
        ) from None


def _are_equally_good(
    vocab: vocabularies.Vocabulary, first: Sequence[int], second: Sequence[int]
) -> bool:
    """Whether two segmentations have equal scores, so that rounding decides."""
    if max(first, default=0) >= vocab.size:
        return False
    (spelled, score), (other, other_score) = vocab.spell(first), vocab.spell(second)
    return spelled == other and abs(score - other_score) < 1e-3
