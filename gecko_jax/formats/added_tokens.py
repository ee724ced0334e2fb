"""Added tokens of Hugging Face tokenizers: tokens that are cut out of a text.

A tokenizer lists them in several files:

    tokenizer.json             added_tokens: with ids
    tokenizer_config.json      added_tokens_decoder: with ids; pad_token, ...: without
    added_tokens.json          with ids
    special_tokens_map.json    pad_token, additional_special_tokens, ...: without ids
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gecko_jax.formats import source_files, tokenizer_json
from gecko_jax.io import field_rules, inputs
from gecko_jax.text import vocabularies

# SentencePiece rejects halves of surrogate pairs.
_CONTENT = field_rules.Kind(
    "text", lambda v: isinstance(v, str) and not re.search(r"[\ud800-\udfff]", v)
)
_FLAG = field_rules.optional(field_rules.FLAG)
# An id is a string where it is a key of JSON.
_ID = field_rules.Kind(
    "a whole number from 0",
    lambda v: (
        field_rules.COUNT.holds(v)
        or (isinstance(v, str) and v.isdecimal() and len(v) < 16)
    ),
)
_FLAGS = dict.fromkeys(("special", "single_word", "normalized"), _FLAG)
_TOKEN = {"content": _CONTENT, "id": _ID, **_FLAGS}
_FILE_NAMES = {
    "tokenizer": "tokenizer.json",
    "config": "tokenizer_config.json",
    "special": "special_tokens_map.json",
    "added": "added_tokens.json",
}


@dataclasses.dataclass(frozen=True)
class Files:
    """Contents of the tokenizer files of a folder; a missing file is empty."""

    folder: pathlib.Path
    tokenizer: dict[str, Any]
    config: dict[str, Any]
    special: dict[str, Any]
    added: dict[str, Any]

    def path(self, name: str) -> pathlib.Path:
        """Returns the path of one of the files, by the name of the attribute."""
        return self.folder / _FILE_NAMES[name]


@dataclasses.dataclass(frozen=True)
class Listed:
    """A token, the file that lists it, and whether `split_special_tokens` applies."""

    token: vocabularies.AddedToken
    is_special: bool
    source: pathlib.Path


def read_files(folder: pathlib.Path) -> Files:
    """Reads the tokenizer files of a folder."""
    contents = {
        name: source_files.read_json(folder / file) if (folder / file).is_file() else {}
        for name, file in _FILE_NAMES.items()
    }
    return Files(folder, **contents)


def read_listed(files: Files) -> dict[str, Listed]:
    """Returns the tokens that any file lists with an id, by content."""
    special = {content for content, _ in read_special(files)}
    decoder = files.config.get("added_tokens_decoder") or {}
    entries = [
        *((entry, "tokenizer") for entry in files.tokenizer.get("added_tokens") or ()),
        *(({**entry, "id": number}, "config") for number, entry in decoder.items()),
        *(({"content": c, "id": number}, "added") for c, number in files.added.items()),
    ]
    listed: dict[str, Listed] = {}
    for entry, name in entries:
        source, content = files.path(name), entry["content"]
        remedy = "the file is damaged, copy it again"
        field_rules.check(f"{source}, an added token", entry, _TOKEN, remedy)
        is_special = bool(entry.get("special", content in special))
        single_word = bool(entry.get("single_word", False))
        # transformers' default.
        normalized = bool(entry.get("normalized", not is_special))
        try:
            number = int(entry["id"])
            token = vocabularies.AddedToken(content, number, single_word, normalized)
        except ValueError as error:
            raise ValueError(
                f"{source}: {error}; {tokenizer_json.GIVE_VOCABULARY}"
            ) from None
        first = listed.setdefault(content, Listed(token, is_special, source))
        if first.token.id != token.id:
            raise ValueError(
                f"{source}: the token {content!r} has the id {token.id}, and "
                f"{first.token.id} in {first.source.name}; correct the files"
            )
    return listed


def read_special(files: Files) -> list[tuple[str, pathlib.Path]]:
    """Returns the special tokens that files name without an id."""
    special = []
    for name, values in (("config", files.config), ("special", files.special)):
        path = files.path(name)
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
                    problem = f"{inputs.kind(content)} that is not the text of a token"
                    raise source_files.damaged(path, f"{key} holds {problem}")
                special.append((content, path))
    return special


def choose(
    plain: vocabularies.Vocabulary,
    listed: Mapping[str, Listed],
    special: Sequence[tuple[str, pathlib.Path]],
    prompts: Sequence[str],
    *,
    is_split: bool,
) -> list[vocabularies.AddedToken]:
    """Returns the tokens that are cut out of texts, in the order of their ids.

    Reserved tokens and sentinels are cut out only if one of the prompts contains one.
    With `is_split`, the tokenizer reads special tokens in a text as text. Raises
    ValueError if the id of a token is not that of its piece, or it has none.
    """
    tokens = dict(listed)
    for content, path in special:
        number = _find(plain, content)
        if content in tokens:
            continue
        if number is None:
            raise ValueError(
                f"{path}: names the special token {content!r}, which has an id in no "
                "file here; save the tokenizer again, or "
                f"{tokenizer_json.GIVE_VOCABULARY}"
            )
        tokens[content] = Listed(vocabularies.AddedToken(content, number), True, path)
    pad, eos = (plain.spell([n])[0] for n in (plain.pad_id, plain.eos_id))
    reserved = {pad, eos, "<unk>"}
    chosen, usual = [], []
    for content, entry in tokens.items():
        number = _find(plain, content)
        if number is not None and number != entry.token.id:
            raise ValueError(
                f"{entry.source}: the token {content!r} has the id {entry.token.id}, "
                f"and is piece {number} of the vocabulary; correct the file"
            )
        if is_split and entry.is_special:
            continue
        is_usual = content in reserved or re.fullmatch(tokenizer_json.SENTINEL, content)
        (usual if is_usual else chosen).append(entry.token)
    # T5's tokenizer cuts these out even if no file lists them.
    for content in (*reserved, *(f"<extra_id_{n}>" for n in range(plain.extra_ids))):
        number = _find(plain, content)
        if number is not None and content not in tokens and not is_split:
            usual.append(vocabularies.AddedToken(content, number))
    if any(token.content in prompt for token in usual for prompt in prompts):
        chosen += usual
    return sorted(chosen, key=lambda token: token.id)


def _find(plain: vocabularies.Vocabulary, content: str) -> int | None:
    """Returns the id of a piece; our sentinel pieces begin with "▁"."""
    number = plain.find_piece(content)
    if number is None and re.fullmatch(tokenizer_json.SENTINEL, content):
        return plain.find_piece(f"▁{content}")
    return number


def count_sentinels(files: Files) -> int:
    """Counts the sentinels that a tokenizer adds after the pieces of `spiece.model`."""
    tokens = files.tokenizer.get("added_tokens") or ()
    if not files.tokenizer:
        tokens = (files.config.get("added_tokens_decoder") or {}).values()
    if files.tokenizer or tokens:
        return _count_names(token["content"] for token in tokens)
    if not files.config:
        return 0
    if files.config.get("extra_ids") is not None:
        return files.config["extra_ids"]
    # T5's tokenizers add 100 by default.
    return _count_names(files.config.get("additional_special_tokens") or ()) or 100


def _count_names(contents: Iterable[Any]) -> int:
    return sum(bool(re.fullmatch(tokenizer_json.SENTINEL, str(c))) for c in contents)
