"""Every verb reads the same values from a file, or reports the same error."""

import gzip
import io
import json
import os
import re

import numpy as np
import pytest
import samples

from gecko_jax.cli import search_command
from gecko_jax.data import jsonl, sources
from gecko_jax.evaluation import sets
from gecko_jax.fret import passages
from gecko_jax.inference import vector_files, vector_index
from gecko_jax.text import overlap, text_files

NEL, LS, BOM = "\x85", "\u2028", "\ufeff"
LIZARD = '{"_id": "p1", "text": "lizard on wall"}\n'
BREAD = '{"_id": "p2", "text": "bread and flour"}\n'


# Functions that read a corpus and return its (id, text) pairs.


def _evaluate(folder, content, name, ids, gecko):
    (found,) = sets.load(samples.judged_folder(folder, content, name, ids))
    return list(zip(found.passage_ids, found.texts, strict=True))


def _prepare(folder, content, name, ids, gecko):
    samples.judged_folder(folder, content, name, ids, split="train")
    (found,) = sources.read(f"beir:{folder}")
    return [(p["docid"], p["text"]) for p in found["positive_passages"]]


def _embed(folder, content, name, ids, gecko):
    path = samples.write(folder / name, content) if name else folder / "corpus.jsonl"
    made = vector_index.from_embeddings(
        vector_files.embed_file(gecko, path, folder / "v")
    )
    return list(zip(made.ids, made.texts, strict=True))


def _fret(folder, content, name, ids, gecko):
    path = samples.write(folder / name, content) if name else folder / "corpus.jsonl"
    return [(p["source_id"], p["text"]) for p in passages.read_file(path)]


VERBS = {
    "evaluate": _evaluate,
    "data prepare": _prepare,
    "embed": _embed,
    "fret": _fret,
}

# (file name, content, expected (id, text) pairs) of a corpus.
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
def test_every_command_reads_the_same_texts(tmp_path, tiny_gecko, oddity, verb):
    name, content, expected = GOOD[oddity]
    ids = [identity for identity, _ in expected]
    assert VERBS[verb](tmp_path, content, name, ids, tiny_gecko) == expected


def _with_id(written):
    return LIZARD + BREAD.replace('"p2"', written)


# (file name, content, error) of a corpus.
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
def test_every_command_gives_the_same_error(tmp_path, tiny_gecko, oddity, verb):
    name, content, message = BAD[oddity]
    message = f"{tmp_path}/{message.format(tmp_path / name)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        VERBS[verb](tmp_path, content, name, ["p1"], tiny_gecko)


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_refuses_a_pipe_or_folder(tmp_path, tiny_gecko, verb):
    for make, kind in ((os.mkfifo, "a pipe"), (os.mkdir, "a folder")):
        folder = tmp_path / kind
        folder.mkdir()
        make(folder / "corpus.jsonl")
        with pytest.raises(ValueError, match=f"corpus.jsonl: {kind}, not a file; "):
            VERBS[verb](folder, "", "", ["p1"], tiny_gecko)


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_null_id_is_a_missing_id(tmp_path, tiny_gecko, value):
    for verb, read in VERBS.items():
        arguments = (_with_id(value), "corpus.jsonl", ["p1"], tiny_gecko)
        if verb == "fret":  # Ids are optional here.
            assert [i for i, _ in read(tmp_path / verb, *arguments)] == ["p1", "2"]
            continue
        with pytest.raises(ValueError, match="jsonl:2: field '_id' is null or NaN"):
            read(tmp_path / verb, *arguments)


def _why_dropped(path):
    """Why FRet does not keep the last passage of a file."""
    *_, last = passages.read_file(path)
    rules = passages.Rules(1, 99, 0.0, 0)
    return passages.clean(last, rules, overlap.Contamination())


@pytest.mark.parametrize("value", ["null", "NaN", '""'])
def test_a_text_without_a_value_is_an_empty_text(tmp_path, tiny_gecko, value):
    content = BREAD + f'{{"_id": "p3", "text": {value}}}\n'
    arguments = (content, "corpus.jsonl", ["p2", "p3"], tiny_gecko)
    assert _evaluate(tmp_path / "a", *arguments) == TEXTS[1:]
    assert _prepare(tmp_path / "b", *arguments) == [TEXTS[1], ("p3", "")]
    with pytest.raises(ValueError, match=r"corpus.jsonl:2: text '' is empty"):
        _embed(tmp_path / "c", *arguments)
    assert _why_dropped(tmp_path / "a" / "corpus.jsonl") in ("no_text", "empty")
    # The text of a passage that has only a title is the title, in all of these forms.
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


# Standard input of `gecko search`: (bytes, queries).
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
    assert [line for _, line in search_command._read_lines()] == queries
    path = samples.write(tmp_path / "queries.txt", content)
    told = capsys.readouterr().err
    if told:
        assert told.startswith("gecko search: standard input:2: not UTF-8")
        with pytest.raises(ValueError, match=r"queries.txt:2: not UTF-8"):
            list(text_files.read_texts(path))
    else:
        assert [record.text for record in text_files.read_texts(path)] == queries


@pytest.mark.parametrize(
    "content", ["one\n".encode("utf-16"), gzip.compress(b"one", mtime=0)]
)
def test_standard_input_of_another_kind_ends_the_reading(monkeypatch, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match=r"^standard input: .*, not UTF-8 text; "):
        list(search_command._read_lines())


# In training data, a missing value equals a missing field.
PAIR_RECORD = {
    "task": "t",
    "query": "who",
    "positive": "a gecko",
    "negatives": ["a newt", "a toad"],
}
MISSING = ("title", "task_description", "query_id", "passage_id", "negative_group")


@pytest.mark.parametrize("value", ["null", "NaN"])
def test_a_null_field_of_a_pair_is_a_missing_field(tmp_path, value):
    plain = json.dumps(PAIR_RECORD)
    fields = [f'"{name}": {value}' for name in MISSING]
    fields += [
        f'"{name}": [{value}, {value}]' for name in ("negative_titles", "negative_ids")
    ]
    odd = f"{plain[:-1]}, {', '.join(fields)}}}"
    path = samples.write(tmp_path / "pairs.jsonl", f"{plain}\n{odd}\n")
    first, second = jsonl.read_pairs(path)
    assert first == second
    for name in ("query", "positive", "task"):
        odd = plain.replace(f'"{name}": "', f'"{name}": {value}, "x": "')
        path = samples.write(tmp_path / "pairs.jsonl", odd)
        with pytest.raises(ValueError, match=f"jsonl:1: field '{name}' is null or NaN"):
            list(jsonl.read_pairs(path))


def test_a_whole_float_is_the_integer_in_a_pair(tmp_path):
    ids = {"query_id": 1, "passage_id": 2, "negative_ids": [3, 4], "negative_group": 5}
    floats = json.loads(json.dumps(ids), parse_int=float)
    lines = [json.dumps({**PAIR_RECORD, **extra}) for extra in (ids, floats)]
    first, second = jsonl.read_pairs(
        samples.write(tmp_path / "a.jsonl", "\n".join(lines))
    )
    assert first == second
    assert second.given_ids == (2, 3, 4)
    assert isinstance(second.given_ids[0], int)
    empty = json.dumps({**PAIR_RECORD, "query_id": ""})
    with pytest.raises(ValueError, match="field 'query_id' is empty"):
        list(jsonl.read_pairs(samples.write(tmp_path / "a.jsonl", empty)))


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
    # Records of TFDS.
    assert sources._plain({"a": np.float32("nan"), "b": np.array([np.nan, 1])}) == {
        "a": None,
        "b": [None, 1.0],
    }
