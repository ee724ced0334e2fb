r"""Parsing of generated answers, which are untrusted text.

    " fact checking\nQuery: geckos shed their skin"  ->  ("fact checking", "geckos ...")

An answer that breaks a rule is `Rejected` with a short reason. Nothing is repaired that
would change the meaning.
"""

import dataclasses
import unicodedata
from collections.abc import Sequence

from gecko_jax.fret import prompts
from gecko_jax.text import word_rule

_QUOTES = "\"'`“”‘’«»*"


class Rejected(Exception):
    """An answer without a valid query; the text is the reason, which is counted."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Limits of a query: keys `generate` of `configs/fret.py`."""

    min_words: int
    max_words: int
    max_copied_words: int


def parse(
    answer: str,
    prompt: prompts.Prompt,
    rules: Rules,
    *,
    task: str | None,
    passage: str,
    shots: Sequence[int],
    is_cut: bool,
) -> tuple[str, str]:
    """Returns task description and query of an answer, or raises `Rejected`.

    `task` is None if the model writes it. The query may not repeat those of `shots`,
    the examples in the prompt. `is_cut` says whether the token limit ended the answer:
    a query without end is rejected.
    """
    for stop in prompt.stop:  # Not every server stops there.
        answer, separator, _ = answer.partition(stop)
        is_cut = is_cut and not separator
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    if not lines:
        raise Rejected("empty")
    if task is None:
        marker = prompt.markers[-1]
        if len(lines) < 2 or not lines[1].startswith(marker):
            raise Rejected("no_query")
        task = _clean(lines[0]).lower().rstrip(".:")
        num_words = word_rule.count(word_rule.words(task))
        if not 0 < num_words <= 8 or len(task) > 60:
            raise Rejected("no_task")
        lines = [lines[1].removeprefix(marker), *lines[2:]]
    if is_cut and len(lines) == 1:
        raise Rejected("cut_off")
    query = _clean(lines[0])
    if reason := _find_rejection(query, prompt, rules, passage, shots):
        raise Rejected(reason)
    if _has_marker(task, prompt):
        raise Rejected("marker")
    return task, query


def _find_rejection(
    query: str, prompt: prompts.Prompt, rules: Rules, passage: str, shots: Sequence[int]
) -> str | None:
    words = word_rule.words(query)
    num_words = word_rule.count(words)
    if "\ufffd" in query:
        return "not_text"
    if _has_marker(query, prompt):
        return "marker"
    if query and prompt.neutralize(query) != query:
        return "special_token"
    if num_words < rules.min_words:
        return "too_short"
    if num_words > rules.max_words:
        return "too_long"
    if words in (word_rule.words(prompt.examples[shot]["query"]) for shot in shots):
        return "copied_example"
    limit = rules.max_copied_words
    if limit and longest_copy(words, word_rule.words(passage)) > limit:
        return "copied_passage"
    return None


def _has_marker(text: str, prompt: prompts.Prompt) -> bool:
    return any(marker.lower() in text.lower() for marker in prompt.markers)


def longest_copy(words: Sequence[str], source: Sequence[str]) -> int:
    """Returns the length in words of the longest run that `source` contains, too."""
    best = end = 0
    text = f" {' '.join(source)} "
    for begin in range(len(words)):
        end = max(begin, end)
        while end < len(words) and f" {' '.join(words[begin : end + 1])} " in text:
            end += 1
        best = max(best, word_rule.count(words[begin:end]))
    return best


def _clean(line: str) -> str:
    """Removes the quotes and asterisks that models put around an answer."""
    line = " ".join(unicodedata.normalize("NFC", line).split())
    while len(line) > 1 and line[0] in _QUOTES and line[-1] in _QUOTES:
        line = line[1:-1].strip()
    return line
