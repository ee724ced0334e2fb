"""What a run will cost, and whether the judges are reliable.

Both ask about the seed passages that are held out of the run. `plan` sends a few
requests of each kind and extrapolates. `calibrate` lets both judges rank the candidates
of queries whose answer is known, the seed, and compares them with their fusion.
"""

import dataclasses
import functools
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from gecko_jax.fret import fusion, pipeline, runs, settings, stages
from gecko_jax.llm import request_log


@dataclasses.dataclass(frozen=True)
class Kind:
    """Requests of one stage."""

    name: str  # of the stage
    requests: int  # of the run
    prompt_tokens: float  # mean prompt tokens of a request
    completion_tokens: float  # mean completion tokens of a request
    seconds: float  # mean time of a request, among concurrent requests


@dataclasses.dataclass(frozen=True)
class Plan:
    """Expected cost of a run."""

    passages: int  # seed passages of the run, without the held-out ones
    kept: float  # share of the sample with a valid query
    kinds: tuple[Kind, ...]  # of requests
    cost: float  # of all requests, in the currency of the prices
    hours: float  # time of the run if nothing else uses the server
    sample: int  # requests sent for this plan


def plan(config: ml_collections.ConfigDict, workdir: pathlib.Path, sample: int) -> Plan:
    """Estimates the cost of a run from `sample` requests of each kind."""
    budget = runs.open_budget(config)
    with runs.prepare(config, workdir, budget) as source:
        seeds = sum(map(len, runs.main_pipeline(source).shards))
        chosen = _held_out(config, source)[:sample]
        prompts, model, sent = source.prompts, source.model, budget.requests
        kinds = []
        if source.pair_files:
            generated = [source.pairs[number] for number in chosen]
        else:
            ask = functools.partial(source.generate, chosen)
            generated, kind = _measure(source, "generate", seeds, ask)
            kinds.append(kind)
        queries = stages.kept(generated)
        share = len(queries) / len(generated)
        num_passages, num_queries = len(source.store), int(seeds * share)
        num_candidates = min(config.retrieve.num_candidates, num_passages)
        rng = np.random.default_rng([config.seed, len(chosen)])
        rows = [
            {"id": r["id"], "candidates": rng.integers(num_passages, size=1).tolist()}
            for r in queries
        ]
        shared = (rows, stages.by_id(queries), source.store, model)
        if config.fuse.likelihood_weight and rows:
            each = num_candidates + bool(config.likelihood.generic_passage)
            ask = functools.partial(stages.likelihood, *shared, prompts.likelihood, "")
            kinds.append(_measure(source, "likelihood", num_queries * each, ask)[1])
        if config.fuse.relevance_weight and rows:
            count = num_queries * num_candidates
            ask = functools.partial(stages.relevance, *shared, prompts.relevance)
            kinds.append(_measure(source, "relevance", count, ask)[1])
    return Plan(
        passages=seeds,
        kept=share,
        kinds=tuple(kinds),
        cost=sum(
            kind.requests * budget.price(kind.prompt_tokens, kind.completion_tokens)
            for kind in kinds
        ),
        hours=sum(kind.requests * kind.seconds for kind in kinds) / 3600,
        sample=budget.requests - sent,
    )


def _measure(
    source: pipeline.Source,
    name: str,
    count: int,
    ask: Callable[[], list[stages.Record]],
) -> tuple[list[stages.Record], Kind]:
    """Returns the rows that the model answers now, and the cost of `count` requests."""
    if source.config.llm.weights:  # The first call compiles.
        source.model.log = request_log.RequestLog(None)
        ask()
    source.model.log = request_log.RequestLog(None)
    began = time.monotonic()
    rows = ask()
    seconds = time.monotonic() - began
    errors = [row for row in rows if stages.is_error(row)]
    if errors and len(errors) == len(rows):
        raise ValueError(
            f"no request of the sample was answered: {errors[0]['dropped']} "
            f"({errors[0].get('detail', '')}); check the model"
        )
    used: Counter[str] = Counter()
    for row in rows:
        used.update(row.get("usage", {}))
    num = max(used["requests"], 1)
    tokens = (used["prompt_tokens"] / num, used["completion_tokens"] / num)
    return rows, Kind(name, count, *tokens, seconds / num)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How well each judge finds the seed among the candidates."""

    seeds: int  # held-out queries that were judged
    candidates: float  # mean number of candidates
    mrr: dict[str, float]  # judge -> mean of 1 / rank of the seed, in [0, 1]
    standard_error: dict[str, float]  # judge -> standard error of this mean
    warnings: tuple[str, ...]  # advice from the numbers


def calibrate(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    budget: request_log.Budget | None = None,
) -> Calibration:
    """Ranks the candidates of held-out seeds by each judge, in `calibration/`."""
    with runs.prepare(config, workdir, budget) as source:
        _held_out(config, source)
        passes = runs.calibration_pipeline(source)
        passes.run("relevance")
        return read_calibration(passes)


def read_calibration(passes: pipeline.Pipeline) -> Calibration:
    """Returns the result of a finished calibration pass."""
    config = passes.source.config
    grades = list(passes.source.prompts.relevance.labels.values())
    weighted = settings.fusion_settings(config)
    # Shows for a judge without weight what giving it one would do.
    both_weighted = dataclasses.replace(
        weighted,
        likelihood_weight=weighted.likelihood_weight or 1.0,
        relevance_weight=weighted.relevance_weight or 1.0,
    )
    reciprocal: defaultdict[str, list[float]] = defaultdict(list)
    sizes = []
    for shard in range(len(passes.shards)):
        likelihoods, relevances = passes.judged(shard)
        for row in stages.kept(passes.retrieve.read(shard)):
            number = row["id"]
            if number not in relevances:
                continue
            sizes.append(len(row["candidates"]))
            ranks: dict[str, Any] = {}
            if number in likelihoods:
                log_probs = likelihoods[number]["log_probs"]
                ranks["QL"] = fusion.ranks(stages.of_candidates(log_probs, row))
            judged = (relevances[number], row, grades, config.fuse.relevance)
            ranks["RC"] = fusion.ranks(stages.relevance_scores(*judged))
            if "QL" in ranks:
                fused = fusion.fuse(ranks["QL"], ranks["RC"], both_weighted)
                ranks["fusion"] = fusion.ranks(fused.tolist())
            rank = row["seed_rank"]
            reciprocal["retrieval"].append(1.0 / rank if rank else 0.0)
            seed = stages.position(row, stages.seed_of(row))
            for name, order in ranks.items():
                reciprocal[name].append(1.0 / int(order[seed]))
    if not sizes:
        raise ValueError(
            f"{passes.queries.folder.parent}: no held-out query was judged; `dropped` "
            "in its shards says why"
        )
    mrr = {name: float(np.mean(values)) for name, values in reciprocal.items()}
    chance = float(np.mean([np.mean(1 / np.arange(1, n + 1)) for n in sizes]))
    return Calibration(
        seeds=len(sizes),
        candidates=float(np.mean(sizes)),
        mrr=mrr | {"chance": chance},
        standard_error={
            name: float(np.std(values) / np.sqrt(len(values)))
            for name, values in reciprocal.items()
        },
        warnings=tuple(_warnings(reciprocal, chance, weighted)),
    )


def _warnings(
    reciprocal: Mapping[str, Sequence[float]], chance: float, weighted: fusion.Settings
) -> list[str]:
    warnings = []
    mrr = {name: float(np.mean(values)) for name, values in reciprocal.items()}
    if {"QL", "RC", "fusion"} <= mrr.keys():
        best = max(("QL", "RC"), key=lambda name: mrr[name])
        # Of the same seeds, so that their difficulty cancels.
        loss = np.subtract(reciprocal[best], reciprocal["fusion"])
        if np.mean(loss) > np.std(loss) / np.sqrt(len(loss)):
            worse = "relevance" if best == "QL" else "likelihood"
            is_used = getattr(weighted, f"{worse}_weight")
            advice = (
                f"set fuse.{worse}_weight=0 or lower" if is_used else "leave it at 0"
            )
            warnings.append(
                f"fusing hurts: {mrr['fusion']:.3f} against {mrr[best]:.3f} of {best} "
                f"alone; {advice}, or use a stronger model"
            )
    return warnings + [
        f"{name} does not judge: {mrr[name]:.3f}, chance gives {chance:.3f}"
        for name in ("QL", "RC")
        if name in mrr and mrr[name] <= chance * 1.1
    ]


def _held_out(
    config: ml_collections.ConfigDict, source: pipeline.Source
) -> Sequence[int]:
    chosen = runs.seeds_to_judge(source)
    if not chosen:
        kind = "lines" if source.pair_files else "passages"
        total = len(source.pairs if source.pair_files else source.store)
        raise ValueError(
            f"calibrate.num_seeds={config.calibrate.num_seeds} of {total} {kind}: no "
            f"seed is held out; set it above 0 and give at least 5 {kind}"
        )
    return chosen
