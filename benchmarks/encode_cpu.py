"""Texts encoded per second: an imported encoder and sentence-transformers.

    python benchmarks/encode_cpu.py                       needs gecko-jax[torch]
    python benchmarks/encode_cpu.py --size base --texts 256 --rounds 3
    python benchmarks/encode_cpu.py --size base --dtype bfloat16      with a GPU

sentence-transformers writes a folder of random T5 1.1 weights, `gecko import` reads it,
and both encode the bundled training passages in the order of the corpus. The passages
have 10 to 160 tokens and are truncated to 128. Both libraries sort by length inside
`encode`. The benchmark stops unless both return the same vectors. If PyTorch and JAX
have a GPU, both use it.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import side_by_side

import gecko_jax

NAMES = ("gecko_jax", "sentence-transformers")
LENGTH = 128  # tokens
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}


def passages(number: int) -> list[str]:
    """Returns real passages of mixed lengths in the format of training."""
    from gecko_jax.data import task_table
    from gecko_jax.text import text_formats

    lines = (task_table.QUICKSTART / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][:: max(len(lines) // number, 1)]
    text_format = text_formats.TextFormat()
    return [text_format.format_passage(r["positive"]) for r in records[:number]]


def make(size: str, scratch: pathlib.Path) -> None:
    """Writes `sbert/`, a model with random weights, and `gecko/`, its import."""
    import sbert as baseline

    from gecko_jax.cli import entry
    from gecko_jax.data import task_table
    from gecko_jax.models import dual_encoder

    config = dual_encoder.EncoderConfig(**dual_encoder.PRESETS[size])
    parts = scratch / "parts"
    built = baseline.build(config, task_table.QUICKSTART_VOCABULARY, LENGTH, str(parts))
    built.save(str(scratch / "sbert"))
    output = f"--output={scratch / 'gecko'}"
    status = entry.main(["import", str(scratch / "sbert"), output])
    if status:
        sys.exit(status)


def gecko(scratch: pathlib.Path, options: argparse.Namespace) -> None:
    """Serves rounds of `Gecko.encode_passages`."""
    import jax

    from gecko_jax.inference import embedding

    files = embedding.load(scratch / "gecko").files
    config = dataclasses.replace(files.encoder_config, dtype=options.dtype)
    built = embedding.Gecko(dataclasses.replace(files, encoder_config=config))
    texts = passages(options.texts)

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        vectors = built.encode_passages(texts)
        seconds = time.perf_counter() - began
        np.save(scratch / f"{NAMES[0]}.npy", vectors)
        return seconds, len(texts)

    def device_peak() -> float:
        statistics = jax.devices()[0].memory_stats() or {}
        return statistics.get("peak_bytes_in_use", 0) / 2**30

    on_host = jax.default_backend() == "cpu"
    side_by_side.serve(work, side_by_side.host_peak if on_host else device_peak)


def sbert(scratch: pathlib.Path, options: argparse.Namespace) -> None:
    """Serves rounds of `SentenceTransformer.encode`."""
    import torch
    from sentence_transformers import SentenceTransformer

    on_host = not torch.cuda.is_available()
    built = SentenceTransformer(
        str(scratch / "sbert"),
        device="cpu" if on_host else "cuda",
        model_kwargs={"dtype": options.dtype},
    )
    # The dtype argument does not affect the Dense module.
    built.to(getattr(torch, options.dtype))
    texts = passages(options.texts)

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        vectors = built.encode(
            texts,
            batch_size=options.batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        vectors = vectors.float().cpu().numpy()
        seconds = time.perf_counter() - began
        np.save(scratch / f"{NAMES[1]}.npy", vectors)
        return seconds, len(texts)

    def device_peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**30

    side_by_side.serve(work, side_by_side.host_peak if on_host else device_peak)


def check(scratch: pathlib.Path, dtype: str) -> None:
    """Stops the benchmark unless both libraries return the same vectors."""
    ours, theirs = (np.load(scratch / f"{name}.npy") for name in NAMES)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = float(np.min(np.sum(ours * theirs, axis=1) / norms))
    print(f"the same vectors: least cosine {cosine:.7f}", flush=True)
    if not cosine >= LEAST_COSINE[dtype]:
        sys.exit(f"the vectors differ: cosine {cosine} < {LEAST_COSINE[dtype]}")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="mini", help="mini, small, base, ...")
    parser.add_argument("--texts", type=int, default=1024, help="texts per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32", choices=tuple(LEAST_COSINE))
    parser.add_argument(
        "--batch-size", type=int, default=64, help="texts, for sentence-transformers"
    )
    parser.add_argument("--scratch", help="folder that --worker reads")
    parser.add_argument("--worker", choices=("make", *NAMES))
    options = parser.parse_args()
    if options.worker == "make":
        make(options.size, pathlib.Path(options.scratch))
        return
    if options.worker:
        serve = gecko if options.worker == NAMES[0] else sbert
        serve(pathlib.Path(options.scratch), options)
        return
    # Two processes share the GPU: JAX must not reserve most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(f"gecko_jax {gecko_jax.__version__}, `{options.size}`, {options.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        # In a separate process, so that the workers do not inherit its peak memory.
        maker = [sys.executable, sys.argv[0], "--worker=make", f"--size={options.size}"]
        subprocess.run([*maker, f"--scratch={folder}"], check=True)
        arguments = [
            f"--texts={options.texts}",
            f"--dtype={options.dtype}",
            f"--batch-size={options.batch_size}",
            f"--scratch={folder}",
        ]
        side_by_side.compare(
            sys.argv[0],
            NAMES,
            options.rounds,
            "texts",
            arguments,
            warmed=lambda: check(scratch, options.dtype),
        )


if __name__ == "__main__":
    main()
