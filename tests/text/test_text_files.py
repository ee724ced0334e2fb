"""Passages from files and folders."""

import gzip
import json

import pytest
import samples

from gecko_jax.text import text_files


def _passages(*paths):
    files = text_files.find_files(paths)
    return {p.id: p.text for p in text_files.read_passages(files)}


def test_lines_of_prose_are_paragraphs(tmp_path):
    path = samples.write(tmp_path / "a.md", "# Birds\nHerons wade.\n\n\n- one\n- two\n")
    assert _passages(path) == {"1": "# Birds Herons wade.", "5": "- one - two"}


def test_a_long_paragraph_is_split_between_lines(tmp_path):
    line = "x" * 999
    path = samples.write(tmp_path / "a.rst", "\n".join([line] * 5))
    passages = _passages(path)
    assert list(passages) == ["1", "3", "5"]
    assert "".join(passages.values()).count("x") == 5 * 999


def test_a_folder_is_read_whole_with_names_in_the_ids(tmp_path):
    samples.write(tmp_path / "a.txt", "one\ntwo\n")
    (tmp_path / "inner").mkdir()
    record = json.dumps({"_id": "p1", "title": "T", "text": "three"})
    packed = gzip.compress(record.encode(), mtime=0)
    (tmp_path / "inner" / "b.jsonl.gz").write_bytes(packed)
    samples.write(tmp_path / "picture.png", "not text")
    assert _passages(tmp_path) == {
        f"{tmp_path}/a.txt:1": "one",
        f"{tmp_path}/a.txt:2": "two",
        f"{tmp_path}/inner/b.jsonl.gz:p1": "three",
    }
    # A file named twice counts once.
    assert len(_passages(tmp_path, tmp_path / "a.txt")) == 3


def test_unsearchable_inputs_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no files in it that end in \.jsonl"):
        text_files.find_files([tmp_path / "empty"])
    page = samples.write(tmp_path / "page.html", "<p>")
    with pytest.raises(ValueError, match=r"page\.html: unknown kind of file; use one"):
        text_files.find_files([page])
    with pytest.raises(ValueError, match=r"gone\.txt: no such file"):
        _passages(tmp_path / "gone.txt")
    twice = samples.write(tmp_path / "twice.jsonl", '{"id": 1, "text": "a"}\n' * 2)
    with pytest.raises(ValueError, match=r"twice\.jsonl:2: .*1"):
        _passages(twice)
