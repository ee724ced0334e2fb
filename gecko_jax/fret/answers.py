r"""What a model wrote, read as text that nobody vouches for.

    " fact checking\nQuery: geckos shed their skin"  ->  ("fact checking", "geckos ...")

An answer that breaks a rule is `Rejected` with a reason of a few words; nothing is
mended that would change what the model said.
"""

import dataclasses
import unicodedata
from collections.abc import Sequence

from gecko_jax.fret import prompts
from gecko_jax.text import word_rule

_QUOTES = "\"'`“”‘’«»*"
# The most that a task description may be, in words and characters.
_MAX_TASK_WORDS, _MAX_TASK_CHARACTERS = 8, 60


class Rejected(Exception):
    """An answer that is no query."""

    def __init__(self, reason: str):
        """Keeps the reason, by which answers are counted."""
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a query must be.

    Attributes:
        min_words: Fewest words.
        max_words: Most words.
        max_copied_words: Longest run of words taken from the passage; 0 for any.
    """

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
    """Returns task description and query of an answer.

    Args:
        answer: What the model wrote after the prompt.
        prompt: That it was asked with.
        rules: What a query must be.
        task: The task that was given; None if the model was to write it.
        passage: The seed.
        shots: Examples of the prompt, none of which may be repeated.
        is_cut: The limit of tokens ended the answer: a query without an end is none.

    Raises:
        Rejected: A rule is broken.
    """
    for stop in prompt.stop:  # Not every server stops where it was told to.
        head, found, _ = answer.partition(stop)
        answer, is_cut = head, is_cut and not found
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    if not lines:
        raise Rejected("empty")
    if task is None:
        marker = prompt.markers[-1]
        if len(lines) < 2 or not lines[1].startswith(marker):
            raise Rejected("no_query")
        task = _clean(lines[0]).lower().rstrip(".:")
        lines[1] = lines[1].removeprefix(marker)
        if not 0 < word_rule.count(word_rule.words(task)) <= _MAX_TASK_WORDS:
            raise Rejected("no_task")
        if len(task) > _MAX_TASK_CHARACTERS:
            raise Rejected("no_task")
        lines = lines[1:]
    if is_cut and len(lines) == 1:
        raise Rejected("cut_off")
    query = _clean(lines[0])
    _check(query, prompt, rules, passage, shots)
    if any(marker.lower() in task.lower() for marker in prompt.markers):
        raise Rejected("marker")
    return task, query


def _check(
    query: str,
    prompt: prompts.Prompt,
    rules: Rules,
    passage: str,
    shots: Sequence[int],
) -> None:
    words = word_rule.words(query)
    num_words = word_rule.count(words)
    if "\ufffd" in query:
        raise Rejected("not_text")
    if any(marker.lower() in query.lower() for marker in prompt.markers):
        raise Rejected("marker")
    if prompt.neutralize(query or "-") != (query or "-"):
        raise Rejected("special_token")
    if num_words < rules.min_words:
        raise Rejected("too_short")
    if num_words > rules.max_words:
        raise Rejected("too_long")
    copied = {
        " ".join(word_rule.words(prompt.examples[shot]["query"])) for shot in shots
    }
    if " ".join(words) in copied:
        raise Rejected("copied_example")
    run = rules.max_copied_words
    if run and longest_copy(words, word_rule.words(passage)) > run:
        raise Rejected("copied_passage")


def longest_copy(words: Sequence[str], source: Sequence[str]) -> int:
    """Returns how many words the longest run has that `source` holds too."""
    best = end = 0
    text = f" {' '.join(source)} "
    for begin in range(len(words)):
        end = max(begin, end)
        while end < len(words) and f" {' '.join(words[begin : end + 1])} " in text:
            end += 1
        best = max(best, word_rule.count(words[begin:end]))
    return best


def _clean(line: str) -> str:
    """Takes off the quotes and stars that models put around an answer."""
    line = " ".join(unicodedata.normalize("NFC", line).split())
    while len(line) > 1 and line[0] in _QUOTES and line[-1] in _QUOTES:
        line = line[1:-1].strip()
    return line
