"""Measures: what a run will cost, and whether the judges can be trusted with it.

Both ask the model about the seeds that are held out of the run. `plan` sends a few
requests of each kind and multiplies; `calibrate` lets both judges rank the candidates
of queries whose answer is known, the seed, and compares them with their fusion.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from gecko_jax.fret import fusion, pipeline, runs, settings, stages
from gecko_jax.llm import protocol, request_log


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        name: Of the stage that sends it.
        requests: That the run will send.
        prompt_tokens: Of one, the mean of the sample.
        completion_tokens: Of one, the mean of the sample.
        seconds: Of one, when many are asked at once.
    """

    name: str
    requests: int
    prompt_tokens: float
    completion_tokens: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is expected to take.

    Attributes:
        passages: Seeds of the run, held-out ones left out.
        kept: Share of the sample whose query passed.
        kinds: Of requests.
        cost: Of all requests, in the currency of the prices.
        hours: If nothing else uses the server.
        sample: Requests that were sent to find out.
    """

    passages: int
    kept: float
    kinds: tuple[Kind, ...]
    cost: float
    hours: float
    sample: int


def plan(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    sample: int,
    *,
    budget: request_log.Budget | None = None,
    connect: Callable[..., protocol.LanguageModel] | None = None,
) -> Plan:
    """Prices a run by `sample` requests of each kind.

    Raises:
        ValueError: Nothing is held out to ask about, or the model does not answer.
    """
    budget = budget or runs.open_budget(config)
    with runs.prepare(config, workdir, budget, connect or runs.open_model) as source:
        return _plan(config, source, sample, budget)


def _plan(
    config: ml_collections.ConfigDict,
    source: pipeline.Source,
    sample: int,
    budget: request_log.Budget,
) -> Plan:
    passes = runs.main_pipeline(source)
    seeds = sum(map(len, passes.shards))
    chosen = _held_out(config, source)[:sample]
    num_candidates = min(config.retrieve.num_candidates, len(source.store))
    model = source.model
    sent = budget.requests

    def timed(ask: Callable[[], list[stages.Record]]) -> list[stages.Record]:
        """Asks, and keeps how long it took."""
        nonlocal took
        if config.llm.weights:  # The first call compiles, which a run does once.
            model.log = request_log.RequestLog(None)
            ask()
        # How the model answers now is measured: nothing comes from a log.
        model.log = request_log.RequestLog(None)
        began = time.monotonic()
        found = ask()
        took = time.monotonic() - began
        return _refuse_errors(found)

    took = 0.0
    generated = timed(
        lambda: stages.generate(
            chosen,
            source.store,
            model,
            source.prompts.generate,
            settings.query_rules(config),
            settings.sampling(config, source.prompts.generate),
            source.contamination,
            shots=config.generate.shots,
            seed=config.seed,
        )
    )
    kept = stages.kept(generated)
    share = len(kept) / len(generated)
    kinds = [_kind("generate", generated, took, seeds)]
    rng = np.random.default_rng([config.seed, len(chosen)])
    rows = [
        {"id": r["id"], "candidates": rng.integers(len(source.store), size=1).tolist()}
        for r in kept
    ]
    queries = stages.by_id(kept)
    later = int(seeds * share)
    if config.fuse.likelihood_weight and rows:
        prompt = source.prompts.likelihood
        found = timed(
            lambda: stages.likelihood(rows, queries, source.store, model, prompt, "")
        )
        count = num_candidates + bool(config.likelihood.generic_passage)
        kinds.append(_kind("likelihood", found, took, later * count))
    if config.fuse.relevance_weight and rows:
        found = timed(
            lambda: stages.relevance(
                rows, queries, source.store, model, source.prompts.relevance
            )
        )
        kinds.append(_kind("relevance", found, took, later * num_candidates))
    return Plan(
        passages=seeds,
        kept=share,
        kinds=tuple(kinds),
        cost=sum(
            k.requests * budget.price(k.prompt_tokens, k.completion_tokens)
            for k in kinds
        ),
        hours=sum(k.requests * k.seconds for k in kinds) / 3600,
        sample=budget.requests - sent,
    )


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well each judge finds the seed among the candidates.

    Attributes:
        seeds: Held-out queries that were judged.
        candidates: Of each, the mean.
        mrr: Name of the judge -> mean of 1 / rank of the seed, in [0, 1].
        standard_error: Of each of these means.
        warnings: What the numbers advise against.
    """

    seeds: int
    candidates: float
    mrr: dict[str, float]
    standard_error: dict[str, float]
    warnings: tuple[str, ...]


def calibrate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    budget: request_log.Budget | None = None,
    connect: Callable[..., protocol.LanguageModel] | None = None,
) -> Calibration:
    """Ranks the candidates of held-out seeds by each judge and by their fusion.

    The judges' answers are kept in `calibration/`, like those of a run.

    Raises:
        ValueError: Nothing is held out, or no query of it passed.
        requests.BudgetError: The limit is reached; what was answered is kept.
    """
    budget = budget or runs.open_budget(config)
    with runs.prepare(config, workdir, budget, connect or runs.open_model) as source:
        _held_out(config, source)
        passes = runs.calibration_pipeline(source)
        passes.run("relevance")
        return read_calibration(passes)


def read_calibration(passes: pipeline.Pipeline) -> Calibration:
    """Returns the result of a finished calibration pass."""
    config = passes.source.config
    grades = list(passes.source.prompts.relevance.labels.values())
    weighted = settings.fusion_settings(config)
    # With a judge that has no weight, the question is what giving it one would do.
    both = dataclasses.replace(
        weighted,
        likelihood_weight=weighted.likelihood_weight or 1.0,
        relevance_weight=weighted.relevance_weight or 1.0,
    )
    found: dict[str, list[float]] = {}
    sizes = []
    for shard in range(len(passes.shards)):
        rows = stages.kept(passes.retrieve.read(shard))
        likelihoods = {}
        if passes.has_likelihood:
            likelihoods = stages.by_id(passes.likelihood.read(shard))
        relevances = stages.by_id(passes.relevance.read(shard))
        for row in rows:
            if row["id"] not in relevances:
                continue
            seed = row["candidates"].index(row["id"])
            sizes.append(len(row["candidates"]))
            ranks: dict[str, Any] = {}
            if row["id"] in likelihoods:
                log_probs = likelihoods[row["id"]]["log_probs"]
                ranks["QL"] = fusion.ranks(stages.of_candidates(log_probs, row))
            record, kind = relevances[row["id"]], config.fuse.relevance
            ranks["RC"] = fusion.ranks(
                stages.relevance_scores(record, row, grades, kind)
            )
            if "QL" in ranks:
                fused = fusion.fuse(ranks["QL"], ranks["RC"], both)
                ranks["fusion"] = fusion.ranks(fused.tolist())
            rank = row["seed_rank"]
            found.setdefault("retrieval", []).append(1.0 / rank if rank else 0.0)
            for name, order in ranks.items():
                found.setdefault(name, []).append(1.0 / int(order[seed]))
    if not sizes:
        raise ValueError(
            f"{passes.generate.folder.parent}: no held-out query was judged; `dropped` "
            "in its shards says why"
        )
    mrr = {name: float(np.mean(values)) for name, values in found.items()}
    error = {
        name: float(np.std(values) / np.sqrt(len(values)))
        for name, values in found.items()
    }
    chance = float(np.mean([np.mean(1 / np.arange(1, n + 1)) for n in sizes]))
    return Calibration(
        seeds=len(sizes),
        candidates=float(np.mean(sizes)),
        mrr=mrr | {"chance": chance},
        standard_error=error,
        warnings=tuple(_warnings(mrr, chance, weighted)),
    )


def _warnings(
    mrr: dict[str, float], chance: float, weighted: fusion.Settings
) -> list[str]:
    told = []
    if {"QL", "RC", "fusion"} <= mrr.keys():
        best = max(("QL", "RC"), key=lambda name: mrr[name])
        if mrr["fusion"] < mrr[best]:
            other = "relevance" if best == "QL" else "likelihood"
            weight = getattr(weighted, f"{other}_weight")
            advice = (
                f"set fuse.{other}_weight=0 or lower" if weight else "leave it at 0"
            )
            told.append(
                f"fusing hurts: {mrr['fusion']:.3f} against {mrr[best]:.3f} of {best} "
                f"alone; {advice}, or take a stronger model"
            )
    told += [
        f"{name} does not judge: {mrr[name]:.3f}, chance gives {chance:.3f}"
        for name in ("QL", "RC")
        if name in mrr and mrr[name] <= chance * 1.1
    ]
    return told


def _held_out(
    config: ml_collections.ConfigDict, source: pipeline.Source
) -> Sequence[int]:
    chosen = runs.held_out(config, len(source.store))
    if not chosen:
        raise ValueError(
            f"calibrate.num_seeds={config.calibrate.num_seeds} of {len(source.store)} "
            "passages: no seed is held out to ask about; set it above 0 and give at "
            "least 5 passages"
        )
    return chosen


def _refuse_errors(rows: list[stages.Record]) -> list[stages.Record]:
    errors = [row for row in rows if stages.is_error(row)]
    if errors and len(errors) == len(rows):
        raise ValueError(
            f"no request of the sample was answered: {errors[0]['dropped']} "
            f"({errors[0].get('detail', '')})"
        )
    return rows


def _kind(name: str, rows: Sequence[stages.Record], seconds: float, count: int) -> Kind:
    usages = [row["usage"] for row in rows if "usage" in row]
    total = max(sum(usage["requests"] for usage in usages), 1)
    return Kind(
        name=name,
        requests=count,
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages) / total,
        completion_tokens=sum(usage["completion_tokens"] for usage in usages) / total,
        seconds=seconds / total,
    )
