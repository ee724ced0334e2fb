"""How good a model trained here is, beside others, and what each switch brings.

    python benchmarks/quality.py --data=quickstart --output=results/quality
    python benchmarks/quality.py --data=DIR --output=DIR --rows=ladder --steps=2000
    python benchmarks/quality.py --data=DIR --output=DIR --rows=ablations --seeds=0,1,2
    python benchmarks/quality.py --output=results/quality --table=docs/results.md

A data folder has `train.jsonl.gz` and `eval/SPLIT/TASK/` in the BEIR layout, SPLIT
being dev or test; `quickstart` is the bundled corpus. Every row is a file of JSON with
its seed, date, commit, wall time, pairs/s, peak memory and scores, made by a process of
its own. One that is there is not made again, and our training, if it was stopped, goes
on. The table is made of what is there. sentence-transformers needs gecko-jax[torch],
TF-IDF gecko-jax[eval].
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import logging
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import quality_table
import side_by_side

from gecko_jax import files, ranking

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = ROOT / "gecko_jax" / "quickstart"
VOCABULARY_SIZE = 8_000  # what `mini` has room for


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kind: What makes it: bm25, tfidf, gecko, sbert.
        about: For people.
        both: Keys of the config that differ in both stages.
        second: Keys that differ in the second stage.
    """

    kind: str
    about: str
    both: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    second: Mapping[str, Any] = dataclasses.field(default_factory=dict)


LADDER = {
    "bm25": Row("bm25", "BM25, English stemmer"),
    "tfidf": Row("tfidf", "TF-IDF, cosine"),
    "sbert": Row(
        "sbert", "the same encoder, batches and steps in sentence-transformers"
    ),
    "gecko": Row(
        "gecko", "gecko_jax: `prefinetune.py:local`, then `finetune.py:local`"
    ),
}
# What the paper never isolated; each differs from `gecko` by what it says.
ABLATIONS = {
    "gecko": LADDER["gecko"],
    "no-same-tower": Row(
        "gecko", "no same-tower negatives", {}, {"loss.same_tower": False}
    ),
    "no-mask": Row("gecko", "duplicates not masked", {"loss.mask_duplicates": False}),
    "one-task": Row("gecko", "one task in a batch", {"data.one_task_per_batch": True}),
    "no-mrl": Row(
        "gecko",
        "the largest dim alone",
        {"loss.mrl_dims": (256,), "loss.mrl_weights": (1.0,)},
    ),
    "negatives-0": Row("gecko", "no hard negative", {}, {"data.num_negatives": 0}),
    "negatives-3": Row("gecko", "3 hard negatives", {}, {"data.num_negatives": 3}),
    "hardness": Row("gecko", "hard negatives weighed", {}, {"loss.hardness": 5.0}),
    "spread": Row("gecko", "spread-out regularizer", {"loss.spread_weight": 1.0}),
    "plain-start": Row(
        "gecko",
        "random token embeddings and projection",
        {"init.token_weights": "none", "init.align_steps": 0},
    ),
}
GROUPS = {"ladder": tuple(LADDER), "ablations": tuple(ABLATIONS)}
ROWS = LADDER | ABLATIONS


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the texts are: pairs, and folders in the BEIR layout by split and task."""

    name: str
    train: pathlib.Path
    evals: Mapping[str, Mapping[str, pathlib.Path]]


def find_data(name: str) -> Data:
    """Looks a data folder over."""
    if name == "quickstart":
        return Data(name, QUICKSTART / "train.jsonl", {"test": {name: QUICKSTART}})
    root = pathlib.Path(name)
    train = [root / "train.jsonl.gz", root / "train.jsonl"]
    train = [path for path in train if path.is_file()]
    evals = {
        split: {
            folder.name: folder
            for folder in sorted((root / "eval" / split).glob("*"))
            if (folder / "corpus.jsonl").is_file()
        }
        for split in ("dev", "test")
    }
    evals = {split: found for split, found in evals.items() if found}
    if not train or not evals:
        raise SystemExit(f"{root}: needs train.jsonl(.gz) and eval/test/TASK/ folders")
    return Data(root.name, train[0], evals)


def main() -> None:
    """Makes the rows that are missing, or the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="quickstart", help="a folder (quickstart)")
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument(
        "--rows", default="ladder", help=f"ladder, ablations, or of {', '.join(ROWS)}"
    )
    parser.add_argument("--seeds", default="0", help="such as 0,1,2 (0)")
    parser.add_argument("--steps", type=int, default=200, help="of stage 1 (200)")
    parser.add_argument("--second-steps", type=int, default=60, help="of stage 2 (60)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples (64)")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        quality_table.write(options.output / "rows", options.table, ROWS, GROUPS)
        return
    if options.worker:
        make_row(options.worker, int(options.seeds), options)
        return
    # So that the worker ends with us: `subprocess.run` kills it when this is raised.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = GROUPS.get(options.rows) or tuple(options.rows.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows: {unknown[0]} is none of {', '.join(ROWS)}")
    if {ROWS[name].kind for name in names} & {"gecko", "sbert"}:
        prepare(find_data(options.data), options.output)
    for seed in options.seeds.split(","):
        for name in names:
            path = row_path(name, int(seed), options)
            if path.exists():
                print(f"{path}: there")
                continue
            arguments = [*sys.argv[1:], f"--seeds={seed}", f"--worker={name}"]
            if subprocess.run([sys.executable, __file__, *arguments]).returncode:
                raise SystemExit(
                    f"{name}, seed {seed}: ended; the same command goes on"
                )


def row_path(name: str, seed: int, options: argparse.Namespace) -> pathlib.Path:
    """Names the file of a row by all that decides it but the code."""
    row = ROWS[name]
    label = f"{name}-{find_data(options.data).name}"
    if row.kind in ("gecko", "sbert"):
        steps = f"{options.steps}+{options.second_steps}x{options.batch_size}"
        label += f"-{steps}-seed{seed}"
    return options.output / "rows" / f"{label}.json"


def make_row(name: str, seed: int, options: argparse.Namespace) -> None:
    """Makes one row and writes its file."""
    row, data = ROWS[name], find_data(options.data)
    makers = {"bm25": bm25, "tfidf": tfidf, "gecko": gecko, "sbert": sbert}
    facts = makers[row.kind](row, data, seed, options)
    facts = {
        "row": name,
        "data": data.name,
        "seed": seed if row.kind in ("gecko", "sbert") else None,
        "steps": [options.steps, options.second_steps],
        "batch_size": options.batch_size,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": f"{platform.processor() or platform.machine()}, {cores()} cores",
        "peak_gib": side_by_side.host_peak(),
        **facts,
    }
    with files.write_file(row_path(name, seed, options)) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{row_path(name, seed, options)}: made")


def commit() -> str:
    """Returns the commit, with a plus when the tree has changes."""

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "--short", "HEAD") + changed


def cores() -> int:
    """Returns how many cores this process may use."""
    import os

    return len(os.sched_getaffinity(0))


def vocabulary_path(data: Data, output: pathlib.Path) -> pathlib.Path:
    """Returns the vocabulary of a data folder: one of its own, but for the bundled."""
    if data.name == "quickstart":
        return QUICKSTART / "vocabulary.model"
    return output / "prepared" / f"{data.name}.model"


def prepare(data: Data, output: pathlib.Path) -> None:
    """Makes the vocabulary and the triples once; neither counts as training."""
    import bm25s

    from gecko_jax.data import mining, pieces

    logging.getLogger(bm25s.__name__).setLevel(logging.WARNING)
    vocabulary, triples = vocabulary_path(data, output), triples_path(data, output)
    if not vocabulary.exists():
        pieces.train_vocabulary([str(data.train)], str(vocabulary), VOCABULARY_SIZE)
    if not triples.exists():
        mining.mine_negatives([data.train], triples, 3)


def triples_path(data: Data, output: pathlib.Path) -> pathlib.Path:
    """Returns the file of triples."""
    return output / "prepared" / f"{data.name}-triples.jsonl.gz"


def configs(
    row: Row, data: Data, seed: int, options: argparse.Namespace
) -> tuple[Any, Any, pathlib.Path, pathlib.Path]:
    """Returns the configs of both stages, and their workdirs.

    Rows that differ in the second stage alone share the first.
    """
    from gecko_jax import config as config_lib
    from gecko_jax import flags

    work = options.output / "work"
    made = []
    for stage, steps, keys, source in (
        ("prefinetune", options.steps, row.both, data.train),
        (
            "finetune",
            options.second_steps,
            {**row.both, **row.second},
            triples_path(data, options.output),
        ),
    ):
        config = flags.load(f"{ROOT / 'configs' / stage}.py:local")
        config.seed = seed
        config.data.files = (str(source),)
        config.data.vocabulary = str(vocabulary_path(data, options.output))
        config.data.batch_size = options.batch_size
        config.data.cache_dir = str(options.output / "cache")
        config.train.num_steps = steps
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
        config.checkpoint.every_minutes = 5
        config.checkpoint.every_steps = max(steps, 1)
        config.checkpoint.keep = 2
        config.evaluation.every_steps = 0
        config.evaluation.folder = ""
        for key, value in keys.items():
            if stage == "prefinetune" or not key.startswith("init."):
                config.update_from_flattened_dict({key: value})
        if made:
            config.init.checkpoint = str(made[-1][1])
        digest = hashlib.sha256(config_lib.to_json(config).encode()).hexdigest()[:12]
        made.append((config, work / f"{stage}-{digest}"))
    return made[0][0], made[1][0], made[0][1], made[1][1]


def bm25(
    row: Row, data: Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores BM25."""
    del row, seed, options

    def rank(found: Any) -> dict[str, Any]:
        return {
            "all": ranking.bm25_rankings(
                found.queries, passages(found), found.passage_ids, 11
            )
        }

    return {"scores": score(data, lambda found, task: rank(found))}


def tfidf(
    row: Row, data: Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores the cosine of TF-IDF vectors, weighed on each corpus."""
    del row, seed, options
    from sklearn.feature_extraction import text

    def rank(found: Any, task: str) -> dict[str, Any]:
        weigh = text.TfidfVectorizer(sublinear_tf=True)
        corpus = weigh.fit_transform(passages(found))
        similarity = (weigh.transform(found.queries) @ corpus.T).toarray()
        return {"all": rankings(found, similarity)}

    return {"scores": score(data, rank)}


def gecko(
    row: Row, data: Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains both stages, and scores every dim that was trained."""
    from gecko_jax import embedding, train

    *both, first, second = configs(row, data, seed, options)
    seconds = 0.0
    for config, workdir in zip(both, (first, second), strict=True):
        with timed(workdir):
            train.train(config, workdir)
        seconds += spent(workdir)
    model = embedding.load(str(second))

    def rank(found: Any, task: str) -> dict[str, Any]:
        queries = model.encode_queries(found.queries, task=tasks_of(found, task))
        corpus = model.encode_passages(found.texts, found.titles)
        return by_dim(found, queries, corpus, model.files.mrl_dims)

    return {**speed(options, seconds), "scores": score(data, rank)}


def sbert(
    row: Row, data: Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains the same encoder for the same number of examples, and scores it."""
    del row
    import sbert_training

    base, tuned, *_ = configs(ROWS["gecko"], data, seed, options)
    work = options.output / "work" / f"sbert-{data.name}-{options.steps}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    built, seconds = sbert_training.train((base, tuned), seed, work)

    def rank(found: Any, task: str) -> dict[str, Any]:
        queries, corpus = sbert_training.encode(
            built, found, tasks_of(found, task), base
        )
        return by_dim(found, queries, corpus, base.loss.mrl_dims)

    return {**speed(options, seconds), "scores": score(data, rank)}


def speed(options: argparse.Namespace, seconds: float) -> dict[str, float]:
    """Returns what training took: compilation and reading included."""
    pairs = (options.steps + options.second_steps) * options.batch_size
    return {"train_seconds": seconds, "pairs_per_second": pairs / seconds}


@contextlib.contextmanager
def timed(workdir: pathlib.Path) -> Iterator[None]:
    """Adds the time of a run, or of what an interrupted one had, to its workdir."""
    began = time.perf_counter()
    try:
        yield
    finally:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "seconds.txt").open("a") as file:
            file.write(f"{time.perf_counter() - began}\n")


def spent(workdir: pathlib.Path) -> float:
    """Returns all time of a workdir; opening a finished run adds next to nothing."""
    return sum(map(float, (workdir / "seconds.txt").read_text().split()))


def score(data: Data, rank: Any) -> dict[str, dict[str, dict[str, float]]]:
    """Returns nDCG@10 by split, task and dims.

    Args:
        data: The evaluation folders.
        rank: (set, task) -> dims -> a ranking for each query.
    """
    from gecko_jax.evaluation import sets

    found: dict[str, dict[str, dict[str, float]]] = {}
    for split, folders in data.evals.items():
        for task, folder in folders.items():
            (one,) = (s for s in sets.load(folder) if isinstance(s, sets.RetrievalSet))
            found.setdefault(split, {})[task] = {
                dim: float(
                    np.mean(
                        [
                            ranking.ndcg_at_k(
                                [p for p in best if p != query], one.relevance[query]
                            )
                            for query, best in zip(one.query_ids, ranked, strict=True)
                        ]
                    )
                )
                for dim, ranked in rank(one, task).items()
            }
    return found


def tasks_of(found: Any, folder: str) -> list[str]:
    """Returns the task of each query: its own, or else the name of the folder."""
    return [task or folder for task in found.tasks]


def passages(found: Any) -> list[str]:
    """Returns the passages with their titles in front."""
    both = zip(found.titles, found.texts, strict=True)
    return [f"{title} {text}".strip() for title, text in both]


def by_dim(
    found: Any, queries: np.ndarray, corpus: np.ndarray, dims: Sequence[int]
) -> dict[str, Any]:
    """Returns the rankings at every dim, by the cosine of the prefixes."""
    from gecko_jax import embedding

    return {
        str(dim): rankings(
            found, embedding.cut(queries, dim) @ embedding.cut(corpus, dim).T
        )
        for dim in dims
    }


def rankings(found: Any, similarity: np.ndarray) -> list[list[str]]:
    """Returns the best ids of each query; one more than is scored may be its own."""
    return [
        [found.passage_ids[int(place)] for place in ranking.best_positions(row, 11)]
        for row in similarity
    ]


if __name__ == "__main__":
    main()
