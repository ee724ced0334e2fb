"""The bundled triples of FRet, generated and relabelled."""

import collections
import json

import numpy as np
import pytest

from gecko_jax.data import (
    fret_builder,
    jsonl,
    load_seqio,
    mixtures,
    registration,
    task_table,
)

LICENCES = {
    *("Apache-2.0", "BSD-3-Clause", "PSF-2.0", "PostgreSQL", "curl"),
    *("WordNet-3.0", "public domain"),
}


@pytest.fixture(scope="module", params=["fret", "relabelled"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def lines(kind):
    path = task_table.QUICKSTART / kind / "fret.jsonl.gz"
    return [record for _, record, _ in jsonl.read_lines(path)]


def test_the_table_counts_the_lines_of_each_task(kind, lines):
    counts = collections.Counter(line["task"] for line in lines)
    tasks, _ = mixtures.resolve(f"quickstart_{kind}")
    assert {task.source_task: task.num_examples for task in tasks} == counts
    assert len(lines) >= {"fret": 600, "relabelled": 500}[kind]


def test_every_text_names_its_licence(kind, lines):
    for line in lines:
        named = {line["licence"], *line["negative_licences"]}
        if kind == "fret" or line["moved"]:
            named.add(line["seed_licence"])
        named |= {candidate["licence"] for candidate in line["candidates"]}
        assert named <= LICENCES
        assert len(line["negative_licences"]) == len(line["negatives"])
        model = line["generator" if kind == "fret" else "judge"]
        assert model.startswith("qwen2.5-coder-1.5b")
        for text in (*line["candidates"], line):
            if kind == "relabelled":
                assert text["source_id"].startswith(f"{text['source']}/")


def test_positive_and_negatives_are_among_the_judged_candidates(lines):
    for line in lines:
        texts = collections.defaultdict(list)
        for candidate in line["candidates"]:
            texts[candidate["part"]].append(candidate["text"])
        assert texts["positive"] == [line["positive"]]
        assert sorted(texts["negative"]) == sorted(line["negatives"])
        assert 2 <= len(line["candidates"]) <= 6
        scores = [[c[name] for name in ("ql", "rc", "rrf")] for c in line["candidates"]]
        assert np.isfinite(scores).all()
        best = max(line["candidates"], key=lambda candidate: candidate["rrf"])
        assert best["rrf"] == pytest.approx(
            next(c["rrf"] for c in line["candidates"] if c["part"] == "positive")
        )
        assert len(line["scores"]) == 1 + len(line["negatives"])


def test_no_line_has_a_held_out_query_or_its_passage(lines):
    def read(name):
        content = (task_table.QUICKSTART / name).read_text()
        return [json.loads(line) for line in content.splitlines()]

    relevant = {row["corpus-id"] for row in read("qrels.jsonl")}
    held_out = {row["text"] for row in read("queries.jsonl")}
    held_out |= {row["text"] for row in read("corpus.jsonl") if row["_id"] in relevant}
    for line in lines:
        texts = {line["query"], line["positive"], *line["negatives"]}
        assert not texts & held_out


def test_the_mixture_reads_them(kind, lines):
    seqio = load_seqio()
    registration.register(f"quickstart_{kind}")
    mixture = seqio.get_mixture_or_task(f"quickstart_{kind}")
    assert mixture.num_input_examples("train") == len(lines)
    dataset = mixture.get_dataset(
        sequence_length={"query": 32, "positive": 64, "negatives": 64},
        split="train",
        shuffle=False,
    )
    assert len(next(dataset.as_numpy_iterator())["positive"]) <= 64


def test_they_are_a_tfds_set(kind, lines, tmp_path):
    builder = fret_builder.build(task_table.QUICKSTART / kind, tmp_path)
    assert builder.info.splits["train"].num_examples == len(lines)
    assert "qwen2.5-coder-1.5b" in builder.info.description
