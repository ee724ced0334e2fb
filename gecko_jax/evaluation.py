"""Evaluation: how well a model retrieves and compares, beside the lines to beat.

    results = evaluation.evaluate(embedding.load("runs/finetune"), ["quickstart"])
    print(evaluation.format_table(results))

Retrieval is judged by nDCG@10, recall@100 and MRR@10, similarity by Spearman's
correlation of the cosines. The texts are encoded once, and every dim is judged on its
prefix of the vectors. As in BEIR, a passage with the id of the query is passed over.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Float

from gecko_jax import (
    checkpoints,
    embedding,
    evaluation_sets,
    files,
    index,
    model,
    plots,
    quantization,
    ranking,
    vocabulary,
)

# Judged to this rank by recall, the deepest of the metrics.
DEPTH = 100
SIMILARITY_TASK = "semantic similarity"
ALL = "all"

# Systems beside the model, and how tables call them.
MODEL, BM25 = "model", "BM25"
UNTRAINED = "untrained model"
BAG, IDF_BAG = "random bag of words", "random bag, IDF weights"

_METRICS: Mapping[str, tuple[str, Callable[..., float]]] = {
    "ndcg_at_10": ("nDCG@10", functools.partial(ranking.ndcg_at_k, k=10)),
    "recall_at_100": ("recall@100", functools.partial(ranking.recall_at_k, k=DEPTH)),
    "mrr_at_10": ("MRR@10", functools.partial(ranking.mrr_at_k, k=10)),
}
_SPEARMAN = "spearman"


@dataclasses.dataclass(frozen=True)
class Row:
    """Scores of one system at one dim on one task of one set.

    Attributes:
        set: Name of the evaluation set.
        system: `MODEL`, `BM25`, ...
        dim: Entries of the vectors; None for BM25.
        task: The queries' task, `ALL` for all of them.
        count: Queries, or pairs of sentences.
        metrics: ndcg_at_10, recall_at_100 and mrr_at_10, or spearman.
    """

    set: str
    system: str
    dim: int | None
    task: str
    count: int
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores, and what must be known to reproduce them."""

    rows: tuple[Row, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that JSON can hold."""
        return {"about": self.about, "rows": [dataclasses.asdict(r) for r in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Results":
        """Inverse of `to_dict`."""
        return cls(tuple(Row(**row) for row in values["rows"]), dict(values["about"]))

    def check_model(self, model_files: checkpoints.ModelFiles) -> "Results":
        """Returns itself; raises ValueError if the scores are of another model."""
        if self.about.get("revision") != model_files.revision:
            raise ValueError(
                f"the results are of revision {self.about.get('revision')}, the model "
                f"is {model_files.revision}: evaluate this model, or leave them out"
            )
        return self

    def find(self, system: str, dim: int | None = None, task: str = ALL) -> list[Row]:
        """Returns the rows of a system, one per set."""
        return [
            row
            for row in self.rows
            if (row.system, row.task) == (system, task) and dim in (None, row.dim)
        ]


def evaluate(
    gecko: embedding.Gecko,
    paths: Sequence[str | os.PathLike],
    *,
    dims: Sequence[int] | None = None,
    task: str | None = None,
    precisions: Sequence[str] = (quantization.FLOAT32,),
    baselines: bool = True,
    untrained: bool = False,
) -> Results:
    """Judges a model on retrieval folders and similarity files.

    Args:
        gecko: The model.
        paths: See `evaluation_sets.load`.
        dims: Some of the model's dims; None is all.
        task: Of queries that name no task the model knows; None is "search result",
            and "semantic similarity" for similarity files.
        precisions: How passages are stored (`quantization`); a row each. Queries are
            float32 always, and of a pair the second sentence counts as the passage.
        baselines: Adds BM25, a random bag of words and one with IDF weights.
        untrained: Adds the same architecture with fresh parameters.

    Raises:
        ValueError: A dim is not trained, or a set has a fault (named).
    """
    dims = sorted({gecko.check_dim(dim) for dim in dims or gecko.dims})
    for precision in precisions:
        quantization.check_precision(precision)
    # All is read first, so that a fault in the last set does not waste the others.
    sets = [found for path in paths for found in evaluation_sets.load(path)]
    fresh = _untrained(gecko) if untrained else None
    rows: list[Row] = []
    for found in sets:
        rows += _judge(gecko, found, dims, task, MODEL, found.name, precisions)
        if fresh:
            rows += _judge(
                fresh, found, dims, task, UNTRAINED, f"{found.name}, untrained"
            )
        if baselines and isinstance(found, evaluation_sets.RetrievalSet):
            rows += _judge_bm25(found)
            for idf in (False, True):
                rows += bag_of_words_baseline(
                    gecko.vocabulary, found, dim=dims[-1], idf=idf
                )
    return Results(tuple(rows), _describe(gecko, dims, task, sets))


def _judge(
    gecko: embedding.Gecko,
    found: evaluation_sets.EvaluationSet,
    dims: Sequence[int],
    task: str | None,
    system: str,
    description: str,
    precisions: Sequence[str] = (quantization.FLOAT32,),
) -> list[Row]:
    kinds = [(dim, precision) for dim in dims for precision in precisions]
    if isinstance(found, evaluation_sets.SimilaritySet):
        first, second = (
            gecko.encode_queries(list(side), task or SIMILARITY_TASK)
            for side in (found.sentences1, found.sentences2)
        )
        return [
            _judge_similarity(found, system, first, second, dim, precision)
            for dim, precision in kinds
        ]
    known = gecko.task_descriptions
    fallback = task or embedding.DEFAULT_TASK
    tasks = np.array([t if t in known else fallback for t in found.tasks])
    queries = np.empty((len(tasks), gecko.dims[-1]), np.float32)
    # The passages of a symmetric task are written with that task.
    searches: dict[str | None, list[int]] = {}
    for name in np.unique(tasks).tolist():
        members = np.flatnonzero(tasks == name)
        queries[members] = gecko.encode_queries(
            [found.queries[q] for q in members], name
        )
        symmetric = gecko.files.text_format.is_symmetric(name)
        searches.setdefault(name if symmetric else None, []).extend(members.tolist())
    rankings: dict[tuple[int, str], list[list[str]]] = {
        kind: [[]] * len(tasks) for kind in kinds
    }
    for passage_task, members in searches.items():
        passages = gecko.encode(
            found.texts,
            side="passage",
            task=passage_task,
            titles=found.titles,
            description=f"Encoding {description}",
        )
        for dim, precision in kinds:
            codes = quantization.encode(embedding.cut(passages, dim), precision)
            corpus = index.Index(codes, found.passage_ids)
            _, ids = corpus.search(embedding.cut(queries[members], dim), DEPTH + 1)
            for query, ranked in zip(members, ids, strict=True):
                rankings[dim, precision][query] = ranked
    return [
        row
        for dim, precision in kinds
        for row in _score(
            found, _name(system, precision), dim, rankings[dim, precision]
        )
    ]


def _name(system: str, precision: str) -> str:
    return system if precision == quantization.FLOAT32 else f"{system}, {precision}"


def _judge_similarity(
    found: evaluation_sets.SimilaritySet,
    system: str,
    first: Float[np.ndarray, "N D"],
    second: Float[np.ndarray, "N D"],
    dim: int,
    precision: str,
) -> Row:
    codes = quantization.encode(embedding.cut(second, dim), precision)
    second = embedding.cut(codes.decode(), dim)
    cosines = np.sum(embedding.cut(first, dim) * second, axis=1)
    correlation = ranking.spearman(cosines.astype(np.float64), found.scores)
    return Row(
        found.name,
        _name(system, precision),
        dim,
        ALL,
        len(cosines),
        {_SPEARMAN: correlation},
    )


def _judge_bm25(found: evaluation_sets.RetrievalSet) -> list[Row]:
    passages = [
        f"{title} {text}".strip()
        for title, text in zip(found.titles, found.texts, strict=True)
    ]
    ranked = ranking.bm25_rankings(
        found.queries, passages, found.passage_ids, DEPTH + 1
    )
    return _score(found, BM25, None, ranked)


def bag_of_words_baseline(
    vocab: vocabulary.Vocabulary,
    found: evaluation_sets.RetrievalSet,
    *,
    dim: int,
    idf: bool,
    seed: int = 0,
) -> list[Row]:
    """Judges a model that learned nothing: one random vector per token, summed.

    Args:
        vocab: Cuts the texts into tokens.
        found: The set.
        dim: Entries of the vectors.
        idf: Weighs each token by its inverse document frequency in the corpus.
        seed: Of the random vectors.
    """
    table = np.random.default_rng(seed).standard_normal((vocab.size, dim), np.float32)
    passages = [
        f"{title} {text}" if title else text
        for title, text in zip(found.titles, found.texts, strict=True)
    ]
    corpus_tokens = [np.array(ids[:-1], np.int64) for ids in vocab.encode(passages)]
    query_tokens = [np.array(ids[:-1], np.int64) for ids in vocab.encode(found.queries)]
    if idf:
        frequency = np.zeros(vocab.size)
        for tokens in corpus_tokens:
            frequency[np.unique(tokens)] += 1
        weights = np.log((len(passages) + 1) / (frequency + 1))
        table *= weights[:, None].astype(np.float32)
    corpus, queries = (
        embedding.cut(np.stack([table[tokens].sum(axis=0) for tokens in side]), dim)
        for side in (corpus_tokens, query_tokens)
    )
    _, ranked = index.Index(corpus, found.passage_ids).search(queries, DEPTH + 1)
    return _score(found, IDF_BAG if idf else BAG, dim, ranked)


def _score(
    found: evaluation_sets.RetrievalSet,
    system: str,
    dim: int | None,
    rankings: Sequence[Sequence[str]],
) -> list[Row]:
    """Returns a row for all queries, and one per task where there are several."""
    scores = np.empty((len(_METRICS), len(rankings)))
    for q, (query, ranked) in enumerate(zip(found.query_ids, rankings, strict=True)):
        ranked = [passage for passage in ranked if passage != query]
        for m, (_, metric) in enumerate(_METRICS.values()):
            scores[m, q] = metric(ranked, found.relevance[query])
    tasks = np.array(found.tasks)
    names = sorted(set(found.tasks))
    groups = [(ALL, np.ones(len(tasks), bool))]
    if len(names) > 1:
        groups += [(name or "no task", tasks == name) for name in names]
    return [
        Row(
            set=found.name,
            system=system,
            dim=dim,
            task=name,
            count=int(members.sum()),
            metrics={
                metric: float(scores[m, members].mean())
                for m, metric in enumerate(_METRICS)
            },
        )
        for name, members in groups
    ]


def _untrained(gecko: embedding.Gecko) -> embedding.Gecko:
    config = gecko.files.encoder_config
    init = jax.jit(functools.partial(model.init_params, config))
    return embedding.Gecko(
        dataclasses.replace(
            gecko.files, params=init(jax.random.key(0)), revision="untrained"
        )
    )


def _describe(
    gecko: embedding.Gecko,
    dims: Sequence[int],
    task: str | None,
    sets: Sequence[evaluation_sets.EvaluationSet],
) -> dict[str, Any]:
    model_files = gecko.files
    return {
        "revision": gecko.revision,
        "step": model_files.step,
        "dims": list(dims),
        "task": task,
        "dtype": model_files.encoder_config.dtype,
        "query_length": model_files.query_length,
        "passage_length": model_files.passage_length,
        "text_format": model_files.text_format.to_dict(),
        "backend": jax.default_backend(),
        "versions": checkpoints.versions(),
        "num_passages": {
            found.name: len(found.texts)
            for found in sets
            if isinstance(found, evaluation_sets.RetrievalSet)
        },
    }


def build_callback(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> Callable[[Any, int], dict[str, float]] | None:
    """Returns the evaluation that `train.train` calls, or None if config has none.

    It reads the workdir's model files at its first call, when training has written
    them. With `evaluation.max_queries`, the corpus is cut to ten times as many
    passages (`RetrievalSet.limit`).
    """
    if not config.evaluation.folder:
        return None
    max_queries = config.evaluation.max_queries
    # A missing or broken set should stop a run at its start.
    sets = [
        found.limit(max_queries, 10 * max_queries)
        for found in evaluation_sets.load(config.evaluation.folder)
    ]

    def evaluate_now(params: Any, step: int) -> dict[str, float]:
        model_files = checkpoints.load_settings(pathlib.Path(workdir))
        gecko = embedding.Gecko(
            dataclasses.replace(model_files, params=params, step=step)
        )
        return judge_quickly(gecko, sets)

    return evaluate_now


def judge_quickly(
    gecko: embedding.Gecko, sets: Sequence[evaluation_sets.EvaluationSet]
) -> dict[str, float]:
    """Returns {"ndcg_at_10/256": ..., "spearman/256": ...}, means over the sets."""
    values: dict[str, list[float]] = {}
    for found in sets:
        rows = _judge(gecko, found, gecko.dims, None, MODEL, found.name)
        for row in rows:
            if row.task == ALL:
                for name, value in row.metrics.items():
                    values.setdefault(f"{name}/{row.dim}", []).append(value)
    return {name: float(np.mean(found)) for name, found in values.items()}


def format_table(results: Results, width: int = 100) -> str:
    """Returns the scores as tables, one per set, and one of means over several."""
    from rich import console

    buffer = io.StringIO()
    screen = console.Console(file=buffer, width=width)
    for name in dict.fromkeys(row.set for row in results.rows):
        rows = [row for row in results.rows if row.set == name]
        screen.print(_build_table(results, name, rows))
    means = _means(results)
    if means:
        screen.print(_build_table(results, means[0].set, means))
    lines = buffer.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip()


def _build_table(results: Results, name: str, rows: Sequence[Row]) -> Any:
    from rich import box, table

    overall = [row for row in rows if row.task == ALL]
    tasks = list(dict.fromkeys(row.task for row in rows if row.task != ALL))
    metrics = [metric for metric in _METRICS if metric in overall[0].metrics]
    unit = "queries" if metrics else "pairs"
    metrics = metrics or [_SPEARMAN]
    has_codes = any(_precision(row) != quantization.FLOAT32 for row in overall)
    num_passages = results.about.get("num_passages", {}).get(name)
    title = f"{name}: {overall[0].count:,} {unit}"
    title += f", {num_passages:,} passages" if num_passages else ""
    built = table.Table(
        title=title,
        title_justify="left",
        caption="under a task: nDCG@10 of its queries" if tasks else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    built.add_column("system", no_wrap=True)
    built.add_column("dims", justify="right")
    if has_codes:
        built.add_column("bytes", justify="right")
    for metric in metrics:
        label = _METRICS[metric][0] if metric in _METRICS else "Spearman"
        built.add_column(label, justify="right", no_wrap=True)
    for task in tasks:
        built.add_column(task, justify="right", style="dim")
    systems = dict.fromkeys(row.system for row in overall)
    for system in systems:
        for row in overall:
            if row.system != system:
                continue
            by_task = {
                other.task: other.metrics["ndcg_at_10"]
                for other in rows
                if (other.system, other.dim) == (row.system, row.dim)
                and other.task != ALL
            }
            built.add_row(
                system,
                str(row.dim or ""),
                *([_bytes(row)] if has_codes else []),
                *(f"{row.metrics[metric]:.3f}" for metric in metrics),
                *(f"{by_task[task]:.3f}" for task in tasks),
                style="bold" if system == MODEL else None,
            )
    return built


def _precision(row: Row) -> str:
    """The precision that `_name` wrote into the system's name."""
    last = row.system.rpartition(", ")[2]
    return last if last in quantization.PRECISIONS else quantization.FLOAT32


def _bytes(row: Row) -> str:
    """Memory of a passage; BM25 has no vectors."""
    if row.dim is None:
        return ""
    return f"{quantization.bytes_per_vector(_precision(row), row.dim):,}"


def _means(results: Results) -> list[Row]:
    """Returns means over the retrieval sets, when there are several."""
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in results.rows:
        if row.task == ALL and _SPEARMAN not in row.metrics:
            groups.setdefault((row.system, row.dim), []).append(row)
    count = max(map(len, groups.values()), default=0)
    if count < 2:
        return []
    return [
        Row(
            set=f"mean of {count} sets",
            system=system,
            dim=dim,
            task=ALL,
            count=sum(row.count for row in rows),
            metrics={
                name: float(np.mean([row.metrics[name] for row in rows]))
                for name in _METRICS
            },
        )
        for (system, dim), rows in groups.items()
    ]


def save(results: Results, folder: str | os.PathLike) -> list[pathlib.Path]:
    """Writes results.json, table.txt and quality.png; returns their paths."""
    folder = pathlib.Path(folder)
    paths = [folder / name for name in ("results.json", "table.txt", "quality.png")]
    with files.write_file(paths[0]) as temporary:
        temporary.write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    with files.write_file(paths[1]) as temporary:
        temporary.write_text(format_table(results) + "\n")
    with files.write_file(paths[2]) as temporary:
        # The picture compares systems; codes of one are in the table.
        exact = [r for r in results.rows if _precision(r) == quantization.FLOAT32]
        shown = dataclasses.replace(results, rows=tuple(exact) or results.rows)
        plots.plot_quality(shown.to_dict(), temporary)
    return paths


def read(path: str | os.PathLike) -> Results:
    """Reads a results.json that `save` wrote.

    Raises:
        ValueError: The file is missing or is no such results.
    """
    try:
        return Results.from_dict(json.loads(pathlib.Path(path).read_text()))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; `gecko evaluate --output=DIR` writes results.json"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not the results.json of `gecko evaluate` ({error}); give that "
            "file, or evaluate again"
        ) from error
