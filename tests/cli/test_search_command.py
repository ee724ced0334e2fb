"""`gecko search` with queries as arguments, on standard input and at its prompt."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from gecko_jax.cli import entry


@pytest.fixture(scope="module")
def index_folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        '{"_id": "a", "title": "Geckos", "text": "Small lizards that climb walls."}\n'
        '{"_id": "b", "title": "", "text": "Arrays of any built-in type."}\n'
        '{"_id": "c", "title": "", "text": "The shortest path in a graph."}\n'
    )
    vectors, index = str(folder / "vectors"), str(folder / "index")
    arguments = ["embed", str(corpus), f"--model={tiny_folder}", "--dim=8"]
    assert entry.main([*arguments, f"--output={vectors}"]) == 0
    assert entry.main(["index", vectors, f"--output={index}"]) == 0
    return index


def test_search_answers_every_query_in_order(gecko, tiny_folder, index_folder):
    status, out, _ = gecko(
        *("search", f"--model={tiny_folder}", f"--index={index_folder}"),
        *("--count=2", "--json", "Small lizards that climb walls.", "a graph"),
    )
    assert status == 0
    first, second = map(json.loads, out.splitlines())
    assert first["query"] == "Small lizards that climb walls."
    assert second["query"] == "a graph"
    for answer in (first, second):
        scores = [hit["score"] for hit in answer["hits"]]
        assert len(scores) == 2
        assert scores == sorted(scores, reverse=True)


def test_search_reads_files_and_folders_and_caches_their_index(
    gecko, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("Small lizards climb\nwalls.\n\nArrays of any type.\n")
    (notes / "b.txt").write_text("The shortest path in a graph.\n")
    command = ("search", "shortest graph", "--json", f"--model={tiny_folder}")
    command += ("--hybrid", "--texts", str(notes))
    status, out, err = gecko(*command)
    assert status == 0
    assert "Embedding" in err
    (answer,) = map(json.loads, out.splitlines())
    ids = [hit["id"] for hit in answer["hits"]]
    assert sorted(ids) == [f"{notes}/a.md:1", f"{notes}/a.md:4", f"{notes}/b.txt:1"]
    # The model is untrained, so the words decide.
    assert ids.index(f"{notes}/b.txt:1") < 2
    by_id = {hit["id"]: hit["text"] for hit in answer["hits"]}
    assert by_id[f"{notes}/a.md:1"] == "Small lizards climb walls."

    status, again, err = gecko(*command)
    assert (status, again) == (0, out)
    assert "Embedding" not in err
    (notes / "b.txt").write_text("The shortest path in a graph.\nBread.\n")
    status, out, err = gecko(*command)
    assert len(json.loads(out)["hits"]) == 4
    assert "Embedding" in err


def test_search_needs_an_index_or_texts(gecko, tiny_folder, index_folder):
    for extra in ((), (f"--index={index_folder}", "--texts", "x.txt")):
        status, out, err = gecko("search", f"--model={tiny_folder}", *extra, "query")
        assert (status, out) == (1, "")
        assert "--index, --texts: give one of them" in err


def test_search_shows_titles_and_texts(gecko, tiny_folder, index_folder):
    status, out, _ = gecko(
        *("search", f"--model={tiny_folder}", f"--index={index_folder}", "lizard"),
    )
    assert status == 0
    assert "Geckos: Small lizards that climb walls." in out
    assert out.splitlines()[1] == "lizard"


def test_search_reads_queries_from_standard_input(
    gecko, monkeypatch, tiny_folder, index_folder
):
    lines = io.BytesIO(b"lizard\n\n   \n\xff\na graph\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, "utf-8"))
    status, out, err = gecko(
        "search", f"--model={tiny_folder}", f"--index={index_folder}", "--json"
    )
    assert status == 0
    assert [json.loads(line)["query"] for line in out.splitlines()] == [
        "lizard",
        "a graph",
    ]
    assert err.startswith("gecko search: standard input:4: not UTF-8")
    assert "error" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["   "], "is empty: a query or passage needs"),
        (["x", "--index=nowhere"], "nowhere: not an index (no index.json)"),
        (["x", "--model=nowhere"], "nowhere: no such folder, and not the name"),
    ],
)
def test_a_search_error_is_one_line(
    gecko, tiny_folder, index_folder, arguments, message
):
    start = ["search", f"--model={tiny_folder}", f"--index={index_folder}"]
    status, out, err = gecko(*start, *arguments)
    assert (status, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_search_without_queries_or_standard_input_is_an_error(gecko, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # The value of sys.stdin after `<&-`.
    status, _, err = gecko("search", "--model=m", "--index=i")
    assert status == 1
    assert "no QUERY, and standard input is closed" in err


def test_a_search_without_standard_output_is_silent(
    gecko, monkeypatch, tiny_folder, index_folder
):
    monkeypatch.setattr("sys.stdout", None)
    arguments = ("search", f"--model={tiny_folder}", f"--index={index_folder}", "a")
    assert gecko(*arguments)[0] == 0


# `gecko search` at a pseudo-terminal, with a fake model and index.
_AT_A_TERMINAL = r"""
import fcntl, sys, termios, types
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import gecko_jax
class Model:
    files = types.SimpleNamespace(query_length=9)
    def encode_queries(self, texts, task=None, dim=None):
        if "\udcff" in texts[0]:
            raise ValueError("no character")
        return [len(text) for text in texts]
class Index:
    dim = 4
    def check_model(self, model): pass
    def search(self, vectors, count): return [[0.5]], [[str(vectors[0])]]
    def text(self, name): return "found"
import gecko_jax.inference
gecko_jax.inference.embedding = types.SimpleNamespace(
    DEFAULT_TASK="t", load=lambda _: Model()
)
gecko_jax.inference.vector_index = types.SimpleNamespace(load=lambda _: Index())
from gecko_jax import __main__
sys.argv = ["gecko", "search", "--model=m", "--index=i"]
__main__.run()
"""


def _read_until(terminal, expected):
    output, end = b"", time.monotonic() + 20
    while expected not in output and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                output += os.read(terminal, 1 << 16)
            except OSError:  # The process has exited.
                break
    return output.decode(errors="replace")


@pytest.mark.parametrize(
    ("keys", "status", "last"),
    [
        (b"\x04", 0, ""),
        (b"\r", 0, ""),
        (b" \t \r", 0, ""),
        (b"half\x03", 130, "gecko search: interrupted"),
    ],
    ids=["end", "empty", "blank", "interrupt"],
)
def test_the_prompt_answers_until_it_is_closed(keys, status, last):
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", _AT_A_TERMINAL],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(inside)
    try:
        assert "one query per line" in _read_until(terminal, b"query> ")
        for line, answer in (
            (b"lizard", "  1  0.500  6  found"),
            (b"\xff", "gecko search: no character"),
            (b"long " * 1_000, "  1  0.500  4999  found"),
        ):
            os.write(terminal, line + b"\r")
            assert answer in _read_until(terminal, b"\nquery> ")
        # One at a time: CPython misses a signal that arrives while it reads a key.
        for key in keys:
            os.write(terminal, bytes([key]))
            time.sleep(0.2)
        rest = _read_until(terminal, b"no more")
        assert process.wait(20) == status
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert "Traceback" not in rest
    assert rest.strip().endswith(last)
