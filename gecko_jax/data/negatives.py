"""Negatives of a batch: finds tasks whose examples have no negative.

The contrastive loss compares the positive of an example with its negatives. Another
example with an equal query or an equal positive is a duplicate and not a negative, and
so is a hard negative that equals the positive. An example with only duplicates teaches
nothing: its loss is 0 with `loss.mask_duplicates`; without, the loss pushes the query
away from its own answers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, Int, Shaped


def has_negative(
    batch: Mapping[str, np.ndarray], *, all_hard_negatives: bool = False
) -> Bool[np.ndarray, " B"]:
    """Returns which examples of a batch have a negative that is not a duplicate.

    `all_hard_negatives` includes those of the group's other examples, as in the loss.
    """
    mask = batch["example_mask"]
    group, query, passage = (
        _numbers(batch[name][mask])
        for name in ("negative_group", "query_id", "passage_id")
    )
    # Examples of the group, minus those with an equal query or an equal positive, by
    # inclusion and exclusion.
    count = _count(group) - _count(group, query) - _count(group, passage)
    count += _count(group, query, passage)
    result = count > 0

    passages = batch["passage_id"][mask][:, None]
    hard = np.any(batch["negative_id"][mask] != passages, axis=-1)
    hard &= batch["negative_mask"][mask]
    result |= hard.any(axis=1)
    if all_hard_negatives:
        for each in np.unique(group):
            members = np.flatnonzero(group == each)
            negatives = batch["negative_id"][mask][members]
            is_present = batch["negative_mask"][mask][members]
            distinct = np.unique(negatives[is_present], axis=0)
            # Of two different negatives, at most one can equal a positive.
            if len(distinct) == 1:
                result[members] |= np.any(passages[members, 0] != distinct[0], axis=-1)
            elif len(distinct):
                result[members] = True
    has = np.zeros(len(mask), bool)
    has[mask] = result
    return has


class Watch:
    """Warns about tasks whose examples had no negative in any batch so far.

    A task is watched until one of its examples has a negative: in sound data, until the
    first batch.
    """

    def __init__(self, task_names: Sequence[str], *, all_hard_negatives: bool):
        self._task_names = task_names
        self._all_hard_negatives = all_hard_negatives
        # Watched task -> its examples so far, none of which had a negative.
        self._without = dict.fromkeys(range(len(task_names)), 0)

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Counts the examples of a batch."""
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
        """Warns once about each task that was seen without a negative."""
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
    """Returns a number for each row, equal for equal rows."""
    return np.unique(ids, axis=0, return_inverse=True)[1].reshape(-1)


def _count(*columns: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    """Returns for each row the number of rows that are equal in all columns."""
    rows = np.stack(columns, axis=1)
    _, number, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return counts[number.reshape(-1)]
