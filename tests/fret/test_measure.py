"""The plan and the calibration of a run."""

import fake_llm
import fret_runs
import pytest

from gecko_jax.fret import measure, runs, settings


@pytest.fixture
def corpus(tmp_path):
    return fret_runs.write_corpus(tmp_path)


def test_calibration_measures_the_seed_among_the_candidates(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url, "calibrate.num_seeds=3")
        found = measure.calibrate(config, tmp_path / "run")
        runs.run(config, tmp_path / "run")
        assert not fret_runs.repeated(fake)
        sent = fake.received
        again = measure.calibrate(config, tmp_path / "run")
        assert (again, fake.received) == (found, sent)
    assert found.seeds == 3
    assert {"retrieval", "QL", "RC", "fusion", "chance"} == found.mrr.keys()
    assert found.mrr["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert found.mrr["QL"] > found.mrr["chance"]


def test_calibration_warns_when_fusing_hurts():
    weights = settings.fusion_settings(fret_runs.load("x"))
    ranks = {"QL": [1.0, 0.6], "RC": [0.3, 0.3], "fusion": [0.7, 0.5]}
    (hurts, blind) = measure._warnings(ranks, 0.29, weights)
    assert "fusing hurts: 0.600 against 0.800 of QL" in hurts
    assert "fuse.relevance_weight=0" in hurts
    assert "RC does not judge" in blind
    better = ranks | {"RC": [0.7, 0.7], "fusion": [0.9, 0.9]}
    assert not measure._warnings(better, 0.29, weights)


def test_calibration_does_not_warn_of_a_loss_within_its_standard_error():
    weights = settings.fusion_settings(fret_runs.load("x"))
    ranks = {"QL": [1.0, 0.5, 1.0], "RC": [0.5] * 3, "fusion": [0.5, 0.9, 1.0]}
    assert not measure._warnings(ranks, 0.29, weights)


def test_the_plan_counts_what_the_run_sends(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(
            corpus, fake.url, "llm.price_input=1.0", "llm.price_output=2.0"
        )
        plan = measure.plan(config, tmp_path / "run", 2)
        assert plan.sample == 6
        summary = runs.run(config, tmp_path / "run")
    planned = {kind.name: kind.requests for kind in plan.kinds}
    sent = {
        name: done["usage"].get("requests") for name, done in summary.stages.items()
    }
    assert planned == {name: sent[name] for name in planned}
    assert plan.cost == pytest.approx(summary.budget.cost, rel=0.2)
