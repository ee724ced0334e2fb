"""Decontamination: lines of tasks that hold texts of evaluation sets.

   {"task": "qa", "query": "which small lizard runs along ceilings at night", ...}
-> Hit(place="pairs.jsonl:7", part="query", match=Match(set="geckos", ...))
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from gecko_jax.data import task_table
from gecko_jax.text import overlap


@dataclasses.dataclass(frozen=True)
class Hit:
    """A text of a line that matches an evaluation set."""

    place: str  # file and line
    part: str  # query, positive or negative
    match: overlap.Match  # the matching text of the set


@dataclasses.dataclass
class Shared:
    """Hits of a task in one evaluation set."""

    lines: int = 0  # lines with a hit
    same: int = 0  # lines with a text that equals one of the set
    # Side of the set -> lines with a hit on it.
    sides: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass
class Report:
    """Hits of a task in all evaluation sets."""

    task: str  # its name
    num_lines: int = 0
    # Name of a set -> its hits; only sets with a hit.
    shared: dict[str, Shared] = dataclasses.field(default_factory=dict)
    # The first hits, those on queries of a set before others.
    examples: list[Hit] = dataclasses.field(default_factory=list)


def find(
    tasks: Sequence[task_table.Task],
    known: overlap.Contamination,
    num_examples: int = 2,
) -> list[Report]:
    """Reads all lines of tasks, and reports the hits of each task in `known` sets.

    Raises ValueError if a line is invalid.
    """
    reports = {task.name: Report(task.name) for task in tasks}
    for task, place, pair in task_table.read_lines(tasks, "Comparing"):
        report = reports[task.name]
        report.num_lines += 1
        hits: dict[str, list[Hit]] = {}
        for part, content in (
            ("query", pair.query),
            ("positive", pair.positive),
            *(("negative", negative) for negative in pair.negatives),
        ):
            for match in known.find(content):
                hits.setdefault(match.set, []).append(Hit(place, part, match))
        for name, set_hits in hits.items():
            shared = report.shared.setdefault(name, Shared())
            shared.lines += 1
            shared.same += any(hit.match.is_same for hit in set_hits)
            shared.sides.update({hit.match.side for hit in set_hits})
            report.examples += set_hits
            report.examples.sort(key=lambda hit: hit.match.side != "query")
            del report.examples[num_examples:]
    return list(reports.values())
