"""Mining: hard negatives that are near, and never an answer."""

import json

import pytest

from gecko_jax.data import (
    mining,
)


def mine(tmp_path, records, **options):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps(record) for record in records))
    summary = mining.mine_negatives([source], output, **options)
    return summary, [json.loads(line) for line in output.read_text().splitlines()]


def pair(query, positive, task="t", **fields):
    return {"task": task, "query": query, "positive": positive, **fields}


def test_mined_negatives_are_near_and_never_answers(tmp_path):
    summary, mined = mine(
        tmp_path,
        [
            pair("red apple", "apple trees bear red apple fruit", src="kept"),
            pair("red apple", "the red apple of discord"),  # Equal query, other answer.
            pair("green apple", "apple of green colour"),
            pair("apple list", "red  apple"),  # The first query's own text.
            pair("sea", "boats sail the sea"),
            pair("red apple", "red apple of another task", task="other"),
        ],
    )
    negatives = [record.get("negatives") for record in mined]
    assert negatives[0] == negatives[1] == ["apple of green colour"]
    assert negatives[4] is None  # Nothing else shares a word.
    assert negatives[5] is None  # Its task has no other passage.
    assert mined[0]["src"] == "kept"
    assert summary == mining.MiningSummary(examples=6, mined=4, short=2)


def test_mining_tops_up_and_keeps_titles(tmp_path):
    _, mined = mine(
        tmp_path,
        [
            pair("red apple", "a red apple", negative="pear"),
            pair("blue apple", "blue apple", title="Blue"),
            pair("apple", "some apple", negatives=["x", "y"]),
        ],
        num_negatives=2,
    )
    assert mined[0]["negatives"][0] == "pear"
    assert len(mined[0]["negatives"]) == 2
    assert "negative" not in mined[0]
    assert mined[2]["negatives"] == ["x", "y"]
    for record in mined:
        titles = record.get("negative_titles", [""] * len(record["negatives"]))
        for negative, title in zip(record["negatives"], titles, strict=True):
            assert title == ("Blue" if negative == "blue apple" else "")


def test_mining_leaves_nothing_half_written(tmp_path):
    with pytest.raises(ValueError, match=r"in\.jsonl:2: no field 'query'"):
        mine(tmp_path, [pair("a", "b"), {"task": "t"}])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    with pytest.raises(ValueError, match="num_negatives=0"):
        mining.mine_negatives([], tmp_path / "x", 0)
