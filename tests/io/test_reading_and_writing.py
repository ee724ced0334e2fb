import errno
import gzip
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from gecko_jax.io import reading, writing
from gecko_jax.text import text_files


def _write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_texts_of_json_lines_plain_and_packed(tmp_path):
    lines = [
        '{"_id": "a", "title": "T", "text": "one", "task": "docs"}',
        "",
        '{"id": 7, "text": "two"}',
        '{"_id": "c", "title": "only a title", "text": ""}',
    ]
    plain = _write(tmp_path / "corpus.jsonl", *lines)
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        records = list(text_files.read_texts(path))
        assert [record.id for record in records] == ["a", "7", "c"]
        assert records[0][1:] == ("a", "T", "one", "docs")
        assert records[2].text == "only a title"
        assert records[1].place == f"{path}:3"


def test_a_txt_file_has_one_text_per_line_with_its_number_as_id(tmp_path):
    path = _write(tmp_path / "texts.txt", "first", "", "third")
    assert [(r.id, r.text) for r in text_files.read_texts(path)] == [
        ("1", "first"),
        ("3", "third"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "b", "text": ', r"corpus.jsonl:2: not JSON"),
        ("[1, 2]", r"corpus.jsonl:2: a list; each line must be one JSON object"),
        ('{"text": "x"}', r"corpus.jsonl:2: no field '_id' or 'id' \(it has text\)"),
        ('{"_id": "b"}', r"corpus.jsonl:2: no field 'text'"),
        ('{"_id": "b", "text": " \\n"}', r"corpus.jsonl:2: text '' is empty"),
        ('{"_id": "b", "text": ["x"]}', r"corpus.jsonl:2: field 'text' is a list"),
        ('{"_id": "a", "text": "x"}', r"corpus.jsonl:2: id 'a' .* at .*corpus.jsonl:1"),
        ("[" * 100_000, r"corpus.jsonl:2: JSON that cannot be read .*nested"),
        (f'{{"_id": {"9" * 5000}}}', r"corpus.jsonl:2: JSON that cannot be read"),
        (
            '{"_id": "b", "text": "\\ud800"}',
            r"corpus.jsonl:2: field .text. holds a lone",
        ),
        (
            json.dumps({"_id": "b", "text": "x " * 500_000}),
            r"corpus.jsonl:2: .*at most",
        ),
    ],
)
def test_errors_name_a_bad_line_and_its_rule(tmp_path, line, message):
    path = _write(tmp_path / "corpus.jsonl", '{"_id": "a", "text": "x"}', line)
    with pytest.raises(ValueError, match=message):
        list(text_files.read_texts(path))


def test_empty_texts_may_be_allowed(tmp_path):
    path = _write(tmp_path / "corpus.jsonl", '{"_id": "a", "text": ""}')
    assert [
        record.text for record in text_files.read_texts(path, allow_empty=True)
    ] == [""]


def test_a_missing_damaged_or_foreign_file_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        list(reading.read_lines(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b"{}\n\xe9\n")
    with pytest.raises(ValueError, match=r"latin.jsonl:2: not UTF-8"):
        list(reading.read_lines(tmp_path / "latin.jsonl"))
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.jsonl.gz:\d+: not a whole gzip file"):
        list(reading.read_lines(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "fake.jsonl.gz").write_bytes(b"plain\n")
    with pytest.raises(ValueError, match="not a whole gzip file"):
        list(reading.read_lines(tmp_path / "fake.jsonl.gz"))


def _write_half(writer):
    with writer as temporary:
        path = temporary / "half" if temporary.is_dir() else temporary
        path.write_text("half")
        raise RuntimeError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with writing.write_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError):
        _write_half(writing.write_file(path))
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder"
    for name in ("one", "two"):
        with writing.write_folder(path) as temporary:
            (temporary / name).write_text(name)
        assert [p.name for p in path.iterdir()] == [name]
    with pytest.raises(RuntimeError):
        _write_half(writing.write_folder(path))
    assert [p.name for p in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def _fill_disk(write, path):
    with write(path):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("write", [writing.write_file, writing.write_folder])
def test_a_full_disk_names_the_place_and_the_remedy(tmp_path, write):
    with pytest.raises(OSError, match=r"no disk space left for .*out; .*free some"):
        _fill_disk(write, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_gzip_file_is_named(tmp_path):
    packed = bytearray(gzip.compress(b'{"a": 1}'))
    packed[10] = 0xFF  # An invalid block type.
    (tmp_path / "bad.jsonl.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=r"bad.jsonl.gz:1: not a whole gzip file"):
        list(reading.read_lines(tmp_path / "bad.jsonl.gz"))


def test_only_files_are_replaced_by_files_and_links_stay_links(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="not a file"), writing.write_file(place):
            pass
    (tmp_path / "link").symlink_to("real")
    with writing.write_file(tmp_path / "link") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"
    with (
        pytest.raises(OSError, match=r"real.below: cannot be written .*not a folder"),
        writing.write_file(tmp_path / "real" / "below"),
    ):
        pass


def _ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_processes_are_removed_and_others_stay(tmp_path):
    path = tmp_path / "out"
    begin = f".out.{socket.gethostname()}-"
    dead = tmp_path / f"{begin}{_ended_process()}-0.tmp"
    alive = tmp_path / f"{begin}{os.getppid()}-0.tmp"
    for left in (dead, alive):
        left.write_text("half")
    with writing.write_file(path) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([alive, path])


def test_a_folder_is_restored_after_a_killed_replacement(tmp_path):
    old = tmp_path / f".out.{socket.gethostname()}-{_ended_process()}-0.old"
    old.mkdir()
    (old / "kept").write_text("x")
    with pytest.raises(RuntimeError):
        _write_half(writing.write_folder(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_of_two_writers_of_a_folder_the_later_one_wins(tmp_path, monkeypatch):
    path, rename = tmp_path / "out", pathlib.Path.rename
    others = iter(["first", "second"])

    def rename_late(source, target):
        """Another writer finishes just before the rename."""
        if target == path and (name := next(others, None)):
            path.mkdir()
            (path / name).touch()
        return rename(source, target)

    with writing.write_folder(path) as folder:
        (folder / "ours").touch()
        monkeypatch.setattr(pathlib.Path, "rename", rename_late)
    assert sorted(child.name for child in tmp_path.rglob("*")) == ["ours", "out"]


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_may_be_nested_as_deep_as_it_is_used(opening):
    closing = "]" if opening == "[" else "}"
    for depth, is_read in ((1, True), (49, True), (50, False), (900, False)):
        content = opening * depth + "1" + closing * depth
        if is_read:
            assert reading.parse_json(content) == json.loads(content)
        else:
            with pytest.raises(ValueError, match="brackets are nested more than"):
                reading.parse_json(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"size": 2, "kind": "c"}', 'kind must be one of a, b, not "c"'),
        ('{"size": true, "kind": "a"}', "size must be a whole number from 1, not true"),
        ('{"size": 0, "kind": "a"}', "size must be a whole number from 1, not 0"),
        ("{}", "no size; no kind"),
        ("null", "null, not an object"),
        ("\udcff", "not JSON"),
        ("[" * 100_000, "not JSON .*nested more than 50 deep"),
        (f'{{"size": {"[" * 51}{"]" * 51}}}', "not JSON .*nested more than 50 deep"),
    ],
)
def test_errors_list_the_invalid_fields_of_a_file(tmp_path, content, message):
    path = tmp_path / "about.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    fields = {"size": int, "kind": ("a", "b")}
    with pytest.raises(ValueError, match=rf"about\.json: .*{message}.*; make it again"):
        reading.read_object(path, fields, remedy="make it again")
    path.write_text('{"size": 1}')
    defaults = {"kind": "b"}
    found = reading.read_object(path, fields, remedy="", defaults=defaults)
    assert found == {"size": 1, "kind": "b"}
