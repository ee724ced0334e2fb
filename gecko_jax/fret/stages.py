r"""The stages: each maps the records of a shard to the records of the next stage.

    pairs       {"id": 7, "task": "docs", "query": "Honey", "positive": 12, ...}, or
    generate    {"id": 7, "task": "fact checking", "query": "Honey ...", "shots": [3],
                 "prompt": "generate@1", "raw": " fact checking\nQuery: Honey ...",
                 "usage": {...}}
    retrieve    {"id": 7, "candidates": [7, 41, ...], "scores": [11.2, ...]}
    likelihood  {"id": 7, "log_probs": [-9.1, ...], "num_tokens": 6, "usage": {...}}
    relevance   {"id": 7, "label_log_probs": [[-0.2, -1.9, ...], ...], "usage": {...}}
    fuse        {"id": 7, "positive": 41, "negative": 12, "moved": true, "ranks": ...}

The id is the number of the seed passage; or that of a line, whose positive is then the
seed (`relabelling`). A record with `dropped` holds the reason and
ends there; a reason that begins with `error_` is a failure of the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.fret import answers, fusion, prompts, records, retrieval
from gecko_jax.inference import ranking
from gecko_jax.llm import protocol
from gecko_jax.text import overlap

Record = dict[str, Any]

_FEW_SHOT, _NEGATIVE = 1, 2  # Purposes of random numbers.


class Passages:
    """The (title, text) pairs of all passages, by number."""

    def __init__(self, passages: Sequence[Mapping[str, Any]]):
        self.texts = [(record["title"], record["text"]) for record in passages]

    def __len__(self) -> int:
        return len(self.texts)

    def write(self, number: int) -> str:
        """Returns a passage as prompts show it."""
        title, body = self.texts[number]
        return f"{title}. {body}" if title else body


def row_rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Returns the random generator of a row, independent of its shard."""
    return np.random.default_rng([seed, purpose, number])


def generate(
    numbers: Sequence[int],
    store: Passages,
    model: protocol.LanguageModel,
    prompt: prompts.Prompt,
    rules: answers.Rules,
    sampling: protocol.Sampling,
    contamination: overlap.Contamination,
    *,
    shots: int,
    seed: int,
) -> list[Record]:
    """Generates a task and a query for every seed passage: LLM(P_QG, p) -> (t, q).

    A prompt that takes a task gets one drawn uniformly for each row. A query must not
    repeat a text of `contamination`. `shots` 0 shows all examples.
    """
    rows, texts, seeds = [], [], []
    for number in numbers:
        rng = row_rng(seed, _FEW_SHOT, number)
        chosen = prompt.choose(shots, rng)
        fields = {"passage": store.write(number)}
        if prompt.kind == "generate_for_task":
            fields["task"] = str(rng.choice(prompt.tasks))
        texts.append(prompt.render(chosen, **fields))
        seeds.append(int(rng.integers(2**31)))
        rows.append({"id": number, "shots": list(chosen), "seed": seeds[-1]} | fields)
    result = []
    for row, answer in zip(rows, model.generate(texts, seeds, sampling), strict=True):
        passage, task = row.pop("passage"), row.pop("task", None)
        row |= {"prompt": f"{prompt.name}@{prompt.version}", "model": model.name}
        if isinstance(answer, protocol.Failure):
            result.append(row | _error(answer))
            continue
        row |= {"raw": answer.text, "usage": _usage(answer.usage)}
        try:
            task, query = answers.parse(
                answer.text,
                prompt,
                rules,
                task=task,
                passage=passage,
                shots=row["shots"],
                is_cut=answer.is_cut,
            )
            if contamination.holds(query):
                raise answers.Rejected("evaluation_set")
            result.append(row | {"task": task, "query": query})
        except answers.Rejected as error:
            result.append(row | {records.DROPPED: str(error)})
    return result


def retrieve(
    rows: Sequence[Record],
    retriever: ranking.Retriever,
    num_candidates: int,
    *,
    max_seed_rank: int = 0,
    min_seed_cosine: float = -1.0,
    scores_all: bool = False,
) -> list[Record]:
    """Finds the candidates of every query.

    The seed passage, and the negatives of a line, are always candidates, as far as
    there is room; those that are not found take the last places, without a score, or
    with one if `scores_all`. A query whose seed ranks or scores too low is dropped.
    """
    results = retriever.search(
        [row["query"] for row in rows], [row["task"] for row in rows], num_candidates
    )
    result = []
    for row, (candidates, scores) in zip(rows, results, strict=True):
        seed, seed_rank = row.get("positive", row["id"]), None
        own = list(dict.fromkeys([seed, *row.get("negatives", ())]))[:num_candidates]
        if seed in candidates:
            seed_rank = candidates.index(seed) + 1
            # Rounding makes the file independent of the last bits.
            scores = [round(score, 6) for score in scores]
        others = [n for n in candidates if n not in own][: num_candidates - len(own)]
        scored = dict(zip(candidates, scores, strict=True))
        scored = {n: score for n, score in scored.items() if n in own or n in others}
        missing = [number for number in own if number not in scored]
        if missing and scores_all:
            # `settings.check` refuses the settings that need this with BM25.
            assert isinstance(retriever, retrieval.GeckoRetriever)
            similarities = retriever.similarities(row["query"], row["task"], missing)
            rounded = [round(similarity, 6) for similarity in similarities]
            scored |= dict(zip(missing, rounded, strict=True))
        else:
            scored |= dict.fromkeys(missing)
        record = {"id": row["id"], "candidates": list(scored)}
        record |= {"scores": list(scored.values()), "seed_rank": seed_rank}
        record |= {"seed": seed} if "positive" in row else {}
        if len(scored) < 2:
            record[records.DROPPED] = "no_candidates"
        elif max_seed_rank and (seed_rank or len(scored) + 1) > max_seed_rank:
            record[records.DROPPED] = "low_rank"
        elif min_seed_cosine > -1 and scored[seed] < min_seed_cosine:
            record[records.DROPPED] = "low_cosine"
        result.append(record)
    return result


def seed_of(row: Record) -> int:
    """Returns the seed passage of a record of `retrieve`."""
    return row.get("seed", row["id"])


def likelihood(
    rows: Sequence[Record],
    queries: Mapping[int, Record],
    store: Passages,
    model: protocol.LanguageModel,
    prompt: prompts.Prompt,
    generic_passage: str,
    then: prompts.Prompt | None = None,
) -> list[Record]:
    """Scores every candidate by QL(q, p) = log LLM(q | p, P_QL).

    A generic passage, "" for none, is scored like a candidate: how likely is the query
    given any text? `then` is the prompt of `relevance` if it begins with the texts that
    are read here.
    """
    shots = range(len(prompt.examples))
    texts, continuations = [], []
    for row in rows:
        query = f" {prompt.neutralize(queries[row['id']]['query'])}"
        shown = [store.write(number) for number in row["candidates"]]
        for passage in shown + [generic_passage] * bool(generic_passage):
            texts.append(prompt.render(shots, passage=passage))
            continuations.append(query)
    questions = _questions(rows, queries, store, then) if then else []
    labels = list(then.labels) if then else []
    scored = iter(model.score(texts, continuations, questions, labels))
    result = []
    for row in rows:
        scores = [next(scored) for _ in row["candidates"]]
        record: Record = {"id": row["id"]}
        record["log_probs"] = [_number(score, "log_prob") for score in scores]
        if generic_passage:
            scores.append(next(scored))
            record["generic_log_prob"] = _number(scores[-1], "log_prob")
        record["num_tokens"] = _number(scores[0], "num_tokens")
        result.append(record | _total(scores))
    return result


def relevance(
    rows: Sequence[Record],
    queries: Mapping[int, Record],
    store: Passages,
    model: protocol.LanguageModel,
    prompt: prompts.Prompt,
) -> list[Record]:
    """Scores every candidate by RC(q, p) = log LLM(label | q, p, P_RC), each label."""
    texts = _questions(rows, queries, store, prompt)
    scored = iter(model.label_log_probs(texts, list(prompt.labels)))
    result = []
    for row in rows:
        scores = [next(scored) for _ in row["candidates"]]
        record: Record = {"id": row["id"]}
        record["label_log_probs"] = [_number(score, "log_probs") for score in scores]
        result.append(record | _total(scores))
    return result


def _questions(
    rows: Sequence[Record],
    queries: Mapping[int, Record],
    store: Passages,
    prompt: prompts.Prompt,
) -> list[str]:
    shots = range(len(prompt.examples))
    shown = ((store.write(n), queries[r["id"]]) for r in rows for n in r["candidates"])
    return [prompt.render(shots, passage=p, query=q["query"]) for p, q in shown]


def fuse(
    rows: Sequence[Record],
    queries: Mapping[int, Record],
    likelihoods: Mapping[int, Record],
    relevances: Mapping[int, Record],
    grades: Sequence[int],
    settings: fusion.Settings,
    *,
    seed: int,
) -> list[Record]:
    """Ranks the candidates by both judgements and chooses the triple.

    A judgement without a weight is not used. The grades are those of the labels, in the
    order of `label_log_probs`.
    """

    def of(name: str) -> list[int]:
        """Returns the positions of the passages that a line names."""
        return [places[n] for n in queries[number].get(name, ()) if n in places]

    result = []
    for row in rows:
        number, candidates = row["id"], row["candidates"]
        places = {candidate: place for place, candidate in enumerate(candidates)}
        scores: dict[str, Any] = {"likelihood": None, "relevance": None}
        if settings.likelihood_weight and number in likelihoods:
            scores["likelihood"] = of_candidates(likelihoods[number]["log_probs"], row)
        elif settings.likelihood_weight:
            result.append({"id": number, records.DROPPED: "no_likelihood"})
            continue
        if settings.relevance_weight and number in relevances:
            record, kind = relevances[number], settings.relevance
            scores["relevance"] = relevance_scores(record, row, grades, kind)
        elif settings.relevance_weight:
            result.append({"id": number, records.DROPPED: "no_relevance"})
            continue
        ranks = {n: None if v is None else fusion.ranks(v) for n, v in scores.items()}
        fused = fusion.fuse(ranks["likelihood"], ranks["relevance"], settings)
        seed_position = position(row, seed_of(row))
        choice = fusion.choose(
            fused,
            seed_position,
            settings,
            row_rng(seed, _NEGATIVE, number),
            answers=of("answers"),
            given=of("negatives"),
            similarities=of_candidates(row["scores"], row),
        )
        negatives = [candidates[place] for place in choice.negatives]
        record = {
            "id": number,
            "positive": candidates[choice.positive],
            "negative": negatives[0] if negatives else None,
            "moved": choice.positive != seed_position,
            "ranks": {n: None if v is None else v.tolist() for n, v in ranks.items()},
            "fused": [round(float(value), 6) for value in fused],
        }
        if len(negatives) > 1:
            record["negatives"] = negatives
        if choice.others:
            record["positives"] = [candidates[p] for p in choice.others]
        if choice.false_negatives:
            record["false_negatives"] = [candidates[p] for p in choice.false_negatives]
        generic = likelihoods.get(number, {}).get("generic_log_prob")
        if generic is not None:
            information = likelihoods[number]["log_probs"][choice.positive] - generic
            record["information"] = round(information, 4)
            if information < settings.min_information:
                record[records.DROPPED] = "low_information"
        result.append(record)
    return result


def kept(rows: Sequence[Record]) -> list[Record]:
    """Returns the records that were not dropped."""
    return [row for row in rows if records.DROPPED not in row]


class _ById(dict[int, Record]):
    """Records by id; a missing id raises a `ValueError`."""

    def __missing__(self, number: int) -> Record:
        raise _mismatch(number, "one stage has no record of it")


def by_id(rows: Sequence[Record]) -> dict[int, Record]:
    """Returns the records that were not dropped, by id."""
    return _ById((row["id"], row) for row in kept(rows))


def of_candidates(values: Sequence[Any], row: Record) -> Sequence[Any]:
    """Returns the values if there is one for each candidate of the row, or raises."""
    if len(values) != len(row["candidates"]):
        problem = f"{len(values)} numbers for {len(row['candidates'])} candidates"
        raise _mismatch(row["id"], problem)
    return values


def position(row: Record, number: int) -> int:
    """Returns the position of a passage among a row's candidates, or raises."""
    if number not in row["candidates"]:
        raise _mismatch(row["id"], f"passage {number} is not among its candidates")
    return row["candidates"].index(number)


def relevance_scores(
    record: Record, row: Record, grades: Sequence[int], kind: str
) -> list[float]:
    """Returns one score per candidate of a row; see `fusion.relevance_score`."""
    listed = of_candidates(record["label_log_probs"], row)
    if any(len(log_probs) != len(grades) for log_probs in listed):
        raise _mismatch(row["id"], f"not every candidate has {len(grades)} labels")
    return [fusion.relevance_score(values, grades, kind) for values in listed]


def _mismatch(number: int, problem: str) -> ValueError:
    return ValueError(
        f"seed passage {number}: the records of two stages do not match ({problem}); a "
        "shard was changed: restore it, or remove its folder and those of the stages "
        "after it, and the same command makes them again"
    )


def is_error(record: Mapping[str, Any]) -> bool:
    """Whether a record was dropped because the model did not answer."""
    return str(record.get(records.DROPPED, "")).startswith("error_")


def _number(answer: Any, name: str) -> Any:
    """Returns a rounded number of an answer, or None for a failure."""
    if isinstance(answer, protocol.Failure):
        return None
    value = getattr(answer, name)
    is_tuple = isinstance(value, tuple)
    return [round(entry, 6) for entry in value] if is_tuple else round(value, 6)


def _total(row_answers: Sequence[Any]) -> Record:
    """Returns the tokens of a row, and its first failure if there is one."""
    failures = [a for a in row_answers if isinstance(a, protocol.Failure)]
    usages = [a.usage for a in row_answers if not isinstance(a, protocol.Failure)]
    usage = {"usage": _usage(sum(usages, protocol.Usage(0, 0, 0)))}
    return usage | _error(failures[0]) if failures else usage


def _error(failure: protocol.Failure) -> Record:
    detail = {"detail": failure.detail[:300]} if failure.detail else {}
    return {records.DROPPED: f"error_{failure.reason}", **detail}


def _usage(usage: protocol.Usage) -> dict[str, int]:
    names = ("requests", "prompt_tokens", "completion_tokens")
    return {name: getattr(usage, name) for name in names}
