"""Facts about a run for its report: of every triple, of drops, and some rows."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gecko_jax.fret import fusion, html_page, pipeline, records, stages
from gecko_jax.text import word_rule


class Facts:
    """What the page shows of the finished shards."""

    def __init__(self, passes: pipeline.Pipeline, num_rows: int):
        self.triples: list[dict[str, Any]] = []
        self.rows: list[html_page.Row] = []  # random ones
        self.moved: list[html_page.Row] = []  # random ones whose positive moved
        # Stage -> number of records, and tokens and requests.
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        # (stage, reason) -> number of dropped records, and the text of one.
        self.dropped: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], str] = {}
        source = passes.source
        rng = np.random.default_rng(source.config.seed)
        finished = [s for s in range(len(passes.shards)) if passes.fuse.has(s)]
        if not finished:
            raise ValueError(
                f"{source.workdir}: no shard is fused yet; run `gecko fret run` first"
            )
        num_moved = 0
        for shard in finished:
            by_stage: dict[str, dict[int, stages.Record]] = defaultdict(dict)
            for step in passes.steps:
                if step.stage is source.embed:
                    continue
                rows = step.stage.read(shard)
                by_stage[step.stage.name] = stages.by_id(rows)
                self._count(step.stage.name, rows, by_stage[passes.queries.name])
            for number, record in by_stage["fuse"].items():
                query = by_stage[passes.queries.name][number]
                row = by_stage["retrieve"][number]
                self.triples.append(_measure(source, query, row, record))
                ql = by_stage["likelihood"].get(number, {})
                rc = by_stage["relevance"].get(number, {})
                shown = (query, row, record, ql, rc)
                _sample(self.rows, shown, len(self.triples), num_rows, rng)
                if record["moved"]:
                    num_moved += 1
                    _sample(self.moved, shown, num_moved, num_rows, rng)

    def _count(
        self,
        stage: str,
        rows: Iterable[stages.Record],
        queries: dict[int, stages.Record],
    ) -> None:
        for row in rows:
            self.counts[stage].update(row.get("usage", {}), records=1)
            if reason := row.get(records.DROPPED):
                self.dropped[stage, reason] += 1
                if row["id"] in queries:
                    row = {**queries[row["id"]], **row}
                shown = (row.get(n) for n in ("detail", "query", "raw", "line"))
                text = next((v for v in shown if v and str(v).strip()), "")
                text = html_page.shortened(str(text))
                self.examples.setdefault((stage, reason), text)


def _sample(
    rows: list[html_page.Row],
    row: html_page.Row,
    count: int,
    num_rows: int,
    rng: np.random.Generator,
) -> None:
    """Reservoir sampling: all of `count` rows are equally likely to be shown."""
    if len(rows) < num_rows:
        rows.append(row)
    elif num_rows and (place := int(rng.integers(count))) < num_rows:
        rows[place] = row


def _measure(
    source: pipeline.Source,
    query: stages.Record,
    row: stages.Record,
    record: stages.Record,
) -> dict[str, Any]:
    """Returns the facts about a triple; ranks have the names of their charts."""
    first, second = record["ranks"]["likelihood"], record["ranks"]["relevance"]
    for values in (record["fused"], first, second):
        if values is not None:
            stages.of_candidates(values, row)
    seed = stages.position(row, stages.seed_of(row))
    ranks = {"seed, by retrieval": row["seed_rank"] or len(row["candidates"]) + 1}
    if first is not None:
        ranks["seed, by QL"] = first[seed]
    if second is not None:
        ranks["seed, by RC"] = second[seed]
    ranks["seed, fused"] = int(fusion.ranks(record["fused"])[seed])
    for name in ("positive", "negative"):
        if record[name] is not None:
            ranks[f"{name}, by retrieval"] = stages.position(row, record[name]) + 1
    body = source.store.texts[stages.seed_of(row)][1]
    facts = {
        "moved": record["moved"],
        "task": query["task"],
        "query": word_rule.count(word_rule.words(query["query"])),
        "passage": word_rule.count(word_rule.words(body)),
        "ranks": ranks,
        "candidates": len(row["candidates"]),
        "others": len(record.get("positives", ())),
        "given": len(query.get("negatives", ())),
        "false": len(record.get("false_negatives", ())),
    }
    if first is not None and second is not None:
        facts["tau"] = kendall(first, second)
        facts["same_first"] = np.argmin(first) == np.argmin(second)
    return facts


def kendall(first: Sequence[int], second: Sequence[int]) -> float:
    """Returns Kendall's tau: the share of concordant less that of discordant pairs."""
    a, b = np.asarray(first), np.asarray(second)
    upper = np.triu_indices(len(a), 1)
    signs = np.sign(a[:, None] - a)[upper] * np.sign(b[:, None] - b)[upper]
    return float(signs.mean())
