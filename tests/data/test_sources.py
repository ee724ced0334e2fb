"""Sources: every format is read, and what is wrong with one is named."""

import gzip
import re

import pytest
import samples

from gecko_jax.data import (
    load_seqio,
    sources,
)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            {"corpus": [{"_id": "d1", "text": "other"}]},
            "corpus.jsonl:3: id 'd1' was given before, at {}/corpus.jsonl:1",
        ),
        (
            {"queries": [{"_id": "q", "text": "who"}]},
            "queries.jsonl:2: id 'q' was given before, at {}/queries.jsonl:1",
        ),
        (
            {"judged": ["q\td1\t0"]},
            "train.tsv:4: query 'q' and passage 'd1' were judged before, at "
            "{}/qrels/train.tsv:2",
        ),
        ({"judged": ["q\td3\thigh"]}, "train.tsv:4: score 'high' is not a number"),
        ({"judged": ["q d3 1"]}, "train.tsv:4: column 'corpus-id' is empty"),
        ({"judged": ["q\td9\t1"]}, "train.tsv:4: passage 'd9' is not in the corpus"),
        (
            {"corpus": [{"text": "a"}]},
            "corpus.jsonl:3: no field '_id' or 'id' (it has text)",
        ),
        (
            {"corpus": [{"_id": "d3"}], "judged": ["q\td3\t1"]},
            "corpus.jsonl:3: no field 'text'",
        ),
        (
            {"queries": [{"_id": "r"}], "judged": ["r\td1\t1"]},
            "queries.jsonl:2: no field 'text'",
        ),
    ],
)
def test_bad_beir_folders_are_named(tmp_path, added, message):
    folder = samples.beir_folder(tmp_path, **added)
    with pytest.raises(ValueError, match=re.escape(message.format(tmp_path))):
        list(sources.read(folder))


@pytest.mark.parametrize("name", ["id", "_id"])
def test_an_id_may_come_once_in_a_source(tmp_path, name):
    one, two = {name: 7, "question": "q"}, {name: 8, "question": "q"}
    samples.write_lines(tmp_path / "a.jsonl", one, {"question": "has none"}, two)
    last = samples.write_lines(
        tmp_path / "b.jsonl", {"question": "has none"}, {name: "7"}
    )
    message = f"{last}:2: id '7' was given before, at {tmp_path}/a.jsonl:1"
    with pytest.raises(ValueError, match=re.escape(message)):
        list(sources.read(f"{tmp_path}/*.jsonl"))
    assert len(list(sources.read(str(tmp_path / "a.jsonl")))) == 3
    with pytest.raises(ValueError, match=r"\*\.parquet: no such file"):
        sources.stamps(f"{tmp_path}/*.parquet")
    blank = tmp_path / "c.jsonl"
    blank.write_text('{"id": 1}\n\n  \n{"id": 2}\n')
    assert list(sources.read(f"jsonl:{blank}")) == [{"id": 1}, {"id": 2}]
    assert list(sources.stamps(f"jsonl:{blank}")) == [str(blank)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(
        gzip.compress(b'{"a": 1}\n' * 9)[:-9] if "gz" in kind else b"\0" * 50
    )
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*not a whole"):
        list(sources.read(f"{kind.removesuffix('.gz')}:{path}"))


@pytest.mark.parametrize("line", ['{"a": ', "[1]", "9" * 5000, "[" * 9999, "\xff"])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:2: "):
        list(sources.read(str(path)))


@pytest.mark.parametrize(
    "call", [sources.stamps, lambda name: list(sources.read(name))]
)
def test_a_cloud_that_does_not_answer_is_named(monkeypatch, call):
    load_seqio()
    import tensorflow as tf

    def fail(path):
        raise tf.errors.FailedPreconditionError(None, None, "no host\nwhen reading")

    monkeypatch.setattr(sources, "_path", fail)
    with pytest.raises(OSError, match=r"read \(no host\); check .*: 'gs://b/a.jsonl'"):
        call("gs://b/a.jsonl")
