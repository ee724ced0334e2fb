"""Export of the triples as JSON lines that `gecko train` reads, with a data card.

    {"task": "fact checking", "query": "Honey ...", "positive": "Honey hardly ...",
     "title": "", "negatives": ["..."], "negative_titles": [""],
     "task_description": "fact checking", "generator": "...", "licence": "CC0-1.0"}

`gecko train --config.data.files=WORKDIR/export/fret.jsonl` reads the file. Every value
of `task` is a training task, so rare ones become "search result". `task_description`
keeps the words of the model, which training writes before the query. A line that is
relabelled keeps its fields, apart from those of its passages.
"""

import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from gecko_jax.fret import pipeline, records, relabelling, stages
from gecko_jax.io import reading, wording, writing

TEMPLATES = pathlib.Path(__file__).parent / "templates"
OUTPUT = "fret.jsonl"
OTHER_TASK = "search result"
_ORIGIN = ("source", "source_id", "licence")
_PASSAGE = ("text", "title", "passage_id")
_NAMES = {"likelihood": "ql", "relevance": "rc", "fused": "rrf"}
# Counts in the export's `.done.json`.
COUNTS = ("moved", "further_positives", "false_negatives")


def export(passes: pipeline.Pipeline) -> pathlib.Path:
    """Writes the triples of a finished pass and returns their file.

    An existing file that was made from the same records stays. Raises ValueError if no
    triple is left, or the file was changed since it was written.
    """
    source, stage = passes.source, open_stage(passes)
    stage.begin()
    path = stage.folder / OUTPUT
    done = stage.done()
    if done and path.exists():
        if reading.sha256(path) != done.get("sha256"):
            raise ValueError(
                f"{path}: not as this run wrote it; move it away, and the same command "
                "writes it again"
            )
        return path
    counts: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    digest = hashlib.sha256()
    with writing.write_file(path) as temporary, temporary.open("wb") as lines:
        for triple, record in _triples(passes):
            line = records.to_line(triple).encode()
            lines.write(line)
            digest.update(line)
            counts["rows"] += 1
            if record is None:  # A further positive of the line before.
                counts["further_positives"] += 1
            else:
                false = len(record.get("false_negatives", ()))
                counts.update(triples=1, moved=record["moved"], false_negatives=false)
            named = [*triple.get("negative_licences", [])]
            named.append(triple.get("licence") or triple.get("license"))
            licences.update(name or "unknown" for name in named)
            if "seed_licence" in triple or not source.pair_files:
                licences[triple.get("seed_licence", "unknown")] += 1
    if not counts["rows"]:
        path.unlink()
        raise ValueError(f"{source.workdir}: no triple is left; see gecko fret report")
    with writing.write_file(stage.folder / "README.md") as temporary:
        temporary.write_text(_card(passes, counts, licences))
    facts = {name: counts[name] for name in COUNTS if counts[name] or name == "moved"}
    stage.finish(0, records=counts["rows"], sha256=digest.hexdigest(), **facts)
    return path


def open_stage(passes: pipeline.Pipeline) -> records.Stage:
    """Returns the stage of the export, which has no shards."""
    config = passes.source.config.export
    facts = {"code": 3, "fuse": passes.fuse.hash, "max_tasks": config.max_tasks}
    added = {"candidates": config.candidates, "scores": config.scores}
    facts |= {name: value for name, value in added.items() if value}
    return records.Stage(passes.source.workdir, "export", facts)


def write_pairs(passes: pipeline.Pipeline, path: pathlib.Path) -> int:
    """Writes (task, query, seed passage) of every query; returns their number."""
    number, tasks = 0, _common_tasks(passes)
    with writing.write_file(path) as temporary, temporary.open("w") as lines:
        for record in _queries(passes):
            seed = record.get("positive", record["id"])
            title, body = passes.source.store.texts[seed]
            task = record["task"] if record["task"] in tasks else OTHER_TASK
            pair = {"task": task, "query": record["query"]}
            lines.write(records.to_line(pair | {"positive": body, "title": title}))
            number += 1
    return number


def _queries(passes: pipeline.Pipeline) -> Iterator[dict[str, Any]]:
    for shard in range(len(passes.shards)):
        yield from stages.kept(passes.queries.read(shard))


def _common_tasks(passes: pipeline.Pipeline) -> set[str]:
    """Returns the most frequent tasks, which keep their names."""
    counts = Counter(record["task"] for record in _queries(passes))
    common = sorted(counts, key=lambda task: (-counts[task], task))
    return set(common[: passes.source.config.export.max_tasks])


def _triples(
    passes: pipeline.Pipeline,
) -> Iterator[tuple[dict[str, Any], stages.Record | None]]:
    """Yields (line, fused record) of every query, in order.

    The lines of further positives follow, with None.
    """
    source, tasks = passes.source, _common_tasks(passes)
    passages: dict[int, stages.Record] = {}
    for shard in range(source.num_shards):
        passages |= stages.by_id(source.stage.read(shard))
    lines = enumerate(relabelling.read_lines(source.pair_files))
    has_scores = source.config.export.candidates or source.config.export.scores
    for shard in range(len(passes.shards)):
        queries = stages.by_id(passes.queries.read(shard))
        candidates = _candidates_of(passes, shard) if has_scores else {}
        for record in stages.kept(passes.fuse.read(shard)):
            query = queries[record["id"]]
            input_line = None
            if source.pair_files:
                input_line = next(line for n, (_, line, _) in lines if n == query["id"])
            for positive in (record["positive"], *record.get("positives", ())):
                if input_line is None:
                    task = query["task"] if query["task"] in tasks else OTHER_TASK
                    triple = _triple(task, query, positive, record, passages)
                else:
                    triple = relabelling.relabel(
                        input_line, query, positive, negatives_of(record), passages
                    )
                    triple["judge"] = source.model_facts["model"]
                if candidates:
                    judged = candidates[record["id"]]
                    triple |= _scores(passes, positive, record, judged, passages)
                yield triple, record if positive == record["positive"] else None


def _triple(
    task: str,
    query: stages.Record,
    positive: int,
    record: stages.Record,
    passages: Mapping[int, stages.Record],
) -> dict[str, Any]:
    """Returns the line of a generated query."""
    chosen = passages[positive]
    triple: dict[str, Any] = {"task": task, "query": query["query"]}
    triple |= {"positive": chosen["text"], "title": chosen["title"]}
    negatives = [passages[number] for number in negatives_of(record)]
    if negatives:
        triple["negatives"] = [passage["text"] for passage in negatives]
        triple["negative_titles"] = [passage["title"] for passage in negatives]
    triple |= {"task_description": query["task"], "generator": query["model"]}
    triple |= {"prompt": query["prompt"], "seed": record["id"]}
    triple |= origin_of(chosen)
    if negatives:
        origins = [origin_of(passage) for passage in negatives]
        triple |= {f"negative_{n}s": [o.get(n, "") for o in origins] for n in _ORIGIN}
    seed = origin_of(passages[record["id"]])
    return triple | {f"seed_{name}": value for name, value in seed.items()}


def negatives_of(record: stages.Record) -> list[int]:
    """Returns the hard negatives of a record of `fuse`."""
    negative = record["negative"]
    return record.get("negatives") or ([] if negative is None else [negative])


def _candidates_of(
    passes: pipeline.Pipeline, shard: int
) -> dict[int, dict[int, dict[str, float]]]:
    """Returns query -> candidate -> scores: likelihood, relevance, fused."""
    kind = passes.source.config.fuse.relevance
    grades = list(passes.source.prompts.relevance.labels.values())
    retrieved = stages.by_id(passes.retrieve.read(shard))
    likelihoods, relevances = passes.judged(shard)
    scores: dict[int, dict[int, dict[str, float]]] = {}
    for record in stages.kept(passes.fuse.read(shard)):
        number, row = record["id"], retrieved[record["id"]]
        columns: dict[str, Any] = {}
        if passes.has_likelihood:
            columns["likelihood"] = likelihoods[number]["log_probs"]
        if passes.has_relevance:
            columns["relevance"] = stages.relevance_scores(
                relevances[number], row, grades, kind
            )
        columns["fused"] = record["fused"]
        values = [stages.of_candidates(column, row) for column in columns.values()]
        scores[number] = {
            candidate: {n: round(v, 4) for n, v in zip(columns, own, strict=True)}
            for candidate, *own in zip(row["candidates"], *values, strict=True)
        }
    return scores


def _scores(
    passes: pipeline.Pipeline,
    positive: int,
    record: stages.Record,
    judged: Mapping[int, dict[str, float]],
    passages: Mapping[int, stages.Record],
) -> dict[str, Any]:
    """Returns the fields `scores` and `candidates` of a line."""
    config, result = passes.source.config, {}
    negatives = negatives_of(record)
    if name := config.export.scores:
        result["scores"] = [judged[number][name] for number in (positive, *negatives)]
    if config.export.candidates:
        parts = dict.fromkeys(record.get("false_negatives", ()), "false_negative")
        parts |= dict.fromkeys(negatives, "negative")
        chosen = (record["positive"], *record.get("positives", ()))
        parts |= dict.fromkeys(chosen, "positive")
        result["candidates"] = [
            {
                **{n: passages[number][n] for n in _PASSAGE if n in passages[number]},
                **origin_of(passages[number]),
                **{_NAMES[name]: score for name, score in scores.items()},
                "part": parts.get(number, ""),
            }
            for number, scores in judged.items()
        ]
    return result


def origin_of(passage: Mapping[str, Any]) -> dict[str, Any]:
    """Returns source and licence of a passage, as far as its file names them."""
    values = {**passage, "licence": passage.get("licence", passage.get("license"))}
    return {name: values[name] for name in _ORIGIN if values.get(name) is not None}


def _card(
    passes: pipeline.Pipeline, counts: Counter[str], licences: Counter[str]
) -> str:
    """Returns the data card."""
    source, config, safe = passes.source, passes.source.config, wording.markdown
    prompts = [] if source.pair_files else [source.prompts.generate]
    prompts += [source.prompts.likelihood] * passes.has_likelihood
    prompts += [source.prompts.relevance] * passes.has_relevance
    used = ", ".join(
        f"{safe(f'{p.name} version {p.version}')} ({p.sha256[:12]})" for p in prompts
    )
    rows = []
    for stage, done in passes.done().items():
        if done is not None and done["records"]:
            why = ", ".join(f"{n} {safe(name)}" for name, n in done["dropped"].items())
            rows.append(f"| {stage} | {done['records']:,} | {done['kept']:,} | {why} |")
    name = "card_relabelled.md" if source.pair_files else "card_generated.md"
    template = (TEMPLATES / name).read_text("utf-8")
    return template.format(
        num_rows=counts["rows"],
        moved=counts["moved"] / counts["triples"],
        others=counts["further_positives"],
        false_negatives=counts["false_negatives"],
        files=", ".join(safe(path.name) for path in source.pair_files),
        generator=safe(json.dumps(source.model_facts)),
        licence=safe(config.llm.licence or "not stated"),
        retriever=safe(config.retrieve.model or "BM25"),
        num_candidates=config.retrieve.num_candidates,
        seed=config.seed,
        hash=passes.fuse.hash,
        prompts=used,
        clear_of=", ".join(map(safe, config.passages.decontaminate)) or "nothing",
        licences=", ".join(f"{safe(name)} {n:,}" for name, n in licences.most_common()),
        stages="\n".join(rows),
    )
