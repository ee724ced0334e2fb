"""Throughput of each stage of the data pipeline, and the rate that training needs.

    python benchmarks/data.py                                the bundled pairs
    python benchmarks/data.py --files=pairs.jsonl --vocabulary=t5.model --extra-ids=100
    python benchmarks/data.py padding | stages | step | sbert       only one part

    padding   share of padding tokens, with and without packing, and shapes to compile
    stages    examples and tokens per second of each stage on one core, and the rate
              that training `base` needs on an H200 and on the host of a v5e-8
    step      examples per second when training `mini`, packed and unpacked
    sbert     batches from the same file, compared with the Dataset and collator of
              sentence-transformers; needs gecko-jax[torch]

Lengths are those of configs/finetune.py (64 and 512). The rate that a step needs is
computed from its FLOPs and the chips' data sheets: nothing runs on an accelerator.
"""

import argparse
import collections
import itertools
import pathlib
import sys
import tempfile
import time

import side_by_side

from gecko_jax.data import (
    cache,
    features,
    jsonl,
    pipeline,
    registration,
    selection,
    task_table,
)
from gecko_jax.models import dual_encoder
from gecko_jax.parallel import chips
from gecko_jax.text import text_formats, vocabularies

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("padding", "stages", "step", "sbert")
LENGTHS = {"query": 64, "passage": 512}  # GTR
STEPS = 20  # number of steps whose padding is counted

# Small, because an unpacked step of `mini` takes seconds on a CPU.
TRAINED_BATCH, TRAINED_STEPS = 32, 2

# Machine -> (chip, number of chips per host).
HOSTS = {"H200": ("H200", 1), "v5e-8 host": ("v5e", 8)}
UTILISATIONS = (1.0, 0.5)


def open_batches(
    options: argparse.Namespace,
    *,
    packing: bool = True,
    batch_size: int = 0,
    row_multiple: int = 8,
) -> pipeline.Batches:
    """Opens the batches of the file. The first call builds the cache."""
    chosen = selection.select(
        mixture="quickstart",
        files=options.files,
        vocabulary=vocabularies.load(options.vocabulary, options.extra_ids),
        text_format=text_formats.TextFormat(),
        cache_dir=options.cache_dir,
    )
    return pipeline.Batches(
        chosen,
        features.Shape(
            LENGTHS["query"],
            LENGTHS["passage"],
            packing=packing,
            row_multiple=row_multiple,
        ),
        batch_size=batch_size or options.batch_size,
        one_task_per_batch=False,
        seed=0,
    )


def padding(options: argparse.Namespace) -> None:
    """Prints the share of padding and the number of shapes that a run compiles."""
    print(f"\nPadding, {STEPS} steps of {options.batch_size:,}, rows in multiples of 8")
    print(f"{'':10}{'query':>9}{'passage':>9}{'both':>9}{'slots':>12}{'shapes':>8}")
    for packing in (False, True):
        batches = open_batches(options, packing=packing)
        slots: collections.Counter[str] = collections.Counter()
        filled: collections.Counter[str] = collections.Counter()
        shapes = set()
        for step in range(STEPS):
            batch = batches.batch(step)
            shapes.add(tuple(batch[f"{side}_tokens"].shape for side in LENGTHS))
            for side in LENGTHS:
                slots[side] += batch[f"{side}_tokens"].size
                filled[side] += int((batch[f"{side}_segment_ids"] > 0).sum())
        shares = [1 - filled[side] / slots[side] for side in LENGTHS]
        shares.append(1 - filled.total() / slots.total())
        print(
            f"{'packed' if packing else 'unpacked':10}"
            + "".join(f"{share:9.1%}" for share in shares)
            + f"{slots.total() // STEPS:12,}{len(shapes):8}"
        )


def stages(options: argparse.Namespace) -> None:
    """Prints the rate of each stage on one core and the rate that training needs."""
    batches = open_batches(options)
    seconds, counts, tokens = measure_stages(options, batches)
    print(f"\nDelivered, batches of {options.batch_size:,}, in one core's time")
    print(f"{'':34}{'examples/s':>12}{'tokens/s':>14}")
    for name, duration in seconds.items():
        count, size = counts[name], tokens[name]
        print(f"{name:34}{count / duration:12,.0f}{size / duration:14,.0f}")
    step_seconds = sum(
        duration for name, duration in seconds.items() if name.startswith("step: ")
    )
    count, size = (of["step: decode"] for of in (counts, tokens))
    print(
        f"{'step: all of it':34}{count / step_seconds:12,.0f}"
        f"{size / step_seconds:14,.0f}"
    )
    began, delivered = time.perf_counter(), 0
    for batch in batches.iterate(0, STEPS):
        delivered += len(batch["query_id"])
    wall = time.perf_counter() - began
    print(f"{'iterate, by the clock':34}{delivered / wall:12,.0f}")

    config = dual_encoder.EncoderConfig(**dual_encoder.PRESETS["base"])
    flops = dual_encoder.flops_per_token(config, LENGTHS["passage"]) * size / count
    print(
        f"\nNeeded by `base`, {flops / 1e9:.1f} GFLOPs an example of {size / count:.0f}"
        " tokens, without padding"
    )
    print(f"{'':24}{'utilisation':>12}{'examples/s':>12}{'delivered/needed':>18}")
    for host, (chip, number) in HOSTS.items():
        for utilisation in UTILISATIONS:
            peak = chips.CHIPS[chip].flops_per_second * number
            needed = peak * utilisation / flops
            print(
                f"{host:24}{utilisation:12.0%}{needed:12,.0f}"
                f"{count / step_seconds / needed:18.2f}"
            )


def measure_stages(
    options: argparse.Namespace, batches: pipeline.Batches
) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    """Returns CPU seconds, examples and tokens of each stage."""
    seconds: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    tokens: dict[str, int] = collections.defaultdict(int)

    def note(name: str, duration: float, of: list[features.Example]) -> None:
        seconds[name] += duration
        counts[name] += len(of)
        tokens[name] += sum(
            min(len(e.query), LENGTHS["query"])
            + min(len(e.positive), LENGTHS["passage"])
            for e in of
        )

    clock = time.process_time
    task = batches.tasks[0]
    began = clock()
    pairs = itertools.chain.from_iterable(
        jsonl.read_pairs(file, task.source_task) for file in task.files
    )
    parsed = len(list(itertools.islice(pairs, options.tokenized)))
    seconds["once: parse JSON lines"] = clock() - began
    dataset = registration.register_task(
        task, batches.text_format, batches.vocabulary
    ).get_dataset(sequence_length=None, split="train", shuffle=False)
    began = clock()
    blocks = dataset.take(parsed).ragged_batch(registration.BLOCK)
    all_examples = list(cache.examples(blocks, []))
    note("once: parse, format, tokenize", clock() - began, all_examples)
    note("once: parse JSON lines", 0.0, all_examples)

    for step in range(STEPS):
        began = clock()
        picks = batches.picks(step)
        drawn = clock()
        records = []
        for number, reader in enumerate(batches.readers):
            own_picks = [example for of_task, example in picks if of_task == number]
            records += reader.records(own_picks)
        read = clock()
        examples = [cache.decode(record) for record in records]
        decoded = clock()
        features.convert(examples, batches.shape)
        converted = clock()
        note("step: draw", drawn - began, examples)
        note("step: read records", read - drawn, examples)
        note("step: decode", decoded - read, examples)
        note("step: convert, packed", converted - decoded, examples)
    return seconds, counts, tokens


def step(options: argparse.Namespace) -> None:
    """Compares training of `mini` on packed and unpacked batches."""
    print(
        f"\nTraining `mini`, batches of {TRAINED_BATCH}, {TRAINED_STEPS} steps a turn"
    )
    run_pair(options, "step", ("packed", "unpacked"), "examples")


def sbert(options: argparse.Namespace) -> None:
    """Compares reading batches here and in sentence-transformers."""
    print(f"\nBatches of {options.batch_size:,}, ready for the step")
    run_pair(options, "sbert", ("gecko_jax", "sentence-transformers"), "examples")


def run_pair(
    options: argparse.Namespace, part: str, names: tuple[str, str], unit: str
) -> None:
    """Runs both workers in turns."""
    open_batches(options)  # Once, and not by both of them.
    arguments = [
        part,
        f"--vocabulary={options.vocabulary}",
        f"--extra-ids={options.extra_ids}",
        f"--batch-size={options.batch_size}",
        f"--cache-dir={options.cache_dir}",
        *(f"--files={file}" for file in options.files),
    ]
    side_by_side.compare(sys.argv[0], names, options.rounds, unit, arguments)


def train_worker(options: argparse.Namespace, packing: bool) -> None:
    """Serves rounds of training steps."""
    import jax
    import numpy as np

    from gecko_jax.cli import flags
    from gecko_jax.parallel import sharding
    from gecko_jax.training import train_step

    config = flags.load(str(ROOT / "configs/prefinetune.py") + ":local")
    with config.unlocked():
        config.data.query_length = LENGTHS["query"]
        config.data.passage_length = LENGTHS["passage"]
        config.data.packing = packing
        config.model.vocab_size = max(config.model.vocab_size, 32_128)
    batches = open_batches(
        options, packing=packing, batch_size=TRAINED_BATCH, row_multiple=1
    )
    mesh = sharding.build_mesh(devices=jax.devices()[:1])
    built = train_step.build(
        config,
        mesh,
        num_segments=batches.shape.num_segments,
        num_tasks=len(batches.task_names),
    )
    params = dual_encoder.init_params(built.encoder.config, jax.random.key(0))
    state = train_step.TrainState(params, built.tx.init(params), np.int32(0))
    state = jax.device_put(state, built.shardings)
    key = jax.random.key(0)

    def work() -> tuple[float, int]:
        nonlocal state
        began = time.perf_counter()
        for number in range(TRAINED_STEPS):
            placed = sharding.place_batch(batches.batch(number), mesh)
            state, _ = built.run(state, placed, key)
        jax.block_until_ready(state)
        return time.perf_counter() - began, TRAINED_STEPS * TRAINED_BATCH

    side_by_side.serve(work)


def gecko_worker(options: argparse.Namespace) -> None:
    """Serves rounds of our batches. Nothing is prefetched between rounds."""
    batches = open_batches(options)
    steps = itertools.count()

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        for step in itertools.islice(steps, 2):
            batches.batch(step)
        return time.perf_counter() - began, 2 * options.batch_size

    side_by_side.serve(work)


def sbert_worker(options: argparse.Namespace) -> None:
    """Serves rounds of batches as the trainer of sentence-transformers reads them."""
    import datasets
    import sbert as baseline
    import torch
    from sentence_transformers.sentence_transformer import data_collator

    text_format = text_formats.TextFormat()
    files = options.files or [str(task_table.QUICKSTART / "train.jsonl")]
    pairs = [pair for file in files for pair in jsonl.read_pairs(file)]
    dataset = datasets.Dataset.from_dict(
        {
            "anchor": [text_format.format_query(p.query, p.task) for p in pairs],
            "positive": [text_format.format_passage(p.positive) for p in pairs],
        }
    )
    config = dual_encoder.EncoderConfig(
        **dual_encoder.PRESETS["mini"] | {"vocab_size": 32_128}
    )
    with tempfile.TemporaryDirectory() as folder:
        built = baseline.build(
            config, pathlib.Path(options.vocabulary), LENGTHS["passage"], folder
        )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=data_collator.SentenceTransformerDataCollator(built.preprocess),
    )
    stream = itertools.chain.from_iterable(iter(lambda: loader, None))

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        for _ in itertools.islice(stream, 2):
            pass
        return time.perf_counter() - began, 2 * options.batch_size

    side_by_side.serve(work)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--files", action="append", default=[], help="JSONL of pairs")
    parser.add_argument("--vocabulary", default=str(task_table.QUICKSTART_VOCABULARY))
    parser.add_argument("--extra-ids", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=2_048)
    parser.add_argument(
        "--tokenized", type=int, default=4_000, help="number of examples"
    )
    parser.add_argument("--rounds", type=int, default=5)
    cache = pathlib.Path("~/.cache/gecko_jax").expanduser()
    parser.add_argument("--cache-dir", default=str(cache))
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker in ("packed", "unpacked"):
        train_worker(options, options.worker == "packed")
    elif options.worker == "gecko_jax":
        gecko_worker(options)
    elif options.worker:
        sbert_worker(options)
    else:
        for part in options.parts or PARTS:
            globals()[part](options)


if __name__ == "__main__":
    main()
