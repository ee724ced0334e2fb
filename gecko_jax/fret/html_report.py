"""The report: one static page with statistics and examples of a run.

All text of models and passages is escaped, and the page cannot load or run anything.
Charts are HTML and CSS.
"""

import html
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from gecko_jax.fret import fusion, pipeline, runs, stages
from gecko_jax.io import writing
from gecko_jax.text import word_rule

OUTPUT = "report.html"
_PAPER_MOVED = 0.15  # section 4.3 of the paper
_MAX_TASKS = 16
_MAX_CHARACTERS = 420  # of a passage
_MAX_BINS = 15  # of a histogram


# Records of generate, retrieve and fuse.
_Row = tuple[stages.Record, stages.Record, stages.Record]


def write(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, num_rows: int
) -> pathlib.Path:
    """Writes the page of a run, finished or not, with some random rows.

    Raises:
        ValueError: No shard is fused yet, or the settings are not those of the run.
    """
    if not (workdir / "passages").is_dir():
        raise ValueError(f"{workdir}: no run here; start one with `gecko fret run`")
    source = runs.prepare(config, workdir)
    passes = runs.main_pipeline(source)
    for step in passes.steps:
        if step.stage.folder.is_dir():
            step.stage.begin()
    page = _render(passes, *_gather(passes, num_rows))
    path = workdir / OUTPUT
    with writing.write_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _gather(
    passes: pipeline.Pipeline, num_rows: int
) -> tuple[list[dict[str, Any]], list[_Row]]:
    """Returns the facts about every triple, and some random rows."""
    source = passes.source
    facts: list[dict[str, Any]] = []
    shown: list[_Row] = []
    rng = np.random.default_rng(source.config.seed)
    finished = [s for s in range(len(passes.shards)) if passes.fuse.has(s)]
    if not finished:
        raise ValueError(
            f"{source.workdir}: no shard is fused yet; run `gecko fret run` first"
        )
    for shard in finished:
        queries = stages.by_id(passes.queries.read(shard))
        retrieved = stages.by_id(passes.retrieve.read(shard))
        for record in stages.kept(passes.fuse.read(shard)):
            row = queries[record["id"]], retrieved[record["id"]], record
            facts.append(_measure(source, *row))
            # Reservoir sampling: all rows are equally likely to be shown.
            if len(shown) < num_rows:
                shown.append(row)
            elif num_rows:
                place = int(rng.integers(len(facts)))
                if place < num_rows:
                    shown[place] = row
    return facts, shown


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
    seed = stages.position(row, record["id"])
    ranks = {"seed, by retrieval": row["seed_rank"] or len(row["candidates"]) + 1}
    if first is not None:
        ranks["seed, by QL"] = first[seed]
    if second is not None:
        ranks["seed, by RC"] = second[seed]
    ranks["seed, fused"] = int(fusion.ranks(record["fused"])[seed])
    for name in ("positive", "negative"):
        if record[name] is not None:
            rank = stages.position(row, record[name]) + 1
            ranks[f"{name}, by retrieval"] = rank
    facts = {
        "moved": record["moved"],
        "task": query["task"],
        "query": _num_words(query["query"]),
        "passage": _num_words(source.store.texts[record["id"]][1]),
        "ranks": ranks,
    }
    if first is not None and second is not None:
        facts["tau"] = kendall(first, second)
        facts["same_first"] = np.argmin(first) == np.argmin(second)
    return facts


def _num_words(text: str) -> int:
    return word_rule.count(word_rule.words(text))


def kendall(first: Sequence[int], second: Sequence[int]) -> float:
    """Returns Kendall's tau: the share of concordant less that of discordant pairs."""
    a, b = np.asarray(first), np.asarray(second)
    upper = np.triu_indices(len(a), 1)
    signs = np.sign(a[:, None] - a)[upper] * np.sign(b[:, None] - b)[upper]
    return float(signs.mean())


def _render(
    passes: pipeline.Pipeline, facts: Sequence[dict[str, Any]], shown: Sequence[_Row]
) -> str:
    """Returns the page."""
    source, config = passes.source, passes.source.config
    last = max((max(one["ranks"].values()) for one in facts), default=1)
    names = dict.fromkeys(name for one in facts for name in one["ranks"])
    charts = []
    for name in names:
        counts = Counter(one["ranks"].get(name) for one in facts)
        values = {str(rank): counts[rank] for rank in range(1, last + 1)}
        charts.append(_columns(values, f"rank of the {name}"))
    lengths = [
        _columns(_histogram([one[side] for one in facts]), f"words of a {title}")
        for side, title in (("query", "query"), ("passage", "seed passage"))
    ]
    tasks = Counter(one["task"] for one in facts)
    common = tasks.most_common(_MAX_TASKS)
    if rest := tasks.total() - sum(count for _, count in common):
        common.append((f"{len(tasks) - len(common):,} other tasks", rest))
    parts = [
        _PAGE_HEAD,
        f"<h1>FRet: {_escape(source.workdir.resolve().name)}</h1>",
        f"<p class=lead>{len(facts):,} triples, written and judged by "
        f"<b>{_escape(source.model_facts['model'])}</b>, candidates by "
        f"<b>{_escape(config.retrieve.model or 'BM25')}</b>.</p>",
        _tiles(facts, len(tasks), passes),
        "<h2>From passages to triples</h2>",
        _funnel(passes),
        "<h2>Ranks</h2>",
        "<p>The seed is the passage that the query was written for. A good retriever "
        "and good judges rank it near the top; otherwise either another passage "
        "answers the query better, or the judge errs. A seed that retrieval did not "
        "find counts as one place behind the last.</p>",
        f"<div class=figures>{''.join(charts)}</div>",
        "<h2>Tasks and lengths</h2>",
        _table(("task", "*queries"), [(name, f"{count:,}") for name, count in common]),
        f"<div class=figures>{''.join(lengths)}</div>",
        "<h2>Cost</h2>",
        _costs(passes),
        f"<h2>{len(shown)} random rows</h2>",
        "<p>Candidates in the order of retrieval. A filled mark is the choice: the "
        "positive, and the hard negative. Scroll the table sideways to see all of "
        "it.</p>",
        *(_row(source, *records) for records in shown),
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def _tiles(
    facts: Sequence[dict[str, Any]], num_tasks: int, passes: pipeline.Pipeline
) -> str:
    seeds = sum(map(len, passes.shards))
    rows = max(len(facts), 1)
    share = sum(one["moved"] for one in facts) / rows
    moved = f"the paper's: about {_PAPER_MOVED:.0%}"
    tiles = [(f"{share:.1%}", "of positives are not the seed", moved)]
    if taus := [one["tau"] for one in facts if "tau" in one]:
        same = sum(one.get("same_first", False) for one in facts) / rows
        note = "Kendall's tau; 1 is the same order, 0 is chance"
        tiles += [
            (f"{np.mean(taus):.2f}", "agreement of QL and RC", note),
            (f"{same:.0%}", "of rows have the same best candidate", "for QL and RC"),
        ]
    tiles += [
        (f"{len(facts) / max(seeds, 1):.0%}", "of seeds became a triple", f"{seeds:,}"),
        (f"{num_tasks:,}", "different tasks", ""),
    ]
    cells = (
        f"<div class=tile><b>{value}</b><span>{name}</span><small>{note}</small></div>"
        for value, name, note in tiles
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def _funnel(passes: pipeline.Pipeline) -> str:
    rows = []
    for stage, done in passes.done().items():
        if done is None:
            rows.append((stage, "", "", "not finished"))
        elif done["records"]:
            dropped = sorted(done["dropped"].items(), key=lambda item: -item[1])
            reasons = ", ".join(f"{count:,} {name}" for name, count in dropped)
            counts = f"{done['records']:,}", f"{done['kept']:,}"
            rows.append((stage, *counts, reasons))
    return _table(("stage", "*records", "*kept", "dropped, by reason"), rows)


def _costs(passes: pipeline.Pipeline) -> str:
    prices = runs.open_budget(passes.source.config)
    names = ("requests", "prompt_tokens", "completion_tokens")
    usages = {
        stage: [done["usage"].get(name, 0) for name in names]
        for stage, done in passes.done().items()
        if done and done["usage"]
    }
    usages["total"] = np.sum([*usages.values(), [0, 0, 0]], axis=0).tolist()
    rows = [
        (name, *(f"{n:,}" for n in numbers), f"{prices.price(*numbers[1:]):,.4f}")
        for name, numbers in usages.items()
    ]
    head = ("stage", "*requests", "*prompt tokens", "*completion tokens", "*cost")
    return _table(head, rows)


def _row(
    source: pipeline.Source,
    query: stages.Record,
    row: stages.Record,
    record: stages.Record,
) -> str:
    """Returns one row with its candidates."""
    lines = []
    judged = (record["ranks"]["likelihood"], record["ranks"]["relevance"])
    for place, number in enumerate(row["candidates"]):
        marks = "".join(
            f"<span class={name}>{name}</span>"
            for name, chosen in (
                ("positive", record["positive"]),
                ("negative", record["negative"]),
                ("seed", record["id"]),
            )
            if number == chosen
        )
        ranks = ("–" if values is None else str(values[place]) for values in judged)
        text = source.store.write(number)
        if len(text) > _MAX_CHARACTERS:
            text = f"{text[:_MAX_CHARACTERS].rsplit(' ', 1)[0]} …"
        fused = f"{record['fused'][place]:.3f}"
        lines.append((str(place + 1), *ranks, fused, _Markup(marks), text))
    head = ("*retrieval", "*QL", "*RC", "*fused", "", "passage")
    moved = " · moved" if record["moved"] else ""
    return (
        f"<article><h3>{_escape(query['query'])}</h3><p class=note>"
        f"{_escape(query['task'])} · seed {record['id']} · prompt "
        f"{_escape(query['prompt'])}, examples {_escape(query['shots'])}{moved}</p>"
        f"<div class=wide>{_table(head, lines)}</div></article>"
    )


class _Markup(str):
    """HTML that is not escaped again."""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; a "*" before a heading marks a column of numbers."""
    classes = ["class=n" if name.startswith("*") else "" for name in head]

    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(
            f"<{tag} {name}>{cell if isinstance(cell, _Markup) else _escape(cell)}"
            for name, cell in zip(classes, cells, strict=True)
        )

    lines = [line("th", (name.removeprefix("*") for name in head))]
    return f"<table>{''.join(lines + [line('td', row) for row in rows])}</table>"


def _histogram(values: Sequence[int]) -> dict[str, int]:
    """Counts values in bins of equal, whole width, named by their first value."""
    low, high = min(values, default=0), max(values, default=0)
    step = -(-(high - low + 1) // _MAX_BINS)
    edges = np.arange(low, high + step + 1, step)
    counts, _ = np.histogram(values, edges)
    return dict(zip(map(str, edges), counts.tolist(), strict=False))


def _columns(values: Mapping[str, int], caption: str) -> str:
    """Returns a column chart."""
    highest = max(*values.values(), 1)
    columns = "".join(
        f'<span title="{name}: {count:,}"><i style="height:{count / highest:.1%}"></i>'
        f"<small>{name}</small></span>"
        for name, count in values.items()
    )
    return (
        f"<figure><small>{highest:,}</small><div class=columns>{columns}</div>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


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
.columns { display: flex; height: 8rem; gap: .2rem; border-top: 1px solid #e4e8ec; }
.columns span { flex: 1; min-width: 0; display: grid; grid-template-rows: 1fr auto;
  text-align: center; }
.columns i { align-self: end; background: #3fa796; }
.columns small { font-size: .7rem; overflow: hidden; }
article { padding: 1rem 1.2rem; margin: 0 0 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
article table { border: 0; }
.wide { overflow-x: auto; }
.wide td:last-child { min-width: 24rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .7rem;
  border-bottom: 1px solid #eef1f3; }
td:last-child { overflow-wrap: anywhere; }
th { color: #61707d; font-weight: 600; font-size: .8rem; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.positive, .negative, .seed { border-radius: 3px; padding: .05rem .4rem;
  margin: 0 .2rem .2rem 0; font-size: .78rem; display: inline-block; }
.positive { background: #1f7a73; color: #fff; }
.negative { background: #b64a27; color: #fff; }
.seed { border: 1px solid #7b8794; color: #22313f; }
</style></head><body><main>"""
