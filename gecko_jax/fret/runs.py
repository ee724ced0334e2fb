"""A run: turns raw passages into training triples in a workdir (section 3.2).

    passages/ generate/ [embed/] retrieve/ likelihood/ relevance/ fuse/   shards
    requests/             the language model's answers, as they arrived
    export/fret.jsonl     the triples; export/README.md describes them
    config.json           the settings

A run that is killed at any moment and restarted ends with the same bytes, and does not
repeat answered requests.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from gecko_jax.evaluation import set_texts
from gecko_jax.fret import (
    beam_passages,
    export,
    passages,
    pipeline,
    records,
    relabelling,
    settings,
)
from gecko_jax.io import reading
from gecko_jax.llm import canary, in_process, protocol, request_log, server
from gecko_jax.text import overlap

# The bundled passages, and recorded answers about some of them: "quickstart".
_QUICKSTART = pathlib.Path(__file__).parents[1] / "quickstart"
_HELD_OUT, _LINES = 3, 4  # Purposes of random numbers; see `stages.row_rng`.


@dataclasses.dataclass(frozen=True)
class Summary:
    """Result of a call."""

    stages: dict[str, dict[str, Any]]  # content of `.done.json` of each finished stage
    budget: request_log.Budget  # requests, tokens and cost of this call
    stopped: str  # why it ended early; "" if it did not
    output: pathlib.Path | None  # the exported file; None if there is none yet


def run(
    config: ml_collections.ConfigDict,  # see `configs/fret.py`
    workdir: pathlib.Path,  # shared by all workers
    *,
    budget: request_log.Budget | None = None,  # limits of this call; None sets none
    worker: tuple[int, int] = (0, 1),  # see `Pipeline.run`
    until: str = "export",  # the last stage
    beam_options: Sequence[str] | None = None,
) -> Summary:
    """Runs the missing stages, and exports.

    With `beam_options`, Apache Beam makes the passages. Raises ValueError if a setting,
    file or answer is wrong, or the workdir was begun with other settings, and OSError
    if the server is gone or the disk is full. All answers are kept.
    """
    budget = budget or open_budget(config)
    stopped = ""
    with prepare(config, workdir, budget, beam_options) as source:
        passes = main_pipeline(source)
        try:
            if until != "passages":
                passes.run("fuse" if until == "export" else until, worker)
        except request_log.BudgetError as error:
            stopped = str(error)
    done = passes.done()
    output = export.export(passes) if until == "export" and done["fuse"] else None
    if output:
        done["export"] = export.open_stage(passes).done()
    finished = {name: counts for name, counts in done.items() if counts}
    return Summary(finished, budget, stopped, output)


def prepare(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    budget: request_log.Budget | None = None,
    beam_options: Sequence[str] | None = None,
) -> pipeline.Source:
    """Checks the config, makes the passages, and returns what the pipelines share."""
    settings.check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    contamination = set_texts.read(config.passages.decontaminate)
    stage = _passages(config, workdir, contamination, beam_options)
    name, facts = _describe_model(config)

    def connect() -> protocol.LanguageModel:
        model = open_model(config, budget or open_budget(config))
        request_log.write_model(workdir, name, facts)
        return model

    files = find_files(config, "relabel")
    return pipeline.Source(config, workdir, stage, contamination, facts, connect, files)


def open_budget(
    config: ml_collections.ConfigDict,
    max_requests: int | None = None,
    max_cost: int | float | None = None,
) -> request_log.Budget:
    """Returns a budget with the prices of the config."""
    prices = (config.llm.price_input, config.llm.price_output)
    return request_log.Budget(max_requests, max_cost, *prices)


def open_model(
    config: ml_collections.ConfigDict, budget: request_log.Budget
) -> protocol.LanguageModel:
    """Returns the recorded, the in-process or the server's model, checked."""
    if config.llm.recording:
        return protocol.recorded(_or_bundled(config.llm.recording, "recording"))
    if config.llm.weights:
        names = ("weights", "dtype", "tensor", "compilation_cache")
        chosen = {name: config.llm[name] for name in names}
        return in_process.open_model(**chosen, budget=budget)
    model = server.connect(settings.fill(server.ServerSettings, config.llm), budget)
    try:
        canary.check(
            model,
            scores=config.llm.scoring != "none" and not config.llm.chat,
            labels=bool(config.fuse.relevance_weight),
        )
    except BaseException:
        model.close()
        raise
    return model


def held_out(config: ml_collections.ConfigDict, num_passages: int) -> list[int]:
    """Returns the seed passages that calibrate the judges and stay out of the run.

    Lines that are relabelled do not stay out: nothing is written from them.
    """
    count = min(config.calibrate.num_seeds, num_passages // 5)
    rng = np.random.default_rng([config.seed, _HELD_OUT])
    return sorted(rng.permutation(num_passages)[:count].tolist())


def main_pipeline(source: pipeline.Source) -> pipeline.Pipeline:
    """Returns the pass over the passages that are not held out, or over the lines."""
    if source.pair_files:
        lines, facts = _lines(source)
        return pipeline.Pipeline(source, _shards(source.config, lines), "", facts)
    excluded = set(held_out(source.config, len(source.store)))
    facts = {"held_out": len(excluded)}
    seeds = [n for n in range(len(source.store)) if n not in excluded]
    if limit := source.config.generate.limit:
        seeds = seeds[:limit]
        facts["limit"] = limit
    chosen = set(seeds)
    all_shards = _shards(source.config, range(len(source.store)))
    shards = [[number for number in shard if number in chosen] for shard in all_shards]
    return pipeline.Pipeline(source, shards, "", facts)


def calibration_pipeline(source: pipeline.Source) -> pipeline.Pipeline:
    """Returns the pass over the held-out passages or lines, scored by both judges."""
    chosen = seeds_to_judge(source)
    facts = {"seeds": len(chosen)}
    if source.pair_files:
        facts |= _lines(source)[1]
    shards = _shards(source.config, chosen)
    return pipeline.Pipeline(source, shards, "calibration", facts, scores_all=True)


def seeds_to_judge(source: pipeline.Source) -> list[int]:
    """Returns the held-out passages, or some of the lines, for plan and calibration."""
    if not source.pair_files:
        return held_out(source.config, len(source.store))
    lines, _ = _lines(source)
    return [lines[place] for place in held_out(source.config, len(lines))]


def _lines(source: pipeline.Source) -> tuple[list[int], dict[str, Any]]:
    """Returns the lines to relabel, and the facts that decide which these are."""
    total, limit = len(source.pairs), source.config.relabel.limit
    if not limit:
        return list(range(total)), {"lines": total}
    rng = np.random.default_rng([source.config.seed, _LINES])
    chosen = sorted(rng.permutation(total)[:limit].tolist())
    return chosen, {"lines": len(chosen), "seed": source.config.seed}


def _shards(config: ml_collections.ConfigDict, rows: Sequence[Any]) -> list[Any]:
    """Cuts rows into shards."""
    size = config.passages.shard_rows
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _passages(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    contamination: overlap.Contamination,
    beam_options: Sequence[str] | None,
) -> records.Stage:
    """Returns the finished stage of passages; one worker makes it, others wait."""
    paths = find_files(config, "passages")
    pairs = find_files(config, "relabel")
    rules = settings.fill(passages.Rules, config.passages)
    rows = config.passages.shard_rows
    facts = {
        "code": pipeline.CODE_VERSION["passages"],
        "files": {path.name: reading.sha256(path) for path in paths},
        **({"pairs": [[p.name, reading.sha256(p)] for p in pairs]} if pairs else {}),
        "decontaminate": config.passages.decontaminate,
        "rules": dataclasses.asdict(rules),
        "shard_rows": rows,
    }
    stage = records.Stage(workdir, "passages", facts)
    stage.begin()
    while stage.done() is None:
        with records.try_lock(workdir / records.LOCKS / "passages.lock") as has_lock:
            if has_lock and stage.done() is None and beam_options is not None:
                sets = config.passages.decontaminate
                beam_passages.write(paths, rules, sets, stage, rows, beam_options)
            elif has_lock and stage.done() is None:
                given = relabelling.read_passages(pairs)
                kept, dropped = passages.read(paths, rules, contamination, given)
                shards = _shards(config, kept)
                for shard, part in enumerate(shards):
                    stage.write(shard, part)
                total = len(kept) + sum(dropped.values())
                stage.finish(len(shards), records=total, dropped=dropped)
        if not has_lock:
            time.sleep(0.2)
    return stage


def find_files(config: ml_collections.ConfigDict, group: str) -> list[pathlib.Path]:
    """Returns the `files` of a group; "quickstart" is the bundled one."""
    paths = [_or_bundled(name, "train.jsonl") for name in config[group].files]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{group}.files: {path}: no such file; check the path")
    return paths


def _or_bundled(path: str, bundled: str) -> pathlib.Path:
    return _QUICKSTART / bundled if path == "quickstart" else pathlib.Path(path)


def _describe_model(config: ml_collections.ConfigDict) -> tuple[str, dict[str, Any]]:
    """Returns name and facts of the model without opening it."""
    if config.llm.recording:
        recording = _or_bundled(config.llm.recording, "recording")
        name, facts, _ = request_log.read_recording(recording)
        return name, facts
    if config.llm.weights:
        facts = in_process.facts(config.llm.weights, config.llm.dtype)
        return facts["model"], facts
    served = settings.fill(server.ServerSettings, config.llm)
    return server.name(served), server.facts(served)
