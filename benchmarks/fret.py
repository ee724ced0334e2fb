"""What FRet computes most: scores of queries, and judgements of candidates.

    python benchmarks/fret.py scoring --model=smollm2
    python benchmarks/fret.py judging --model=qwen2.5-coder-1.5b --dtype=bfloat16

`scoring` asks for log LLM(query | few shots, passage) of real text: in batches behind
the shared few shots, by the same model one prompt at a time, and by llama.cpp, which
keeps the last prompt's state. `judging` asks for QL and RC with FRet's prompts: from
one reading, from one each, and by llama.cpp. It needs `gecko-jax[llm-local]`,
`xllamacpp`, and the model (`gecko fret fetch-model`). All take turns in one process;
the first round, which compiles, is not counted. Seconds of the processors are printed
beside the rate, because other processes change them less. `search.py` times the nearest
passages.
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
    costs: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (work, items) in contestants.items():
            began, used = time.perf_counter(), time.process_time()
            work()
            if turn:
                rates[name].append(items / (time.perf_counter() - began))
                costs[name].append((time.process_time() - used) / items)
                print(
                    f"round {turn}: {name} {rates[name][-1]:.2f} {unit}/s, "
                    f"{costs[name][-1]:.2f} processor s each",
                    flush=True,
                )
    first = next(iter(rates.values()))
    print(
        f"\n{'':34}{unit + '/s':>12}{'min':>9}{'max':>9}{'first is':>12}"
        f"{'processor s each':>18}"
    )
    for name, samples in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(first, samples, strict=True)]
        print(
            f"{name:34}{statistics.median(samples):12.2f}{min(samples):9.2f}"
            f"{max(samples):9.2f}{statistics.median(ratios):10.2f} x"
            f"{statistics.median(costs[name]):18.2f}"
        )


def _records(count: int) -> list[dict]:
    from gecko_jax.data import task_table

    lines = (task_table.QUICKSTART / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // count]]


def judging(
    rounds: int, pairs: int, threads: list[int], weights: str, dtype: str
) -> None:
    """Compares ways to judge candidates by QL and RC."""
    import llama_cpp

    from gecko_jax.fret import prompts
    from gecko_jax.llm import decoder_files, local

    relevance = prompts.load("relevance", ("relevance",))
    likelihood = prompts.load("likelihood", ("likelihood",))
    shared = prompts.before_query(relevance)
    labels = [f" {label}" for label in relevance.labels]
    records = _records(pairs)[:pairs]

    def render(prompt: prompts.Prompt, **names: str) -> list[str]:
        shots = range(len(prompt.examples))
        return [
            prompt.render(shots, **{name: r[key] for name, key in names.items()})
            for r in records
        ]

    joint_prompts = render(shared, passage="positive")
    own = render(likelihood, passage="positive")
    questions = render(relevance, passage="positive", query="query")
    queries = [f" {relevance.neutralize(record['query'])}" for record in records]
    path = decoder_files.find(weights)
    model = local.load(path, dtype=dtype)
    num_tokens = model.num_tokens(joint_prompts[0])
    print(f"{model.name}: {pairs} pairs, prompts of {num_tokens} tokens")

    def forget() -> None:
        model.score(["x"], ["y"])  # The prefix of the round before.

    def share() -> None:
        forget()
        model.judge(joint_prompts, queries, questions, labels)

    def separate() -> None:
        forget()
        model.score(own, queries)
        model.label_log_probs(questions, labels)

    contestants: dict[str, tuple[Callable[[], object], int]] = {
        "one reading for QL and RC": (share, pairs),
        "a reading each": (separate, pairs),
    }
    encode = model.tokenizer.encode
    scored = [(encode(p), encode(q)) for p, q in zip(own, queries, strict=True)]
    label_requests = [
        (encode(question), encode(labels[0])[:1]) for question in questions
    ]
    for count in threads:
        server = llama_cpp.LlamaCpp(str(path), threads=count)
        contestants[f"llama.cpp, {count} thread(s)"] = (
            lambda server=server: (server.score(scored), server.score(label_requests)),
            pairs,
        )
    take_turns(contestants, rounds, "pairs")


def scoring(
    rounds: int, pairs: int, threads: list[int], weights: str, dtype: str
) -> None:
    """Compares ways to score."""
    import jax
    import llama_cpp

    from gecko_jax.llm import decoder_files, local

    records = _records(pairs + SHOTS)

    def ask(record: dict) -> str:
        return f"Passage: {record['positive']}\nQuery:"

    few_shot = "".join(f"{ask(r)} {r['query']}\n\n" for r in records[:SHOTS])
    examples = records[SHOTS : SHOTS + pairs]
    prompts = [few_shot + ask(record) for record in examples]
    queries = [f" {record['query']}" for record in examples]
    path = decoder_files.find(weights)
    model = local.load(path, dtype=dtype)
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
    num_alone = max(pairs // 8, 1)

    def alone() -> None:
        for prompt, query in zip(prompts[:num_alone], queries[:num_alone], strict=True):
            model.score([prompt], [query])

    def batched() -> None:
        model.score(["x"], ["y"])  # Clear the cached prefix of the previous round.
        model.score(prompts, queries)

    contestants: dict[str, tuple[Callable[[], object], int]] = {
        "batches behind a shared prefix": (batched, pairs),
        "one at a time, no prefix": (alone, num_alone),
    }
    for count in threads:
        server = llama_cpp.LlamaCpp(str(path), threads=count)
        # Another prompt first, so that the few shots are read again in each round.
        contestants[f"llama.cpp, {count} thread(s)"] = (
            lambda server=server: server.score([([0], [1]), *tokens]),
            pairs,
        )
    take_turns(contestants, rounds, "pairs")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("scoring", "judging"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(f"gecko_jax {gecko_jax.__version__}")
    work = {"scoring": scoring, "judging": judging}[options.what]
    work(options.rounds, options.pairs, options.threads, options.model, options.dtype)


if __name__ == "__main__":
    main()
