"""The TFDS data set of FRet's triples."""

import gzip
import json
import pathlib
import re

import pytest

from gecko_jax.data import fret_builder, sources

TRIPLES = [
    {
        "task": "search result",
        "query": f"query {number}",
        "positive": f"passage {number}",
        "title": "A title",
        "negatives": [f"another passage {number}"],
        "negative_titles": [""],
        "task_description": "find it",
        "generator": "a model",
        "prompt": "generate@1",
        "seed": number,
        "licence": "CC0-1.0",
    }
    for number in range(5)
]
TRIPLES[4].pop("negatives")
TRIPLES[4].pop("negative_titles")
TRIPLES[3] |= {
    "moved": True,
    "judge": "a judge",
    "scores": [-1.5, None],
    "candidates": [
        {"text": "passage 3", "title": "A title", "ql": -1.5, "rc": -0.5, "part": ""},
        {"text": "another passage 3", "title": "", "ql": -2.0, "part": "negative"},
    ],
}


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    write(folder, TRIPLES)
    (folder / "README.md").write_text("# FRet triples\n\nOf a test.\n")
    return folder


def write(folder, triples):
    (folder / "fret.jsonl").write_text(to_lines(triples))


def to_lines(triples):
    return "".join(json.dumps(triple) + "\n" for triple in triples)


def test_triples_may_be_compressed(export, tmp_path):
    (export / "fret.jsonl").unlink()
    (export / "fret.jsonl.gz").write_bytes(gzip.compress(to_lines(TRIPLES).encode()))
    builder = fret_builder.build(export, tmp_path / "tfds")
    assert builder.info.splits["train"].num_examples == 5


def test_the_data_set_holds_every_field_in_order(export, tmp_path):
    builder = fret_builder.build(export, tmp_path / "tfds")
    assert builder.info.splits["train"].num_examples == 5
    assert "Of a test." in builder.info.description
    # As anybody reads it who has the folder alone.
    data_dir = str(tmp_path / "tfds")
    found = list(sources.read("tfds:gecko_fret:train", tfds_data_dir=data_dir))
    found.sort(key=lambda record: record["seed"])
    for record, triple in zip(found, TRIPLES, strict=True):
        for name, value in ({"negatives": [], "judge": ""} | triple).items():
            if name not in ("scores", "candidates"):
                assert plain(record[name]) == value, name
        assert plain(record["source"]) == ""
    assert [record["moved"] for record in found] == [-1, -1, -1, 1, -1]
    # The reader of our sources turns NaN into null.
    assert plain(found[3]["scores"]) == [-1.5, None]
    assert not len(found[0]["scores"])
    candidates = found[3]["candidates"]
    assert plain(candidates["text"]) == ["passage 3", "another passage 3"]
    assert plain(candidates["part"]) == ["", "negative"]
    assert plain(candidates["ql"]) == [-1.5, -2.0]
    assert plain(candidates["rc"]) == [-0.5, None]


def plain(value):
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def test_another_export_is_not_taken_for_the_one_that_is_there(export, tmp_path):
    fret_builder.build(export, tmp_path / "tfds")
    fret_builder.build(export, tmp_path / "tfds")
    write(export, TRIPLES[:3])
    with pytest.raises(ValueError, match=r"holds other triples.*choose another"):
        fret_builder.build(export, tmp_path / "tfds")


@pytest.mark.parametrize("name", ["fret.jsonl", "README.md"])
def test_a_folder_that_is_no_export_is_refused(export, tmp_path, name):
    (export / name).unlink()
    with pytest.raises(ValueError, match=f"it has no {re.escape(name)}"):
        fret_builder.build(export, tmp_path / "tfds")
    assert not pathlib.Path(tmp_path / "tfds").exists()


def test_a_bad_line_leaves_no_data_set(export, tmp_path):
    write(export, [*TRIPLES, {"task": "docs", "query": "no positive"}])
    with pytest.raises(ValueError, match=r"fret\.jsonl:6"):
        fret_builder.build(export, tmp_path / "tfds")
    write(export, TRIPLES)
    assert fret_builder.build(export, tmp_path / "tfds").info.splits["train"]
