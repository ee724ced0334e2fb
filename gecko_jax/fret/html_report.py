"""The report: one static page with statistics and examples of a run.

It answers, in this order: how much was kept and moved, whether the judges judge, what
was dropped, what it cost, and what moved. Charts are HTML and CSS.
"""

import math
import pathlib
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from gecko_jax.fret import export, html_page, measure, pipeline, report_facts, runs
from gecko_jax.io import writing

OUTPUT = "report.html"
_REASONS = {
    "evaluation_set": "repeats a text of passages.decontaminate",
    "duplicate": "was there before",
    "near_duplicate": "resembles an earlier passage",
    "too_short": "fewer words than the setting allows",
    "too_long": "longer than the setting allows",
    "no_passage": "its positive was dropped as a passage",
    "copied_example": "repeats a query of the prompt",
    "copied_passage": "copies a long run of words of the passage",
    "cut_off": "the answer reached generate.max_tokens",
    "no_candidates": "BM25 found no second passage",
    "low_rank": "retrieval ranks the seed below retrieve.max_seed_rank",
    "low_cosine": "the seed is below retrieve.min_seed_cosine",
    "low_information": "the passage makes the query hardly more likely",
    "no_likelihood": "its QL was dropped",
    "no_relevance": "its RC was dropped",
}


def write(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, num_rows: int
) -> pathlib.Path:
    """Writes the page of a run, finished or not, with some random rows."""
    if not (workdir / "passages").is_dir():
        raise ValueError(f"{workdir}: no run here; start one with `gecko fret run`")
    source = runs.prepare(config, workdir)
    passes = runs.main_pipeline(source)
    for step in passes.steps:
        if step.stage.folder.is_dir():
            step.stage.begin()
    page = _render(passes, report_facts.Facts(passes, num_rows))
    path = workdir / OUTPUT
    with writing.write_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _render(passes: pipeline.Pipeline, gathered: report_facts.Facts) -> str:
    """Returns the page."""
    source, config, facts = passes.source, passes.source.config, gathered.triples
    seed = "old positive" if source.pair_files else "seed"
    last = max((max(triple["ranks"].values()) for triple in facts), default=1)
    charts = []
    for name in dict.fromkeys(name for triple in facts for name in triple["ranks"]):
        counts = Counter(triple["ranks"].get(name) for triple in facts)
        values = {str(rank): counts[rank] for rank in range(1, last + 1)}
        shown = name.replace("seed", seed)
        charts.append(html_page.columns(values, f"rank of the {shown}"))
    titles = {"query": "words of a query", "passage": f"words of {seed}"}
    lengths = [
        html_page.columns(html_page.histogram([f[side] for f in facts]), title)
        for side, title in titles.items()
    ]
    tasks = Counter(triple["task"] for triple in facts)
    common = tasks.most_common(16)
    if num_others := tasks.total() - sum(count for _, count in common):
        common.append((f"{len(tasks) - len(common):,} other tasks", num_others))
    listed = [(name, f"{count:,}") for name, count in common]
    files = ", ".join(path.name for path in source.pair_files)
    description = (
        f"queries of {files}, judged by" if files else "triples, written and judged by"
    )
    num = len(passes.shards)
    num_fused = sum(map(passes.fuse.has, range(num)))
    unfinished = f"Not finished: {num_fused:,} of {num:,} shards."
    unfinished = f"<p><b>{unfinished}</b> Figures are of these.</p>"
    moved = [html_page.side_by_side(passes, row, seed) for row in gathered.moved]
    rows = [html_page.with_candidates(passes, row, seed) for row in gathered.rows]
    page = string.Template((export.TEMPLATES / "report.html").read_text("utf-8"))
    return page.substitute(
        name=html_page.escape(source.workdir.resolve().name),
        num_triples=f"{len(facts):,}",
        what=html_page.escape(description),
        model=html_page.escape(source.model_facts["model"]),
        retriever=html_page.escape(config.retrieve.model or "BM25"),
        unfinished="" if num_fused == num else unfinished,
        tiles=_tiles(gathered, len(tasks), passes),
        judges=_judges(passes, facts, seed),
        funnel=_funnel(passes, gathered),
        dropped=_dropped(gathered),
        costs=_costs(passes, gathered),
        seed=seed,
        num_moved=len(moved),
        moved="".join(f"\n{article}" for article in moved),
        ranks="".join(charts),
        tasks=html_page.table(("task", "*queries"), listed),
        lengths="".join(lengths),
        num_rows=len(rows),
        rows="".join(f"\n{article}" for article in rows),
    )


def _tiles(
    gathered: report_facts.Facts, num_tasks: int, passes: pipeline.Pipeline
) -> str:
    facts = gathered.triples
    seeds, rows = gathered.counts[passes.queries.name]["records"], max(len(facts), 1)
    share = sum(triple["moved"] for triple in facts) / rows
    moved, kept_share = f"{share:.1%}", f"{len(facts) / max(seeds, 1):.0%}"
    if passes.source.pair_files:
        tiles = [(moved, "of positives moved", "to a passage judged better")]
        tiles.append((kept_share, "of lines were kept", f"of {seeds:,}"))
    else:  # Section 4.3 of the paper.
        tiles = [(moved, "of positives are not the seed", "the paper's: about 15%")]
        tiles.append((kept_share, "of seeds became a triple", f"of {seeds:,}"))
    if num_negatives := sum(triple["given"] for triple in facts):
        num_false = sum(triple["false"] for triple in facts)
        note = f"judged above its positive: {num_false:,} of {num_negatives:,}"
        false_share = f"{num_false / num_negatives:.1%}"
        tiles.append((false_share, "of negatives may be false", note))
    if num_further := sum(triple["others"] for triple in facts):
        tiles.append((f"{num_further:,}", "further positives", "judged nearly as high"))
    if taus := [triple["tau"] for triple in facts if "tau" in triple]:
        same = sum(triple.get("same_first", False) for triple in facts) / rows
        note = "Kendall's tau; 1 is the same order, 0 is chance"
        tiles += [
            (f"{np.mean(taus):.2f}", "agreement of QL and RC", note),
            (f"{same:.0%}", "of rows have the same best candidate", "for QL and RC"),
        ]
    tiles.append((f"{num_tasks:,}", "different tasks", ""))
    cells = (
        f"<div class=tile><b>{value}</b><span>{name}</span><small>{note}</small></div>"
        for value, name, note in tiles
    )
    return f"<div class=tiles>{''.join(cells)}</div>"


def _judges(
    passes: pipeline.Pipeline, facts: Sequence[dict[str, Any]], seed: str
) -> str:
    """Returns how high each judge ranks the seed, beside chance."""
    calibration = _calibration(passes.source)
    chance = np.mean([np.mean(1 / np.arange(1, f["candidates"] + 1)) for f in facts])
    head = ["", f"*MRR, {len(facts):,} rows", "*ranked first"]
    rows = []
    for name in ("retrieval", "QL", "RC", "fusion"):
        key = "fused" if name == "fusion" else f"by {name}"
        seed_ranks = [f["ranks"].get(f"seed, {key}") for f in facts]
        ranks = np.array([rank for rank in seed_ranks if rank is not None])
        row = [name, "not asked", ""]
        if len(ranks):
            error = (1 / ranks).std() / math.sqrt(len(ranks))
            own = f"{(1 / ranks).mean():.3f} ± {error:.3f}"
            row = [name, own, f"{np.mean(ranks == 1):.0%}"]
        rows.append(row)
    top = np.mean([1 / f["candidates"] for f in facts])
    rows.append(["chance", f"{chance:.3f}", f"{top:.0%}"])
    if calibration:
        head.append(f"*MRR, {calibration.seeds:,} held out")
        for row in rows:
            value = calibration.mrr.get(row[0])
            error = calibration.standard_error.get(row[0])
            spread = "" if error is None else f" ± {error:.3f}"
            row.append("" if value is None else f"{value:.3f}{spread}")
        warnings = map(html_page.escape, calibration.warnings)
        advice = "".join(f"<p><b>Warning:</b> {warning}.</p>" for warning in warnings)
    else:
        advice = (
            "<p><code>gecko fret calibrate</code> with this config asks both judges "
            "about held-out queries, a judge without weight too, and adds a column.</p>"
        )
    return (
        f"<p>Mean reciprocal rank (MRR) of the {seed} among the candidates, ± standard "
        "error: 1 is always first. A judge near chance decides nothing, and a fusion "
        f"below its best judge loses by fusing. Not every {seed} is the best answer: "
        f"an MRR of 1 is not the goal.</p>{html_page.table(head, rows)}{advice}"
    )


def _calibration(source: pipeline.Source) -> measure.Calibration | None:
    """Returns the calibration in the workdir, if it is finished and of this config."""
    passes = runs.calibration_pipeline(source)
    try:
        passes.relevance.compare()
        is_done = passes.relevance.done() is not None
    except ValueError:
        return None
    return measure.read_calibration(passes) if is_done else None


def _funnel(passes: pipeline.Pipeline, gathered: report_facts.Facts) -> str:
    counts = {stage: counter["records"] for stage, counter in gathered.counts.items()}
    dropped = Counter(gathered.dropped)
    if done := passes.source.stage.done():
        counts = {"passages": done["records"], **counts}
        dropped.update({("passages", why): n for why, n in done["dropped"].items()})
    rows = []
    for stage, count in counts.items():
        own = [(why, n) for (at, why), n in dropped.most_common() if at == stage]
        reasons = ", ".join(f"{n:,} {why}" for why, n in own)
        num_kept = count - sum(n for _, n in own)
        rows.append((stage, f"{count:,}", f"{num_kept:,}", reasons))
    return html_page.table(("stage", "*records", "*kept", "dropped, by reason"), rows)


def _dropped(gathered: report_facts.Facts) -> str:
    if not gathered.dropped:
        return "<p>No query was dropped.</p>"
    rows = []
    for (stage, reason), count in gathered.dropped.most_common():
        is_error = reason.startswith("error_")
        why = "the model gave no valid answer" if is_error else _REASONS.get(reason, "")
        text = gathered.examples[stage, reason]
        rows.append((stage, f"{count:,}", reason, why, text))
    head = ("stage", "*queries", "reason", "meaning", "an example")
    return html_page.table(head, rows)


def _costs(passes: pipeline.Pipeline, gathered: report_facts.Facts) -> str:
    config, num_triples = passes.source.config, len(gathered.triples)
    prices = runs.open_budget(config)
    names = ("requests", "prompt_tokens", "completion_tokens")
    counts: dict[str, Mapping[str, int]] = dict(gathered.counts)
    for stage, done in runs.calibration_pipeline(passes.source).done().items():
        if done:
            counts[f"calibration, {stage}"] = done["usage"]
    usages = {
        stage: [usage.get(name, 0) for name in names]
        for stage, usage in counts.items()
        if usage.get("requests")
    }
    usages["total"] = np.sum([*usages.values(), [0, 0, 0]], axis=0).tolist()
    rows = [
        (name, *(f"{n:,}" for n in numbers), f"{prices.price(*numbers[1:]):,.4f}")
        for name, numbers in usages.items()
    ]
    head = ["stage", "*requests", "*prompt tokens", "*completion tokens", "*cost"]
    _, *tokens = usages["total"]
    each = 1000 / max(num_triples, 1)
    note = f"{prices.price(*tokens) * each:,.4f} for a thousand triples."
    if not config.llm.price_input and not config.llm.price_output:
        head, rows = head[:-1], [row[:-1] for row in rows]
        note = (
            f"{tokens[0] * each:,.0f} tokens read for a thousand triples. Set "
            "llm.price_input and llm.price_output to see the cost."
        )
    return f"{html_page.table(head, rows)}<p class=note>{note}</p>"
