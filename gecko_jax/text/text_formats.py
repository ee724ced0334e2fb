"""The encoding format: how queries and passages are written for the encoder.

Gecko reads a query together with a short natural-language *task description*, and a
passage together with its title (section 3.1, appendix B, table 7). Without this format
MTEB falls from 60.70 to 57.45 (table 4), so the format belongs to the checkpoint: every
model folder stores its `TextFormat`. Only this module knows the strings.

    query      "arrays in PostgreSQL", task "docs"
            -> "task: search result | query: arrays in PostgreSQL"
    passage    "Arrays of any built-in type ...", title "Arrays"
            -> "title: Arrays | text: Arrays of any built-in type ..."
    passage    no title
            -> "title: none | text: Arrays of any built-in type ..."
"""

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from gecko_jax.io import field_rules

# A longer text is a mistake in the data (a whole file in one field): the encoder reads
# only a few hundred tokens.
MAX_CHARACTERS = 200_000

# The task of a query that names none (section 3.1).
DEFAULT_TASK = "search result"

# Keys that `TextFormat.prompts` must have; the names are sentence-transformers'.
QUERY_PROMPT, DOCUMENT_PROMPT = "query", "document"
_BARE = "{text}"

# Query template of models with several prompts that were imported before `prompts`
# was a field.
_OLD_PROMPTS = "{task_description}{text}"

_TEXT, _TEXTS = field_rules.TEXT, field_rules.map_of(field_rules.TEXT)
_FIELDS = {
    **dict.fromkeys(("query", "passage", "no_title"), field_rules.optional(_TEXT)),
    **dict.fromkeys(("task_descriptions", "prompts"), field_rules.optional(_TEXTS)),
    "symmetric_tasks": field_rules.optional(field_rules.list_of(_TEXT)),
    "verbatim": field_rules.optional(field_rules.FLAG),
}


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How texts are written before they are tokenized."""

    # Template of a query, with `{text}` and optionally `{task_description}`.
    query: str = "task: {task_description} | query: {text}"
    # Template of a passage, with `{text}` and optionally `{title}`. Without `{title}`,
    # the title of a passage is written before its text, as in BEIR.
    passage: str = "title: {title} | text: {text}"
    no_title: str = "none"  # placeholder for a missing title, as in EmbeddingGemma
    # Task name -> the paper's natural-language *t*.
    task_descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    symmetric_tasks: tuple[str, ...] = ()  # their passages have the query form
    # Literal prefixes of queries by task name, of a sentence-transformers model, in
    # which nothing is expanded. "query" (for all other queries) and "document" (for
    # passages) replace the templates; without these two, the templates apply to every
    # task that is not in `prompts`.
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Write texts as they are. Otherwise they are cleaned, which does not change the
    # tokens of a SentencePiece model; a `tokenizer.json` keeps line breaks, tabs and
    # repeated spaces apart.
    verbatim: bool = False

    def __post_init__(self):
        has_templates = (self.query, self.passage) != (_BARE, _BARE)
        missing = {QUERY_PROMPT, DOCUMENT_PROMPT} - self.prompts.keys()
        if self.prompts and not has_templates and missing:
            raise ValueError(
                f"text format: prompts has no {' and no '.join(sorted(missing))}; "
                "add it, '' for no prompt"
            )
        if has_templates and len(missing) < 2:
            raise ValueError(
                f"text format: prompts need the query and passage templates "
                f"{_BARE!r}, not {self.query!r} and {self.passage!r}; remove one "
                "of the two"
            )
        for template, optional in (
            (self.query, "{task_description}"),
            (self.passage, "{title}"),
        ):
            fields = sorted(re.findall(r"\{\w+\}", template))
            if fields not in ([_BARE], sorted([_BARE, optional])):
                raise ValueError(
                    f"text format {template!r}: must hold {{text}} once, {optional} at "
                    "most once, and no other field"
                )

    @property
    def has_only_prompts(self) -> bool:
        """Whether prompts replace the templates, so that no description is written."""
        return QUERY_PROMPT in self.prompts

    def describe(self, task: str) -> str:
        """Returns the description of a task name; any other text describes itself."""
        return self.task_descriptions.get(task, task)

    def is_symmetric(self, task: str) -> bool:
        """Returns whether both sides of `task` are written in the query form."""
        return task in self.symmetric_tasks

    def format_query(self, text: str, task: str, description: str | None = None) -> str:
        """Writes one query; raises ValueError if the text is empty or only whitespace.

        `task` is a name in `task_descriptions` or `prompts`, or a description in plain
        words. A format with prompts cannot write descriptions and uses its "query"
        prompt instead. `description` overrides the task's.
        """
        written = self._write(text)
        # A query without a task must get the "query" prompt, even if the model has a
        # prompt named "search result".
        prompt = self.prompts.get(QUERY_PROMPT)
        if task != DEFAULT_TASK:
            prompt = self.prompts.get(task, prompt)
        if prompt is not None:
            return _join(prompt, text, written)
        if description is None:
            description = self.describe(task)
        return _fill(self.query, task_description=description, text=written)

    def format_passage(self, text: str, title: str | None = None) -> str:
        """Writes one passage; `title` None, empty or blank means no title."""
        written = self._write(text)
        has_title = bool(title and title.strip())
        title = clean(title) if title and has_title else self.no_title
        if has_title and "{title}" not in self.passage:
            text = written = f"{title} {written}"
        if self.has_only_prompts:
            return _join(self.prompts[DOCUMENT_PROMPT], text, written)
        return _fill(self.passage, title=title, text=written)

    def _write(self, text: str) -> str:
        cleaned = clean(text)  # Checks the text, too.
        return text if self.verbatim else cleaned

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        values = dataclasses.asdict(self)
        values["symmetric_tasks"] = list(self.symmetric_tasks)
        # Omitted where unused, so that other formats keep their checksums.
        return {
            k: v for k, v in values.items() if v or k not in ("prompts", "verbatim")
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TextFormat":
        """Inverse of `to_dict`; also reads how older versions stored prompts.

        Raises ValueError if a field is unknown or has a wrong type.
        """
        field_rules.check("text_format", values, _FIELDS, "restore it", only=True)
        fields = {name: value for name, value in values.items() if value is not None}
        if "symmetric_tasks" in fields:
            fields["symmetric_tasks"] = tuple(fields["symmetric_tasks"])
        passage = fields.get("passage", "")
        prompts = fields.get("task_descriptions", {})
        is_old = fields.get("query") == _OLD_PROMPTS and DEFAULT_TASK in prompts
        if is_old and passage.endswith(_BARE) and "{title}" not in passage:
            prompts = {
                **prompts,
                QUERY_PROMPT: prompts[DEFAULT_TASK],
                DOCUMENT_PROMPT: passage.removesuffix(_BARE),
            }
            fields |= {"query": _BARE, "passage": _BARE}
            fields |= {"task_descriptions": {}, "prompts": prompts}
        return cls(**fields)


# Format of a plain encoder, which reads texts as they are.
PLAIN = TextFormat(query=_BARE, passage=_BARE, no_title="")
# Qwen3-Embedding's format: passages are written as they are.
INSTRUCT = TextFormat(
    query="Instruct: {task_description}\nQuery:{text}", passage=_BARE, no_title=""
)


def from_prompts(prompts: Mapping[str, str]) -> TextFormat:
    """Returns the templates that write such prompts, or a format of only prompts.

    EmbeddingGemma's prompts are Gecko's templates, and Qwen3-Embedding's are
    `INSTRUCT`. As templates, they also write titles and descriptions of other tasks.
    `prompts` has the prompts by task name, "query" and "document" included.
    """
    for known in (TextFormat(), INSTRUCT):
        head, _, tail = known.query.removesuffix(_BARE).partition("{task_description}")
        descriptions = {
            name: prompt[len(head) : -len(tail)]
            for name, prompt in prompts.items()
            if prompt.startswith(head) and prompt[len(head) :].endswith(tail)
        }
        document = known.passage.replace("{title}", known.no_title).removesuffix(_BARE)
        if QUERY_PROMPT in descriptions and prompts[DOCUMENT_PROMPT] == document:
            others = prompts.keys() - descriptions.keys() - {DOCUMENT_PROMPT}
            query = descriptions.pop(QUERY_PROMPT)
            if query != DEFAULT_TASK:
                descriptions[DEFAULT_TASK] = query
            return dataclasses.replace(
                known,
                task_descriptions=descriptions,
                prompts={name: prompts[name] for name in sorted(others)},
            )
    return dataclasses.replace(PLAIN, prompts=prompts)


def _fill(template: str, **fields: str) -> str:
    """Fills all fields in one pass, because a title may itself hold "{text}"."""
    return _check_characters(
        re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], template)
    )


def _join(prompt: str, raw: str, written: str) -> str:
    """Writes a prompt before a text; leading whitespace of the text becomes one space.

    Cleaning would drop it, but sentence-transformers joins prompt and text unchanged.
    """
    has_space = prompt and not prompt[-1].isspace() and raw[:1].isspace()
    if has_space and not written[:1].isspace():
        prompt += " "
    return _check_characters(prompt + written)


def _check_characters(formatted: str) -> str:
    try:
        formatted.encode()
    except UnicodeEncodeError as error:  # Python's escape of a byte that is not UTF-8.
        raise ValueError(
            f"text {formatted[:40]!r} holds {formatted[error.start]!r}, which is no "
            "character; write it as UTF-8"
        ) from None
    return formatted


def clean(text: str) -> str:
    """Returns `text` in NFC, each run of whitespace replaced by one space.

    Raises ValueError if the text is empty, or longer than `MAX_CHARACTERS`.
    """
    cleaned = " ".join(unicodedata.normalize("NFC", text).split())
    if not cleaned:
        raise ValueError(
            f"text {text[:40]!r} is empty: a query or passage needs at least one "
            "visible character; remove it or fill it in"
        )
    if len(cleaned) > MAX_CHARACTERS:
        raise ValueError(
            f"text {cleaned[:40]!r}... has {len(cleaned):,} characters, at most "
            f"{MAX_CHARACTERS:,} are allowed; split it into passages"
        )
    return cleaned


def content_id(text: str, title: str | None = None) -> tuple[int, int]:
    """Returns a 64-bit hash of a cleaned text and title, as two uint32 words.

    One word would not do: at 32 bits a batch of 65,536 has a collision with a
    probability of 39%, at 64 bits of 1e-10.
    """
    content = clean(text)
    if title and title.strip():
        content = f"{clean(title)}\n{content}"
    return hash_words(content)


def hash_words(content: str) -> tuple[int, int]:
    """Returns the first 64 bits of a string's BLAKE2b digest, as two uint32 words."""
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
