"""Encoding texts per second on CPU: gecko_jax beside sentence-transformers.

    python benchmarks/encode_cpu.py           needs gecko-jax[torch]

Both encode the bundled training passages, of 10 to 160 tokens, in the corpus's order
with an untrained `mini`, cut at 128 tokens. Both sort by length inside `encode`.
"""

import argparse
import json
import sys
import tempfile
import time

import side_by_side

import gecko_jax

TEXTS = 1024  # of a round
LENGTH = 128  # tokens


def passages() -> list[str]:
    """Returns real passages of mixed lengths."""
    from gecko_jax.data import tasks

    lines = (tasks.QUICKSTART / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["positive"] for record in records[:: len(records) // TEXTS][:TEXTS]]


def gecko() -> None:
    """Serves rounds of `Gecko.encode_passages`."""
    import jax

    from gecko_jax import checkpoints, embedding, model, text
    from gecko_jax.data import tasks

    config = model.EncoderConfig(**model.PRESETS["mini"])
    built = embedding.Gecko(
        checkpoints.ModelFiles(
            params=model.init_params(config, jax.random.key(0)),
            encoder_config=config,
            text_format=text.TextFormat(),
            vocabulary_proto=tasks.QUICKSTART_VOCABULARY.read_bytes(),
            extra_ids=0,
            mrl_dims=(config.embedding_dim,),
            query_length=LENGTH,
            passage_length=LENGTH,
            step=0,
            revision="untrained",
        )
    )
    texts = passages()

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        built.encode_passages(texts)
        return time.perf_counter() - began, len(texts)

    side_by_side.serve(work)


def sbert() -> None:
    """Serves rounds of `SentenceTransformer.encode`."""
    import sbert as baseline

    from gecko_jax import model, text
    from gecko_jax.data import tasks

    config = model.EncoderConfig(**model.PRESETS["mini"])
    with tempfile.TemporaryDirectory() as folder:
        built = baseline.build(config, tasks.QUICKSTART_VOCABULARY, LENGTH, folder)
    text_format = text.TextFormat()
    texts = [text_format.format_passage(passage) for passage in passages()]

    def work() -> tuple[float, int]:
        began = time.perf_counter()
        built.encode(texts, batch_size=64, show_progress_bar=False)
        return time.perf_counter() - began, len(texts)

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
        print(f"gecko_jax {gecko_jax.__version__}, model `mini`")
        names = ("gecko_jax", "sentence-transformers")
        side_by_side.compare(sys.argv[0], names, options.rounds, "texts", [])


if __name__ == "__main__":
    main()
