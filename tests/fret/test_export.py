"""The exported triples, and the pairs of the initial retriever."""

import json

import fake_llm
import fret_runs
import mutations
import pytest

import gecko_jax.config
from gecko_jax.cli import flags
from gecko_jax.data import jsonl
from gecko_jax.fret import bootstrapping, export, runs


@pytest.fixture
def corpus(tmp_path):
    return fret_runs.write_corpus(tmp_path)


def test_bootstrap_trains_on_the_queries_and_their_seeds(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url)
        with pytest.raises(ValueError, match="--until=generate"):
            bootstrapping.write_pairs(config, tmp_path / "run")
        runs.run(config, tmp_path / "run", until="generate")
        path, count = bootstrapping.write_pairs(config, tmp_path / "run")
    pairs = list(jsonl.read_pairs(path))
    assert len(pairs) == count == 15
    assert all(not pair.negatives for pair in pairs)
    training = flags.load(
        f"{fret_runs.ROOT / 'configs/prefinetune.py'}:local",
        ["--config.data.batch_size=8"],
    )
    assert bootstrapping.training_config(training, path, count).data.files == (
        str(path),
    )
    with pytest.raises(ValueError, match="more than the 3 pairs there"):
        bootstrapping.training_config(training, path, 3)
    small = bootstrapping.training_config(training, path, 3, batch_size=2, num_steps=20)
    gecko_jax.config.check(small)
    assert (small.data.batch_size, small.train.num_steps) == (2, 20)
    finetune = flags.load(f"{fret_runs.ROOT / 'configs/finetune.py'}:local")
    with pytest.raises(ValueError, match="in-batch negatives only"):
        bootstrapping.training_config(finetune, path, count)


def test_rare_tasks_are_search_results(corpus, tmp_path):
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url, "export.max_tasks=1")
        summary = runs.run(config, tmp_path / "run")
    triples = [json.loads(line) for line in summary.output.open()]
    described = {t["task_description"] for t in triples}
    assert len(described) == 3
    assert len({t["task"] for t in triples} - {export.OTHER_TASK}) <= 1


def test_a_licence_is_no_markup_in_the_card(corpus, tmp_path):
    lines = [
        json.loads(line) | {"licence": mutations.HOSTILE} for line in corpus.open()
    ]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with fake_llm.FakeServer() as fake:
        config = fret_runs.load(corpus, fake.url)
        config.llm.licence = mutations.HOSTILE
        runs.run(config, tmp_path / "run")
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert card.count("INJECTED") >= 2
    for markup in ("\n# INJECTED", "<script", "](javascript", "\x1b", "\x9b"):
        assert markup not in card
