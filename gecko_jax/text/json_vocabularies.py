"""Vocabularies in `tokenizer.json`, the format of Hugging Face's `tokenizers`.

    {"added_tokens": [{"id": 1, "content": "<eos>", "special": true, ...}, ...],
     "normalizer": ..., "pre_tokenizer": ..., "decoder": ...,
     "model": {"type": "BPE", "vocab": {"<pad>": 0, "<eos>": 1, ...}, "merges": [...]},
     "post_processor": {"type": "TemplateProcessing", "single": [BOS, text, EOS], ...}}

Ids, added tokens in a text included, are those of transformers: a text that contains
"<eos>" gets the id of EOS there, unless `tokenizer_config.json` sets
`split_special_tokens`. The post-processor alone decides what opens and closes a text,
as in transformers 5, which ignores `add_bos_token` and `add_eos_token` next to a
`tokenizer.json`.

Reading token caches needs the bytes of the file only. Encoding needs the package
`tokenizers`, which encodes a list of texts in several threads. The child of a fork uses
one thread, unless the environment sets TOKENIZERS_PARALLELISM to true: then it hangs.
The ids do not depend on the number of threads.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from gecko_jax.io import field_rules, reading, wording
from gecko_jax.text import vocabularies

_REMEDY = "copy it again from the original model"
_TOKEN = field_rules.object_of(
    {"id": field_rules.COUNT, "content": field_rules.NAME, "special": field_rules.FLAG}
)
_FIELDS = {
    "model": field_rules.OBJECT,
    "added_tokens": field_rules.list_of(_TOKEN),
    "post_processor": field_rules.optional(field_rules.OBJECT),
    "truncation": field_rules.optional(
        field_rules.object_of({"direction": field_rules.one_of("Right")})
    ),
}
_MODEL = {
    "type": field_rules.one_of("BPE"),
    "vocab": field_rules.map_of(field_rules.COUNT),
    "unk_token": field_rules.optional(field_rules.TEXT),
    "merges": field_rules.list_of(
        field_rules.Kind(
            "pairs of tokens",
            lambda v: (
                isinstance(v, str) or field_rules.list_of(field_rules.TEXT).holds(v)
            ),
        )
    ),
    "dropout": field_rules.only(0, 0.0),
}
_CONFIG = {
    "truncation_side": field_rules.only("right"),
    "split_special_tokens": field_rules.optional(field_rules.FLAG),
}


class JsonVocabulary(vocabularies.Vocabulary):
    """A byte-level BPE or a BPE with byte fallback, as Qwen and Gemma have.

    `model_proto` has the bytes of the `tokenizer.json`, which names its own sentinels
    and added tokens.
    """

    verbatim = True

    def __post_init__(self):
        if self.extra_ids or self.added_tokens:
            raise ValueError(
                f"extra_ids={self.extra_ids}: a tokenizer.json names all of its "
                "tokens; set extra_ids to 0"
            )
        if self._facts.eos_id is None:
            raise ValueError(
                "its post_processor does not end texts with exactly one token; the "
                "encoder needs an EOS: write one into the post_processor"
            )

    @functools.cached_property
    def _facts(self) -> "_Facts":
        return _read_facts(self.model_proto, self.tokenizer_config)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends every text."""
        assert self._facts.eos_id is not None  # Checked above.
        return self._facts.eos_id

    @property
    def opening(self) -> tuple[int, ...]:
        """Ids before every text, such as BOS."""
        return self._facts.opening

    @property
    def size(self) -> int:
        """Number of ids: the largest and 1, without media placeholders at the end."""
        return self._facts.size

    @property
    def unk_id(self) -> int | None:
        """Id of the unknown token; None where bytes spell every text."""
        return self._facts.unk_id

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that are equal for equal vocabularies."""
        digest = hashlib.sha256(self.model_proto)
        if self._facts.splits_special:
            digest.update(b"split_special_tokens")
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _library(self) -> Any:
        return _open(self.model_proto, self._facts)

    def _encode_pieces(self, texts: list[str]) -> list[list[int]]:
        library = self._library
        with named_errors(self.path or vocabularies.JSON_FILE, _REMEDY):
            encoded = library.encode_batch_fast(texts, add_special_tokens=False)
        return [text.ids for text in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of token ids, without `opening` and the final `eos_id`."""
        ids = [int(token) for token in tokens]
        if ids and ids[-1] == self.eos_id:
            ids.pop()
        if tuple(ids[: len(self.opening)]) == self.opening:
            ids = ids[len(self.opening) :]
        library = self._library
        with named_errors(self.path or vocabularies.JSON_FILE, _REMEDY):
            return library.decode(ids, skip_special_tokens=False)


class _Facts(NamedTuple):
    """What the package needs to know of a file, which takes a second to parse."""

    size: int
    opening: tuple[int, ...]
    eos_id: int | None
    unk_id: int | None
    splits_special: bool
    dropped: frozenset[int]


@functools.lru_cache(maxsize=4)
def _read_facts(content: bytes, tokenizer_config: bytes) -> _Facts:
    values = _parse(content)
    config = {}
    if tokenizer_config:
        config = _parse_object(tokenizer_config, vocabularies.JSON_CONFIG, _CONFIG)
    model, added = values["model"], values["added_tokens"]
    ids = {*model["vocab"].values(), *(token["id"] for token in added)}
    special = {token["id"]: token["content"] for token in added if token["special"]}
    size, dropped = max(ids, default=-1) + 1, set[int]()
    # Some placeholders of pictures and sounds have ids beyond the embedding table of a
    # text encoder (EmbeddingGemma's <image_soft_token>), where transformers fails.
    while re.search("image|audio|video|vision", special.get(size - 1, "")):
        size -= 1
        dropped.add(size)
    opening, closing = _read_template(values)
    return _Facts(
        size=size,
        opening=opening,
        eos_id=closing[0] if len(closing) == 1 else None,
        unk_id=model["vocab"].get(model.get("unk_token")),
        splits_special=bool(config.get("split_special_tokens")),
        dropped=frozenset(dropped),
    )


def _parse(content: bytes) -> dict[str, Any]:
    """Returns the contents of a `tokenizer.json`, with the fields that are read."""
    values = _parse_object(content, vocabularies.JSON_FILE, _FIELDS)
    model = values["model"]
    if model.get("type", "Unigram") == "Unigram":
        raise ValueError(
            "a Unigram tokenizer, which is a SentencePiece model; give its `.model` "
            "file, or import the folder with `gecko import`"
        )
    field_rules.check(f"{vocabularies.JSON_FILE}: model", model, _MODEL, _REMEDY)
    vocab = model["vocab"]
    if len(set(vocab.values())) < len(vocab):
        raise ValueError(f"model.vocab: two tokens share an id; {_REMEDY}")
    for merge in model["merges"]:
        # A string in older files, whose tokens hold no space.
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocab.keys():
            raise ValueError(
                f"model.merges: {merge!r} does not join two tokens of model.vocab to a "
                f"third; {_REMEDY}"
            )
    return values


def _parse_object(
    content: bytes, name: str, kinds: Mapping[str, field_rules.Kind]
) -> dict[str, Any]:
    try:
        values = reading.parse_json(content)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON ({error}); {_REMEDY}") from None
    return field_rules.check(name, values, kinds, _REMEDY)


def _read_template(values: Mapping[str, Any]) -> tuple[tuple[int, ...], list[int]]:
    """Returns the ids that the post-processor writes before and after a text."""
    opening: list[int] = []
    closing: list[int] = []
    try:
        for step in flatten(values.get("post_processor"), "processors"):
            if step["type"] == "ByteLevel":  # Changes offsets only.
                continue
            if step["type"] != "TemplateProcessing":
                raise ValueError(
                    f"its post_processor has the step {step['type']}; supported are "
                    "TemplateProcessing and ByteLevel: save the tokenizer again with "
                    "transformers 5"
                )
            sides: list[list[int]] = [[]]
            for part in step["single"]:
                if "Sequence" in part:
                    sides.append([])
                else:
                    token = step["special_tokens"][part["SpecialToken"]["id"]]
                    sides[-1] += token["ids"]
            opening, closing = sides[0] + opening, closing + sides[1]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"its post_processor is damaged; {_REMEDY}") from None
    return tuple(opening), closing


def flatten(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Returns the steps of a sequence, with nested sequences expanded."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in flatten(part, key)]


def with_end(content: bytes) -> bytes:
    """Adds EOS to a tokenizer that does not end texts, as those of base models.

    Gemma 3 only opens texts, and Qwen 3 does neither; their embedding models end texts
    with <eos> and <|endoftext|>. Other bytes are returned as they are.
    """
    values = _parse(content)
    special = {t["content"]: t["id"] for t in values["added_tokens"] if t["special"]}
    # Gemma's, T5's and Llama's, and Qwen's.
    ends = ("<eos>", "</s>", "<|endoftext|>")
    end = next((name for name in ends if name in special), None)
    if _read_template(values)[1] or end is None:
        return content
    logging.info("The tokenizer does not end texts; %s is added to it", end)
    before = flatten(values.get("post_processor"), "processors")
    steps = [dict(step) for step in before]
    if not any(step["type"] == "TemplateProcessing" for step in steps):
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        template = {"type": "TemplateProcessing", "special_tokens": {}}
        steps.append(template | {"single": [first], "pair": [first, second]})
    # A post-processor has at most one template: two fail on pairs of texts.
    template = next(step for step in steps if step["type"] == "TemplateProcessing")
    close = {"SpecialToken": {"id": end, "type_id": 0}}
    for key in ("single", "pair"):
        parts = [
            [part, close] if "Sequence" in part else [part]
            for part in template.get(key, ())
        ]
        template[key] = [part for pair in parts for part in pair]
    entry = {"id": end, "ids": [special[end]], "tokens": [end]}
    template["special_tokens"][end] = entry
    values["post_processor"] = {"type": "Sequence", "processors": steps}
    return json.dumps(values, indent=2, ensure_ascii=False).encode()


@functools.lru_cache(maxsize=4)
def _open(content: bytes, facts: _Facts) -> Any:
    if facts.dropped:
        values = json.loads(content)
        values["added_tokens"] = [
            t for t in values["added_tokens"] if t["id"] not in facts.dropped
        ]
        content = json.dumps(values).encode()
    library = import_tokenizers("a tokenizer.json", "tokenizers")
    with named_errors(vocabularies.JSON_FILE, _REMEDY):
        opened = library.Tokenizer.from_str(content.decode())
    opened.no_truncation()
    opened.no_padding()
    opened.encode_special_tokens = facts.splits_special
    return opened


def import_tokenizers(purpose: str, extra: str) -> Any:
    """Returns the package `tokenizers`; an ImportError names the extra."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs the tokenizers package: pip install "gecko-jax[{extra}]"'
        ) from error
    return tokenizers


@contextlib.contextmanager
def named_errors(place: object, remedy: str) -> Iterator[None]:
    """Adds the file to errors of the tokenizer libraries.

    `tokenizers` raises bare exceptions, and Rust panics that no `except Exception`
    catches; `sentencepiece` raises RuntimeError.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        detail = wording.printable(str(error))
        raise ValueError(f"{place}: not a tokenizer ({detail}); {remedy}") from error
