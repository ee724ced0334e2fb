"""Training beside sentence-transformers: the same model, batches and losses."""

import json
import pathlib

import numpy as np
import pytest

import gecko_jax.config

pytestmark = pytest.mark.torch

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20
SMALL = {
    "model.model_dim": 32,
    "model.head_dim": 16,
    "model.mlp_dim": 48,
    "model.embedding_dim": 16,
    "model.local_window": (6, 6),  # Shorter than the texts.
    "model.residual_init_scale": 1.0,  # Otherwise, layers hardly matter at first.
    "data.query_length": 16,
    "data.passage_length": 32,
    "data.batch_size": 16,
    "loss.mrl_dims": (4, 16),
    "loss.mrl_weights": (1.0, 1.0),
    "loss.all_hard_negatives": True,  # As in sentence-transformers.
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 2,
    "train.num_steps": STEPS,
}


@pytest.fixture
def triples(tmp_path):
    """Bundled pairs, each with the next one's positive as its hard negative."""
    lines = (ROOT / "gecko_jax/quickstart/train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[::40]]
    for record, following in zip(records, [*records[1:], records[0]], strict=True):
        record["negatives"] = [following["positive"]]
    path = tmp_path / "triples.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_gemma_has_the_losses_of_sentence_transformers(triples, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import train_cpu

    data = {"data.files": (str(triples),), "data.cache_dir": str(tmp_path)}
    config = gecko_jax.config.load(
        str(ROOT / "configs/finetune.py:local,gemma"),
        train_cpu.SAME_LOSS | SMALL | data,
    )
    assert config.data.num_negatives == 1
    assert config.data.packing
    train_cpu.prepare(config, tmp_path)
    ours = [float(loss) for loss in train_cpu.gecko(config, tmp_path)]
    theirs = [float(loss) for loss in train_cpu.sbert(config, tmp_path)]
    assert len(ours) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    # Training changes the loss by far more than this tolerance.
    assert min(ours[-5:]) < ours[0] - 0.5
