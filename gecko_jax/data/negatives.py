"""Negatives of a batch: which examples have any, so that no task trains on nothing.

The contrastive loss of an example compares its positive with negatives. A duplicate
does not count as a negative: another example with an equal query or an equal positive,
or a hard negative that is the positive. An example that has only duplicates teaches
nothing. Its loss is 0 with `loss.mask_duplicates`; without, the loss pushes the query
away from its own answers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, Int, Shaped


def has_negative(
    batch: Mapping[str, np.ndarray], *, all_hard_negatives: bool = False
) -> Bool[np.ndarray, " B"]:
    """Returns which examples of a batch have a negative that is no duplicate.

    Args:
        batch: Model features, see `pipeline`.
        all_hard_negatives: Counts the hard negatives of the other examples of a group
            too, as `losses.contrastive_loss` does.
    """
    mask = batch["example_mask"]
    group, query, passage = (
        _numbers(batch[name][mask])
        for name in ("negative_group", "query_id", "passage_id")
    )
    # Examples of the group, less those with an equal query or an equal positive.
    count = _count(group)
    count += _count(group, query, passage) - _count(group, query)
    count -= _count(group, passage)
    present = count > 0

    passages = batch["passage_id"][mask][:, None]
    hard = np.any(batch["negative_id"][mask] != passages, axis=-1)
    hard &= batch["negative_mask"][mask]
    present |= hard.any(axis=1)
    if all_hard_negatives:
        for each in np.unique(group):
            members = np.flatnonzero(group == each)
            theirs = batch["negative_id"][mask][members]
            distinct = np.unique(theirs[batch["negative_mask"][mask][members]], axis=0)
            if len(distinct) == 1:
                present[members] |= np.any(passages[members, 0] != distinct[0], axis=-1)
            elif len(distinct):
                present[members] = True
    result = np.zeros(len(mask), bool)
    result[mask] = present
    return result


class Watch:
    """Warns of tasks whose examples had no negative in any batch so far.

    The watch over a task ends when one of its examples has a negative: in sound data,
    with the first batch.
    """

    def __init__(self, task_names: Sequence[str], *, all_hard_negatives: bool):
        """Starts with every task.

        Args:
            task_names: What `task_index` points into.
            all_hard_negatives: See `has_negative`.
        """
        self._task_names = task_names
        self._all_hard_negatives = all_hard_negatives
        # Task -> its examples so far, none of which had a negative.
        self._without = dict.fromkeys(range(len(task_names)), 0)

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Looks at a batch."""
        if not self._without:
            return
        tasks = np.where(batch["example_mask"], batch["task_index"], -1)
        has = has_negative(batch, all_hard_negatives=self._all_hard_negatives)
        for task in list(self._without):
            members = tasks == task
            if has[members].any():
                del self._without[task]
            else:
                self._without[task] += int(members.sum())

    def warn(self) -> None:
        """Logs a warning of each task that was seen without a negative, once."""
        for task, number in list(self._without.items()):
            if not number:
                continue
            logging.warning(
                "Task %s: none of its first %d examples has a negative, so it teaches "
                "nothing: all queries or all positives of a batch are duplicates; give "
                "it others, hard negatives (gecko data prepare), or a larger "
                "data.batch_size",
                self._task_names[task],
                number,
            )
            del self._without[task]


def _numbers(ids: Shaped[np.ndarray, "B ..."]) -> Int[np.ndarray, " B"]:
    """Returns a number for each row, equal where the rows are."""
    return np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1)


def _count(*columns: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    """Returns for each row how many rows are equal to it in all columns."""
    rows = np.stack(columns, axis=1)
    _, number, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return counts[number.reshape(-1)]
