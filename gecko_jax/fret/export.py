"""Export of the triples as JSON lines that `gecko train` reads, with a data card.

    {"task": "fact checking", "query": "Honey ...", "positive": "Honey hardly ...",
     "title": "", "negatives": ["..."], "negative_titles": [""],
     "task_description": "fact checking", "generator": "...", "licence": "CC0-1.0"}

`gecko train --config.data.files=WORKDIR/export/fret.jsonl` reads the file. Every value
of `task` is a training task, so rare ones become "search result". `task_description`
keeps the words of the model, which training writes before the query.
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
    """Writes the triples of a finished pass and returns their file.

    An existing file that was made from the same records stays.

    Raises:
        ValueError: No triple is left, or the file was changed since it was written.
    """
    source = passes.source
    facts = {"code": 3, "fuse": passes.fuse.hash} | {
        "max_tasks": source.config.export.max_tasks
    }
    stage = records.Stage(source.workdir, "export", facts)
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
    num_rows = num_moved = 0
    licences: Counter[str] = Counter()
    digest = hashlib.sha256()
    with writing.write_file(path) as temporary, temporary.open("wb") as lines:
        for triple, moved in _triples(passes):
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
    with writing.write_file(stage.folder / "README.md") as temporary:
        temporary.write_text(_card(passes, num_rows, num_moved, licences))
    stage.finish(0, records=num_rows, moved=num_moved, sha256=digest.hexdigest())
    return path


def write_pairs(passes: pipeline.Pipeline, path: pathlib.Path) -> int:
    """Writes (task, query, seed passage) of every query; returns their number."""
    number, tasks = 0, _common_tasks(passes)
    with writing.write_file(path) as temporary, temporary.open("w") as lines:
        for record in _queries(passes):
            title, body = passes.source.store.texts[record["id"]]
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


def _triples(passes: pipeline.Pipeline) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields (triple, whether its positive is not the seed), in the order of seeds."""
    source, tasks = passes.source, _common_tasks(passes)
    origins = {
        record["id"]: _origin_of(record)
        for shard in range(source.num_shards)
        for record in source.stage.read(shard)
    }
    for shard in range(len(passes.shards)):
        queries = stages.by_id(passes.queries.read(shard))
        for record in stages.kept(passes.fuse.read(shard)):
            query, negative = queries[record["id"]], record["negative"]
            title, body = source.store.texts[record["positive"]]
            task = query["task"] if query["task"] in tasks else OTHER_TASK
            triple: dict[str, Any] = {"task": task, "query": query["query"]}
            triple |= {"positive": body, "title": title}
            if negative is not None:
                title, body = source.store.texts[negative]
                triple |= {"negatives": [body], "negative_titles": [title]}
            triple |= {"task_description": query["task"], "generator": query["model"]}
            triple |= {"prompt": query["prompt"], "seed": record["id"]}
            triple |= origins[record["positive"]]
            if negative is not None:
                origin = origins[negative]
                triple |= {f"negative_{n}s": [origin.get(n, "")] for n in _ORIGIN}
            origin = origins[record["id"]]
            triple |= {f"seed_{name}": value for name, value in origin.items()}
            yield triple, record["moved"]


def _origin_of(passage: dict[str, Any]) -> dict[str, Any]:
    """Returns source and licence of a passage, as far as its file names them."""
    values = {**passage, "licence": passage.get("licence", passage.get("license"))}
    return {name: values[name] for name in _ORIGIN if values.get(name) is not None}


def _card(
    passes: pipeline.Pipeline, num_rows: int, num_moved: int, licences: Counter[str]
) -> str:
    """Returns the data card."""
    source, config = passes.source, passes.source.config
    prompts = [source.prompts.generate]
    prompts += [source.prompts.likelihood] * passes.has_likelihood
    prompts += [source.prompts.relevance] * passes.has_relevance
    used = ", ".join(
        f"{wording.markdown(f'{p.name} version {p.version}')} ({p.sha256[:12]})"
        for p in prompts
    )
    clear_of = ", ".join(map(wording.markdown, config.passages.decontaminate))
    counted = ", ".join(
        f"{wording.markdown(name)} {count:,}" for name, count in licences.most_common()
    )
    rows = []
    for stage, done in passes.done().items():
        if done is not None and done["records"]:
            why = ", ".join(
                f"{count} {wording.markdown(name)}"
                for name, count in done["dropped"].items()
            )
            rows.append(f"| {stage} | {done['records']:,} | {done['kept']:,} | {why} |")
    return _CARD.format(
        num_rows=num_rows,
        moved=num_moved / num_rows,
        generator=wording.markdown(json.dumps(source.model_facts)),
        licence=wording.markdown(config.llm.licence or "not stated"),
        retriever=wording.markdown(config.retrieve.model or "BM25"),
        num_candidates=config.retrieve.num_candidates,
        seed=config.seed,
        hash=passes.fuse.hash,
        prompts=used,
        clear_of=clear_of or "nothing",
        licences=counted,
        stages="\n".join(rows),
    )


_CARD = """\
# FRet triples

Made by `gecko fret run` (gecko_jax): a language model read each passage and wrote a \
task and a query; it then chose the positive and the hard negative among the \
neighbours of the query (Lee et al. 2024, section 3.2). Queries are machine-written \
and were not checked by people.

- triples: {num_rows:,}; the positive is not the seed in {moved:.1%} of them
- generator: {generator}, licence of its output: {licence}
- retriever: {retriever}, {num_candidates} candidates
- seed: {seed}; hash of the fused records: {hash}
- prompts: {prompts}
- kept clear of: {clear_of}
- licences of the texts (positives, hard negatives, and the passages that the model \
read): {licences}

| stage | records | kept | dropped |
|---|---|---|---|
{stages}

## Fields of `fret.jsonl`, one triple per line

| field | |
|---|---|
| `task` | name of the task; rare ones are "search result" |
| `query` | query written by the model |
| `positive`, `title` | passage chosen for it |
| `negatives`, `negative_titles` | the hard negative, a list of one, if there is any |
| `task_description` | the task in the model's words |
| `generator`, `prompt` | the model, and the prompt with its version |
| `seed` | number of the passage that the model read |
| `source`, `source_id`, `licence` | origin of the positive, as far as known |
| `negative_sources`, `negative_source_ids`, `negative_licences` | of the negatives |
| `seed_source`, `seed_source_id`, `seed_licence` | of the passage that the model read |

`gecko train --config.data.files=fret.jsonl` trains on it;
`gecko_jax.data.fret_builder.build(FOLDER, DATA_DIR)` makes it a TFDS data set.
"""
