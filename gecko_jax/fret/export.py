"""Export: the triples as JSON lines that `gecko train` reads, and what they are.

    {"task": "fact checking", "query": "Honey ...", "positive": "Honey hardly ...",
     "title": "", "negatives": ["..."], "negative_titles": [""],
     "task_description": "fact checking", "generator": "...", "licence": "CC0-1.0"}

`gecko train --config.data.files=WORKDIR/export/fret.jsonl` takes the file. Every value
of `task` is a task of its own there, so rare ones are "search result"; the words of the
model stay beside them in `task_description`, which training writes before the query.
"""

import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from gecko_jax.fret import pipeline, records, stages
from gecko_jax.io import reading, wording, writing

OUTPUT = "fret.jsonl"
OTHER_TASK = "search result"
_ORIGIN = ("source", "source_id", "licence")


def export(passes: pipeline.Pipeline) -> pathlib.Path:
    """Writes the triples of a finished pass; returns their file.

    A file that is there already and was made from the same records stays.

    Raises:
        ValueError: No triple is left; the file was changed since it was written.
    """
    source = passes.source
    facts = {"code": 3, "fuse": passes.fuse.hash} | {
        "max_tasks": source.config.export.max_tasks
    }
    stage = records.Stage(source.workdir, "export", facts)
    stage.begin()
    path = stage.folder / OUTPUT
    done = stage.done()
    if done and path.exists() and reading.sha256(path) != done.get("sha256"):
        raise ValueError(
            f"{path}: not as this run wrote it; move it away, and the same command "
            "writes it again"
        )
    if not done or not path.exists():
        tasks = _common_tasks(passes)
        num_rows = num_moved = 0
        licences: Counter[str] = Counter()
        digest = hashlib.sha256()
        with writing.write_file(path) as temporary, temporary.open("wb") as lines:
            for triple, moved in _triples(passes, tasks):
                line = records.to_line(triple).encode()
                lines.write(line)
                digest.update(line)
                num_rows += 1
                num_moved += moved
                negatives = triple.get("negative_licences", [])
                licences.update(name or "unknown" for name in negatives)
                for name in ("licence", "seed_licence"):
                    licences[triple.get(name, "unknown")] += 1
        if not num_rows:
            path.unlink()
            raise ValueError(
                f"{source.workdir}: no triple is left; `gecko fret report` shows what "
                "was dropped and why"
            )
        card = _card(passes, num_rows, num_moved, licences)
        with writing.write_file(stage.folder / "README.md") as temporary:
            temporary.write_text(card)
        stage.finish(0, records=num_rows, moved=num_moved, sha256=digest.hexdigest())
    return path


def write_pairs(passes: pipeline.Pipeline, path: pathlib.Path) -> int:
    """Writes (task, query, seed passage) of every query; returns their number."""
    number, tasks = 0, _common_tasks(passes)
    with writing.write_file(path) as temporary, temporary.open("w") as lines:
        for shard in range(len(passes.shards)):
            for record in stages.kept(passes.generate.read(shard)):
                title, body = passes.source.store.texts[record["id"]]
                task = record["task"] if record["task"] in tasks else OTHER_TASK
                pair = {"task": task, "query": record["query"]}
                lines.write(records.to_line(pair | {"positive": body, "title": title}))
                number += 1
    return number


def _common_tasks(passes: pipeline.Pipeline) -> set[str]:
    """Returns the most frequent tasks, which are tasks of their own in training."""
    counts: Counter[str] = Counter()
    for shard in range(len(passes.shards)):
        for record in stages.kept(passes.generate.read(shard)):
            counts[record["task"]] += 1
    common = sorted(counts, key=lambda task: (-counts[task], task))
    return set(common[: passes.source.config.export.max_tasks])


def _triples(
    passes: pipeline.Pipeline, tasks: set[str]
) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields (triple, whether its positive moved) in the order of the seeds."""
    source = passes.source
    origins = {
        record["id"]: _origin_of(record)
        for shard in range(source.num_shards)
        for record in source.stage.read(shard)
    }
    for shard in range(len(passes.shards)):
        queries = stages.by_id(passes.generate.read(shard))
        for record in stages.kept(passes.fuse.read(shard)):
            query = queries[record["id"]]
            title, body = source.store.texts[record["positive"]]
            task = query["task"] if query["task"] in tasks else OTHER_TASK
            triple: dict[str, Any] = {"task": task, "query": query["query"]}
            triple |= {"positive": body, "title": title}
            if record["negative"] is not None:
                title, body = source.store.texts[record["negative"]]
                triple |= {"negatives": [body], "negative_titles": [title]}
            triple |= {"task_description": query["task"], "generator": query["model"]}
            triple |= {"prompt": query["prompt"], "seed": record["id"]}
            triple |= origins[record["positive"]]
            if record["negative"] is not None:
                origin = origins[record["negative"]]
                triple |= {
                    f"negative_{name}s": [origin.get(name, "")] for name in _ORIGIN
                }
            origin = origins[record["id"]]
            triple |= {f"seed_{name}": value for name, value in origin.items()}
            yield triple, record["moved"]


def _origin_of(passage: dict[str, Any]) -> dict[str, Any]:
    """Returns where a passage is from, as far as its file said so."""
    spelt = {**passage, "licence": passage.get("licence", passage.get("license"))}
    return {name: spelt[name] for name in _ORIGIN if spelt.get(name) is not None}


def _card(
    passes: pipeline.Pipeline, num_rows: int, num_moved: int, licences: Counter[str]
) -> str:
    """Returns what somebody must know who is given the file alone."""
    source, config = passes.source, passes.source.config
    prompts = source.prompts
    used = [prompts.generate]
    used += [prompts.likelihood] * passes.has_likelihood
    used += [prompts.relevance] * passes.has_relevance
    lines = [
        "# FRet triples",
        "",
        "Made by `gecko fret run` (gecko_jax): a language model read each passage and "
        "wrote a task and a query; it then chose the positive and the hard negative "
        "among the neighbours of the query (Lee et al. 2024, section 3.2). Queries are "
        "machine-written and were not checked by people.",
        "",
        f"- triples: {num_rows:,}; the positive is not the seed in "
        f"{num_moved / num_rows:.1%} of them",
        f"- generator: {wording.markdown(json.dumps(source.model_facts))}, licence of "
        f"its output: {wording.markdown(config.llm.licence or 'not stated')}",
        f"- retriever: {wording.markdown(config.retrieve.model or 'BM25')}, "
        f"{config.retrieve.num_candidates} candidates",
        f"- seed: {config.seed}; hash of the fused records: {passes.fuse.hash}",
        "- prompts: "
        + ", ".join(
            f"{wording.markdown(f'{p.name} version {p.version}')} ({p.sha256[:12]})"
            for p in used
        ),
        "- kept clear of: "
        + (
            ", ".join(map(wording.markdown, config.passages.decontaminate)) or "nothing"
        ),
        "- licences of the texts (positives, hard negatives, and the passages that the "
        "model read): "
        + ", ".join(
            f"{wording.markdown(name)} {count:,}"
            for name, count in licences.most_common()
        ),
        "",
        "| stage | records | kept | dropped |",
        "|---|---|---|---|",
    ]
    for stage in (source.stage, *(step.stage for step in passes.steps)):
        done = stage.done()
        if done is not None and done["records"]:
            why = ", ".join(
                f"{count} {wording.markdown(name)}"
                for name, count in done["dropped"].items()
            )
            lines.append(
                f"| {stage.name} | {done['records']:,} | {done['kept']:,} | {why} |"
            )
    return "\n".join(lines) + "\n" + _FIELDS


_FIELDS = """
## Fields of `fret.jsonl`, one triple a line

| field | |
|---|---|
| `task` | name of the task; rare ones are "search result" |
| `query` | what the model wrote |
| `positive`, `title` | the passage chosen for it |
| `negatives`, `negative_titles` | the hard negative, a list of one, if there is any |
| `task_description` | the task in the model's words |
| `generator`, `prompt` | the model, and the prompt with its version |
| `seed` | number of the passage that the model read |
| `source`, `source_id`, `licence` | of the positive, where they were given |
| `negative_sources`, `negative_source_ids`, `negative_licences` | of the negatives |
| `seed_source`, `seed_source_id`, `seed_licence` | of the passage that the model read |

`gecko train --config.data.files=fret.jsonl` trains on it;
`gecko_jax.data.fret_builder.build(FOLDER, DATA_DIR)` makes it a TFDS data set.
"""
