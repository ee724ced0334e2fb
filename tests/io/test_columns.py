"""Rows with named columns are the same from TSV and from JSON lines."""

import json

import pytest
import samples

from gecko_jax.evaluation import sets
from gecko_jax.io import columns

BOM, NEL = "\ufeff", "\x85"

# (columns, file name, content, expected rows or error).
PAIR, CLASS = ("sentence1", "sentence2", "score"), ("text", "label", "split")
TABLES = {
    "header in another order": (
        PAIR,
        "t.tsv",
        "id\tScore\tsentence_2\tsentence_1\n7\t0.5\tb\ta\n",
        [("a", "b", "0.5")],
    ),
    "no header": (PAIR, "t.tsv.gz", f"{BOM}a\tb\t1\t\r\n\r\nc\td\t2\r\n", None),
    "JSON lines": (
        PAIR,
        "t.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": 0.5}',
        [("a", "b", 0.5)],
    ),
    "NEL in a text": (
        CLASS,
        "t.tsv",
        f"a{NEL}b\tx\ttrain\n",
        [(f"a{NEL}b", "x", "train")],
    ),
    "one name by chance": (
        CLASS,
        "t.tsv",
        "text\tx\ttrain\n",
        [("text", "x", "train")],
    ),
    "NaN": (CLASS, "t.jsonl", '{"text": "a", "label": NaN, "split": "test"}', "label"),
    "null": (PAIR, "t.jsonl", '{"sentence1": "a", "sentence2": null}', "sentence2"),
    "empty": (PAIR, "t.tsv", "a\t\t1", "sentence2"),
}


@pytest.mark.parametrize("oddity", TABLES)
def test_tables_are_read_by_the_same_rules(tmp_path, oddity):
    names, name, content, expected = TABLES[oddity]
    path = samples.write(tmp_path / name, content)
    if isinstance(expected, str):
        message = f"{name}:1: (field|column) '{expected}' is (null or NaN|empty)"
        with pytest.raises(ValueError, match=message):
            list(columns.read(path, names))
        return
    expected = expected or [("a", "b", "1"), ("c", "d", "2")]
    rows = [tuple(row.values()) for _, row in columns.read(path, names)]
    assert rows == expected


def test_labels_follow_the_rule_of_ids(tmp_path):
    rows = [("a", 1.0, "train"), ("b", 0, "train"), ("c", "1", "test")]
    lines = [json.dumps(dict(zip(CLASS, row, strict=True))) for row in rows]
    path = samples.write(tmp_path / "c.jsonl", "\n".join(lines))
    (found,) = sets.load(path)
    assert (found.train.labels, found.test.labels) == (("1", "0"), ("1",))
