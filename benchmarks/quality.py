"""How good a model trained here is, beside others, and what each switch brings.

    python benchmarks/quality.py --data=quickstart --output=results/quality
    python benchmarks/quality.py --data=DIR --output=DIR --rows=gecko,sbert --steps=1000
    python benchmarks/quality.py --data=DIR --output=DIR --rows=ablations
    python benchmarks/quality.py --data=DIR --output=DIR --rows=search
    python benchmarks/quality.py --output=results/quality --table=docs/results.md

`quality_data` says what a data folder is; `quickstart` is the bundled corpus. Every row
is a file of JSON with its seed, date, commit, wall time, pairs/s, peak memory and
scores, made by a process of its own. One that is there is not made again; our training,
if it was stopped or killed, goes on, two minutes back at most. The table is made of
what is there, with a plot of each beside it, and anew after each row as
OUTPUT/table.md.

The ablations are made with three seeds on a fixed subset of the pairs, and judged on
dev where there is one; a row takes one to five minutes on one core. Some of them alone:
`--rows=base,no-mask`; at full length: `--subset=0 --split=test` and more steps.
sentence-transformers needs gecko-jax[torch], TF-IDF and texts with labels need
gecko-jax[eval]. The search is made like the ablations, with one seed: changes of the
recipe to choose from, on dev. Rows that are taught begin with the vectors of
--pretrained, once for all pairs of the folder.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import quality_data
import quality_scores
import quality_table
import quality_teacher
import side_by_side
from quality_rows import GROUPS, ROWS, VOCABULARY_SIZE, Row

from gecko_jax import files, ranking, wording

ROOT = quality_data.ROOT
# What the rows of a table are made with unless told otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ladder": {"seeds": "0", "subset": 0, "split": ""},
    "ablations": {"seeds": "0,1,2", "subset": 24_000, "split": "dev"},
    "search": {"seeds": "0", "subset": 24_000, "split": "dev"},
}


def main() -> None:
    """Makes the rows that are missing, or the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="quickstart", help="a folder (quickstart)")
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument(
        "--rows",
        default="ladder",
        help=f"{', '.join(GROUPS)}, or some of one of these: {', '.join(ROWS)}",
    )
    for name, about in (
        ("seeds", "such as 0,1,2"),
        ("subset", "pairs to train on, 0 for all"),
        ("split", "to judge on, dev or test; empty for both"),
    ):
        usual = (f"{group}: {of[name] or 'empty'}" for group, of in DEFAULTS.items())
        parser.add_argument(
            f"--{name}",
            type=type(DEFAULTS["ladder"][name]),
            help=f"{about} ({'; '.join(usual)})",
        )
    for name, about in (
        ("steps", "of the first stage"),
        ("second-steps", "of the second stage"),
        ("batch-size", "examples of both"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=0, help=f"{about} (0: the row's own)"
        )
    parser.add_argument(
        "--pretrained",
        default="sentence-transformers/all-MiniLM-L6-v2",
        metavar="MODEL",
        help="of sentence-transformers: the row `pretrained`, and the teacher",
    )
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        quality_table.write(options.output / "rows", options.table, ROWS, GROUPS)
        return
    names = GROUPS.get(options.rows) or tuple(options.rows.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows: {unknown[0]} is none of {', '.join(ROWS)}")
    groups = [group for group, rows in GROUPS.items() if set(names) <= set(rows)]
    if not groups:
        parser.error(f"--rows={options.rows}: name rows of one table at a time")
    for key, value in DEFAULTS[groups[0]].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.worker:
        make_row(options.worker, int(options.seeds), options)
        return
    # So that the worker ends with us: `subprocess.run` kills it when this is raised.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    data = find_data(options)
    without = [name for name in names if ROWS[name].classes and not data.classes]
    if without:
        print(f"{options.data}: has no texts with labels, so no {', '.join(without)}")
        names = tuple(name for name in names if name not in without)
    for size in dict.fromkeys(
        ROWS[name].vocabulary_size
        for name in names
        if ROWS[name].kind in ("gecko", "sbert")
    ):
        quality_data.prepare(data, options.output, size)
    teacher = quality_data.prepared(data, options.output, VOCABULARY_SIZE).teacher
    for seed in options.seeds.split(","):
        for name in names:
            path = row_path(name, int(seed), options)
            if path.exists():
                print(f"{path}: there")
                continue
            if is_taught(name) and not teacher.exists():
                quality_teacher.teach(options.pretrained, data.train, teacher)
            arguments = [*sys.argv[1:], f"--seeds={seed}", f"--worker={name}"]
            if subprocess.run([sys.executable, __file__, *arguments]).returncode:
                raise SystemExit(
                    f"{name}, seed {seed}: ended; the same command goes on"
                )
            quality_table.write(
                options.output / "rows", options.output / "table.md", ROWS, GROUPS
            )


def is_taught(name: str) -> bool:
    """Whether the row trains towards the vectors of the pretrained model."""
    return "loss.matching_weight" in ROWS[name].both


def find_data(options: argparse.Namespace) -> quality_data.Data:
    """Returns the data that the options name."""
    return quality_data.find(options.data, options.subset, options.split)


def row_path(name: str, seed: int, options: argparse.Namespace) -> pathlib.Path:
    """Names the file of a row by all that decides it but the code."""
    row = ROWS[name]
    label = f"{name}-{find_data(options).name}"
    if row.kind in ("gecko", "sbert"):
        given = (options.steps, options.second_steps, options.batch_size)
        label += "-{}+{}x{}".format(*given) if any(given) else ""
        label += f"-seed{seed}"
    return options.output / "rows" / f"{label}.json"


def make_row(name: str, seed: int, options: argparse.Namespace) -> None:
    """Makes one row and writes its file."""
    row, data = ROWS[name], find_data(options)
    makers = {
        "bm25": bm25,
        "tfidf": tfidf,
        "pretrained": pretrained,
        "gecko": gecko,
        "sbert": sbert,
    }
    facts = makers[row.kind](row, data, seed, options)
    facts = {
        "row": name,
        "data": data.name,
        "seed": seed if row.kind in ("gecko", "sbert") else None,
        "steps": [options.steps, options.second_steps],
        "batch_size": options.batch_size,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
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


def machine() -> str:
    """Returns the kind of processor, and how many cores this process may use."""
    cores = wording.counted(len(os.sched_getaffinity(0)), "core")
    return f"{platform.processor() or platform.machine()}, {cores}"


def configs(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> tuple[Any, Any, pathlib.Path, pathlib.Path]:
    """Returns the configs of both stages, and their workdirs.

    Rows that differ in the second stage alone share the first.
    """
    from gecko_jax import config as config_lib
    from gecko_jax import flags

    work = options.output / "work"
    ready = quality_data.prepared(data, options.output, row.vocabulary_size)
    triples = [ready.triples, *([ready.classes[row.classes]] if row.classes else [])]
    made = []
    for stage, arg, steps, keys, sources in (
        ("prefinetune", row.first, options.steps, row.both, [ready.pairs]),
        (
            "finetune",
            "local",
            options.second_steps,
            {**row.both, **row.second},
            triples,
        ),
    ):
        config = flags.load(f"{ROOT / 'configs' / stage}.py:{arg}")
        config.seed = seed
        config.data.files = tuple(map(str, sources))
        config.data.vocabulary = str(ready.vocabulary)
        config.data.cache_dir = str(options.output / "cache")
        config.train.compilation_cache = str(options.output / "compiled")
        config.checkpoint.every_minutes = 2
        config.checkpoint.keep = 2
        config.evaluation.every_steps = 0
        config.evaluation.folder = ""
        for key, value in keys.items():
            if stage == "prefinetune" or not key.startswith("init."):
                value = value(config) if callable(value) else value
                config.update_from_flattened_dict({key: value})
        config.train.num_steps = steps or config.train.num_steps
        config.data.batch_size = options.batch_size or config.data.batch_size
        steps = config.train.num_steps
        config.checkpoint.every_steps = max(steps, 1)
        if made and row.averaged:
            config.checkpoint.every_steps = _apart(steps)
            config.checkpoint.keep_every_steps = _apart(steps)
        if made and row.mined is not None:
            config.data.files = (str(mined_path(made[-1][1], row.mined)),)
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
        if config.loss.matching_weight:
            config.data.teacher = str(ready.teacher)
            config.data.teacher_dim = quality_teacher.DIM
        if made:
            config.init.checkpoint = str(made[-1][1])
        digest = hashlib.sha256(config_lib.to_json(config).encode()).hexdigest()[:12]
        made.append((config, work / f"{stage}-{digest}"))
    return made[0][0], made[1][0], made[0][1], made[1][1]


def _apart(steps: int) -> int:
    """Returns the steps between the checkpoints of a row that is averaged."""
    return max(steps // 10, 1)


def mined_path(workdir: pathlib.Path, skip_top: int) -> pathlib.Path:
    """Names the triples whose hard negatives a run's model has found."""
    return workdir / f"triples-{skip_top}.jsonl.gz"


def bm25(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores BM25."""
    del row, seed, options

    def rank(found: Any) -> dict[str, Any]:
        return {
            "all": ranking.bm25_rankings(
                found.queries, quality_scores.passages(found), found.passage_ids, 11
            )
        }

    return {"scores": quality_scores.score(data, lambda found, task: rank(found))}


def tfidf(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores the cosine of TF-IDF vectors, weighed on each corpus."""
    del row, seed, options
    from sklearn.feature_extraction import text

    def rank(found: Any, task: str) -> dict[str, Any]:
        weigh = text.TfidfVectorizer(sublinear_tf=True)
        corpus = weigh.fit_transform(quality_scores.passages(found))
        similarity = (weigh.transform(found.queries) @ corpus.T).toarray()
        return {"all": quality_scores.rankings(found, similarity)}

    return {"scores": quality_scores.score(data, rank)}


def pretrained(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores a model that others trained: on test, nothing was chosen by it."""
    del row, seed
    data = dataclasses.replace(data, evals={"test": data.evals["test"]})

    def rank(found: Any, task: str) -> dict[str, Any]:
        queries, corpus = (
            np.concatenate(list(quality_teacher.encode(options.pretrained, *texts)))
            for texts in ([found.queries], [found.texts, found.titles])
        )
        return {"all": quality_scores.rankings(found, queries @ corpus.T)}

    return {"scores": quality_scores.score(data, rank)}


def gecko(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains both stages; scores all dims, half and a quarter, trained or not."""
    from gecko_jax import checkpoints, embedding, train
    from gecko_jax.evaluation import classification, judge, sets

    *both, first, second = configs(row, data, seed, options)
    seconds = 0.0
    for config, workdir in zip(both, (first, second), strict=True):
        if workdir == second and row.mined is not None:
            mine(both[0].data.files, first, row.mined)
        # Rows that differ in the second stage alone share the first.
        if checkpoints.latest_step(workdir) != config.train.num_steps:
            with timed(workdir):
                train.train(config, workdir)
        seconds += spent(workdir)
    model = embedding.load(str(average(second, both[-1], row.averaged)))
    dims = [both[-1].loss.mrl_dims[-1] // part for part in (4, 2, 1)]

    def rank(found: Any, task: str) -> dict[str, Any]:
        queries = model.encode_queries(
            found.queries, task=quality_scores.tasks_of(found, task)
        )
        corpus = model.encode_passages(found.texts, found.titles)
        return quality_scores.by_dim(found, queries, corpus, dims)

    facts = {**speed(both, seconds), "scores": quality_scores.score(data, rank)}
    if data.classes:
        (labelled,) = sets.load(data.classes)
        assert isinstance(labelled, sets.ClassificationSet)
        learned, judged = (
            judge.encode_symmetric(model, part.texts, "Classification")
            for part in (labelled.train, labelled.test)
        )
        facts["accuracy"] = classification.accuracy(
            learned, labelled.train.labels, judged, labelled.test.labels
        )
    return facts


def mine(pairs: Sequence[str], workdir: pathlib.Path, skip_top: int) -> None:
    """Writes triples whose hard negatives the model of a run has found."""
    from gecko_jax import embedding
    from gecko_jax.data import mining
    from gecko_jax.fret import retrieval

    path = mined_path(workdir, skip_top)
    if not path.exists():
        build = retrieval.searched_by(embedding.load(str(workdir)))
        mining.mine_negatives(pairs, path, 3, skip_top=skip_top, build=build)


def average(workdir: pathlib.Path, config: Any, number: int) -> pathlib.Path:
    """Averages the last checkpoints of a run into a model; of none, the run itself."""
    from gecko_jax import averaging

    if not number:
        return workdir
    steps, apart = config.train.num_steps, _apart(config.train.num_steps)
    chosen = [steps - apart * back for back in range(number)]
    output = workdir.with_name(f"{workdir.name}-mean")
    if not output.exists():
        averaging.average([str(workdir)], output, steps=chosen)
    return output


def sbert(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains the same encoder for the same number of examples, and scores it."""
    del row
    import sbert_training

    base, tuned, *_ = configs(Row("gecko", ""), data, seed, options)
    work = options.output / "work" / f"sbert-{data.name}-{options.steps}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    built, seconds = sbert_training.train((base, tuned), seed, work)

    def rank(found: Any, task: str) -> dict[str, Any]:
        queries, corpus = sbert_training.encode(
            built, found, quality_scores.tasks_of(found, task), base
        )
        return quality_scores.by_dim(found, queries, corpus, base.loss.mrl_dims)

    return {**speed((base, tuned), seconds), "scores": quality_scores.score(data, rank)}


def speed(stages: Sequence[Any], seconds: float) -> dict[str, float]:
    """Returns what training took: compilation and reading included."""
    pairs = sum(config.train.num_steps * config.data.batch_size for config in stages)
    return {"train_seconds": seconds, "pairs_per_second": pairs / seconds}


@contextlib.contextmanager
def timed(workdir: pathlib.Path) -> Iterator[None]:
    """Notes in the workdir when a run begins and ends, and where it goes on from."""
    workdir.mkdir(parents=True, exist_ok=True)
    saved = [path.stat().st_mtime for path in (workdir / "checkpoints").glob("*")]
    with (workdir / "times.txt").open("a") as file:
        if saved:
            file.write(f"saved {max(saved)}\n")
        file.write(f"began {time.time()}\n")
        file.flush()
        try:
            yield
        finally:
            file.write(f"ended {time.time()}\n")


def spent(workdir: pathlib.Path) -> float:
    """Returns the seconds of all runs of a workdir.

    One that was killed counts to the last checkpoint it left: what came after is done
    again by the next.
    """
    lines = [line.split() for line in (workdir / "times.txt").read_text().splitlines()]
    total = 0.0
    for (what, time_), (next_, end) in itertools.pairwise(lines):
        if what == "began" and next_ != "began":
            total += max(float(end) - float(time_), 0.0)
    return total


if __name__ == "__main__":
    main()
