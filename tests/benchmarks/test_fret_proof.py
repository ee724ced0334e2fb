"""The benchmark of FRet's triples, without its trainings."""

import argparse
import json
import pathlib
import sys

import fake_llm
import fret_runs
import numpy as np
import pytest

from gecko_jax.cli import flags
from gecko_jax.fret import runs
from gecko_jax.llm import request_log

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import fret_proof
import fret_proof_table


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The options and results of a replayed run."""
    output = tmp_path_factory.mktemp("proof")
    options = argparse.Namespace(
        output=output,
        data="quickstart",
        start="bag",
        start_steps=4,
        steps=2,
        batch_size=8,
        judged=5,
    )
    config = flags.load(f"{fret_runs.ROOT / 'configs/fret.py'}:local,recorded")
    return options, fret_proof.make_triples(config, options)


def read(options, name):
    lines = fret_proof.triples_path(name, options).read_text().splitlines()
    return {row["seed"]: row for row in map(json.loads, lines)}


def test_rows_differ_by_their_choice_alone(made):
    options, facts = made
    rows = {name: read(options, name) for name in fret_proof.ROWS}
    seed, relabelled = rows["seed, none"], rows["relabelled, none"]
    assert all(found.keys() == seed.keys() for found in rows.values())
    assert len(seed) == facts["triples"] > 25
    passages = {
        record["id"]: record["text"]
        for path in (options.output / "fret/passages").glob("shard-*")
        for record in map(json.loads, path.open())
    }
    for number, row in seed.items():
        assert row["positive"] == passages[number]
        assert all(found[number]["query"] == row["query"] for found in rows.values())
        assert "negatives" not in row
        assert "negatives" not in relabelled[number]
        hardest = rows["relabelled, hardest"][number]["negatives"]
        assert hardest == rows["relabelled, hardest 4"][number]["negatives"][:1]
        distilled = rows["relabelled, hardest 4, KL"][number]
        assert len(distilled["scores"]) == 1 + len(distilled["negatives"]) <= 5
        assert row["query"] == distilled["query"]
    moved = [n for n in seed if relabelled[n]["positive"] != seed[n]["positive"]]
    assert 0 < len(moved) == round(facts["moved"] * len(seed)) < len(seed)
    drawn, hardest = rows["relabelled, random"], rows["relabelled, hardest"]
    assert any(drawn[n]["negatives"] != hardest[n]["negatives"] for n in seed)


def test_every_row_trains_on_its_triples_from_the_same_start(made):
    options, _ = made
    start = fret_proof.training_config(fret_proof.START, 1, options)
    assert (start.data.num_negatives, start.train.num_steps) == (0, 4)
    for name, choice in fret_proof.ROWS.items():
        config = fret_proof.training_config(name, 1, options)
        num_negatives = choice.get("fuse.num_negatives", 1)
        if choice["fuse.negative"] == "none":
            num_negatives = 0
        assert config.data.num_negatives == num_negatives
        assert config.loss.kl_weight == float(name.endswith("KL"))
        assert config.data.files == (str(fret_proof.triples_path(name, options)),)
        assert config.init.checkpoint == str(
            fret_proof.model_path(fret_proof.START, 1, options)
        )
        assert (config.seed, config.train.num_steps) == (1, 2)
    assert config.model.num_layers == 0
    options = argparse.Namespace(**vars(options) | {"start": "mini"})
    assert fret_proof.training_config(name, 1, options).init.checkpoint == "mini"
    options.start = "t5"
    start = fret_proof.training_config(fret_proof.START, 1, options)
    assert start.model.num_layers > 0


def test_judges_rank_judged_queries_and_ask_once(tmp_path):
    ((task, one),) = fret_proof.retrieval_sets(argparse.Namespace(data="quickstart"))
    few = one.limit(24, 0)
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(fret_runs.write_corpus(tmp_path), fake.url)
        for _ in range(2):
            budget = request_log.Budget()
            with runs.prepare(config, tmp_path / "run", budget) as source:
                found = fret_proof.rerank(source, few, task, tmp_path / "log")
        assert not fret_runs.repeated(fake)
    assert found["queries"] == 24
    assert found["ndcg"].keys() == {"retrieval", "QL", "RC", "RRF"}
    (count,) = {len(values) for values in found["ndcg"].values()}
    assert 0 < count <= 24
    # The fake model prefers queries whose words the passage has, as BM25 does.
    assert np.mean(found["ndcg"]["QL"]) > 0.3
    assert all(0 <= v <= 1 for values in found["ndcg"].values() for v in values)


def test_the_tables_show_mean_and_spread(made, tmp_path):
    _, facts = made
    rows = tmp_path / "rows"
    rows.mkdir()
    about = {"machine": "m", "date": "d", "commit": "c"}
    (rows / "run.json").write_text(json.dumps(facts | about))
    some = {"retrieval": 0.5, "QL": 0.75, "RC": 0.4, "fusion": 0.6}
    flat = {"QL": [0.5, 0.5], "RC": [0.0, 0.0]}
    judges = {
        "seeds": {
            "seeds": 9,
            "mrr": some | {"chance": 0.3},
            "standard_error": dict.fromkeys(some, 0.125),
        },
        "queries": {
            "t": {"ndcg": flat | {"retrieval": [0.0, 0.5], "RRF": [0.5, 0.5]}},
            "u": {"ndcg": flat | {"retrieval": [0.25, 0.75], "RRF": [0.25, 0.75]}},
        },
    }
    (rows / "judges-7.json").write_text(json.dumps(judges))
    names = [fret_proof.START, *fret_proof.ROWS]
    for number, name in enumerate(names):
        for seed in (0, 1):
            score = 0.2 + 0.1 * number + 0.02 * seed * number
            row = {
                "row": name,
                "seed": seed,
                "data": "t",
                "start": "bag",
                "steps": [4, 2],
                "batch_size": 8,
                "scores": {"test": {"t": {"64": 0.0, "256": score}}},
            }
            (rows / f"model-{number}-{seed}.json").write_text(json.dumps(row))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{fret_proof_table.BEGIN}\nold\n{fret_proof_table.END}\nz")
    fret_proof_table.write(rows, page, names)
    fret_proof_table.write(rows, page, names)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{fret_proof_table.END}\nz")
    assert "old" not in text
    assert "| initial retriever | 0.200 ± 0.000 | -0.110 ± 0.014 | 0, 1 |" in text
    assert "| seed, none | 0.310 ± 0.014 |  | 0, 1 |" in text
    assert "| seed, hardest | 0.420 ± 0.028 | +0.110 ± 0.014 | 0, 1 |" in text
    assert "nDCG@10, 2 queries of `u`" in text
    assert (
        "| retrieval | 0.500 ± 0.125 | 0.250 ± 0.177 | 0.500 ± 0.177 | 0.375 ± 0.125 |"
        in text
    )
    # The paired gains of `u` are 0, so its queries add no error.
    assert "paired | | +0.250 ± 0.177 | +0.000 ± 0.000 | +0.125 ± 0.088 |" in text
    page.write_text("no place")
    with pytest.raises(SystemExit, match="no place for the tables"):
        fret_proof_table.write(rows, page, names)
