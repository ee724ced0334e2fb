"""The mixtures, and every rate in one place. The paper gives none: these are ours.

A mixture draws a task in proportion to its size, `min(size, cap) ** (1 / temperature)`,
or by fixed shares. `data.one_task_per_batch` is a switch of the config, since it fits
any mixture.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

from gecko_jax.data import task_table

# Where `gecko data prepare` puts sets, unless it is told another place.
PREPARED = "~/.cache/gecko_jax/prepared"


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Tasks and how often each is drawn.

    Attributes:
        tasks: Names, in order.
        shares: Task -> share of the mixture, in any unit; None for rates by size.
        cap: Most examples that count of a task, as T5's mixtures have it.
        temperature: 1 is proportional to size; larger is more even.
    """

    tasks: tuple[str, ...]
    shares: Mapping[str, float] | None = None
    cap: int | None = None
    temperature: float = 1.0

    def rates(self, names: Sequence[str], sizes: Sequence[int]) -> list[float]:
        """Returns the rate of each task, not normalized.

        Raises:
            ValueError: A rate is missing or no number above 0, or the temperature is.
        """
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0")
        if self.shares is not None:
            rates = [float(self.shares.get(name, 0)) for name in names]
        else:
            cap = self.cap or max(sizes, default=0)
            rates = [min(size, cap) ** (1 / self.temperature) for size in sizes]
        for name, rate in zip(names, rates, strict=True):
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"task {name} has the rate {rate:g}: it must be a number above 0; "
                    "give it one, or take the task out of the mixture"
                )
        return rates


_CLASSIFICATION = (
    "imdb_sentiment",
    "ag_news_topic",
    "clinc_intent",
    "goemotions_emotion",
    "civil_comments_toxicity",
)
_ACADEMIC = ("natural_questions", "hotpotqa", "fever", "medmcqa", "snli", "mnli")
_MIRACL = tuple(t.name for t in task_table.TASKS if t.name.startswith("miracl_"))

MIXTURES: Mapping[str, Mixture] = {
    "quickstart": Mixture(
        (
            "quickstart_docs",
            "quickstart_wordnet",
            "quickstart_code",
            "quickstart_term",
        )
    ),
    "gecko_prefinetune": Mixture(
        (
            "gooaq",
            "stackexchange_qa",
            "stackexchange_title_body",
            "wikipedia_title_body",
        ),
        cap=2_000_000,
    ),
    "gecko_fret": Mixture(("fret",)),
    "gecko_academic": Mixture(
        (*_ACADEMIC, *_CLASSIFICATION), cap=200_000, temperature=2.0
    ),
    "gecko_finetune": Mixture(
        ("fret", *_ACADEMIC, *_CLASSIFICATION), cap=1_000_000, temperature=2.0
    ),
    "gecko_multilingual": Mixture(
        ("fret", *_ACADEMIC, *_CLASSIFICATION, *_MIRACL),
        cap=1_000_000,
        temperature=2.0,
    ),
}


def resolve(
    mixture: str, prepared_dir: str | os.PathLike = PREPARED
) -> tuple[tuple[task_table.Task, ...], Mixture]:
    """Returns the tasks of a mixture, or of one task's name, with their files.

    Raises:
        ValueError: Neither table knows the name, or sets are not prepared.
    """
    chosen, found = describe(mixture)
    located = [locate(task, prepared_dir) for task in chosen]
    missing = [task.name for task in located if not task.files]
    if missing:
        raise ValueError(
            f"mixture {mixture}: {', '.join(missing)} not prepared in {prepared_dir}; "
            f"run `gecko data prepare {missing[0]}` for each"
        )
    return tuple(located), found


def describe(mixture: str) -> tuple[tuple[task_table.Task, ...], Mixture]:
    """Returns the rows of a mixture, or of one task's name, prepared or not."""
    table = {task.name: task for task in task_table.TASKS}
    if mixture in MIXTURES:
        found = MIXTURES[mixture]
    elif mixture in table:
        found = Mixture((mixture,))
    else:
        raise ValueError(
            f"mixture {mixture!r} is unknown: choose one of "
            f"{', '.join([*MIXTURES, *table])}, or give files of your own as data.files"
        )
    return tuple(table[name] for name in found.tasks), found


def locate(
    task: task_table.Task, prepared_dir: str | os.PathLike = PREPARED
) -> task_table.Task:
    """Returns the row with the files that `prepare` wrote, or none."""
    if not task.source:
        return task
    folder = pathlib.Path(prepared_dir).expanduser() / task.name
    if not (folder / "prepared.json").exists():
        return task
    return dataclasses.replace(
        task, files=tuple(str(path) for path in sorted(folder.glob("part-*.jsonl.gz")))
    )
