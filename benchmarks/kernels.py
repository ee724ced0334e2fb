"""Time and memory of the loss and of exact search on this device.

    python benchmarks/kernels.py loss --batches 8192 65536
    python benchmarks/kernels.py search --passages 1000000 10000000

`loss` times eq. 3 and its gradient at MRL 256 and 768, with same-tower negatives and
one hard negative per query. `search` times `index.Index.search` for the best 10 of
random vectors of 256 dims, after one search that is not counted. Each size prints one
JSON line.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
REPEATS = 5
WIDTH, DIM = 768, 256  # dims of the loss's embeddings and of the index's vectors


def seconds(run: Callable[[], Any]) -> float:
    """Returns the median time of a call that waits for its result."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def loss(batch_size: int) -> dict[str, float]:
    """Times the loss and its gradient and prints the compiler's memory estimate."""
    import jax
    import jax.numpy as jnp

    from gecko_jax.losses import contrastive

    keys = jax.random.split(jax.random.key(0), 3)
    queries, positives, negatives = (
        jax.random.normal(key, (batch_size, WIDTH)) for key in keys
    )
    numbers = jnp.arange(3 * batch_size, dtype=jnp.uint32).reshape(3, batch_size)
    query_id, passage_id, negative_id = jnp.stack([numbers, numbers], axis=-1)
    ids = contrastive.BatchIds(
        query_id=query_id,
        passage_id=passage_id,
        negative_id=negative_id[:, None],
        negative_mask=jnp.ones((batch_size, 1), bool),
        example_mask=jnp.ones(batch_size, bool),
        negative_group=jnp.zeros(batch_size, jnp.int32),
    )

    def total(parts: Any) -> Any:
        return contrastive.mrl_loss(
            *parts,
            ids,
            mrl_dims=(256, WIDTH),
            mrl_weights=(1.0, 1.0),
            temperature=0.01,
            same_tower=True,
        )[0].mean()

    parts = (queries, positives, negatives[:, None])
    compiled = jax.jit(jax.value_and_grad(total)).lower(parts).compile()
    memory = compiled.memory_analysis()
    # Similarities to positives and queries: forward, recomputed, and two backward.
    flops = 2 * 4 * 2.0 * batch_size**2 * (256 + WIDTH)
    duration = seconds(lambda: jax.block_until_ready(compiled(parts)))
    return {
        "seconds": duration,
        "tflops_per_second": flops / duration / 1e12,
        "temporary_gib": memory.temp_size_in_bytes / 2**30 if memory else 0.0,
    }


def search(num_passages: int) -> dict[str, float]:
    """Times searches with one query and with 256."""
    from gecko_jax.inference import vector_index

    rng = np.random.default_rng(0)
    # Repeat a million random vectors: their values do not affect the time of a search.
    drawn = rng.standard_normal((min(num_passages, 1_000_000), DIM), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors = np.resize(drawn, (num_passages, DIM))
    built = vector_index.Index(vectors, [str(row) for row in range(num_passages)])
    queries = rng.standard_normal((256, DIM), np.float32)
    measurements = {}
    for number in (1, 256):
        chosen = queries[:number]
        duration = seconds(lambda q=chosen: built.search(q, 10))
        measurements[f"seconds_{number}"] = duration
    _, positions = built.search_positions(queries[:8], 10)
    exact = np.argsort(-(queries[:8].astype(np.float64) @ drawn.T), axis=1)[:, :1]
    measurements["share_right"] = float(np.mean(positions[:, :1] % len(drawn) == exact))
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    command = commands.add_parser("loss")
    command.add_argument("--batches", type=int, nargs="+", default=[8_192, 65_536])
    command = commands.add_parser("search")
    command.add_argument("--passages", type=int, nargs="+", default=[1_000_000])
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import jax

    device = jax.devices()[0].device_kind
    run, sizes = (
        (loss, options.batches)
        if options.what == "loss"
        else (search, options.passages)
    )
    for size in sizes:
        print(json.dumps({"device": device, "size": size, **run(size)}), flush=True)


if __name__ == "__main__":
    main()
