"""Training pairs per second on CPU: gecko_jax and sentence-transformers.

    python benchmarks/train_cpu.py            needs gecko-jax[torch]
    python benchmarks/train_cpu.py --preset=gemma

Both train the same random model, of configs/prefinetune.py:local, from one folder of
sentence-transformers, on the same bundled pairs in the same order, with in-batch
negatives (eq. 2 here; MatryoshkaLoss with MultipleNegativesRankingLoss there), AdamW
and clipping. The time includes tokenization there and reading the tokenized cache here,
as in training. The benchmark stops unless both have the same losses at first, and ends
with the largest difference of all steps.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import side_by_side

import gecko_jax
import gecko_jax.config

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("gecko_jax", "sentence-transformers")
STEPS = 4  # of a round
# sentence-transformers' loss has no such switch.
SAME_LOSS = {"loss.same_tower": False, "loss.mask_duplicates": False}
MOST_APART = 1e-3  # nats


def prepare(config: Any, scratch: pathlib.Path) -> None:
    """Writes `model/`, for sentence-transformers, and `batches.jsonl`.

    A line of the latter has the formatted texts of a step: a list of queries, of
    positives and, if the config has a hard negative, of negatives.
    """
    import jax

    from gecko_jax.data import jsonl
    from gecko_jax.formats import model_folder, to_sentence_transformers
    from gecko_jax.models import dual_encoder
    from gecko_jax.text import text_formats
    from gecko_jax.training import loop

    batches = loop.build_batches(config, text_format=text_formats.TextFormat())
    text_format = batches.text_format
    encoder_config = gecko_jax.config.encoder_config(config)
    init = jax.jit(dual_encoder.init_params, static_argnums=0)
    model = model_folder.ModelFiles(
        params=init(encoder_config, jax.random.key(config.seed)),
        encoder_config=encoder_config,
        text_format=text_format,
        vocabulary_proto=batches.vocabulary.model_proto,
        extra_ids=batches.vocabulary.extra_ids,
        mrl_dims=tuple(config.loss.mrl_dims),
        query_length=config.data.query_length,
        passage_length=config.data.passage_length,
        step=0,
        revision="random",
    )
    to_sentence_transformers.save(scratch / "model", model)
    pairs = [
        [
            pair
            for path in task.files
            for pair in jsonl.read_pairs(path, task.source_task)
        ]
        for task in batches.tasks
    ]
    with (scratch / "batches.jsonl").open("w") as file:
        for step in range(config.train.num_steps):
            picked = [pairs[task][number] for task, number in batches.picks(step)]
            passages = [[pair.positive for pair in picked]]
            if config.data.num_negatives:
                passages.append([pair.negatives[0] for pair in picked])
            columns = [
                [text_format.format_query(pair.query, pair.task) for pair in picked],
                *([text_format.format_passage(text) for text in c] for c in passages),
            ]
            file.write(json.dumps(columns) + "\n")


def gecko(config: Any, scratch: pathlib.Path) -> Iterator[Any]:
    """Returns the losses of `train_step`, each computed when it is taken."""
    import jax

    from gecko_jax.parallel import sharding
    from gecko_jax.text import text_formats
    from gecko_jax.training import initialization, loop, train_step

    config = config.copy_and_resolve_references()
    config.init.checkpoint = str(scratch / "model")
    opened = initialization.open_start(config, loop.load_vocabulary(config))
    assert opened is not None
    start = initialization.read_start(config, opened)
    mesh = sharding.build_mesh(**train_step.mesh_sizes(config))
    batches = loop.build_batches(
        config,
        text_format=text_formats.TextFormat(),
        row_multiple=sharding.num_batch_shards(mesh),
    )
    step = train_step.build(
        config,
        mesh,
        num_segments=batches.shape.num_segments,
        num_tasks=len(batches.task_names),
    )
    key = jax.random.key(config.seed)

    def begin() -> Any:
        state = train_step.TrainState(
            start.params, step.tx.init(start.params), np.int32(0)
        )
        return jax.device_put(state, step.shardings)

    # Compile all batch shapes before the measurement: a run compiles each only once.
    num_steps = config.train.num_steps
    shapes = {
        tuple(leaf.shape for leaf in batch.values()): batch
        for batch in batches.iterate(0, num_steps)
    }
    for batch in shapes.values():
        step.run(begin(), sharding.place_batch(batch, mesh), key)

    def losses() -> Iterator[Any]:
        state = begin()
        for batch in batches.iterate(0, num_steps):
            state, summary = step.run(state, sharding.place_batch(batch, mesh), key)
            yield summary["loss"]

    return losses()


def sbert(config: Any, scratch: pathlib.Path) -> Iterator[Any]:
    """Returns the losses of a plain training loop, which is faster than the Trainer."""
    import sbert_training
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    built = SentenceTransformer(str(scratch / "model"), device="cpu")
    contrast = losses.MultipleNegativesRankingLoss(
        built, scale=1 / config.loss.temperature
    )
    lines = (scratch / "batches.jsonl").read_text().splitlines()
    batches = (
        sbert_training.tokenize(built, json.loads(line), config) for line in lines
    )
    return sbert_training.steps(built, contrast, batches, config)


def serve(losses: Iterator[Any], batch_size: int, output: pathlib.Path) -> None:
    """Serves rounds of training, and writes the losses of all steps so far."""
    computed = []

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        computed.extend(itertools.islice(losses, STEPS))
        float(computed[-1])  # Waits for the last step.
        seconds = time.perf_counter() - began
        np.save(output, [float(loss) for loss in computed])
        return seconds, STEPS * batch_size

    side_by_side.serve(work)


def compare_losses(scratch: pathlib.Path) -> float:
    """Returns the largest difference, in nats."""
    ours, theirs = (np.load(scratch / f"{name}.npy") for name in NAMES)
    return float(np.abs(ours - theirs).max())


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--preset", choices=("mini", "gemma"), default="mini")
    parser.add_argument("--worker", choices=NAMES)
    parser.add_argument("--scratch", type=pathlib.Path)
    options = parser.parse_args()
    name = f"configs/prefinetune.py:local,{options.preset}"
    num_steps = (options.rounds + 1) * STEPS
    config = gecko_jax.config.load(
        str(ROOT / name), SAME_LOSS | {"train.num_steps": num_steps}
    )
    if options.worker:
        work = gecko if options.worker == NAMES[0] else sbert
        output = options.scratch / f"{options.worker}.npy"
        serve(work(config, options.scratch), config.data.batch_size, output)
        return

    def check() -> None:
        if (apart := compare_losses(scratch)) > MOST_APART:
            sys.exit(f"the losses of the first steps differ by {apart:.3g} nats")

    print(f"gecko_jax {gecko_jax.__version__}, {name}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        prepare(config, scratch)
        arguments = [f"--preset={options.preset}", f"--rounds={options.rounds}"]
        arguments += [f"--scratch={scratch}"]
        side_by_side.compare(
            sys.argv[0], NAMES, options.rounds, "pairs", arguments, check
        )
        apart = compare_losses(scratch)
    print(f"largest difference of the losses of {num_steps} steps: {apart:.2g} nats")


if __name__ == "__main__":
    main()
