"""The benchmark of FRet's triples, without its trainings."""

import argparse
import json
import pathlib
import sys

import fake_llm
import fret_runs
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
        output=output, data="quickstart", start_steps=4, steps=2, batch_size=8, judged=5
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
        assert rows["relabelled, hardest"][number]["negatives"]
    moved = [n for n in seed if relabelled[n]["positive"] != seed[n]["positive"]]
    assert 0 < len(moved) == round(facts["moved"] * len(seed)) < len(seed)
    drawn, hardest = rows["relabelled, random"], rows["relabelled, hardest"]
    assert any(drawn[n]["negatives"] != hardest[n]["negatives"] for n in seed)


def test_every_row_trains_on_its_triples_from_the_same_start(made):
    options, _ = made
    start = fret_proof.training_config(fret_proof.START, 1, options)
    assert (start.data.num_negatives, start.train.num_steps) == (0, 4)
    for name, (_, negative) in fret_proof.ROWS.items():
        config = fret_proof.training_config(name, 1, options)
        assert config.data.num_negatives == (negative != "none")
        assert config.data.files == (str(fret_proof.triples_path(name, options)),)
        assert config.init.checkpoint == str(
            fret_proof.model_path(fret_proof.START, 1, options)
        )
        assert (config.seed, config.train.num_steps) == (1, 2)


def test_judges_rank_judged_queries_and_ask_once(tmp_path):
    ((task, one),) = fret_proof.retrieval_sets(argparse.Namespace(data="quickstart"))
    few = one.limit(24, 0)
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(fret_runs.write_corpus(tmp_path), fake.url)
        for _ in range(2):
            with runs.prepare(
                config, tmp_path / "run", request_log.Budget(), runs.open_model
            ) as source:
                found = fret_proof.rerank(source, few, task, tmp_path / "log")
        assert not fret_runs.repeated(fake)
    assert found["judged"] <= found["queries"] == 24
    assert found["ndcg"].keys() == {"retrieval", "QL", "RC", "RRF"}
    # The fake model prefers queries whose words the passage has, as BM25 does.
    assert found["ndcg"]["QL"] > 0.3
    assert all(0 <= value <= 1 for value in found["ndcg"].values())


def test_the_tables_show_mean_and_spread(made, tmp_path):
    _, facts = made
    rows = tmp_path / "rows"
    rows.mkdir()
    about = {"machine": "m", "date": "d", "commit": "c"}
    (rows / "run.json").write_text(json.dumps(facts | about))
    judges = {
        "seeds": {
            "seeds": 9,
            "mrr": {"retrieval": 0.5, "QL": 0.75, "chance": 0.3},
            "standard_error": {"retrieval": 0.1, "QL": 0.125},
        },
        "queries": {
            "t": {
                "judged": 7,
                "ndcg": {"QL": 0.25, "RRF": 0.5},
                "standard_error": {"QL": 0.0, "RRF": 0.0},
            },
            "u": {"judged": 7, "ndcg": {"QL": 0.35}, "standard_error": {"QL": 0.2}},
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
    assert (
        "| QL | 0.750 ± 0.125 | 0.250 ± 0.000 | 0.350 ± 0.200 | 0.300 ± 0.100 |" in text
    )
    page.write_text("no place")
    with pytest.raises(SystemExit, match="no place for the tables"):
        fret_proof_table.write(rows, page, names)
