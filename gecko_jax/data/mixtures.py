"""The mixtures and their rates. The paper gives no rates: these are our choice.

A mixture draws each task in proportion to `min(size, cap) ** (1 / temperature)`.
`data.one_task_per_batch` is a config key, because it applies to any mixture.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import gecko_jax.config
from gecko_jax.data import task_table

# Default folder of `gecko data prepare`.
PREPARED: str = gecko_jax.config.TRAINING["data.prepared_dir"].default


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Tasks and how often each is drawn."""

    tasks: tuple[str, ...]
    cap: int | None = None  # largest size that counts, as in T5's mixtures
    temperature: float = 1.0  # 1 is proportional to size; larger is more even

    def rates(self, names: Sequence[str], sizes: Sequence[int]) -> list[float]:
        """Returns the rate of each task, not normalized.

        Raises ValueError if the temperature or a rate is not a number above 0.
        """
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature}: must be above 0")
        cap = self.cap or max(sizes, default=0)
        rates = [min(size, cap) ** (1 / self.temperature) for size in sizes]
        for name, rate in zip(names, rates, strict=True):
            if not 0 < rate < math.inf:
                raise ValueError(
                    f"task {name} has the rate {rate:g}: it must be a number above 0; "
                    "add examples, or remove the task from the mixture"
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


def _starting_with(prefix: str) -> tuple[str, ...]:
    names = (task.name for task in task_table.TASKS)
    return tuple(name for name in names if name.startswith(prefix))


MIXTURES: Mapping[str, Mixture] = {
    "quickstart": Mixture(
        ("quickstart_docs", "quickstart_wordnet", "quickstart_code", "quickstart_term")
    ),
    "quickstart_fret": Mixture(_starting_with("quickstart_fret_")),
    "quickstart_relabelled": Mixture(_starting_with("quickstart_relabelled_")),
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
        ("fret", *_ACADEMIC, *_CLASSIFICATION, *_starting_with("miracl_")),
        cap=1_000_000,
        temperature=2.0,
    ),
}


def resolve(
    mixture: str, prepared_dir: str | os.PathLike = PREPARED
) -> tuple[tuple[task_table.Task, ...], Mixture]:
    """Returns the tasks of a mixture, or the task of that name, with their files.

    Raises ValueError if the name is unknown, or sets are not prepared.
    """
    rows, drawn = describe(mixture)
    tasks = tuple(locate(row, prepared_dir) for row in rows)
    missing = [task.name for task in tasks if not task.files]
    if missing:
        raise ValueError(
            f"mixture {mixture}: {', '.join(missing)} not prepared in {prepared_dir}; "
            f"run `gecko data prepare {missing[0]}` for each"
        )
    return tasks, drawn


def describe(mixture: str) -> tuple[tuple[task_table.Task, ...], Mixture]:
    """Returns the rows of a mixture, or the row of that name, prepared or not."""
    table = {task.name: task for task in task_table.TASKS}
    if mixture not in MIXTURES and mixture not in table:
        raise ValueError(
            f"mixture {mixture!r} is unknown: choose one of "
            f"{', '.join([*MIXTURES, *table])}, or give your own files as data.files"
        )
    drawn = MIXTURES.get(mixture) or Mixture((mixture,))
    return tuple(table[name] for name in drawn.tasks), drawn


def locate(
    task: task_table.Task, prepared_dir: str | os.PathLike = PREPARED
) -> task_table.Task:
    """Returns the row with the files that `prepare` wrote, if it is finished."""
    folder = pathlib.Path(prepared_dir).expanduser() / task.name
    if not task.source or not (folder / "prepared.json").exists():
        return task
    files = sorted(map(str, folder.glob("part-*.jsonl.gz")))
    return dataclasses.replace(task, files=tuple(files))
