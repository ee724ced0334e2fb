"""The report: one static page that shows what a run made, to somebody who must decide.

Everything that a model or a passage wrote is escaped, and the page may load and run
nothing: it is what it shows. Plots are drawn as SVG by `charts`.
"""

import dataclasses
import html
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections
import numpy as np

from gecko_jax.fret import fusion, pipeline, runs, stages
from gecko_jax.io import writing
from gecko_jax.llm import request_log
from gecko_jax.plots import charts
from gecko_jax.text import word_rule

OUTPUT = "report.html"
_PAPER_MOVED = 0.15  # section 4.3 of the paper
_MAX_TASKS = 16
_CUT = 420  # characters of a passage that are shown


@dataclasses.dataclass
class Facts:
    """What the page tells, gathered shard by shard.

    Attributes:
        rows: Triples.
        moved: Those whose positive is not the seed.
        ranks: Name of a histogram -> rank -> number of rows.
        agreements: Kendall's tau of the two judges, row by row.
        same_first: Rows whose best candidate is the same for both.
        tasks: Task -> number of queries.
        query_words: Of each query.
        passage_words: Of each seed passage.
        shown: Rows drawn at random, side by side.
    """

    rows: int
    moved: int
    ranks: dict[str, Counter[int]]
    agreements: list[float]
    same_first: int
    tasks: Counter[str]
    query_words: list[int]
    passage_words: list[int]
    shown: list[dict[str, Any]]


def write(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, num_rows: int
) -> pathlib.Path:
    """Writes the page of a run, finished or not.

    Args:
        config: That the run was made with.
        workdir: Of the run.
        num_rows: Random rows to show.

    Raises:
        ValueError: Nothing is fused yet, or the settings are not those of the run.
    """
    if not (workdir / "passages").is_dir():
        raise ValueError(f"{workdir}: no run here; start one with `gecko fret run`")
    source = runs.prepare(config, workdir, request_log.Budget(), runs.open_model)
    passes = runs.main_pipeline(source)
    for step in passes.steps:
        if step.stage.folder.is_dir():
            step.stage.begin()
    facts = gather(passes, num_rows)
    path = workdir / OUTPUT
    with writing.write_file(path) as temporary:
        temporary.write_text(render(passes, facts), encoding="utf-8")
    return path


def gather(passes: pipeline.Pipeline, num_rows: int) -> Facts:
    """Reads every finished shard."""
    facts = Facts(0, 0, {}, [], 0, Counter(), [], [], [])
    source = passes.source
    rng = np.random.default_rng(source.config.seed)
    finished = [s for s in range(len(passes.shards)) if passes.fuse.has(s)]
    if not finished:
        raise ValueError(
            f"{source.workdir}: no shard is fused yet; run `gecko fret run` first"
        )
    for shard in finished:
        queries = stages.by_id(passes.generate.read(shard))
        retrieved = stages.by_id(passes.retrieve.read(shard))
        for record in stages.kept(passes.fuse.read(shard)):
            query, found = queries[record["id"]], retrieved[record["id"]]
            facts.rows += 1
            facts.moved += record["moved"]
            facts.tasks[query["task"]] += 1
            facts.query_words.append(word_rule.count(word_rule.words(query["query"])))
            seed = source.store.texts[record["id"]][1]
            facts.passage_words.append(word_rule.count(word_rule.words(seed)))
            _count_ranks(facts, record, found)
            # Each row is as likely to be shown as any other.
            row = {"record": record, "query": query, "found": found}
            if len(facts.shown) < num_rows:
                facts.shown.append(row)
            elif num_rows:
                place = int(rng.integers(facts.rows))
                if place < num_rows:
                    facts.shown[place] = row
    return facts


def _count_ranks(facts: Facts, record: dict[str, Any], found: dict[str, Any]) -> None:
    def count(name: str, rank: int) -> None:
        facts.ranks.setdefault(name, Counter())[rank] += 1

    candidates = found["candidates"]
    seed = stages.position(found, record["id"])
    for values in (record["fused"], *record["ranks"].values()):
        if values is not None:
            stages.of_candidates(values, found)
    count("seed, by retrieval", found["seed_rank"] or len(candidates) + 1)
    for name, title in (("likelihood", "QL"), ("relevance", "RC")):
        if record["ranks"][name] is not None:
            count(f"seed, by {title}", record["ranks"][name][seed])
    count("seed, fused", int(fusion.ranks(record["fused"])[seed]))
    count("positive, by retrieval", stages.position(found, record["positive"]) + 1)
    if record["negative"] is not None:
        count("negative, by retrieval", stages.position(found, record["negative"]) + 1)
    first, second = record["ranks"]["likelihood"], record["ranks"]["relevance"]
    if first is not None and second is not None:
        facts.agreements.append(kendall(first, second))
        facts.same_first += _best(first) == _best(second)


def _best(ranks: Sequence[int]) -> int:
    return int(np.argmin(ranks))


def kendall(first: Sequence[int], second: Sequence[int]) -> float:
    """Returns the share of pairs in the same order less that of those in the other."""
    a, b = np.asarray(first), np.asarray(second)
    upper = np.triu_indices(len(a), 1)
    signs = np.sign(a[:, None] - a)[upper] * np.sign(b[:, None] - b)[upper]
    return float(signs.mean())


def render(passes: pipeline.Pipeline, facts: Facts) -> str:
    """Returns the page."""
    source = passes.source
    config = source.config
    last = max((max(counter) for counter in facts.ranks.values()), default=1)
    parts = [
        _PAGE_HEAD,
        f"<h1>FRet: {_escape(source.workdir.resolve().name)}</h1>",
        f"<p class=lead>{facts.rows:,} triples, written and judged by "
        f"<b>{_escape(source.model_facts['model'])}</b>, candidates by "
        f"<b>{_escape(config.retrieve.model or 'BM25')}</b>.</p>",
        _tiles(facts, passes),
        "<h2>From passages to triples</h2>",
        _funnel(passes),
        "<h2>Where the ranks lie</h2>",
        "<p>The seed is the passage that the query was written for. A good retriever "
        "and good judges put it near the top; where they do not, either another "
        "passage answers the query better, or the judge errs. A seed that retrieval "
        "did not find stands one place behind the last.</p>",
        _figures(
            charts.bars(
                {str(rank): counter[rank] for rank in range(1, last + 1)},
                f"rank of the {name}",
            )
            for name, counter in facts.ranks.items()
            if sum(counter.values())
        ),
        "<h2>Tasks and lengths</h2>",
        charts.rows(_top(facts.tasks), "queries of each task"),
        _figures(
            [
                charts.histogram(facts.query_words, "words of a query"),
                charts.histogram(facts.passage_words, "words of a seed passage"),
            ]
        ),
        "<h2>What it took</h2>",
        _costs(passes),
        f"<h2>{len(facts.shown)} random rows</h2>",
        "<p>Candidates in the order of retrieval. A filled mark is the choice: the "
        "positive, and the hard negative. Move along the table to see all of it.</p>",
        *(_row(source, row) for row in facts.shown),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _tiles(facts: Facts, passes: pipeline.Pipeline) -> str:
    rows = max(facts.rows, 1)
    tiles = [
        (
            f"{facts.moved / rows:.1%}",
            "of positives are not the seed",
            f"the paper's: about {_PAPER_MOVED:.0%}",
        )
    ]
    if facts.agreements:
        tiles.append(
            (
                f"{np.mean(facts.agreements):.2f}",
                "agreement of QL and RC",
                "Kendall's tau; 1 is the same order, 0 is chance",
            )
        )
        tiles.append(
            (
                f"{facts.same_first / rows:.0%}",
                "of rows have the same best candidate",
                "for QL and for RC",
            )
        )
    seeds = sum(map(len, passes.shards))
    tiles.append(
        (f"{facts.rows / max(seeds, 1):.0%}", "of seeds became a triple", f"{seeds:,}")
    )
    tiles.append((f"{len(facts.tasks):,}", "different tasks", ""))
    return (
        "<div class=tiles>"
        + "".join(
            f"<div class=tile><b>{value}</b><span>{name}</span><small>{note}</small>"
            "</div>"
            for value, name, note in tiles
        )
        + "</div>"
    )


def _funnel(passes: pipeline.Pipeline) -> str:
    lines = []
    for stage in (passes.source.stage, *(step.stage for step in passes.steps)):
        done = stage.done()
        if done is None:
            lines.append(f"<tr><td>{stage.name}<td colspan=3><i>not finished</i>")
        elif done["records"]:
            why = ", ".join(
                f"{count:,} {_escape(name)}"
                for name, count in sorted(
                    done["dropped"].items(), key=lambda item: -item[1]
                )
            )
            lines.append(
                f"<tr><td>{stage.name}<td class=n>{done['records']:,}"
                f"<td class=n>{done['kept']:,}<td>{why}"
            )
    head = "<tr><th>stage<th class=n>records<th class=n>kept<th>dropped, by reason"
    return f"<table>{head}{''.join(lines)}</table>"


def _costs(passes: pipeline.Pipeline) -> str:
    prices = runs.open_budget(passes.source.config)
    lines, totals = [], np.zeros(3, np.int64)
    for step in passes.steps:
        done = step.stage.done()
        usage = done["usage"] if done else {}
        if not usage:
            continue
        numbers = [
            usage.get(n, 0) for n in ("requests", "prompt_tokens", "completion_tokens")
        ]
        totals += numbers
        lines.append(_cost_row(step.stage.name, numbers, prices))
    lines.append(_cost_row("together", totals.tolist(), prices))
    head = (
        "<tr><th>stage<th class=n>requests<th class=n>tokens read"
        "<th class=n>tokens written<th class=n>cost"
    )
    return f"<table>{head}{''.join(lines)}</table>"


def _cost_row(name: str, numbers: Sequence[int], prices: request_log.Budget) -> str:
    cells = "".join(f"<td class=n>{number:,}" for number in numbers)
    cost = prices.price(numbers[1], numbers[2])
    return f"<tr><td>{name}{cells}<td class=n>{cost:,.4f}"


def _row(source: pipeline.Source, row: dict[str, Any]) -> str:
    record, query, found = row["record"], row["query"], row["found"]
    lines = []
    for place, number in enumerate(found["candidates"]):
        marks = ""
        if number == record["positive"]:
            marks += "<span class=positive>positive</span>"
        if number == record["negative"]:
            marks += "<span class=negative>negative</span>"
        if number == record["id"]:
            marks += "<span class=seed>seed</span>"
        cells = "".join(
            f"<td class=n>{'–' if ranks is None else ranks[place]}"
            for ranks in (record["ranks"]["likelihood"], record["ranks"]["relevance"])
        )
        shown = _escape(_shorten(source.store.write(number)))
        lines.append(
            f"<tr><td class=n>{place + 1}{cells}"
            f"<td class=n>{record['fused'][place]:.3f}<td>{marks}<td class=text>{shown}"
        )
    head = (
        "<tr><th class=n>retrieval<th class=n>QL<th class=n>RC<th class=n>fused<th>"
        "<th>passage"
    )
    moved = " · moved" if record["moved"] else ""
    return (
        f"<article><h3>{_escape(query['query'])}</h3><p class=note>"
        f"{_escape(query['task'])} · seed {record['id']} · prompt "
        f"{_escape(query['prompt'])}, examples {_escape(query['shots'])}{moved}</p>"
        f"<div class=wide><table>{head}{''.join(lines)}</table></div></article>"
    )


def _figures(drawn: Iterable[str]) -> str:
    return f"<div class=figures>{''.join(drawn)}</div>"


def _top(counter: Counter[str]) -> dict[str, int]:
    """Returns the most frequent, and the rest as one."""
    common = dict(counter.most_common(_MAX_TASKS))
    rest = counter.total() - sum(common.values())
    others = len(counter) - len(common)
    return common | ({f"{others:,} other tasks": rest} if rest else {})


def _shorten(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT].rsplit(' ', 1)[0]} …"


def _escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


_PAGE_HEAD = """<!doctype html>
<html lang=en><head><meta charset=utf-8>
<meta http-equiv=Content-Security-Policy
 content="default-src 'none'; style-src 'unsafe-inline'">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>FRet report</title>
<style>
body { margin: 0; background: #f5f7f8; color: #22313f;
       font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.5rem 5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .3rem 0 .8rem; }
.lead { font-size: 1.05rem; }
.note, small, figcaption { color: #61707d; font-size: .85rem; }
.tiles, .figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); margin-top: 1.2rem; }
.figures { grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.tile, figure, article, table { background: #fff; border: 1px solid #e0e5e9;
  border-radius: 6px; }
.tile { padding: .9rem 1rem; display: flex; flex-direction: column; }
.tile b { font-size: 1.6rem; color: #135457; }
figure { margin: 0; padding: .8rem 1rem; }
figure svg { width: 100%; height: auto; display: block; }
article { padding: 1rem 1.2rem; margin: 0 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
article table { border: 0; }
.wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem;
  border-bottom: 1px solid #eef1f3; }
th { color: #61707d; font-weight: 600; font-size: .8rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.text { min-width: 24rem; overflow-wrap: anywhere; }
.positive, .negative, .seed { border-radius: 3px; padding: .05rem .4rem;
  margin: 0 .2rem .2rem 0; font-size: .78rem; display: inline-block; }
.positive { background: #1f7a73; color: #fff; }
.negative { background: #b64a27; color: #fff; }
.seed { border: 1px solid #7b8794; color: #22313f; }
</style></head><body><main>"""
