r"""The stages: each turns the records of a shard into the records of the next.

    generate    {"id": 7, "task": "fact checking", "query": "Honey ...", "shots": [3],
                 "prompt": "generate@1", "raw": " fact checking\nQuery: Honey ...",
                 "usage": {...}}
    retrieve    {"id": 7, "candidates": [7, 41, ...], "scores": [11.2, ...]}
    likelihood  {"id": 7, "log_probs": [-9.1, ...], "num_tokens": 6, "usage": {...}}
    relevance   {"id": 7, "label_log_probs": [[-0.2, -1.9, ...], ...], "usage": {...}}
    fuse        {"id": 7, "positive": 41, "negative": 12, "moved": true, "ranks": ...}

The id is the seed passage's. A record with `dropped` holds the reason and goes no
further; reasons that begin with `error_` are the server's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gecko_jax.fret import answers, fusion, prompts, records
from gecko_jax.inference import ranking
from gecko_jax.llm import protocol
from gecko_jax.text import overlap

Record = dict[str, Any]


class Passages:
    """(title, text) of every passage, by its number."""

    def __init__(self, found: Sequence[Mapping[str, Any]]):
        """Takes the records of the passages stage, in order."""
        self.texts = [(record["title"], record["text"]) for record in found]

    def __len__(self) -> int:
        return len(self.texts)

    def write(self, number: int) -> str:
        """Returns a passage as prompts show it."""
        title, body = self.texts[number]
        return f"{title}. {body}" if title else body


def row_rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Returns the randomness of one row, whatever its shard."""
    return np.random.default_rng([seed, purpose, number])


_FEW_SHOT, _NEGATIVE = 1, 2


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
    """Asks for a task and a query of every seed passage: LLM(P_QG, p) -> (t, q).

    Args:
        numbers: The seed passages.
        store: All passages.
        model: Writes.
        prompt: P_QG; with a task given, one is drawn evenly for each row.
        rules: What a query must be.
        sampling: How text is drawn.
        contamination: What a query must not be.
        shots: Few-shot examples of a row; 0 for all.
        seed: Of the run.
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
            result.append(row | {records.DROPPED: error.reason})
    return result


def retrieve(
    rows: Sequence[Record], retriever: ranking.Retriever, num_candidates: int
) -> list[Record]:
    """Finds the candidates of every query; the seed passage is always one of them."""
    found = retriever.search(
        [row["query"] for row in rows], [row["task"] for row in rows], num_candidates
    )
    result = []
    for row, (positions, scores) in zip(rows, found, strict=True):
        # Six decimals: what is written does not depend on the last bit.
        rounded = [round(score, 6) for score in scores]
        record = {"id": row["id"], "candidates": positions, "scores": rounded}
        record["seed_rank"] = None
        if row["id"] in positions:
            record["seed_rank"] = positions.index(row["id"]) + 1
        else:  # It takes the last place, with a score that nothing gave it.
            record["candidates"] = [*positions[: num_candidates - 1], row["id"]]
            record["scores"] = [*scores[: num_candidates - 1], None]
        if len(record["candidates"]) < 2:
            record[records.DROPPED] = "no_candidates"
        result.append(record)
    return result


def likelihood(
    rows: Sequence[Record],
    queries: Mapping[int, Record],
    store: Passages,
    model: protocol.LanguageModel,
    prompt: prompts.Prompt,
    generic_passage: str,
) -> list[Record]:
    """Scores every candidate by QL(q, p) = log LLM(q | p, P_QL).

    Args:
        rows: Of retrieve.
        queries: Of generate, by id.
        store: All passages.
        model: Scores.
        prompt: P_QL.
        generic_passage: Scored as one more candidate, for what the query says beyond
            any text; "" for none.
    """
    shots = range(len(prompt.examples))
    texts, continuations = [], []
    for row in rows:
        query = f" {prompt.neutralize(queries[row['id']]['query'])}"
        shown = [store.write(number) for number in row["candidates"]]
        for passage in shown + [generic_passage] * bool(generic_passage):
            texts.append(prompt.render(shots, passage=passage))
            continuations.append(query)
    found = iter(model.score(texts, continuations))
    result = []
    for row in rows:
        scores = [next(found) for _ in row["candidates"]]
        generic = next(found) if generic_passage else None
        asked = [*scores, generic] if generic else scores
        record: Record = {"id": row["id"]}
        record["log_probs"] = [_number(score, "log_prob") for score in scores]
        if generic is not None:
            record["generic_log_prob"] = _number(generic, "log_prob")
        record["num_tokens"] = _number(scores[0], "num_tokens")
        result.append(record | _total(asked))
    return result


def relevance(
    rows: Sequence[Record],
    queries: Mapping[int, Record],
    store: Passages,
    model: protocol.LanguageModel,
    prompt: prompts.Prompt,
) -> list[Record]:
    """Scores every candidate by RC(q, p) = log LLM(label | q, p, P_RC), each label."""
    shots = range(len(prompt.examples))
    texts = [
        prompt.render(
            shots, passage=store.write(number), query=queries[row["id"]]["query"]
        )
        for row in rows
        for number in row["candidates"]
    ]
    found = iter(model.label_log_probs(texts, list(prompt.labels)))
    result = []
    for row in rows:
        scores = [next(found) for _ in row["candidates"]]
        record: Record = {"id": row["id"]}
        record["label_log_probs"] = [_number(score, "log_probs") for score in scores]
        result.append(record | _total(scores))
    return result


def fuse(
    rows: Sequence[Record],
    likelihoods: Mapping[int, Record],
    relevances: Mapping[int, Record],
    grades: Sequence[int],
    settings: fusion.Settings,
    *,
    seed: int,
) -> list[Record]:
    """Ranks the candidates by both judgements and chooses the triple.

    Args:
        rows: Of retrieve.
        likelihoods: Kept records of likelihood by id; empty if it has no weight.
        relevances: Kept records of relevance by id; empty if it has no weight.
        grades: Of the labels, in the order of `label_log_probs`.
        settings: How to fuse and choose.
        seed: Of the run.
    """
    result = []
    for row in rows:
        number, candidates = row["id"], row["candidates"]
        ranks: dict[str, Any] = {"likelihood": None, "relevance": None}
        if settings.likelihood_weight:
            if number not in likelihoods:
                result.append({"id": number, records.DROPPED: "no_likelihood"})
                continue
            ranks["likelihood"] = fusion.ranks(
                of_candidates(likelihoods[number]["log_probs"], row)
            )
        if settings.relevance_weight:
            if number not in relevances:
                result.append({"id": number, records.DROPPED: "no_relevance"})
                continue
            ranks["relevance"] = fusion.ranks(
                relevance_scores(relevances[number], row, grades, settings.relevance)
            )
        fused = fusion.fuse(ranks["likelihood"], ranks["relevance"], settings)
        seed_position = candidates.index(number)
        positive, negative = fusion.choose(
            fused, seed_position, settings, row_rng(seed, _NEGATIVE, number)
        )
        record: Record = {
            "id": number,
            "positive": candidates[positive],
            "negative": None if negative is None else candidates[negative],
            "moved": positive != seed_position,
            "ranks": {
                name: None if found is None else found.tolist()
                for name, found in ranks.items()
            },
            "fused": [round(float(value), 6) for value in fused],
        }
        generic = likelihoods.get(number, {}).get("generic_log_prob")
        if generic is not None:
            told = likelihoods[number]["log_probs"][positive] - generic
            record["information"] = round(told, 4)
            if told < settings.min_information:
                record[records.DROPPED] = "low_information"
        result.append(record)
    return result


def kept(found: Sequence[Record]) -> list[Record]:
    """Returns the records that were not dropped."""
    return [record for record in found if records.DROPPED not in record]


class _ById(dict[int, Record]):
    """Records by their id, which names one that is missing."""

    def __missing__(self, number: int) -> Record:
        raise _strangers(number, "one stage has no record of it")


def by_id(found: Sequence[Record]) -> dict[int, Record]:
    """Returns the records that were not dropped, by their id."""
    return _ById((record["id"], record) for record in kept(found))


def of_candidates(values: Sequence[Any], row: Record) -> Sequence[Any]:
    """Returns values of which each candidate of a row has one.

    Raises:
        ValueError: There are more or fewer.
    """
    if len(values) != len(row["candidates"]):
        told = f"{len(values)} numbers for {len(row['candidates'])} candidates"
        raise _strangers(row["id"], told)
    return values


def position(row: Record, number: int) -> int:
    """Returns the place of a passage among a row's candidates.

    Raises:
        ValueError: It is none of them.
    """
    if number not in row["candidates"]:
        raise _strangers(row["id"], f"passage {number} is not among its candidates")
    return row["candidates"].index(number)


def relevance_scores(
    record: Record, row: Record, grades: Sequence[int], kind: str
) -> list[float]:
    """Returns one number for each candidate of a row; see `fusion.relevance_score`.

    Args:
        record: Of relevance.
        row: Of retrieve.
        grades: Grades of the labels.
        kind: "log_prob" or "log_odds".
    """
    listed = of_candidates(record["label_log_probs"], row)
    if any(len(log_probs) != len(grades) for log_probs in listed):
        raise _strangers(row["id"], f"not every candidate has {len(grades)} labels")
    return [fusion.relevance_score(found, grades, kind) for found in listed]


def _strangers(number: int, why: str) -> ValueError:
    return ValueError(
        f"seed passage {number}: the records of two stages do not belong together "
        f"({why}); a shard was changed: restore it, or remove its folder and those of "
        "the stages after it, and the same command makes them anew"
    )


def is_error(record: Mapping[str, Any]) -> bool:
    """Whether a record was dropped because the model did not answer."""
    return str(record.get(records.DROPPED, "")).startswith("error_")


def _number(answer: Any, name: str) -> Any:
    """Returns a rounded number of an answer; None where there is none."""
    if isinstance(answer, protocol.Failure):
        return None
    value = getattr(answer, name)
    if isinstance(value, tuple):
        return [round(entry, 6) for entry in value]
    return round(value, 6)


def _total(answers_of_row: Sequence[Any]) -> Record:
    """Returns the tokens of a row, and the first failure if there is one."""
    usages = [a.usage for a in answers_of_row if not isinstance(a, protocol.Failure)]
    fields: Record = {"usage": _usage(sum(usages, protocol.Usage(0, 0, 0)))}
    failed = [a for a in answers_of_row if isinstance(a, protocol.Failure)]
    return fields | _error(failed[0]) if failed else fields


def _error(failure: protocol.Failure) -> Record:
    detail = {"detail": failure.detail[:300]} if failure.detail else {}
    return {records.DROPPED: f"error_{failure.reason}", **detail}


def _usage(usage: protocol.Usage) -> dict[str, int]:
    return {
        "requests": usage.requests,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }
