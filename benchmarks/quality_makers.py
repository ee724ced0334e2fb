"""Training and scoring of the rows of `quality.py`."""

import argparse
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import measured
import numpy as np
import quality_data
import quality_scores
import quality_teacher
from quality_rows import Row

from gecko_jax.inference import ranking


def configs(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> tuple[Any, Any, pathlib.Path, pathlib.Path]:
    """Returns the configs of both stages and their workdirs.

    Rows that differ only in the second stage share the first.
    """
    import gecko_jax.config
    from gecko_jax.cli import flags

    work = options.output / "work"
    ready = quality_data.prepared(data, options.output, row.vocabulary_size)
    triples = [ready.triples, *([ready.classes[row.classes]] if row.classes else [])]
    stages = []
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
        config = flags.load(f"{measured.ROOT / 'configs' / stage}.py:{arg}")
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
        if stages and row.averaged:
            config.checkpoint.every_steps = _apart(steps)
            config.checkpoint.keep_every_steps = _apart(steps)
        if stages and row.mined is not None:
            config.data.files = (str(mined_path(stages[-1][1], row.mined)),)
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 4)
        if config.loss.matching_weight:
            config.data.teacher = str(ready.teacher)
            config.data.teacher_dim = quality_teacher.DIM
        if stages:
            config.init.checkpoint = str(stages[-1][1])
        digest = hashlib.sha256(gecko_jax.config.to_json(config).encode()).hexdigest()[
            :12
        ]
        stages.append((config, work / f"{stage}-{digest}"))
    return stages[0][0], stages[1][0], stages[0][1], stages[1][1]


def _apart(steps: int) -> int:
    """Returns the number of steps between the checkpoints that a row averages."""
    return max(steps // 10, 1)


def mined_path(workdir: pathlib.Path, skip_top: int) -> pathlib.Path:
    """Returns the path of the triples whose hard negatives a run's model mines."""
    return workdir / f"triples-{skip_top}.jsonl.gz"


def bm25(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores BM25."""
    del row, seed, options

    def rank(dataset: Any) -> dict[str, Any]:
        return {
            "all": ranking.bm25_rankings(
                dataset.queries,
                quality_scores.passages(dataset),
                dataset.passage_ids,
                11,
            )
        }

    return {"scores": quality_scores.score(data, lambda dataset, task: rank(dataset))}


def tfidf(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores TF-IDF vectors by cosine, with the IDF weights of each corpus."""
    del row, seed, options
    from sklearn.feature_extraction import text

    def rank(dataset: Any, task: str) -> dict[str, Any]:
        weigh = text.TfidfVectorizer(sublinear_tf=True)
        corpus = weigh.fit_transform(quality_scores.passages(dataset))
        similarity = (weigh.transform(dataset.queries) @ corpus.T).toarray()
        return {"all": quality_scores.rankings(dataset, similarity)}

    return {"scores": quality_scores.score(data, rank)}


def pretrained(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores the pretrained model, on the test split only."""
    del row, seed
    data = dataclasses.replace(data, evals={"test": data.evals["test"]})

    def rank(dataset: Any, task: str) -> dict[str, Any]:
        queries, corpus = (
            np.concatenate(list(quality_teacher.encode(options.pretrained, *texts)))
            for texts in ([dataset.queries], [dataset.texts, dataset.titles])
        )
        return {"all": quality_scores.rankings(dataset, queries @ corpus.T)}

    return {"scores": quality_scores.score(data, rank)}


def gecko(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains both stages and scores all dims, half of them and a quarter."""
    from gecko_jax.evaluation import classification, judge, sets
    from gecko_jax.formats import checkpoints
    from gecko_jax.inference import embedding
    from gecko_jax.training import loop

    *stage_configs, first, second = configs(row, data, seed, options)
    seconds = 0.0
    for config, workdir in zip(stage_configs, (first, second), strict=True):
        if workdir == second and row.mined is not None:
            mine(stage_configs[0].data.files, first, row.mined)
        # Rows that differ only in the second stage share the first.
        if checkpoints.latest_step(workdir) != config.train.num_steps:
            with measured.timed(workdir):
                loop.train(config, workdir)
        seconds += measured.spent(workdir)
    model = embedding.load(str(average(second, stage_configs[-1], row.averaged)))
    dims = [stage_configs[-1].loss.mrl_dims[-1] // part for part in (4, 2, 1)]

    def rank(dataset: Any, task: str) -> dict[str, Any]:
        queries = model.encode_queries(
            dataset.queries, task=quality_scores.tasks_of(dataset, task)
        )
        corpus = model.encode_passages(dataset.texts, dataset.titles)
        return quality_scores.by_dim(dataset, queries, corpus, dims)

    facts = {
        **speed(stage_configs, seconds),
        "scores": quality_scores.score(data, rank),
    }
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
    """Writes triples whose hard negatives the model of a run mines."""
    from gecko_jax.data import mining
    from gecko_jax.fret import retrieval
    from gecko_jax.inference import embedding

    path = mined_path(workdir, skip_top)
    if not path.exists():
        model = embedding.load(str(workdir))
        build = functools.partial(retrieval.index, model)
        mining.mine_negatives(pairs, path, 3, skip_top=skip_top, build=build)


def average(workdir: pathlib.Path, config: Any, number: int) -> pathlib.Path:
    """Averages the last checkpoints of a run; with 0 checkpoints returns the run."""
    from gecko_jax.formats import averaging, checkpoints

    if not number:
        return workdir
    steps, apart = config.train.num_steps, _apart(config.train.num_steps)
    saved = checkpoints.all_steps(workdir)
    chosen = [step for step in saved if step % apart == 0 or step == steps][-number:]
    output = workdir.with_name(f"{workdir.name}-mean")
    if not output.exists():
        averaging.average([str(workdir)], output, steps=chosen)
    return output


def sbert(
    row: Row, data: quality_data.Data, seed: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Trains the same encoder on the same number of examples and scores it."""
    del row
    import sbert_training

    base, tuned, *_ = configs(Row("gecko", ""), data, seed, options)
    work = options.output / "work" / f"sbert-{data.name}-{options.steps}-{seed}"
    work.mkdir(parents=True, exist_ok=True)
    built, seconds = sbert_training.train((base, tuned), seed, work)

    def rank(dataset: Any, task: str) -> dict[str, Any]:
        queries, corpus = sbert_training.encode(
            built, dataset, quality_scores.tasks_of(dataset, task), base
        )
        return quality_scores.by_dim(dataset, queries, corpus, base.loss.mrl_dims)

    return {**speed((base, tuned), seconds), "scores": quality_scores.score(data, rank)}


def speed(stages: Sequence[Any], seconds: float) -> dict[str, float]:
    """Returns the time of training, including compilation and reading."""
    pairs = sum(config.train.num_steps * config.data.batch_size for config in stages)
    return {"train_seconds": seconds, "pairs_per_second": pairs / seconds}


# Kind of a row -> function (row, data, seed, options) that makes it and returns facts.
MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "bm25": bm25,
    "tfidf": tfidf,
    "pretrained": pretrained,
    "gecko": gecko,
    "sbert": sbert,
}
