"""Tables of docs/fret.md, from the rows that `fret_proof.py` writes."""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gecko_jax.io import wording, writing

# Markers in the page. The text between them is replaced.
BEGIN, END = "<!-- fret_proof: begin -->", "<!-- fret_proof: end -->"
_JUDGES = {"retrieval": "retrieval", "QL": "QL", "RC": "RC", "RRF": "RRF of both"}


def write(folder: pathlib.Path, path: pathlib.Path, names: Sequence[str]) -> None:
    """Writes the tables into a page.

    Args:
        folder: Folder of the rows' files.
        path: Page to update.
        names: Names of the models, in order.
    """
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise SystemExit(f"{path}: no place for the tables; add {BEGIN} and {END}")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    parts = [BEGIN, *render(folder, names), END]
    with writing.write_file(path) as temporary:
        temporary.write_text(before + "\n".join(parts) + after)


def render(folder: pathlib.Path, names: Sequence[str]) -> list[str]:
    """Returns the lines."""
    if not (folder / "run.json").exists():
        raise SystemExit(f"{folder}: no run yet; run the command without --table")
    run = json.loads((folder / "run.json").read_text())
    lines = [
        "",
        f"{run['passages']:,} passages gave {run['queries']:,} queries and "
        f"{run['triples']:,} triples; generator {run['generator']}, candidates by "
        f"{run['retriever']} ({run['candidates']}), weights of QL and RC "
        f"{run['weights'][0]:g} and {run['weights'][1]:g}; the positive moved in "
        f"{run['moved']:.1%}. {run['seconds'] / run['passages']:.1f} s a passage, "
        f"{run['machine']}, {run['date']}, commit {run['commit']}.",
        "",
    ]
    for path in sorted(folder.glob("judges-*.json")):
        lines += _judges(json.loads(path.read_text()))
    made = [json.loads(path.read_text()) for path in folder.glob("model-*.json")]
    trained_by = {(row["data"], *row["steps"], row["batch_size"]) for row in made}
    for data, first, second, batch in sorted(trained_by):
        rows = [
            row
            for row in made
            if (row["data"], *row["steps"], row["batch_size"])
            == (data, first, second, batch)
        ]
        lines += [
            f"Models, nDCG@10 on the judged queries of `{data}`; "
            f"{wording.counted(first, 'step')} of the initial retriever, then "
            f"{second} of each row, batches of {batch}; "
            "mean ± standard deviation over the seeds, and the gain over "
            f"`{names[1]}` of the same seed:",
            "",
            *_models(rows, names),
            "",
        ]
    return lines


def _judges(found: Mapping[str, Any]) -> list[str]:
    seeds, queries = found["seeds"], found["queries"]
    head = [f"MRR of the seed ({seeds['seeds']} held out)"]
    head += [
        f"nDCG@10, {one['judged']} queries of `{task}`" for task, one in queries.items()
    ]
    head.append("mean of these")
    lines = [
        "Scores when each judge ranks the same candidates; ± is the standard error:",
        "",
        f"| | {' | '.join(head)} |",
        "|---" * (len(head) + 1) + "|",
    ]
    for name, about in _JUDGES.items():
        key = "fusion" if name == "RRF" else name
        cells = [_value(seeds["mrr"].get(key), seeds["standard_error"].get(key))]
        cells += [
            _value(one["ndcg"].get(name), one["standard_error"].get(name))
            for one in queries.values()
        ]
        judged = [one for one in queries.values() if name in one["ndcg"]]
        errors = [one["standard_error"][name] for one in judged]
        mean = statistics.fmean(one["ndcg"][name] for one in judged) if judged else None
        error = math.hypot(*errors) / len(errors) if judged else None
        cells.append(_value(mean, error))
        lines.append(f"| {about} | {' | '.join(cells)} |")
    return [*lines, "", f"A random order has the MRR {seeds['mrr']['chance']:.3f}.", ""]


def _models(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    scores = {(row["row"], row["seed"]): _mean(row) for row in rows}
    lines = ["| positive, negative | nDCG@10 | gain | seeds |", "|---|---|---|---|"]
    for name in names:
        seeds = sorted(seed for row, seed in scores if row == name)
        if not seeds:
            continue
        values = [scores[name, seed] for seed in seeds]
        gains = [
            scores[name, seed] - scores[names[1], seed]
            for seed in seeds
            if (names[1], seed) in scores
        ]
        gain = _spread(gains, "+.3f") if gains and name != names[1] else ""
        shown = ", ".join(map(str, seeds))
        lines.append(f"| {name} | {_spread(values)} | {gain} | {shown} |")
    return lines


def _mean(row: Mapping[str, Any]) -> float:
    """Returns the mean over the tasks at the largest dim."""
    tasks = row["scores"]["test"].values()
    return statistics.mean(scores[max(scores, key=int)] for scores in tasks)


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _value(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
