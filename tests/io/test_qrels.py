"""Every verb reads the same judgements, or reports the same error."""

import json
import re

import pytest
import samples

from gecko_jax.data import sources
from gecko_jax.evaluation import sets
from gecko_jax.io import qrels

BOM, NEL, LS = "\ufeff", "\x85", "\u2028"

# (file name, content) of judgements. All of them grade p1 as 2 and p2 as 0.
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
    "a name of its own beside another's": (
        "qrels/SPLIT.tsv",
        "relevance\tquery-id\tcorpus-id\tscore\tpid\n7\tq\tp1\t2\tx\n7\tq\tp2\t0\tx\n",
    ),
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
    (found,) = sets.load(
        samples.judged_folder(folder, corpus, "corpus.jsonl", ids, qrels)
    )
    return dict(found.relevance["q"])


def _judged_by_prepare(folder, ids, qrels):
    corpus = "".join(json.dumps({"_id": i, "text": "x"}) + "\n" for i in ids)
    samples.judged_folder(folder, corpus, "corpus.jsonl", ids, qrels, "train")
    (found,) = sources.read(f"beir:{folder}")
    return {
        passage["docid"]: grade
        for grade, kind in ((2, "positive_passages"), (0, "negative_passages"))
        for passage in found[kind]
    }


JUDGING = {"evaluate": _judged_by_evaluate, "data prepare": _judged_by_prepare}


@pytest.mark.parametrize("verb", JUDGING)
@pytest.mark.parametrize("oddity", QRELS)
def test_every_command_reads_the_same_judgements(tmp_path, oddity, verb):
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
        "tsv:1: 4 columns, of which the second is 'p1'; TREC has 0 there. Name",
    ),
    "TREC, but not in every line": (
        "q\t0\tp1\t2\nq\tp2\t0\t1\n",
        "tsv:2: 4 columns, of which the second is 'p2'",
    ),
    "TREC after BEIR": (
        "q\tp1\t2\nq\t0\tp2\t1\n",
        "tsv:2: 4 columns, and the first line has 3; write all lines in one form",
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
def test_every_command_refuses_the_same_judgements(tmp_path, oddity, verb):
    content, message = BAD_QRELS[oddity]
    split = "test" if verb == "evaluate" else "train"
    path = tmp_path / "qrels" / f"{split}.tsv"
    message = f"{path.with_suffix('')}.{message.format(path)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        JUDGING[verb](tmp_path, ["p1", "p2"], ("qrels/SPLIT.tsv", content))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("NaN", "field 'score' is null or NaN; give it a value"),
        ("null", "field 'score' is null or NaN; give it a value"),
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
        qrels.load(path)
