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

# Longer inputs are always a mistake in the data (a whole file in one field): the
# encoder reads a few hundred tokens of it.
MAX_CHARACTERS = 200_000

# The task of a query when none is named (section 3.1).
DEFAULT_TASK = "search result"


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
    """

    query: str = "task: {task_description} | query: {text}"
    passage: str = "title: {title} | text: {text}"
    no_title: str = "none"
    task_descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    symmetric_tasks: tuple[str, ...] = ()

    def __post_init__(self):
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

    def describe(self, task: str) -> str:
        """Returns the description of a task name; any other text describes itself."""
        return self.task_descriptions.get(task, task)

    def is_symmetric(self, task: str) -> bool:
        """Whether both sides of `task` are written in the query form."""
        return task in self.symmetric_tasks

    def format_query(self, text: str, task: str) -> str:
        """Writes one query.

        Args:
            text: The raw query.
            task: A name in `task_descriptions`, or a description in plain words.

        Raises:
            ValueError: The text is empty or only whitespace.
        """
        return _fill(self.query, task_description=self.describe(task), text=clean(text))

    def format_passage(self, text: str, title: str | None = None) -> str:
        """Writes one passage; `title` None, empty or blank stands for no title."""
        text = clean(text)
        has_title = bool(title and title.strip())
        title = clean(title) if title and has_title else self.no_title
        if has_title and "{title}" not in self.passage:
            text = f"{title} {text}"
        return _fill(self.passage, title=title, text=text)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return dataclasses.asdict(self) | {
            "task_descriptions": dict(self.task_descriptions),
            "symmetric_tasks": list(self.symmetric_tasks),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TextFormat":
        """Inverse of `to_dict`."""
        return cls(
            **{
                **values,
                "task_descriptions": dict(values.get("task_descriptions", {})),
                "symmetric_tasks": tuple(values.get("symmetric_tasks", ())),
            }
        )


def _fill(template: str, **fields: str) -> str:
    """Fills all fields in one pass: a title may itself hold "{text}"."""
    filled = re.sub(r"\{(\w+)\}", lambda match: fields[match[1]], template)
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
