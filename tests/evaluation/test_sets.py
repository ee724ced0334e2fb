import gzip
import json
import os

import numpy as np
import pytest
import samples

from gecko_jax.evaluation import judge, sets, tables


def _lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


CORPUS = [
    {"_id": "p1", "title": "Lists", "text": "sorting a list"},
    {"_id": "p2", "title": "", "text": "tables of rows"},
    {"_id": "p3", "title": "only a title", "text": ""},
    {"_id": "p4", "title": "", "text": ""},
]
QUERIES = [
    {"_id": "q1", "text": "sort", "task": "docs"},
    {"_id": "q2", "text": "rows"},
    {"_id": "q3", "text": "nobody judged this"},
    {"_id": "q4", "text": "nothing is relevant"},
]
QRELS = [("q1", "p1", 2), ("q1", "p2", 0), ("q2", "p2", 1), ("q4", "p1", 0)]


def _make(folder, qrels="qrels.jsonl", packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"corpus.jsonl": _lines(CORPUS), "queries.jsonl": _lines(QUERIES)}
    if qrels.endswith("jsonl"):
        keys = ("query-id", "corpus-id", "score")
        contents[qrels] = _lines(dict(zip(keys, row, strict=True)) for row in QRELS)
    else:
        rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, r)) for r in QRELS)]
        contents[qrels] = "\n".join(rows) + "\n"
    for name, content in contents.items():
        path = folder / (name + ".gz" * packed)
        path.parent.mkdir(exist_ok=True)
        data = content.encode()
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("qrels", ["qrels.jsonl", "qrels.tsv", "qrels/test.tsv"])
def test_all_layouts_read_the_same(tmp_path, qrels, packed):
    (found,) = sets.load(_make(tmp_path / "set", qrels, packed))
    assert found.name == "set"
    # The empty passage is left out; a passage may be its title.
    assert found.passage_ids == ("p1", "p2", "p3")
    assert found.titles[0] == "Lists"
    assert found.texts[2] == "only a title"
    # Queries without a relevant passage are left out.
    assert found.query_ids == ("q1", "q2")
    assert found.tasks == ("docs", "")
    assert found.relevance["q1"] == {"p1": 2, "p2": 0}


def test_trec_judgements_have_a_fourth_column(tmp_path):
    folder = _make(tmp_path / "set", "qrels.tsv")
    (folder / "qrels.tsv").write_text("q1\t0\tp1\t1\n")
    (found,) = sets.load(folder)
    assert found.relevance == {"q1": {"p1": 1}}


def test_a_folder_of_sets_and_similarity_files(tmp_path):
    _make(tmp_path / "b")
    _make(tmp_path / "a")
    (tmp_path / "sts.tsv").write_text(
        "sentence1\tsentence2\tscore\na\tb\t0.5\nc\td\t5\n"
    )
    pairs = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (1, 2.5)]
    (tmp_path / "pairs.jsonl").write_text(_lines(pairs))
    (tmp_path / "README.md").write_text("notes")
    found = sets.load(tmp_path)
    assert [s.name for s in found] == ["a", "b", "pairs", "sts"]
    np.testing.assert_array_equal(found[2].scores, [1, 2.5])
    assert (found[3].sentences1, found[3].sentences2) == (("a", "c"), ("b", "d"))


def test_the_bundled_set_has_a_name():
    (found,) = sets.load("quickstart")
    assert (len(found.queries), len(found.texts)) == (356, 956)


def test_a_limit_keeps_judged_passages_and_spreads_the_rest():
    (found,) = sets.load("quickstart")
    small = found.limit(20, 200)
    assert (len(small.queries), len(small.texts)) == (20, 200)
    assert small.query_ids[0] == found.query_ids[0]
    assert small.query_ids != found.query_ids[:20]
    for query in small.query_ids:
        assert set(found.relevance[query]) <= set(small.passage_ids)
    for position, identity in enumerate(small.passage_ids):
        assert small.texts[position] == found.texts[found.passage_ids.index(identity)]
    assert found.limit(0, 0) == found
    assert len(found.limit(20, 1).texts) >= 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "p1"}\n', r"corpus.jsonl:1: no field 'text'"),
        ("corpus.jsonl", "", r"corpus.jsonl: empty corpus"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n', r"queries.jsonl:1: .*empty"),
        ("qrels.jsonl", '{"query-id": "q1"}\n', r"qrels.jsonl:1: no field 'corpus-id'"),
        (
            "qrels.jsonl",
            '{"query-id": "q9", "corpus-id": "p1", "score": 1}\n',
            r"qrels.jsonl:1: query 'q9' is not in queries.jsonl",
        ),
        (
            "qrels.jsonl",
            '{"query-id": "q1", "corpus-id": "p1", "score": 1}\n' * 2,
            r"qrels.jsonl:2: query 'q1' and passage 'p1' were judged before, at .*:1",
        ),
        (
            "qrels.jsonl",
            '{"query-id": "q1", "corpus-id": "p1", "score": "high"}\n',
            r"qrels.jsonl:1: score 'high' is not a number",
        ),
        ("qrels.jsonl", "", r"no query has a relevant passage"),
        ("qrels.tsv", "q1\tp1\n", r"qrels.tsv:1: 2 columns"),
    ],
)
def test_errors_name_the_line_in_a_set(tmp_path, name, content, message):
    folder = _make(tmp_path / "set")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        sets.load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("queries.jsonl", "no queries.jsonl"),
        ("qrels.jsonl", "no judgements; add one of"),
    ],
)
def test_errors_name_a_missing_file(tmp_path, name, message):
    folder = _make(tmp_path / "set")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=message):
        sets.load(folder)


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        sets.load(tmp_path / "none")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        sets.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\n", r"sts.tsv:1: 2 columns; it must hold sentence1"),
        ("a\tb\t1\na\t \t2\n", r"sts.tsv:2: column 'sentence2' is empty"),
        ("a\tb\tnan\n", r"sts.tsv:1: score 'nan'"),
        ("a\tb\t1\n", r"1 pair; Spearman's correlation needs 2"),
    ],
)
def test_errors_name_the_line_in_a_similarity_file(tmp_path, content, message):
    (tmp_path / "sts.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        sets.load(tmp_path / "sts.tsv")


LABELLED = [
    ("a list of rows", "tables", "train"),
    ("sort it", "lists", "train"),
    ("rows of lists", "tables", "test"),
]


def _write_labelled(folder, kind):
    folder.mkdir(exist_ok=True)
    names = ("text", "label", "split")
    if kind == "file.jsonl":
        path = folder / "topics.jsonl"
        path.write_text(_lines(dict(zip(names, r, strict=True)) for r in LABELLED))
        return path
    if kind == "file.tsv.gz":
        path = folder / "topics.tsv.gz"
        rows = ["\t".join(row) for row in (names, *LABELLED)]
        path.write_bytes(gzip.compress("\n".join(rows).encode()))
        return path
    (folder / "topics").mkdir()
    for split in ("train", "test"):
        rows = [row[:2] for row in LABELLED if row[2] == split]
        path = folder / "topics" / f"{split}.{kind.rpartition('.')[2]}"
        if kind == "folder.tsv":
            path.write_text("".join(f"{text}\t{label}\n" for text, label in rows))
        else:
            path.write_text(_lines({"text": t, "label": n} for t, n in rows))
    return folder / "topics"


@pytest.mark.parametrize(
    "kind", ["file.jsonl", "file.tsv.gz", "folder.jsonl", "folder.tsv"]
)
def test_classification_reads_the_same_from_files_and_folders(tmp_path, kind):
    path = _write_labelled(tmp_path, kind)
    for place in (path, tmp_path):  # alone, and among others
        (found,) = sets.load(place)
        assert found.name == "topics"
        assert found.train.texts == ("a list of rows", "sort it")
        assert found.train.labels == ("tables", "lists")
        assert found.test == (("rows of lists",), ("tables",))


def test_a_limit_leaves_the_training_texts(tmp_path):
    labels = ("a", "b") * 10
    texts = tuple(f"text {n}" for n in range(20))
    both = sets.Labelled(texts, labels)
    small = sets.ClassificationSet("x", both, both).limit(5, 50)
    assert small.train == both
    assert small.test.texts == tuple(f"text {n}" for n in (0, 4, 8, 12, 16))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tx\ttrain\nb\ty\n", r"c.tsv:3: column 'split' is empty"),
        ("a\tx\ttrain\nb\ty\tdev\n", r"c.tsv:3: split 'dev' must be one of train"),
        ("a\tx\ttrain\nb\ty\ttrain\n", r"c.tsv: no texts of the split test"),
        ("a\tx\ttrain\nb\tx\ttest\n", r"all training texts have the label 'x'"),
        (
            "a\tx\ttrain\nb\ty\ttrain\nc\tz\ttest\n",
            r"no training text has the test label 'z'",
        ),
    ],
)
def test_errors_name_the_line_in_a_classification_file(tmp_path, content, message):
    (tmp_path / "c.tsv").write_text("text\tlabel\tsplit\n" + content)
    with pytest.raises(ValueError, match=message):
        sets.load(tmp_path / "c.tsv")


def test_sets_with_equal_names_get_unique_names(tmp_path, tiny_gecko):
    pairs = _lines(
        {"sentence1": "a", "sentence2": b, "score": s} for b, s in (("b", 1), ("c", 2))
    )
    for folder in ("one", "two"):
        samples.write(tmp_path / folder / "pairs.jsonl", pairs)
    samples.write(tmp_path / "two" / "pairs.tsv", "a\tb\t1\na\tc\t2\n")
    paths = [tmp_path / "one" / "pairs.jsonl", tmp_path / "two", tmp_path / "two"]
    found = [one.name for one in sets.load_all(paths)]
    assert found == ["pairs", "two/pairs", "pairs.tsv"]
    # Their tables agree, too.
    results = judge.evaluate(tiny_gecko, paths[:2], dims=[4], baselines=False)
    assert [row.set for row in results.rows] == found
    table = tables.format_table(results)
    assert "two/pairs: 2 pairs" in table


def test_bytes_of_a_name_that_are_not_utf8_are_replaced(tmp_path):
    path = tmp_path / os.fsdecode(b"s\xff.tsv")
    try:
        path.write_text("a\tb\t1\nc\td\t2\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (found,) = sets.load(path)
    assert found.name == "s\N{REPLACEMENT CHARACTER}"
