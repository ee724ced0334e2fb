"""Training pairs per second on CPU: gecko_jax and sentence-transformers.

    python benchmarks/train_cpu.py            needs gecko-jax[torch]

Both train `mini` from scratch on the bundled pairs with the same batch size, lengths
and MRL dims, in-batch negatives (eq. 2 here; MatryoshkaLoss with
MultipleNegativesRankingLoss there), AdamW and clipping. The time includes tokenization
there and reading the tokenized cache here, as in training.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import side_by_side

import gecko_jax

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 4  # of a round


def gecko() -> None:
    """Serves rounds of `step.train_step` on real batches."""
    import jax
    import numpy as np

    from gecko_jax.cli import flags
    from gecko_jax.models import dual_encoder
    from gecko_jax.parallel import sharding
    from gecko_jax.text import text_formats
    from gecko_jax.training import loop, train_step

    config = flags.load(str(ROOT / "configs/prefinetune.py") + ":local")
    batches = loop.build_batches(config, text_format=text_formats.TextFormat())
    mesh = sharding.build_mesh()
    step = train_step.build(
        config,
        mesh,
        num_segments=batches.num_segments,
        num_tasks=len(batches.task_names),
    )
    params = dual_encoder.init_params(step.encoder.config, jax.random.key(0))
    state = train_step.TrainState(params, step.tx.init(params), np.int32(0))
    state = jax.device_put(state, step.shardings)
    stream = batches.iterate(0)
    key = jax.random.key(0)

    def work() -> tuple[float, int]:
        nonlocal state
        began = time.perf_counter()
        for batch in itertools.islice(stream, STEPS):
            state, _ = step.run(state, sharding.place_batch(batch, mesh), key)
        jax.block_until_ready(state)
        return time.perf_counter() - began, STEPS * config.data.batch_size

    # Compile all batch shapes before the measurement: a run compiles each only once.
    for batch in itertools.islice(batches.iterate(0), 40):
        state, _ = step.run(state, sharding.place_batch(batch, mesh), key)
    side_by_side.serve(work)


def sbert() -> None:
    """Serves rounds of a plain training loop, which is faster than the Trainer."""
    import sbert as baseline
    import torch
    from sentence_transformers.sentence_transformer import losses

    import gecko_jax.config
    from gecko_jax.cli import flags
    from gecko_jax.data import task_table
    from gecko_jax.text import text_formats

    config = flags.load(str(ROOT / "configs/prefinetune.py") + ":local")
    with tempfile.TemporaryDirectory() as folder:
        built = baseline.build(
            gecko_jax.config.encoder_config(config),
            task_table.QUICKSTART_VOCABULARY,
            config.data.passage_length,
            folder,
        )
    built.train()
    loss = losses.MatryoshkaLoss(
        built,
        losses.MultipleNegativesRankingLoss(built, scale=1 / config.loss.temperature),
        list(config.loss.mrl_dims),
    )
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-3, weight_decay=0.0)
    lines = (task_table.QUICKSTART / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    text_format = text_formats.TextFormat()
    pairs = itertools.cycle(
        [
            (
                text_format.format_query(record["query"], record["task"]),
                text_format.format_passage(record["positive"]),
            )
            # A stride mixes all tasks, as a shuffled batch does.
            for start in range(61)
            for record in records[start::61]
        ]
    )

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        for _ in range(STEPS):
            batch = list(itertools.islice(pairs, config.data.batch_size))
            built.max_seq_length = config.data.query_length
            queries = built.preprocess([query for query, _ in batch])
            built.max_seq_length = config.data.passage_length
            passages = built.preprocess([passage for _, passage in batch])
            loss([queries, passages], None).backward()
            torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began, STEPS * config.data.batch_size

    side_by_side.serve(work)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", choices=("gecko_jax", "sentence-transformers"))
    options = parser.parse_args()
    if options.worker == "gecko_jax":
        gecko()
    elif options.worker:
        sbert()
    else:
        print(f"gecko_jax {gecko_jax.__version__}, configs/prefinetune.py:local")
        names = ("gecko_jax", "sentence-transformers")
        side_by_side.compare(sys.argv[0], names, options.rounds, "pairs", [])


if __name__ == "__main__":
    main()
