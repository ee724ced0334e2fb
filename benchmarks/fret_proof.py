r"""Tests whether FRet's triples train a better model: tables 3 and 6 of the paper.

    python benchmarks/fret_proof.py --output=DIR --config=configs/fret.py:local,qwen \
        --config.passages.limit=1100 --start=mini
    python benchmarks/fret_proof.py --output=DIR --table=docs/fret.md

The first command ranks the candidates of held-out seed passages and of judged queries
with the language model (table 6), and runs `gecko fret run` in DIR/fret (`gecko fret
relabel` with `relabel.files`). Then it trains one model per choice of
positive and negative (table 3) and one that also learns the judge's scores, for each
random seed and all on the same queries. They start from `mini`, or from an initial
retriever that is trained on the queries with their seed passages: a bag of tokens or a
small T5. Each step writes a file in DIR/rows. A second run skips the steps whose file
exists and resumes a step that was interrupted. `--data` names the judged queries: a
data folder of `quality.py`, or the bundled corpus.
"""

import argparse
import dataclasses
import datetime
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from collections import Counter
from typing import Any

import fret_proof_table
import measured
import ml_collections
import numpy as np
import quality_data
import quality_scores
import side_by_side

from gecko_jax.cli import flags
from gecko_jax.evaluation import judgements
from gecko_jax.fret import fusion, retrieval, runs, settings, stages
from gecko_jax.inference import ranking
from gecko_jax.io import progress, writing
from gecko_jax.llm import request_log

# Table 3, and more negatives with and without distillation from the judge.
_HARDEST = {"fuse.positive": "relabelled", "fuse.negative": "lowest"}
_FOUR = _HARDEST | {"fuse.num_negatives": 4}
ROWS: dict[str, dict[str, Any]] = {
    "seed, none": {"fuse.positive": "seed", "fuse.negative": "none"},
    "seed, hardest": {"fuse.positive": "seed", "fuse.negative": "lowest"},
    "relabelled, none": {"fuse.positive": "relabelled", "fuse.negative": "none"},
    "relabelled, random": {"fuse.positive": "relabelled", "fuse.negative": "sampled"},
    "relabelled, hardest": _HARDEST,
    "relabelled, hardest 4": _FOUR,
    "relabelled, hardest 4, KL": _FOUR | {"export.scores": "likelihood"},
}
# Divides the judge's scores, which are nats of a whole query.
_KL_TEMPERATURE = 4.0
STARTS = ("bag", "t5", "mini")
START = "initial retriever"
_QUERIES_AT_ONCE = 16


def main() -> None:
    """Makes the missing rows, or writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--config", default="configs/fret.py:local", metavar="FILE:ARG")
    parser.add_argument("--data", default="quickstart", help="data folder (quickstart)")
    parser.add_argument(
        "--judged", type=int, default=100, help="queries per task (100); 0: no table 6"
    )
    parser.add_argument("--seeds", default="0,1,2", help="training seeds (0,1,2)")
    parser.add_argument(
        "--start", choices=STARTS, default="mini", help="what the models start from"
    )
    parser.add_argument("--start-steps", type=int, default=200, help="stage 1 (200)")
    parser.add_argument("--steps", type=int, default=60, help="steps per row (60)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples (64)")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    overrides, arguments = flags.split(sys.argv[1:])
    options = parser.parse_args(arguments)
    if options.table:
        fret_proof_table.write(options.output / "rows", options.table, [START, *ROWS])
        return
    config = flags.load(options.config, overrides)
    if options.worker:
        work(options.worker, config, options)
        return
    # `subprocess.run` kills the worker when this is raised.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    jobs = {"judges": judges_path(options)} if options.judged else {}
    jobs["fret"] = run_path(options)
    for seed in map(int, options.seeds.split(",")):
        for name in (START, *ROWS):
            jobs[f"{name}:{seed}"] = row_path(name, seed, options)
    for job, path in jobs.items():
        if path.exists():
            print(f"{path}: there")
            continue
        command = [sys.executable, __file__, *sys.argv[1:], f"--worker={job}"]
        if subprocess.run(command).returncode:
            raise SystemExit(f"{job}: failed; run the command again to resume")
        print(f"{path}: written", flush=True)


def run_path(options: argparse.Namespace) -> pathlib.Path:
    """Returns the path of the file that describes the FRet run."""
    return options.output / "rows" / "run.json"


def judges_path(options: argparse.Namespace) -> pathlib.Path:
    """Returns the path of the file of table 6."""
    return options.output / "rows" / f"judges-{options.judged}.json"


def row_path(name: str, seed: int, options: argparse.Namespace) -> pathlib.Path:
    """Returns the path of the file of a row of table 3."""
    label = name.replace(", ", "-").replace(" ", "-")
    steps = f"{options.steps}x{options.batch_size}"
    if options.start != "mini":
        steps = f"{options.start_steps}+{steps}"
    about = f"{options.start}-{pathlib.Path(options.data).name}-{steps}"
    return options.output / "rows" / f"model-{about}-{label}-seed{seed}.json"


def work(
    job: str, config: ml_collections.ConfigDict, options: argparse.Namespace
) -> None:
    """Runs one job in a separate process and writes its file."""
    if job == "fret":
        path, facts = run_path(options), make_triples(config, options)
    elif job == "judges":
        path, facts = judges_path(options), judge(config, options)
    else:
        name, _, seed = job.rpartition(":")
        path = row_path(name, int(seed), options)
        facts = {"row": name, "seed": int(seed)} | train(name, int(seed), options)
    facts |= {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": measured.commit(),
        "machine": measured.machine(),
        "peak_gib": side_by_side.host_peak(),
    }
    with writing.write_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")


def make_triples(
    config: ml_collections.ConfigDict, options: argparse.Namespace
) -> dict[str, Any]:
    """Runs FRet and selects the triples of each row from its judgements."""
    from gecko_jax.fret import bootstrapping

    workdir = options.output / "fret"
    with measured.timed(workdir):
        summary = runs.run(config, workdir)
    pairs, num_pairs = bootstrapping.write_pairs(config, workdir)
    shutil.copy(pairs, triples_path(START, options))
    lines_of: dict[str, dict[tuple[str, str], str]] = {}
    for name, choice in ROWS.items():
        # Only the choice among the judged candidates differs: no new LLM requests.
        again = options.output / "chosen" / name.replace(", ", "-")
        shutil.rmtree(again, ignore_errors=True)
        unlike = ("fuse", "export", request_log.FOLDER, "calibration", "bootstrap")
        shutil.copytree(workdir, again, ignore=shutil.ignore_patterns(*unlike))
        chosen = ml_collections.ConfigDict(config)
        chosen.update_from_flattened_dict(choice)
        output = runs.run(chosen, again).output
        assert output is not None
        lines_of[name] = by_query(output)
    # A row may drop a query whose positive is uninformative: drop it from all rows.
    common = set.intersection(*(set(lines) for lines in lines_of.values()))
    for name, lines in lines_of.items():
        with writing.write_file(triples_path(name, options)) as temporary:
            temporary.write_text("".join(lines[query] for query in sorted(common)))
    positives = [
        [json.loads(lines_of[name][query])["positive"] for query in sorted(common)]
        for name in ("seed, none", "relabelled, none")
    ]
    moved = sum(a != b for a, b in zip(*positives, strict=True))
    line = json.loads(next(iter(lines_of["seed, none"].values())))
    return {
        "generator": line.get("judge") or line["generator"],
        "relabelled": bool(config.relabel.files),
        "passages": summary.stages["passages"]["kept"],
        "queries": num_pairs,
        "triples": len(common),
        "moved": moved / len(common),
        "candidates": config.retrieve.num_candidates,
        "retriever": config.retrieve.model or "BM25",
        "weights": [config.fuse.likelihood_weight, config.fuse.relevance_weight],
        # A recording tells nothing about the time that a model needs.
        "seconds": None if config.llm.recording else measured.spent(workdir),
    }


def by_query(path: pathlib.Path) -> dict[tuple[str, str], str]:
    """Returns the lines of an export whose task and query are those of no other."""
    lines = path.read_text().splitlines(keepends=True)
    queries = [(record["task"], record["query"]) for record in map(json.loads, lines)]
    counts = Counter(queries)
    pairs = zip(queries, lines, strict=True)
    return {query: line for query, line in pairs if counts[query] == 1}


def triples_path(name: str, options: argparse.Namespace) -> pathlib.Path:
    """Returns the training file of a row."""
    folder = options.output / "triples"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl"


def judge(
    config: ml_collections.ConfigDict, options: argparse.Namespace
) -> dict[str, Any]:
    """Ranks the candidates by QL, by RC and by both (table 6).

    The query of a held-out seed passage is generated, and the seed should rank first.
    The judged queries and their answers were written by people.
    """
    from gecko_jax.fret import measure

    calibration = measure.calibrate(config, options.output / "fret")
    reranked = {}
    budget = runs.open_budget(config)
    with runs.prepare(config, options.output / "fret", budget) as source:
        for task, one in retrieval_sets(options):
            few = one.limit(options.judged, 0)
            log = options.output / "judged" / task
            reranked[task] = rerank(source, few, task, log)
    return {"seeds": dataclasses.asdict(calibration), "queries": reranked}


def retrieval_sets(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """Returns the judged test queries, by task."""
    from gecko_jax.evaluation import sets

    folders = quality_data.find(options.data, split="test").evals["test"]
    return [
        (task, one)
        for task, folder in folders.items()
        for one in sets.load(folder)
        if isinstance(one, sets.RetrievalSet)
    ]


def rerank(source: Any, one: Any, task: str, log: pathlib.Path) -> dict[str, Any]:
    """Returns nDCG@10 of each query's candidates in the order of each judge.

    The judges read the first `passages.max_characters` characters of a passage; the
    retriever reads all of it.

    Args:
        source: Model, prompts and settings of the run.
        one: Retrieval set.
        task: Task of the queries that do not name one.
        log: Folder of the model's responses.
    """
    config, prompts = source.config, source.prompts
    passages = list(zip(one.titles, one.texts, strict=True))
    longest = config.passages.max_characters
    store = stages.Passages(
        [{"title": title, "text": text[:longest]} for title, text in passages]
    )
    if config.retrieve.model:
        vectors = source.gecko.encode_passages(one.texts, one.titles)
        retriever: Any = retrieval.GeckoRetriever(source.gecko, vectors)
    else:
        retriever = ranking.Bm25Retriever(passages)
    tasks = quality_scores.tasks_of(one, task)
    rows = [
        {"id": number, "candidates": candidates}
        for number, (candidates, _) in enumerate(
            retriever.search(one.queries, tasks, config.retrieve.num_candidates)
        )
    ]
    rows = [row for row in rows if row["candidates"]]
    queries = {row["id"]: {"query": one.queries[row["id"]]} for row in rows}
    grades = list(prompts.relevance.labels.values())
    # With one prompt for both, one reading also answers RC's questions.
    shares_reading = prompts.likelihood.sha256 == prompts.relevance.sha256
    then = prompts.relevance if shares_reading else None
    judged: dict[str, dict[int, Any]] = {"QL": {}, "RC": {}}
    for start in progress.track(
        range(0, len(rows), _QUERIES_AT_ONCE), f"Judging {task}"
    ):
        block = (rows[start : start + _QUERIES_AT_ONCE], queries, store, source.model)
        read = log / f"likelihood-{start:05}.jsonl"
        with request_log.RequestLog(read) as source.model.log:
            judged["QL"] |= stages.by_id(
                stages.likelihood(*block, prompts.likelihood, "", then)
            )
        asked = log / f"relevance-{start:05}.jsonl"
        with request_log.RequestLog(asked, read) as source.model.log:
            judged["RC"] |= stages.by_id(stages.relevance(*block, prompts.relevance))
    both = dataclasses.replace(
        settings.fusion_settings(config), likelihood_weight=1.0, relevance_weight=1.0
    )
    scores: dict[str, list[float]] = {}
    own = judgements.find_own(one)
    for row in rows:
        if not all(row["id"] in answers for answers in judged.values()):
            continue
        ranks = {
            "QL": fusion.ranks(judged["QL"][row["id"]]["log_probs"]),
            "RC": fusion.ranks(
                [
                    fusion.relevance_score(values, grades, config.fuse.relevance)
                    for values in judged["RC"][row["id"]]["label_log_probs"]
                ]
            ),
        }
        fused = fusion.fuse(ranks["QL"], ranks["RC"], both)
        ranks |= {"retrieval": np.arange(len(fused)), "RRF": fusion.ranks(list(fused))}
        query = one.query_ids[row["id"]]
        for name, order in ranks.items():
            best = [one.passage_ids[row["candidates"][p]] for p in np.argsort(order)]
            scores.setdefault(name, []).append(
                ranking.ndcg_at_k(
                    [p for p in best if p != query or query not in own],
                    one.relevance[query],
                )
            )
    return {
        "queries": len(one.queries),
        "candidates": config.retrieve.num_candidates,
        "ndcg": scores,
    }


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model and scores it on the judged queries."""
    from gecko_jax.inference import embedding
    from gecko_jax.training import loop

    folder = model_path(name, seed, options)
    seconds = 0.0
    if isinstance(folder, pathlib.Path):
        with measured.timed(folder):
            loop.train(training_config(name, seed, options), folder)
        seconds = measured.spent(folder)
    model = embedding.load(str(folder))

    def rank(dataset: Any, task: str) -> dict[str, Any]:
        queries = model.encode_queries(
            dataset.queries, task=quality_scores.tasks_of(dataset, task)
        )
        corpus = model.encode_passages(dataset.texts, dataset.titles)
        return quality_scores.by_dim(dataset, queries, corpus, model.files.mrl_dims)

    data = quality_data.find(options.data, split="test")
    return {
        "start": options.start,
        "steps": [options.start_steps * (options.start != "mini"), options.steps],
        "batch_size": options.batch_size,
        "data": data.name,
        "train_seconds": seconds,
        "scores": quality_scores.score(data, rank),
    }


def model_path(name: str, seed: int, options: argparse.Namespace) -> pathlib.Path | str:
    """Returns the workdir of a model, or the name of the bundled one."""
    if name == START and options.start == "mini":
        return "mini"
    return options.output / "models" / row_path(name, seed, options).stem


def training_config(
    name: str, seed: int, options: argparse.Namespace
) -> ml_collections.ConfigDict:
    """Returns the config of the initial retriever, or of a row that starts from it.

    A bag of tokens learns most from so few queries. Its second stage keeps the high
    learning rate of the token embeddings; at the usual rate the rows do not differ.
    """
    is_bag = options.start == "bag"
    if is_start := name == START:
        stage = "prefinetune.py:local" + ",bag" * is_bag
    else:
        stage = "finetune.py:fret,local" + ",shipped" * (options.start == "mini")
    config = flags.load(f"{measured.ROOT / 'configs' / stage}")
    config.seed = seed
    config.data.files = (str(triples_path(name, options)),)
    config.data.batch_size = options.batch_size
    config.data.cache_dir = str(options.output / "cache")
    steps = options.start_steps if is_start else options.steps
    config.train.num_steps = steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
    config.train.compilation_cache = str(options.output / "compiled")
    config.checkpoint.every_steps = steps
    config.checkpoint.every_minutes = 5
    config.evaluation.every_steps = 0
    config.evaluation.folder = ""
    if is_start:
        return config
    config.init.checkpoint = str(model_path(START, seed, options))
    choice = ROWS[name]
    negatives = choice["fuse.negative"] != "none"
    config.data.num_negatives = negatives * choice.get("fuse.num_negatives", 1)
    if "export.scores" in choice:
        config.loss.kl_weight = 1.0
        config.loss.kl_temperature = _KL_TEMPERATURE
    if is_bag:
        config.model.num_layers = 0
        config.optimizer.learning_rate = 3e-4
        config.optimizer.token_rate = 60.0
    return config


if __name__ == "__main__":
    main()
