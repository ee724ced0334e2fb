"""Every good record is read as documented; every bad one is one clear error."""

import gzip
import json
import math

import pytest

from gecko_jax.data import jsonl, task_table
from gecko_jax.text import text_formats

GOOD = {"task": "docs", "query": "sort a list", "positive": "sorted() returns"}


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_golden_example(tmp_path):
    record = {
        **GOOD,
        "title": "Sorting",
        "negatives": ["reverse()", "append()"],
        "negative_titles": ["Lists", ""],
        "negative_group": 3,
        "task_description": "search result",
        "licence": "passed over",
    }
    (pair,) = jsonl.read_pairs(write(tmp_path / "a.jsonl", record))
    assert pair == jsonl.Pair(
        task="docs",
        task_description="search result",
        query="sort a list",
        positive="sorted() returns",
        title="Sorting",
        negatives=("reverse()", "append()"),
        negative_titles=("Lists", ""),
        query_id=text_formats.content_id("sort a list"),
        passage_id=text_formats.content_id("sorted() returns", "Sorting"),
        negative_ids=(
            text_formats.content_id("reverse()", "Lists"),
            text_formats.content_id("append()"),
        ),
        negative_group=3,
        given_ids=(None, None, None),
    )


def test_aliases_mean_the_same(tmp_path):
    other = {"task": "docs", "query": "sort a list", "passage": "sorted() returns"}
    path = write(
        tmp_path / "a.jsonl",
        {**GOOD, "negatives": ["reverse()"]},
        {**other, "negative": "reverse()"},
    )
    first, second = jsonl.read_pairs(path)
    assert first == second


def test_gzip_tasks_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    lines = [json.dumps(GOOD), "", json.dumps({**GOOD, "task": "code"})]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert [pair.task for pair in jsonl.read_pairs(path)] == ["docs", "code"]
    assert [pair.task for pair in jsonl.read_pairs(path, "code")] == ["code"]
    assert jsonl.count_examples(path) == {"docs": 1, "code": 1}


def test_given_ids_replace_content_ids(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {**GOOD, "query_id": 7, "passage_id": 7},
        {**GOOD, "query": "other", "query_id": "7", "negatives": ["x", "y"]}
        | {"negative_ids": [7, None]},
    )
    first, second = jsonl.read_pairs(path)
    assert first.query_id == second.query_id
    assert first.query_id != first.passage_id
    assert second.passage_id == text_formats.content_id(GOOD["positive"])
    assert second.negative_ids == (first.passage_id, text_formats.content_id("y"))


def test_scores_are_those_of_the_positive_and_of_each_negative(tmp_path):
    scored = {**GOOD, "negatives": ["x", "y"], "scores": [2, None, -0.5]}
    unscored = {**scored, "scores": [None, float("nan"), None]}
    path = write(tmp_path / "a.jsonl", scored, unscored, {**GOOD, "scores": None})
    first, second, third = jsonl.read_pairs(path)
    assert first.scores == (2.0, -math.inf, -0.5)
    assert second.scores == third.scores == ()


def test_several_positives_make_an_example_each(tmp_path):
    line = {
        **{"task": "docs", "query": "sort a list", "query_id": 7, "licence": "CC0-1.0"},
        "positives": ["sorted()", "list.sort()"],
        "titles": ["", "Lists"],
        "passage_ids": [None, "p2"],
        "negatives": ["reverse()"],
        "scores": [3, 2.5, -1],
    }
    path = write(tmp_path / "a.jsonl", line, GOOD)
    (_, one, first), (_, two, second), _ = jsonl.read_lines(path)
    kept = {name: line[name] for name in ("task", "query", "query_id", "licence")}
    kept |= {"negatives": ["reverse()"]}
    assert one == {**kept, "positive": "sorted()", "title": "", "scores": [3.0, -1.0]}
    assert two == {
        **{**kept, "positive": "list.sort()", "title": "Lists", "passage_id": "p2"},
        "scores": [2.5, -1.0],
    }
    # The loss masks examples of equal queries by this id.
    assert first.query_id == second.query_id
    assert first.passage_id == text_formats.content_id("sorted()")
    assert second.given_ids == ("p2", None)
    assert (first.scores, second.scores) == ((3.0, -1.0), (2.5, -1.0))
    assert jsonl.count_examples(path) == {"docs": 3}


SEVERAL = {"task": "t", "query": "a", "positives": ["b", "c"]}

BAD = {
    "few scores": (
        {**GOOD, "negatives": ["x"], "scores": [1.0]},
        "'scores' is 1 item; it must be a list of 2, one for each positive and negat",
    ),
    "many scores": ({**GOOD, "scores": [1, 2]}, "'scores' is 2 items; .* a list of 1"),
    "no list": ({**GOOD, "scores": 1.0}, r"'scores' is 1\.0; it must be a list of 1"),
    "score text": (
        {**GOOD, "scores": ["high"]},
        r"'scores\[0\]' is 'high'; it must be a finite number, or null",
    ),
    "score true": ({**GOOD, "scores": [True]}, "is True; it must be a finite number"),
    "score infinite": ({**GOOD, "scores": [float("inf")]}, r"is inf; it must be a fin"),
    "score huge": ({**GOOD, "scores": [1e39]}, r"is 1e\+39; it must be a finite"),
    "few scores of several": (
        {**SEVERAL, "negatives": ["x"], "scores": [1, 2]},
        "'scores' is 2 items; it must be a list of 3",
    ),
    "both positives": (
        {**SEVERAL, "positive": "b"},
        "'positive' is for one positive; with 'positives', use 'positives'",
    ),
    "one title": ({**SEVERAL, "title": "b"}, "'title' is for one .* use 'titles'"),
    "one alias": ({**SEVERAL, "passage": "b"}, "'passage' is for one .* 'positives'"),
    "titles of positives": (
        {**SEVERAL, "titles": ["b"]},
        "'titles' is 1 item; it must be a list of 2, one for each positive",
    ),
    "none of several": ({**SEVERAL, "positives": []}, "'positives' is empty; give at"),
    "number in several": (
        {**SEVERAL, "positives": ["b", 1]},
        r"'positives\[1\]' is a number",
    ),
    "negative positive": (
        {**SEVERAL, "negatives": ["x", "c"]},
        r"'negatives\[1\]' is one of 'positives', too; remove one",
    ),
    "not JSON": ('{"task": "docs", ', "not JSON"),
    "not an object": ('["docs"]', "a list; each line must be one JSON object"),
    "no task": ({"query": "a", "positive": "b"}, "no field 'task'"),
    "no query": ({"task": "t", "positive": "b"}, "no field 'query'"),
    "null query": ({**GOOD, "query": None}, "field 'query' is null or NaN"),
    "no positive": (
        {"task": "t", "query": "a"},
        r"no field 'positive' or 'passage' \(it has query, task\)",
    ),
    "empty": ({**GOOD, "query": ""}, "field 'query' is empty"),
    "whitespace": ({**GOOD, "positive": " \n\t\u3000"}, "field 'positive' is empty"),
    "several": ({**GOOD, "positive": ["a", "b"]}, "is a list; name it 'positives'"),
    "number": ({**GOOD, "query": 3}, "field 'query' is a number; it must be a string"),
    "both names": ({**GOOD, "passage": "x"}, "'positive' and 'passage' mean the same"),
    "both negatives": (
        {**GOOD, "negative": "x", "negatives": ["y"]},
        "'negatives' and 'negative' mean the same",
    ),
    "negatives text": ({**GOOD, "negatives": "x"}, "must be a list of strings"),
    "negatives dict": ({**GOOD, "negatives": {"a": 1}}, "must be a list of strings"),
    "negative number": (
        {**GOOD, "negatives": ["x", 1]},
        r"'negatives\[1\]' is a number",
    ),
    "negative empty": ({**GOOD, "negatives": [" "]}, r"'negatives\[0\]' is empty"),
    "titles": (
        {**GOOD, "negatives": ["x"], "negative_titles": ["a", "b"]},
        "'negative_titles' is 2 items; it must be a list of 1, one for each negative",
    ),
    "title number": ({**GOOD, "title": 3}, "field 'title' is a number"),
    "group": ({**GOOD, "negative_group": "a"}, "'negative_group' is 'a'; it must be a"),
    "large group": ({**GOOD, "negative_group": 2**31}, "at most 32 bits"),
    "id": ({**GOOD, "query_id": 1.5}, "'query_id' is 1.5; an id must be a string or a"),
    "too long": (
        {**GOOD, "positive": "word " * 500_000},
        r"'positive' has 2,500,000 characters; at most 200,000 are allowed, split",
    ),
    "surrogate": ('{"task": "t", "query": "\\ud800", "positive": "b"}', "surrogate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_one_clear_error(tmp_path, case):
    record, message = BAD[case]
    path = write(tmp_path / "bad.jsonl", GOOD, record, GOOD)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{message}"):
        list(jsonl.read_pairs(path))


def test_bad_files_are_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        jsonl.count_examples(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl: the file is empty"):
        jsonl.count_examples(empty)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b'\n{"query": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8"):
        jsonl.count_examples(latin)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 999)[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz:\d+: not a whole gzip"):
        jsonl.count_examples(cut)


def test_bundled_corpus_is_whole():
    path = task_table.QUICKSTART / "train.jsonl"
    summary = jsonl.count_examples(path)
    table = {
        task.source_task: task.num_examples
        for task in task_table.TASKS
        if task.files == (str(path),)
    }
    assert summary == table
    assert sum(f.stat().st_size for f in task_table.QUICKSTART.iterdir()) < 3_000_000

    def read(name):
        lines = (task_table.QUICKSTART / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    corpus, queries, train = map(read, ("corpus.jsonl", "queries.jsonl", "train.jsonl"))
    for row in (*train, *corpus, *queries):
        assert row["src"]
        assert row["licence"]
    passages = {row["_id"]: row["text"] for row in corpus}
    judged = read("qrels.jsonl")
    assert {row["query-id"] for row in judged} == {row["_id"] for row in queries}
    trained = {text_formats.clean(row["positive"]) for row in train}
    asked = {text_formats.clean(row["query"]) for row in train}
    assert not trained & {
        text_formats.clean(passages[row["corpus-id"]]) for row in judged
    }
    assert not asked & {text_formats.clean(row["text"]) for row in queries}
    notice = (task_table.QUICKSTART / "NOTICE").read_text(encoding="utf-8")
    for source in {row["src"].split("/")[0] for row in (*train, *corpus)}:
        assert (source if not source.startswith("wn30") else "wn30-*") in notice
