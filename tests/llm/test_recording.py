"""The whole pipeline on recorded answers of a real model."""

import gzip
import json
import pathlib

import pytest

from gecko_jax.cli import flags
from gecko_jax.data import jsonl
from gecko_jax.fret import runs
from gecko_jax.llm import request_log

ROOT = pathlib.Path(__file__).parents[2]
RECORDING = ROOT / "gecko_jax/quickstart/recording"
# Of the bundled corpus: all allow redistribution.
LICENCES = {
    "WordNet-3.0",
    "PostgreSQL",
    "PSF-2.0",
    "public domain",
    "BSD-3-Clause",
    "Apache-2.0",
}


def load(*overrides):
    return flags.load(f"{ROOT / 'configs/fret.py'}:local,recorded", list(overrides))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The workdir and the summary of a replayed run."""
    workdir = tmp_path_factory.mktemp("recorded")
    return workdir, runs.run(load(), workdir)


def test_every_stage_runs_on_real_answers(made):
    _, summary = made
    assert summary.budget.requests == 0
    generated, fused = summary.stages["generate"], summary.stages["fuse"]
    assert generated["records"] == 50
    assert not any("error" in why for why in generated["dropped"])
    assert fused["kept"] > 25
    pairs = list(jsonl.read_pairs(summary.output))
    assert len(pairs) == fused["kept"]
    assert all(pair.positive != pair.negatives[0] for pair in pairs)
    triples = [json.loads(line) for line in summary.output.open()]
    assert {t["generator"].partition("@")[0] for t in triples} == {
        "qwen2.5-coder-1.5b-instruct-q4_k_m"
    }
    assert {t["licence"] for t in triples} <= LICENCES
    assert len({t["query"] for t in triples}) > 0.9 * len(triples)


def test_the_judge_finds_the_seed_better_than_chance(made):
    workdir, _ = made
    rows = [
        json.loads(line)
        for path in (workdir / "fuse").glob("shard-*.jsonl")
        for line in path.open()
    ]
    found = {
        row["id"]: row["candidates"]
        for path in (workdir / "retrieve").glob("shard-*.jsonl")
        for row in map(json.loads, path.open())
    }
    ranks = [
        row["ranks"]["likelihood"][found[row["id"]].index(row["id"])]
        for row in rows
        if row.get("ranks")
    ]
    # Of ten candidates by chance: 0.293.
    assert sum(1 / rank for rank in ranks) / len(ranks) > 0.6


def test_what_was_not_recorded_is_told(tmp_path):
    with pytest.raises(ValueError, match="not_recorded"):
        runs.run(load("--config.generate.temperature=0.1"), tmp_path / "run")


def test_the_recording_is_small_and_whole():
    assert sum(p.stat().st_size for p in RECORDING.iterdir()) < 300_000
    name, facts, answers = request_log.read_recording(RECORDING)
    assert facts["model"] == name
    with gzip.open(RECORDING / "answers.jsonl.gz", "rt") as lines:
        keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == len(answers)
