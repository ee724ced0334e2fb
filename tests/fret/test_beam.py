"""Passages by Apache Beam are those of a run without it."""

import json
import random
import sys

import fret_runs
import pytest

from gecko_jax.fret import beam_passages, runs


@pytest.fixture
def files(tmp_path):
    """Three files with equal and nearly equal texts, within and across them."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(fret_runs.WORDS, k=60)) for _ in range(24)]
    for number in range(6):  # Chains: each differs from the one before by a word.
        words = texts[number].split()
        for place in range(4):
            words[10 * place + 5] = f"other{number}{place}"
            texts.append(" ".join(words))
    texts += [texts[3], texts[20], texts[26], "too short", "", "x\x00y " * 12]
    rng.shuffle(texts)
    paths = []
    for part in range(3):
        paths.append(tmp_path / f"part-{part}.jsonl")
        lines = [
            json.dumps({"_id": f"d{n}", "title": f"T{n}", "text": one}) + "\n"
            for n, one in enumerate(texts[part::3])
        ]
        paths[-1].write_text("".join(lines))
    return paths


def load(files, *overrides):
    config = fret_runs.load(files[0], "http://127.0.0.1:9", *overrides)
    config.passages.files = tuple(map(str, files))
    return config


def test_a_text_is_dropped_only_for_one_that_is_kept():
    a, b, c, d = ((0, 1), (0, 9), (1, 0), (1, 1))
    # b goes for a; c is like b alone, which is gone, and stays; d goes for c.
    pairs = [(c, d), (b, c), (a, b), (a, b)]
    assert beam_passages.later_of_the_kept(pairs) == [b, d]
    assert beam_passages.later_of_the_kept([]) == []


def test_missing_beam_is_told(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ImportError, match=r"gecko-jax\[beam\]"):
        runs.run(load(files), tmp_path / "run", until="passages", beam_options=())
    assert not list((tmp_path / "run/passages").glob("shard-*"))


@pytest.mark.beam
@pytest.mark.parametrize("near", [0.0, 0.7])
def test_beam_keeps_the_same_passages_in_the_same_bytes(files, tmp_path, near):
    config = load(files, f"passages.near_duplicate={near}")
    runs.run(config, tmp_path / "plain", until="passages")
    options = ("--runner=DirectRunner",)
    runs.run(config, tmp_path / "beam", until="passages", beam_options=options)
    expected = fret_runs.contents(tmp_path / "plain/passages")
    dropped = json.loads(expected[".done.json"])["dropped"]
    assert dropped["duplicate"] == 3
    assert ("near_duplicate" in dropped) == bool(near)
    assert fret_runs.contents(tmp_path / "beam/passages") == expected


@pytest.mark.beam
def test_beam_takes_no_limit_and_wants_passages(files, tmp_path):
    options = ("--runner=DirectRunner",)
    with pytest.raises(ValueError, match=r"passages\.limit=5: .*set it to 0"):
        runs.run(
            load(files, "passages.limit=5"),
            tmp_path / "run",
            until="passages",
            beam_options=options,
        )
    with pytest.raises(ValueError, match="no passage is left"):
        runs.run(
            load(files, "passages.min_words=1000"),
            tmp_path / "none",
            until="passages",
            beam_options=options,
        )
