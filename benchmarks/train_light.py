"""Trains, resumes, evaluates, embeds and searches without TensorFlow or seqio.

    python benchmarks/train_light.py --build     tokenizes, with TensorFlow
    python benchmarks/train_light.py             trains from that cache, without it

It pre-finetunes `mini` on the bundled pairs as `make demo` does, in two halves, so the
second half restores a checkpoint. Then it embeds and searches the bundled corpus. The
cache is in `.carry/cache`, which git ignores. Prints one JSON line.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
CACHE = ROOT / ".carry" / "cache"


class StoppedHalfway(Exception):
    """Ends the first half of training as a preemption would."""


def load_config(num_steps: int) -> Any:
    """Returns the demo's first stage, with this cache and number of steps."""
    from gecko_jax.cli import flags

    keys = {
        "data.cache_dir": CACHE,
        "train.num_steps": num_steps,
        "optimizer.warmup_steps": min(30, num_steps),
        "checkpoint.every_steps": max(num_steps // 4, 1),
        "evaluation.every_steps": max(num_steps // 2, 1),
    }
    return flags.load(
        f"{ROOT / 'configs/prefinetune.py'}:local",
        [f"--config.{key}={value}" for key, value in keys.items()],
    )


def measure(num_steps: int) -> dict[str, Any]:
    """Trains in two halves, then embeds and searches."""
    import jax

    from gecko_jax import evaluation
    from gecko_jax.inference import embedding, vector_index
    from gecko_jax.training import loop

    config = load_config(num_steps)

    def stop(params: Any, step: int) -> dict[str, float]:
        if step:
            raise StoppedHalfway
        return {}

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(StoppedHalfway):
            loop.train(config, folder, stop)
        saved = sorted(
            path.name for path in pathlib.Path(folder, "checkpoints").iterdir()
        )
        began = time.perf_counter()
        evaluate = evaluation.build_callback(config, folder)
        metrics = loop.train(config, folder, evaluate)
        seconds = time.perf_counter() - began
        model = embedding.load(folder)
        lines = (ROOT / "gecko_jax/quickstart/corpus.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        began = time.perf_counter()
        vectors = model.encode_passages([record["text"] for record in records])
        embed_seconds = time.perf_counter() - began
    built = vector_index.Index(vectors, [record["_id"] for record in records])
    scores, _ = built.search(vectors[:100], 1)
    measurements = {
        "device": jax.devices()[0].device_kind,
        "resumed_from": saved[-1] if saved else 0,
        "seconds_second_half": seconds,
        "seconds_embedding": embed_seconds,
        "least_score_of_itself": float(scores.min()),
        "tensorflow_or_seqio": sorted({"tensorflow", "seqio"} & set(sys.modules)),
    }
    return measurements | {
        k: v for k, v in metrics.items() if "ndcg" in k or k == "loss"
    }


def build() -> None:
    """Tokenizes the bundled pairs into the cache."""
    from gecko_jax.text import text_formats
    from gecko_jax.training import loop

    loop.build_batches(load_config(4), text_format=text_formats.TextFormat())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", action="store_true", help="only make the cache")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.build:
        build()
        return
    print(json.dumps(measure(options.steps)), flush=True)


if __name__ == "__main__":
    main()
