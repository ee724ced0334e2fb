import numpy as np
import pytest

from gecko_jax.data import negatives


def _batch(rng, size, num_hard, num_ids=3, num_groups=2):
    def ids(*shape):
        return rng.integers(0, num_ids, (*shape, 2), np.uint32)

    return {
        "query_id": ids(size),
        "passage_id": ids(size),
        "negative_id": ids(size, num_hard),
        "negative_mask": rng.random((size, num_hard)) < 0.2,
        "example_mask": rng.random(size) < 0.8,
        "negative_group": rng.integers(0, num_groups, size, np.int32),
        "task_index": rng.integers(0, 2, size, np.int32),
    }


def _loop(batch, all_hard_negatives):
    """Whether each example has a negative, pair by pair."""
    query, passage = batch["query_id"], batch["passage_id"]
    size = len(query)
    has = np.zeros(size, bool)
    there = np.flatnonzero(batch["example_mask"])
    for i in there:
        for j in there:
            is_near = batch["negative_group"][i] == batch["negative_group"][j]
            if is_near and i != j:
                is_other = (query[i] != query[j]).any()
                has[i] |= is_other and (passage[i] != passage[j]).any()
            if i == j or (all_hard_negatives and is_near):
                for given, mask in zip(
                    batch["negative_id"][j], batch["negative_mask"][j], strict=True
                ):
                    has[i] |= mask and (given != passage[i]).any()
    return has


@pytest.mark.parametrize("all_hard_negatives", [False, True])
@pytest.mark.parametrize(("size", "num_ids"), [(1, 3), (2, 1), (4, 2), (9, 2), (20, 9)])
@pytest.mark.parametrize("num_hard", [0, 1, 3])
def test_who_has_a_negative(size, num_ids, num_hard, all_hard_negatives):
    rng = np.random.default_rng(size)
    seen = set()
    for _ in range(40):
        batch = _batch(rng, size, num_hard, num_ids)
        expected = _loop(batch, all_hard_negatives)
        found = negatives.has_negative(batch, all_hard_negatives=all_hard_negatives)
        np.testing.assert_array_equal(found, expected)
        seen |= set(expected[batch["example_mask"]].tolist())
    assert seen


def test_a_task_is_told_once_and_only_while_it_has_none(caplog):
    rng = np.random.default_rng(0)
    sound, same = (_batch(rng, 8, 0, num_ids=num, num_groups=1) for num in (99, 1))
    for batch, task in ((sound, 0), (same, 1)):
        batch["task_index"][:] = task
        batch["example_mask"][:] = True
    watch = negatives.Watch(("fine", "same", "unseen"), all_hard_negatives=False)
    with caplog.at_level("WARNING", logger="absl"):
        for batch in (sound, same, same):
            watch.add(batch)
        watch.warn()
        watch.add(same)
        watch.warn()
    (record,) = caplog.records
    assert "Task same: none of its first 16 examples" in record.getMessage()
    caplog.clear()
    late = negatives.Watch(("task",), all_hard_negatives=False)
    for batch in (same | {"task_index": sound["task_index"]}, sound):
        late.add(batch)
    late.warn()
    assert not caplog.records
