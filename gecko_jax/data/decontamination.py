"""Lines of a task that hold texts of evaluation sets.

   {"task": "qa", "query": "which small lizard runs along ceilings at night", ...}
-> Hit(place="pairs.jsonl:7", part="query", match=Match(set="geckos", ...))
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from gecko_jax.data import jsonl, task_table
from gecko_jax.io import progress
from gecko_jax.text import overlap


@dataclasses.dataclass(frozen=True)
class Hit:
    """A text of a line that an evaluation set holds.

    Attributes:
        place: File and line.
        part: query, positive or negative.
        match: What it is in the set.
    """

    place: str
    part: str
    match: overlap.Match


@dataclasses.dataclass
class Shared:
    """What a task shares with one evaluation set.

    Attributes:
        lines: Lines with a hit.
        same: Those of them with a text that is the same as one of the set.
        sides: Side of the set -> those of them that hold a text of it.
    """

    lines: int = 0
    same: int = 0
    sides: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, hits: Sequence[Hit]) -> None:
        """Takes the hits of one line in."""
        self.lines += 1
        self.same += any(hit.match.is_same for hit in hits)
        self.sides.update({hit.match.side for hit in hits})


@dataclasses.dataclass
class Report:
    """What a task shares with evaluation sets.

    Attributes:
        task: Its name.
        num_lines: Its lines.
        shared: Name of a set -> what it shares; only sets with a hit.
        examples: The first hits, those on queries of a set before others.
    """

    task: str
    num_lines: int = 0
    shared: dict[str, Shared] = dataclasses.field(default_factory=dict)
    examples: list[Hit] = dataclasses.field(default_factory=list)


def find(
    tasks: Sequence[task_table.Task],
    known: overlap.Contamination,
    num_examples: int = 2,
) -> list[Report]:
    """Reads every file through; returns a report of each task.

    Args:
        tasks: With their files.
        known: The texts of the evaluation sets.
        num_examples: Hits of a task that are kept to be shown.

    Raises:
        ValueError: A bad line.
    """
    reports = {task.name: Report(task.name) for task in tasks}
    for path in dict.fromkeys(path for task in tasks for path in task.files):
        here = {t.source_task: reports[t.name] for t in tasks if path in t.files}
        for place, _, pair in progress.track(
            jsonl.read_lines(path), f"Comparing {path}"
        ):
            if pair.task not in here:
                continue
            report = here[pair.task]
            report.num_lines += 1
            hits: dict[str, list[Hit]] = {}
            for part, content in (
                ("query", pair.query),
                ("positive", pair.positive),
                *(("negative", negative) for negative in pair.negatives),
            ):
                for match in known.find(content):
                    hits.setdefault(match.set, []).append(Hit(place, part, match))
            for name, found in hits.items():
                report.shared.setdefault(name, Shared()).add(found)
                report.examples += found
                report.examples.sort(key=lambda hit: hit.match.side != "query")
                del report.examples[num_examples:]
    return list(reports.values())
