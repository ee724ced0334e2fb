"""Bootstrap: trains the initial retriever on (query, seed) pairs (section 3.2).

It has in-batch negatives only, and finds the candidates of the next round:

    gecko fret run --until=generate ...
    gecko fret bootstrap --output=runs/initial ...
    gecko fret run --config.retrieve.model=runs/initial ...
"""

import pathlib

import ml_collections

from gecko_jax.fret import export, runs
from gecko_jax.io import wording


def write_pairs(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> tuple[pathlib.Path, int]:
    """Writes the pairs of a run with queries; returns the file and its rows."""
    source = runs.prepare(config, workdir)
    passes = runs.main_pipeline(source)
    passes.queries.begin()
    if passes.queries.done() is None:
        raise ValueError(
            f"{passes.queries.folder}: not finished; run `gecko fret run "
            f"--until={passes.queries.name}` with this config first"
        )
    path = workdir / "bootstrap" / "pairs.jsonl"
    return path, export.write_pairs(passes, path)


def training_config(
    config: ml_collections.ConfigDict,
    pairs: pathlib.Path,
    num_pairs: int,
    *,
    batch_size: int | None = None,
    num_steps: int | None = None,
) -> ml_collections.ConfigDict:
    """Returns a pre-finetuning config that trains on the pairs of `write_pairs`."""
    if config.data.num_negatives:
        raise ValueError(
            f"data.num_negatives={config.data.num_negatives}: the initial retriever "
            "has in-batch negatives only; give configs/prefinetune.py"
        )
    config = ml_collections.ConfigDict(config)
    config.data.files = (str(pairs),)
    config.data.batch_size = batch_size or config.data.batch_size
    if num_steps:
        config.train.num_steps = num_steps
        warmup = config.optimizer.warmup_steps
        config.optimizer.warmup_steps = min(warmup, num_steps // 10)
    if num_pairs < config.data.batch_size:
        raise ValueError(
            f"data.batch_size={config.data.batch_size}: more than the "
            f"{wording.counted(num_pairs, 'pair')} there; lower it with --batch-size, "
            "or generate more queries"
        )
    return config.lock()
