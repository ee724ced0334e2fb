"""Classification sets: labels, and the triples that are drawn of them."""

import pytest
import samples

from gecko_jax.data import (
    classification,
)


def test_classification_leaves_out_what_has_no_partner():
    records = [
        *samples.LABELLED,
        {"text": "dull", "label": 1},
        {"text": "so so", "label": 2},
        {"text": "unknown", "label": -1},
        {"text": "unsaid", "label": None},
        {"text": " ", "label": 1},
    ]
    lines, dropped = samples.split(classification.triples(records))
    assert len(lines) == 4
    assert dropped == [
        "duplicate text",
        "no label",
        "no label",
        "empty text",
        "only text of its label",
    ]
    with pytest.raises(ValueError, match=r"s 1\.5 is out of range"):
        list(
            classification.threshold(
                [{"t": "a", "s": 1.5}], text="t", score="s", low=0.0, high=1.0
            )
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "field 'label' is a string, and must be a number"),
        (True, "field 'label' is true, and must be a number"),
        (0.5, "field 'label' is 0.5, and must be a whole number"),
        (-2, "label -2 is out of range: there are 2"),
        (2, "label 2 is out of range: there are 2"),
    ],
)
def test_a_label_that_is_none_is_refused(value, message):
    records = [*samples.LABELLED, {"text": "odd", "label": value}]
    with pytest.raises(ValueError, match=message):
        list(classification.triples(records, num_labels=2))


def test_labels_may_be_missing_and_whole_floats():
    records = [{**r, "label": float(r["label"])} for r in samples.LABELLED]
    records += [{"text": "unsaid", "label": None}, {"text": "unknown", "label": -1.0}]
    lines, dropped = samples.split(classification.triples(records, num_labels=2))
    assert (len(lines), dropped) == (4, ["no label"] * 2)
    scores = [{"t": "a", "s": None}, {"t": "b", "s": "x"}]
    found = classification.threshold(scores, text="t", score="s", low=0.0, high=1.0)
    assert next(found)["label"] is None
    with pytest.raises(ValueError, match="field 's' is a string, and must be a number"):
        next(found)


@pytest.mark.parametrize("seed", range(5))
def test_no_text_is_its_own_positive(seed):
    lines, _ = samples.split(classification.triples(samples.LABELLED, seed=seed))
    assert all(line["query"] != line["positive"] for line in lines)


def test_toxicity_needs_a_clear_score():
    scores = {"a": 0.0, "b": 0.0, "c": 0.9, "d": 0.5, "e": 0.2}
    records = [{"text": name, "toxicity": score} for name, score in scores.items()]
    lines, dropped = samples.split(
        samples.TABLE["civil_comments_toxicity"].preprocessor(records)
    )
    assert {line["query"] for line in lines} == {"a", "b", "c", "d"}
    assert dropped == ["no label"]


def test_classification_draws_same_and_other_label():
    lines, _ = samples.split(classification.triples(samples.LABELLED, num_labels=2))
    label = {record["text"]: record["label"] for record in samples.LABELLED}
    for number, line in enumerate(lines):
        query, positive, (negative,) = (
            line[name] for name in ("query", "positive", "negatives")
        )
        assert line["negative_group"] == number + 1
        assert query != positive
        assert label[query] == label[positive] != label[negative]
    assert len(lines) == 4


def test_emotions_and_toxicity_become_labels():
    rows = [{"c": "ta", "joy": True, "fear": False}, {"c": "eh", "joy": 1, "fear": 1}]
    found = classification.one_true_column(rows, text="c", columns=("joy", "fear"))
    assert [row["label"] for row in found] == ["joy", None]
    rows = [{"t": "a", "s": s} for s in (0.0, 0.3, 0.5)]
    found = classification.threshold(rows, text="t", score="s", low=0.0, high=0.5)
    assert [row["label"] for row in found] == ["low", None, "high"]
