"""The encoding format: what a query and a passage look like to the encoder.

Gecko reads a query together with a short natural-language *task description*, and a
passage together with its title (section 3.1, appendix B, table 7). Without this format
MTEB falls from 60.70 to 57.45 (table 4), so the format belongs to the checkpoint: every
model folder carries its `TextFormat`, and only this module knows the strings.

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

# Longer inputs are always a mistake in the data (a whole file in one field): the
# encoder reads a few hundred tokens of it.
MAX_CHARACTERS = 200_000

# The task of a query when none is named (section 3.1).
DEFAULT_TASK = "search result"

# Prompts that every `TextFormat.prompts` holds; the names are sentence-transformers'.
QUERY_PROMPT, DOCUMENT_PROMPT = "query", "document"
_BARE = "{text}"

# Query template of imported models with several prompts, before `prompts` was a field.
_OLD_PROMPTS = "{task_description}{text}"

_FIELDS = {
    "query": field_rules.optional(field_rules.TEXT),
    "passage": field_rules.optional(field_rules.TEXT),
    "no_title": field_rules.optional(field_rules.TEXT),
    "task_descriptions": field_rules.optional(field_rules.map_of(field_rules.TEXT)),
    "symmetric_tasks": field_rules.optional(field_rules.list_of(field_rules.TEXT)),
    "prompts": field_rules.optional(field_rules.map_of(field_rules.TEXT)),
}


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How texts are written before they are tokenized.

    Attributes:
        query: Template of a query, with `{text}` and maybe `{task_description}`.
        passage: Template of a passage, with `{text}` and maybe `{title}`; where it has
            no title, a title is written before the text (BEIR's convention).
        no_title: Stands for a title that is missing (EmbeddingGemma's convention).
        task_descriptions: Task name -> the paper's natural-language *t*.
        symmetric_tasks: Tasks whose passages are written in the query form.
        prompts: Literal text before a text, in place of the templates: before queries
            by the name of their task, before all other queries that of "query", before
            passages that of "document". Empty where the templates decide. A model of
            sentence-transformers has prompts, which no field may expand in.
    """

    query: str = "task: {task_description} | query: {text}"
    passage: str = "title: {title} | text: {text}"
    no_title: str = "none"
    task_descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    symmetric_tasks: tuple[str, ...] = ()
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.prompts:
            self._check_prompts()
        for template, field in (
            (self.query, "{task_description}"),
            (self.passage, "{title}"),
        ):
            found = sorted(re.findall(r"\{\w+\}", template))
            if found not in (["{text}"], sorted(["{text}", field])):
                raise ValueError(
                    f"text format {template!r}: must hold {{text}} once, {field} at "
                    "most once, and no other field"
                )

    def _check_prompts(self) -> None:
        if not all(
            isinstance(part, str) for pair in self.prompts.items() for part in pair
        ):
            raise ValueError(
                f"text format: prompts={dict(self.prompts)!r}, must be texts by name"
            )
        missing = {QUERY_PROMPT, DOCUMENT_PROMPT} - self.prompts.keys()
        if missing:
            raise ValueError(
                f"text format: prompts has no {' and no '.join(sorted(missing))}; add "
                "it, '' for no prompt"
            )
        if (self.query, self.passage) != (_BARE, _BARE):
            raise ValueError(
                f"text format: prompts stand before a bare text, so query and passage "
                f"must be {_BARE!r}, not {self.query!r} and {self.passage!r}"
            )

    def describe(self, task: str) -> str:
        """Returns the description of a task name; any other text describes itself."""
        return self.task_descriptions.get(task, task)

    def is_symmetric(self, task: str) -> bool:
        """Whether both sides of `task` are written in the query form."""
        return task in self.symmetric_tasks

    def format_query(self, text: str, task: str, description: str | None = None) -> str:
        """Writes one query.

        Args:
            text: The raw query.
            task: A name in `task_descriptions` or `prompts`, or a description in plain
                words. A format with prompts has no place for a description, and takes
                the prompt of any query.
            description: Stands in place of the task's description.

        Raises:
            ValueError: The text is empty or only whitespace.
        """
        raw, text = text, clean(text)
        if self.prompts:
            # What no task is named for must get the prompt of any query, even where a
            # prompt is called "search result".
            name = (
                task if task in self.prompts and task != DEFAULT_TASK else QUERY_PROMPT
            )
            return _check_characters(_join(self.prompts[name], raw, text))
        if description is None:
            description = self.describe(task)
        return _fill(self.query, task_description=description, text=text)

    def format_passage(self, text: str, title: str | None = None) -> str:
        """Writes one passage; `title` None, empty or blank stands for no title."""
        raw, text = text, clean(text)
        has_title = bool(title and title.strip())
        title = clean(title) if title and has_title else self.no_title
        if has_title and "{title}" not in self.passage:
            raw = text = f"{title} {text}"
        if self.prompts:
            return _check_characters(_join(self.prompts[DOCUMENT_PROMPT], raw, text))
        return _fill(self.passage, title=title, text=text)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        values = {
            "query": self.query,
            "passage": self.passage,
            "no_title": self.no_title,
            "task_descriptions": dict(self.task_descriptions),
            "symmetric_tasks": list(self.symmetric_tasks),
        }
        # Left out where empty: the format and its checksums are then those of old.
        return values | ({"prompts": dict(self.prompts)} if self.prompts else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TextFormat":
        """Inverse of `to_dict`; also reads how prompts were stored before.

        Raises:
            ValueError: A field is unknown, or is not what `to_dict` writes.
        """
        field_rules.check("text_format", values, _FIELDS, "restore it", only=True)
        read = {name: value for name, value in values.items() if value is not None}
        read |= {
            "task_descriptions": dict(read.get("task_descriptions", {})),
            "symmetric_tasks": tuple(read.get("symmetric_tasks", ())),
            "prompts": dict(read.get("prompts", {})),
        }
        passage = read.get("passage", "")
        prompts = read["task_descriptions"]
        if (
            read.get("query") == _OLD_PROMPTS
            and DEFAULT_TASK in prompts
            and passage.endswith(_BARE)
            and "{title}" not in passage
        ):
            read |= {
                "query": _BARE,
                "passage": _BARE,
                "task_descriptions": {},
                "prompts": {
                    **prompts,
                    QUERY_PROMPT: prompts[DEFAULT_TASK],
                    DOCUMENT_PROMPT: passage.removesuffix(_BARE),
                },
            }
        return cls(**read)


def _fill(template: str, **fields: str) -> str:
    """Fills all fields in one pass: a title may itself hold "{text}"."""
    return _check_characters(
        re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], template)
    )


def _join(prompt: str, raw: str, cleaned: str) -> str:
    """Writes a prompt before a text, whose leading whitespace keeps them apart.

    Cleaning drops it, but sentence-transformers joins the two as they are.
    """
    is_apart = not prompt or prompt[-1].isspace() or not raw[:1].isspace()
    space = "" if is_apart else " "
    return f"{prompt}{space}{cleaned}"


def _check_characters(filled: str) -> str:
    try:
        filled.encode()
    except UnicodeEncodeError as error:  # Python's mark of a byte that is no text.
        raise ValueError(
            f"text {filled[:40]!r} holds {filled[error.start]!r}, which is no "
            "character; write it as UTF-8"
        ) from None
    return filled


def clean(text: str) -> str:
    """Returns `text` in NFC with runs of whitespace made one space.

    Raises:
        ValueError: Nothing is left, or the text is longer than `MAX_CHARACTERS`.
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
            f"{MAX_CHARACTERS:,} are allowed: split it into passages"
        )
    return cleaned


def content_id(text: str, title: str | None = None) -> tuple[int, int]:
    """Returns the two uint32 words by which equal texts are known.

    Two words, because 32-bit hashes collide at batch sizes of 65k: the chance that a
    batch of 65,536 holds a collision is 39% at 32 bits and 1e-10 at 64.
    """
    content = clean(text)
    if title and title.strip():
        content = f"{clean(title)}\n{content}"
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
