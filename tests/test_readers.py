"""One reader for each kind of file: the same value or the same error in every verb."""

import contextlib
import gzip
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from gecko_jax import columns, contamination, files, index, judgements, vectors
from gecko_jax.commands import search
from gecko_jax.data import jsonl, sources, teacher
from gecko_jax.evaluation import sets
from gecko_jax.fret import passages

NEL, LS, BOM = "\x85", "\u2028", "\ufeff"
LIZARD = '{"_id": "p1", "text": "lizard on wall"}\n'
BREAD = '{"_id": "p2", "text": "bread and flour"}\n'


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    packs = path.name.endswith(".gz") and not data.startswith(b"\x1f")
    path.write_bytes(gzip.compress(data) if packs else data)
    return path


def _beir(folder, corpus, name, ids, qrels=None, split="test"):
    """A BEIR folder of one query whose answers are `ids`."""
    if name:
        _write(folder / name, corpus)
    _write(folder / "queries.jsonl", '{"_id": "q", "text": "lizard"}\n')
    rows = [{"query-id": "q", "corpus-id": i, "score": 1} for i in ids]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    name, content = qrels or ("qrels/SPLIT.jsonl", lines)
    _write(folder / name.replace("SPLIT", split), content)
    return folder


# Each reads a corpus and returns its (id, text).


def _evaluate(folder, content, name, ids, gecko):
    (found,) = sets.load(_beir(folder, content, name, ids))
    return list(zip(found.passage_ids, found.texts, strict=True))


def _prepare(folder, content, name, ids, gecko):
    _beir(folder, content, name, ids, split="train")
    (found,) = sources.read(f"beir:{folder}")
    return [(p["docid"], p["text"]) for p in found["positive_passages"]]


def _embed(folder, content, name, ids, gecko):
    path = _write(folder / name, content) if name else folder / "corpus.jsonl"
    made = index.from_embeddings(vectors.embed_file(gecko, path, folder / "v"))
    return list(zip(made.ids, made.texts, strict=True))


def _fret(folder, content, name, ids, gecko):
    path = _write(folder / name, content) if name else folder / "corpus.jsonl"
    return [(p["source_id"], p["text"]) for p in passages.read_file(path)]


VERBS = {
    "evaluate": _evaluate,
    "data prepare": _prepare,
    "embed": _embed,
    "fret": _fret,
}

# Name of the corpus, its content, and its (id, text).
TEXTS = [("p1", "lizard on wall"), ("p2", "bread and flour")]
GOOD = {
    "plain": ("corpus.jsonl", LIZARD + BREAD, TEXTS),
    "byte order mark": ("corpus.jsonl", BOM + LIZARD + BREAD, TEXTS),
    "blank lines": ("corpus.jsonl", f"\n{LIZARD}\n  \n{BREAD}\n\n", TEXTS),
    "CRLF": ("corpus.jsonl", (LIZARD + BREAD).replace("\n", "\r\n"), TEXTS),
    "no last line break": ("corpus.jsonl", (LIZARD + BREAD).rstrip(), TEXTS),
    "gzip": ("corpus.jsonl.gz", LIZARD + BREAD, TEXTS),
    "gzip with a mark": ("corpus.jsonl.gz", BOM + LIZARD + BREAD, TEXTS),
    "U+2028 and NEL in ids": (
        "corpus.jsonl",
        LIZARD.replace("p1", f"p{LS}1") + BREAD.replace("p2", f"p{NEL}2"),
        [(f"p{LS}1", TEXTS[0][1]), (f"p{NEL}2", TEXTS[1][1])],
    ),
    "integer ids": (
        "corpus.jsonl",
        LIZARD.replace('"p1"', "1") + BREAD.replace('"p2"', "2.0"),
        [("1", TEXTS[0][1]), ("2", TEXTS[1][1])],
    ),
    "the number of a string": (
        "corpus.jsonl",
        LIZARD.replace('"p1"', '"1.0"'),
        [("1.0", TEXTS[0][1])],
    ),
    "missing titles": (
        "corpus.jsonl",
        LIZARD.replace("}", ', "title": NaN}') + BREAD.replace("}", ', "title": null}'),
        TEXTS,
    ),
    "id beside _id": ("corpus.jsonl", LIZARD.replace("}", ', "id": NaN}'), TEXTS[:1]),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("oddity", GOOD)
def test_every_verb_reads_the_same_texts(tmp_path, tiny_gecko, oddity, verb):
    name, content, expected = GOOD[oddity]
    ids = [identity for identity, _ in expected]
    assert VERBS[verb](tmp_path, content, name, ids, tiny_gecko) == expected


def _with_id(written):
    return LIZARD + BREAD.replace('"p2"', written)


# Name of the corpus, its content, and the error.
BAD = {
    "UTF-16": (
        "corpus.jsonl",
        (LIZARD + BREAD).encode("utf-16"),
        "corpus.jsonl: UTF-16, not UTF-8 text; convert it, for example with `iconv",
    ),
    "big-endian UTF-16": (
        "corpus.jsonl",
        (BOM + LIZARD).encode("utf-16-be"),
        "corpus.jsonl: UTF-16, not UTF-8 text",
    ),
    "UTF-16 without a mark": (
        "corpus.jsonl",
        LIZARD.encode("utf-16-le"),
        "corpus.jsonl: UTF-16, not UTF-8 text",
    ),
    "UTF-32": (
        "corpus.jsonl",
        LIZARD.encode("utf-32"),
        "corpus.jsonl: UTF-32, not UTF-8 text",
    ),
    "Latin-1": (
        "corpus.jsonl",
        (LIZARD + BREAD.replace("bread", "br\xe9ad")).encode("latin-1"),
        "corpus.jsonl:2: not UTF-8 (invalid continuation byte at byte",
    ),
    "a wrong name": (
        "corpus.jsonl",
        gzip.compress(LIZARD.encode()),
        "corpus.jsonl: a gzip file, not UTF-8 text; give it a name that ends in .gz",
    ),
    "a cut file": (
        "corpus.jsonl.gz",
        gzip.compress(LIZARD.encode())[:-9],
        "corpus.jsonl.gz:1: not a whole gzip file",
    ),
    "not JSON": (
        "corpus.jsonl",
        LIZARD + "{'_id': 'p2'}\n",
        "corpus.jsonl:2: not JSON (Expecting property name",
    ),
    "no object": ("corpus.jsonl", LIZARD + "null\n", "corpus.jsonl:2: null; each line"),
    "a fraction as id": (
        "corpus.jsonl",
        _with_id("1.5"),
        "corpus.jsonl:2: field '_id' is 1.5; an id must be a string or a whole number",
    ),
    "a large float as id": (
        "corpus.jsonl",
        _with_id("1e17"),
        "corpus.jsonl:2: field '_id' is 1e+17; an id must be",
    ),
    "infinity as id": (
        "corpus.jsonl",
        _with_id("Infinity"),
        "corpus.jsonl:2: field '_id' is inf; an id must be",
    ),
    "true as id": (
        "corpus.jsonl",
        _with_id("true"),
        "corpus.jsonl:2: field '_id' is True; an id must be",
    ),
    "a list as id": (
        "corpus.jsonl",
        _with_id("[2]"),
        "corpus.jsonl:2: field '_id' is [2]; an id must be",
    ),
    "an empty id": (
        "corpus.jsonl",
        _with_id('" "'),
        "corpus.jsonl:2: field '_id' is empty; an id needs a character",
    ),
    "an id twice": (
        "corpus.jsonl",
        LIZARD + BREAD + LIZARD,
        "corpus.jsonl:3: id 'p1' was given before, at {}:1; ids must differ",
    ),
    "an id twice, once as a float": (
        "corpus.jsonl",
        LIZARD.replace('"p1"', "7.0") + BREAD.replace('"p2"', '"7"'),
        "corpus.jsonl:2: id '7' was given before, at {}:1; ids must differ",
    ),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("oddity", BAD)
def test_every_verb_gives_the_same_error(tmp_path, tiny_gecko, oddity, verb):
    name, content, message = BAD[oddity]
    message = f"{tmp_path}/{message.format(tmp_path / name)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        VERBS[verb](tmp_path, content, name, ["p1"], tiny_gecko)


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipe_or_folder_is_refused_by_every_verb(tmp_path, tiny_gecko, verb):
    for make, kind in ((os.mkfifo, "a pipe"), (os.mkdir, "a folder")):
        folder = tmp_path / kind
        folder.mkdir()
        make(folder / "corpus.jsonl")
        with pytest.raises(ValueError, match=f"corpus.jsonl: {kind}, not a file; "):
            VERBS[verb](folder, "", "", ["p1"], tiny_gecko)


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_an_id_without_a_value_is_missing(tmp_path, tiny_gecko, value):
    for verb, read in VERBS.items():
        arguments = (_with_id(value), "corpus.jsonl", ["p1"], tiny_gecko)
        if verb == "fret":  # It needs no id.
            assert [i for i, _ in read(tmp_path / verb, *arguments)] == ["p1", "2"]
            continue
        with pytest.raises(ValueError, match="jsonl:2: field '_id' is null or NaN"):
            read(tmp_path / verb, *arguments)


def _why_dropped(path):
    """Why FRet does not keep the last passage of a file."""
    *_, last = passages.read_file(path)
    rules = passages.Rules(1, 99, 0.0, 0)
    return passages.clean(last, rules, contamination.Contamination())


@pytest.mark.parametrize("value", ["null", "NaN", '""'])
def test_a_text_without_a_value_is_an_empty_text(tmp_path, tiny_gecko, value):
    content = BREAD + f'{{"_id": "p3", "text": {value}}}\n'
    arguments = (content, "corpus.jsonl", ["p2", "p3"], tiny_gecko)
    assert _evaluate(tmp_path / "a", *arguments) == TEXTS[1:]
    assert _prepare(tmp_path / "b", *arguments) == [TEXTS[1], ("p3", "")]
    with pytest.raises(ValueError, match=r"corpus.jsonl:2: text '' is empty"):
        _embed(tmp_path / "c", *arguments)
    assert _why_dropped(tmp_path / "a" / "corpus.jsonl") in ("no_text", "empty")
    # A passage with nothing but a title is its title, in any of these spellings.
    titled = content.replace('"p3",', '"p3", "title": "Geckos",')
    for read in (_evaluate, _prepare, _embed):
        arguments = (titled, "corpus.jsonl", ["p2", "p3"], tiny_gecko)
        found = read(tmp_path / read.__name__, *arguments)
        assert found == [TEXTS[1], ("p3", "Geckos")]


@pytest.mark.parametrize("field", ["title", "text"])
def test_a_text_is_a_string(tmp_path, tiny_gecko, field):
    content = LIZARD + '{"_id": "p2", "title": "t", "text": "x", "FIELD": 3}\n'.replace(
        "FIELD", field
    )
    for verb, read in VERBS.items():
        arguments = (content, "corpus.jsonl", ["p1"], tiny_gecko)
        if verb == "fret":  # It counts them.
            read(tmp_path / verb, *arguments)
            why = _why_dropped(tmp_path / verb / "corpus.jsonl")
            assert why in ("bad_title", "no_text")
            continue
        message = f"corpus.jsonl:2: field '{field}' is a number; it must be a string"
        with pytest.raises(ValueError, match=message):
            read(tmp_path / verb, *arguments)


# Judgements: name of the file, and its content. All of them judge p1 as 2 and p2 as 0.
HEADER = "query-id\tcorpus-id\tscore\n"
ROWS = "q\tp1\t2\nq\tp2\t0\n"
QRELS = {
    "header": ("qrels/SPLIT.tsv", HEADER + ROWS),
    "no header": ("qrels/SPLIT.tsv", ROWS),
    "byte order mark": ("qrels/SPLIT.tsv", BOM + HEADER + ROWS),
    "blank lines": ("qrels/SPLIT.tsv", f"\n{HEADER}\n \t\n{ROWS}\n\n"),
    "CRLF": ("qrels/SPLIT.tsv", (HEADER + ROWS).replace("\n", "\r\n")),
    "gzip": ("qrels/SPLIT.tsv.gz", HEADER + ROWS),
    "underscores": ("qrels/SPLIT.tsv", HEADER.replace("-", "_") + ROWS),
    "spaces and capitals": ("qrels/SPLIT.tsv", "Query ID\tCorpus ID\tScore\n" + ROWS),
    "names of others": ("qrels/SPLIT.tsv", "qid\tpid\trelevance\n" + ROWS),
    "other columns": (
        "qrels/SPLIT.tsv",
        "score\titeration\tcorpus-id\tquery-id\n2\t0\tp1\tq\n0\t0\tp2\tq\n",
    ),
    "empty columns": (
        "qrels/SPLIT.tsv",
        (HEADER + ROWS).replace("\n", "\t\t\n"),
    ),
    "an empty column of a header": (
        "qrels/SPLIT.tsv",
        "query-id\tcorpus-id\tscore\tnote\nq\tp1\t2\tx\nq\tp2\t0\t\n",
    ),
    "floats as grades": ("qrels/SPLIT.tsv", HEADER + "q\tp1\t2.0\nq\tp2\t0.0\n"),
    "TREC": ("qrels/SPLIT.tsv", "q\t0\tp1\t2\nq\t0\tp2\t0\n"),
    "TREC with Q0": ("qrels/SPLIT.tsv", "q\tQ0\tp1\t2\nq\tQ0\tp2\t0\t\n"),
    "TREC with spaces": ("qrels/SPLIT.tsv", "q 0 p1  2\nq\t0 p2 0\n"),
    "JSON lines": (
        "qrels/SPLIT.jsonl",
        '{"query-id": "q", "corpus-id": "p1", "score": 2}\n'
        '{"query_id": "q", "corpus_id": "p2", "score": 0.0, "note": NaN}\n',
    ),
}
JUDGED = {"p1": 2, "p2": 0}


def _judged_by_evaluate(folder, ids, qrels):
    corpus = "".join(json.dumps({"_id": i, "text": "x"}) + "\n" for i in ids)
    (found,) = sets.load(_beir(folder, corpus, "corpus.jsonl", ids, qrels))
    return dict(found.relevance["q"])


def _judged_by_prepare(folder, ids, qrels):
    corpus = "".join(json.dumps({"_id": i, "text": "x"}) + "\n" for i in ids)
    _beir(folder, corpus, "corpus.jsonl", ids, qrels, "train")
    (found,) = sources.read(f"beir:{folder}")
    return {
        passage["docid"]: grade
        for grade, kind in ((2, "positive_passages"), (0, "negative_passages"))
        for passage in found[kind]
    }


JUDGING = {"evaluate": _judged_by_evaluate, "data prepare": _judged_by_prepare}


@pytest.mark.parametrize("verb", JUDGING)
@pytest.mark.parametrize("oddity", QRELS)
def test_every_verb_reads_the_same_judgements(tmp_path, oddity, verb):
    assert JUDGING[verb](tmp_path, ["p1", "p2"], QRELS[oddity]) == JUDGED


@pytest.mark.parametrize("verb", JUDGING)
def test_ids_of_judgements_are_those_of_the_corpus(tmp_path, verb):
    read = JUDGING[verb]
    odd = [f"p{NEL}1", f"p{LS}2"]
    rows = (f"q\t{odd[0]}\t2\n", f"q\t{odd[1]}\t0\n")
    found = read(tmp_path / "a", odd, ("qrels/SPLIT.tsv", HEADER + "".join(rows)))
    assert found == {odd[0]: 2, odd[1]: 0}
    lines = (
        '{"query-id": "q", "corpus-id": 1.0, "score": 2}\n'
        '{"query-id": "q", "corpus-id": 2, "score": 0}\n'
    )
    found = read(tmp_path / "b", [1, 2], ("qrels/SPLIT.jsonl", lines))
    assert found == {"1": 2, "2": 0}
    # A TSV file has only strings: "1.0" is refused where the corpus has 1.
    with pytest.raises(ValueError, match=r"tsv:2: id '1\.0' is not .*, and '1' is"):
        read(tmp_path / "c", [1, 2], ("qrels/SPLIT.tsv", HEADER + "q\t1.0\t2\n"))
    rows = "q\tp2\t1\nq\t1\t2\n"
    with pytest.raises(ValueError, match=r"tsv:3: id '1' is not .*, and '1\.0' is"):
        read(tmp_path / "d", ["1.0", "p2"], ("qrels/SPLIT.tsv", HEADER + rows))


BAD_QRELS = {
    "NaN": (HEADER + "q\tp1\tnan\n", "tsv:2: score 'nan' is not a number; write a"),
    "infinity": (HEADER + "q\tp1\t1e999\n", "tsv:2: score '1e999' is not a number"),
    "Python's digits": (HEADER + "q\tp1\t1_0\n", "tsv:2: score '1_0' is not a"),
    "no grade": (HEADER + "q\tp1\t\n", "tsv:2: column 'score' is empty; give it"),
    "no passage": (HEADER + "q\t\t1\n", "tsv:2: column 'corpus-id' is empty"),
    "UTF-16": ((HEADER + ROWS).encode("utf-16"), "tsv: UTF-16, not UTF-8 text"),
    "twice": (
        HEADER + ROWS + "q\tp1\t1\n",
        "tsv:4: query 'q' and passage 'p1' were judged before, at {}:2; keep one line",
    ),
    "another query": (HEADER + "r\tp1\t1\n", "tsv:2: query 'r' is not in queries"),
    "BEIR with a fourth column": (
        "q\tp1\t2\tx\n",
        "tsv:1: 4 columns, of which the second is 'p1'; in TREC's form it is 0. Name",
    ),
    "TREC, but not in every line": (
        "q\t0\tp1\t2\nq\tp2\t0\t1\n",
        "tsv:2: 4 columns, of which the second is 'p2'",
    ),
    "five columns": ("q\tp1\t2\tx\ty\n", "tsv:1: 5 columns; it must hold query-id,"),
    "two columns": ("q\tp1\n", "tsv:1: 2 columns; it must hold query-id, corpus-id, s"),
    "more than the header": (
        HEADER + "q\t0\tp1\t2\n",
        "tsv:2: 4 columns, and the header names 3; name or drop the others",
    ),
    "an unknown name": (
        "query-id\tdocument\tscore\n" + ROWS,
        "tsv:1: the header names no column 'corpus-id' (it has query-id, document, "
        "score); the columns are query-id, corpus-id, score",
    ),
    "unknown names": (
        "question\tdocument\tmark\n" + ROWS,
        "tsv:1: score 'mark' is not a number; write a finite number or drop the line; "
        "if this line names the columns, call them query-id, corpus-id, score",
    ),
    "a name twice": (
        "query-id\tquery_id\tcorpus-id\tscore\n",
        "tsv:1: 'query-id' and 'query_id' are both the column 'query-id'; keep one",
    ),
}


@pytest.mark.parametrize("verb", JUDGING)
@pytest.mark.parametrize("oddity", BAD_QRELS)
def test_every_verb_refuses_the_same_judgements(tmp_path, oddity, verb):
    content, message = BAD_QRELS[oddity]
    split = "test" if verb == "evaluate" else "train"
    path = tmp_path / "qrels" / f"{split}.tsv"
    message = f"{path.with_suffix('')}.{message.format(path)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        JUDGING[verb](tmp_path, ["p1", "p2"], ("qrels/SPLIT.tsv", content))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("NaN", "field 'score' is null or NaN, which is no value"),
        ("null", "field 'score' is null or NaN, which is no value"),
        ("true", "score True is not a number"),
        ("[1]", r"score \[1\] is not a number"),
        ("-Infinity", "score -inf is not a number"),
        ('"high"', "score 'high' is not a number"),
        ("9" * 999, "score 9+ is not a number"),
    ],
)
def test_a_grade_is_a_finite_number(tmp_path, score, message):
    path = tmp_path / "qrels.jsonl"
    path.write_text(f'{{"query-id": 1, "corpus-id": 2, "score": {score}}}\n')
    with pytest.raises(ValueError, match=rf"qrels.jsonl:1: {message}"):
        judgements.load(path)


# Standard input of `gecko search`: the bytes, and the queries.
INPUT = {
    "plain": (b"one\ntwo\n", ["one", "two"]),
    "byte order mark": (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
    "CRLF and blank lines": (b"\r\none\r\n \r\ntwo\r\n", ["one", "two"]),
    "U+2028 and NEL": (f"o{LS}ne\nt{NEL}wo\n".encode(), [f"o{LS}ne", f"t{NEL}wo"]),
    "a line of other bytes": (b"one\n\xff\ntwo\n", ["one", "two"]),
}


@pytest.mark.parametrize("oddity", INPUT)
def test_standard_input_is_read_like_a_file(tmp_path, monkeypatch, capsys, oddity):
    content, queries = INPUT[oddity]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [line for _, line in search._read_lines()] == queries
    path = _write(tmp_path / "queries.txt", content)
    told = capsys.readouterr().err
    if told:
        assert told.startswith("gecko search: standard input:2: not UTF-8")
        with pytest.raises(ValueError, match=r"queries.txt:2: not UTF-8"):
            list(files.read_texts(path))
    else:
        assert [record.text for record in files.read_texts(path)] == queries


@pytest.mark.parametrize("content", ["one\n".encode("utf-16"), gzip.compress(b"one")])
def test_standard_input_of_another_kind_ends_the_reading(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match=r"^standard input: .*, not UTF-8 text; "):
        list(search._read_lines())


# Tables beside judgements: name, content, and what is read or the error.
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
    path = _write(tmp_path / name, content)
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
    path = _write(tmp_path / "c.jsonl", "\n".join(lines))
    (found,) = sets.load(path)
    assert (found.train.labels, found.test.labels) == (("1", "0"), ("1",))


# Training data: a missing value is as if the field were not there.
PAIR_RECORD = {
    "task": "t",
    "query": "who",
    "positive": "a gecko",
    "negatives": ["a newt", "a toad"],
}
MISSING = ("title", "task_description", "query_id", "passage_id", "negative_group")


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_missing_value_of_a_pair_is_no_field(tmp_path, value):
    plain = json.dumps(PAIR_RECORD)
    fields = [f'"{name}": {value}' for name in MISSING]
    fields += [
        f'"{name}": [{value}, {value}]' for name in ("negative_titles", "negative_ids")
    ]
    odd = f"{plain[:-1]}, {', '.join(fields)}}}"
    path = _write(tmp_path / "pairs.jsonl", f"{plain}\n{odd}\n")
    first, second = jsonl.read_pairs(path)
    assert first == second
    for name in ("query", "positive", "task"):
        odd = plain.replace(f'"{name}": "', f'"{name}": {value}, "x": "')
        path = _write(tmp_path / "pairs.jsonl", odd)
        with pytest.raises(ValueError, match=f"jsonl:1: field '{name}' is null or NaN"):
            list(jsonl.read_pairs(path))


def test_a_whole_float_is_the_integer_in_a_pair(tmp_path):
    ids = {"query_id": 1, "passage_id": 2, "negative_ids": [3, 4], "negative_group": 5}
    floats = json.loads(json.dumps(ids), parse_int=float)
    lines = [json.dumps({**PAIR_RECORD, **extra}) for extra in (ids, floats)]
    first, second = jsonl.read_pairs(_write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert first == second
    assert second.given_ids == (2, 3, 4)
    assert isinstance(second.given_ids[0], int)
    empty = json.dumps({**PAIR_RECORD, "query_id": ""})
    with pytest.raises(ValueError, match="field 'query_id' is empty"):
        list(jsonl.read_pairs(_write(tmp_path / "a.jsonl", empty)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sources_have_none_for_nan(tmp_path, kind):
    records = [
        {"id": 1.0, "text": "a", "score": float("nan"), "many": [1.0, float("nan")]},
        {"id": float("nan"), "text": None, "score": 2.0, "many": []},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    assert list(sources.read(str(path))) == [
        {"id": 1.0, "text": "a", "score": None, "many": [1.0, None]},
        {"id": None, "text": None, "score": 2.0, "many": []},
    ]
    # Records as TFDS gives them.
    assert sources._plain({"a": np.float32("nan"), "b": np.array([np.nan, 1])}) == {
        "a": None,
        "b": [None, 1.0],
    }


def test_vectors_of_another_kind_are_named(tmp_path):
    np.savez(tmp_path / "v.npz", a=np.eye(2))
    with pytest.raises(ValueError, match=r"v.npz: an .npz, .* give that .npy"):
        list(teacher.read_vectors(tmp_path / "v.npz", []))
    np.save(tmp_path / "v.npy", np.eye(2))
    (tmp_path / "v.npy").rename(tmp_path / "v")
    with pytest.raises(ValueError, match=r"v: a NumPy array \(.npy\), not UTF-8 text"):
        list(teacher.read_vectors(tmp_path / "v", []))
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(ValueError, match=r"pipe.npy: a pipe, not a file"):
        list(teacher.read_vectors(tmp_path / "pipe.npy", []))


def test_sets_of_one_name_are_told_apart(tmp_path):
    pair = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
    for folder in ("one", "two"):
        _write(tmp_path / folder / "pairs.jsonl", pair * 2)
    _write(tmp_path / "two" / "pairs.tsv", "a\tb\t1\n" * 2)
    paths = [tmp_path / "one" / "pairs.jsonl", tmp_path / "two", tmp_path / "two"]
    found = [one.name for one in sets.load_all(paths)]
    assert found == ["pairs", "two/pairs", "pairs.tsv"]


def test_a_name_that_is_not_utf8_is_shown_with_a_mark(tmp_path):
    path = tmp_path / os.fsdecode(b"s\xff.tsv")
    try:
        path.write_text("a\tb\t1\nc\td\t2\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (found,) = sets.load(path)
    assert found.name == "s\N{REPLACEMENT CHARACTER}"


def test_an_error_output_that_is_closed_stays_silent(tmp_path, tiny_folder):
    path = _write(tmp_path / "corpus.jsonl", LIZARD)
    command = [sys.executable, "-m", "gecko_jax", "embed", str(path)]
    command += [f"--model={tiny_folder}", "--output"]

    def run(output, *arguments):
        shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command, output, *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            shell, capture_output=True, text=True, env=environment, check=False
        )

    done = run(str(tmp_path / "vectors"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 vector of 16 dims" in done.stdout
    # The same command with another dim is an error, which has nowhere to go.
    done = run(str(tmp_path / "vectors"), "--dim=4")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_bar_needs_no_error_output(monkeypatch):
    from gecko_jax import progress

    monkeypatch.setattr("sys.stderr", None)
    with contextlib.closing(progress.track("ab", "Reading")) as items:
        assert list(items) == ["a", "b"]
