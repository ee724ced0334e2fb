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
_STARTS = {
    "bag": "a bag of tokens",
    "t5": "a small T5",
    "mini": "the bundled model",
}
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
    speed = ""
    if run["seconds"] is not None:
        speed = f"{run['seconds'] / run['passages']:.1f} s a passage, "
    lines = [
        "",
        f"{run['passages']:,} passages{'' if run['relabelled'] else ' gave'} "
        f"{run['queries']:,} queries and {run['triples']:,} triples; "
        f"{'judge' if run['relabelled'] else 'generator and judge'} "
        f"{run['generator']}, candidates by "
        f"{run['retriever']} ({run['candidates']}), weights of QL and RC "
        f"{run['weights'][0]:g} and {run['weights'][1]:g}; the positive moved in "
        f"{run['moved']:.1%}. {speed}{run['machine']}, {run['date']}, "
        f"commit {run['commit']}.",
        "",
    ]
    for path in sorted(folder.glob("judges-*.json")):
        lines += _judges(json.loads(path.read_text()))
    models: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("model-*.json")):
        row = json.loads(path.read_text())
        key = (row["data"], row["start"], *row["steps"], row["batch_size"])
        models.setdefault(key, []).append(row)
    for (data, start, first, second, batch), rows in sorted(models.items()):
        begun = f", trained for {wording.counted(first, 'step')}" if first else ""
        lines += [
            f"Models that start from {_STARTS[start]}{begun}, nDCG@10 on the judged "
            f"queries of `{data}`; {second} steps of each row, batches of {batch}; "
            "mean ± standard deviation over the seeds, and the gain over "
            f"`{names[1]}` of the same seed:",
            "",
            *_models(rows, names),
            "",
        ]
    return lines


def _judges(judges: Mapping[str, Any]) -> list[str]:
    seeds, queries = judges["seeds"], judges["queries"]
    head = [f"MRR of the seed ({seeds['seeds']} held out)"]
    head += [
        f"nDCG@10, {len(one['ndcg']['retrieval'])} queries of `{task}`"
        for task, one in queries.items()
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
        mrr = _value(seeds["mrr"][key], seeds["standard_error"][key])
        scores = [one["ndcg"][name] for one in queries.values()]
        lines.append(f"| {about} | {mrr} | {_cells(scores)} |")
    # Of the same queries, so that their difficulty cancels.
    gains = [
        [
            a - b
            for a, b in zip(one["ndcg"]["RRF"], one["ndcg"]["retrieval"], strict=True)
        ]
        for one in queries.values()
    ]
    lines.append(f"| RRF less retrieval, paired | | {_cells(gains, '+.3f')} |")
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


def _cells(scores: Sequence[Sequence[float]], form: str = ".3f") -> str:
    """Returns mean and standard error of every task, and of the mean over tasks."""
    means = [statistics.fmean(values) for values in scores]
    errors = [statistics.pstdev(v) / math.sqrt(len(v)) for v in scores]
    both = [*zip(means, errors, strict=True)]
    both.append((statistics.fmean(means), math.hypot(*errors) / len(errors)))
    return " | ".join(_value(mean, error, form) for mean, error in both)


def _value(value: float, error: float, form: str = ".3f") -> str:
    return f"{format(value, form)} ± {error:.3f}"
