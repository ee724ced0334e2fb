"""Tables of docs/results.md, from the rows that `quality.py` writes."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import quality_plot

from gecko_jax.io import writing

_HEAD = """\
# Results

This page shows the quality of models that were trained with gecko_jax, next to other
systems, and what training them cost: nDCG@10 on test folders at the largest
dimension, and the mean at a half and a quarter of it. Ablations change what their
names say, are trained on part of the pairs, and are evaluated on dev folders where
there are some. `benchmarks/quality.py` makes the rows one at a time and writes this
page (its `--help` explains the commands):

```bash
python benchmarks/quality.py --data=DATA --output=DIR --rows=ladder
python benchmarks/quality.py --data=DATA --output=DIR --rows=ablations
python benchmarks/quality.py --data=DATA --output=DIR --rows=search
python benchmarks/quality.py --data=DATA --output=DIR --rows=gecko,sbert \\
    --steps=400 --second-steps=60
python benchmarks/quality.py --data=DATA --output=DIR --steps=400 --seeds=0 \\
    --rows=base,no-same-tower,mrl-none,one-task --subset=0 --split=test
python benchmarks/quality.py --output=DIR --table=docs/results.md
```

`quickstart` is the bundled corpus. Every other table is named after the folder of its
data, which is not bundled. A task that was not trained has a column, but does not count
in the mean. Every number was measured; a missing row was not. With several seeds, the
mean comes first, then the minimum and the maximum. Seconds are those of training both
stages, including compilation and reading, but not making the vocabulary and the hard
negatives. "classes" is the accuracy of mteb's classification on labelled texts of the
data, at the largest dimension.

Most rows were made while other work used the same cores. Their seconds are too high to
compare, except those of the two libraries, which ran one after the other with the same
steps, batches, lengths and learning rates; gecko_jax starts from a weighted bag of its
tokens. Memory is that of the process that made the row, which may have reused a
finished first stage. The recipe was chosen on dev folders (docs/decisions.md).

Rows that are "taught" are distilled (`loss.matching_weight`) from 256 dimensions of
all-MiniLM-L6-v2, which others trained on 1.17 billion pairs. They show what a small
encoder can be taught, and the other rows what these pairs alone teach. The seconds do
not include the teacher's embeddings (215 thousand texts of `mid`: 50 minutes on a busy
core).
"""


# Other commands make the last part of the page. It is kept unchanged.
_LAST_PART = "\n## The bundled model\n"

_PARTS = {"at 1/2": 2, "at 1/4": 4}


def write(
    folder: pathlib.Path,
    path: pathlib.Path,
    rows: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
) -> None:
    """Writes the page.

    Args:
        folder: Folder of the rows' files.
        path: Page to write.
        rows: Name -> row.
        groups: Name of a table -> names of its rows.
    """
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not results:
        raise SystemExit(f"{folder}: no rows yet; run the command without --table")
    parts = [_HEAD]
    for data in dict.fromkeys(row["data"] for row in results):
        for group, names in groups.items():
            trained_by = dict.fromkeys(
                (tuple(row["steps"]), row["batch_size"])
                for row in results
                if row["data"] == data and row["seed"] is not None
            )
            for steps, batch in trained_by or {((), 0): None}:
                lines = [
                    (name, runs)
                    for name in names
                    if (runs := _find(results, data, name, steps, batch))
                ]
                trained = sum(runs[0]["seed"] is not None for _, runs in lines)
                if not lines or (group != "ladder" and trained < 2):
                    continue
                title = f"\n## {group.capitalize()} on `{data}`"
                # 0 stands for the row's own number of steps.
                stages = zip(("first", "second"), steps, strict=False)
                details = [
                    f"{n:,} steps in the {stage} stage" for stage, n in stages if n
                ]
                details += [f"batches of {batch:,}"] if batch else []
                title += f": {', '.join(details)}" if details else ""
                parts += [title + "\n", *_table(lines, rows)]
                if len(lines) < 2:
                    continue
                stem = f"{path.stem}-{group}-{data}"
                if any((*steps, batch or 0)):
                    stem += f"-{steps[0]}-{steps[1]}x{batch}"
                picture = path.with_name(f"{stem}.png")
                quality_plot.plot(
                    _panels(lines, rows), picture, has_base=lines[0][0] == names[0]
                )
                parts.append(f"\n![Mean and spread of each row]({picture.name})")
    before = path.read_text() if path.exists() else ""
    _, heading, last_part = before.partition(_LAST_PART)
    with writing.write_file(path) as temporary:
        temporary.write_text("\n".join(parts) + "\n" + heading + last_part)


def _find(
    results: Sequence[Mapping[str, Any]],
    data: str,
    name: str,
    steps: tuple[int, ...],
    batch: int,
) -> list[Mapping[str, Any]]:
    return [
        row
        for row in results
        if (row["row"], row["data"]) == (name, data)
        and (
            row["seed"] is None
            or (tuple(row["steps"]), row["batch_size"]) == (steps, batch)
        )
    ]


def _table(
    lines: Sequence[tuple[str, list[Mapping[str, Any]]]], rows: Mapping[str, Any]
) -> list[str]:
    split, tasks, trained = _judged(lines)
    has_classes = any("accuracy" in row for _, runs in lines for row in runs)
    head = ["system", "dims", *tasks, "mean", *_PARTS]
    head += ["classes"] if has_classes else []
    head += ["seconds", "pairs/s", "peak GiB", "seeds", "date", "commit"]
    out = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    for name, runs in lines:
        cells = [rows[name].about, str(_largest(runs[0]) or "")]
        cells += [_spread([_full(row, split, task) for row in runs]) for task in tasks]
        cells.append(_spread([_mean(row, split, trained) for row in runs]))
        for part in _PARTS.values():
            dims = [str(_largest(row) // part) for row in runs]
            run_dims = zip(runs, dims, strict=True)
            cells.append(
                _spread(
                    [
                        _mean(row, split, trained, dim)
                        for row, dim in run_dims
                        if dim in _dims(row)
                    ]
                )
            )
        if has_classes:
            cells.append(
                _spread([row["accuracy"] for row in runs if "accuracy" in row])
            )
        for key, form in (("train_seconds", ".0f"), ("pairs_per_second", ".1f")):
            cells.append(_spread([row[key] for row in runs if key in row], form))
        cells.append(_spread([row["peak_gib"] for row in runs], ".2f"))
        seeds = [str(row["seed"]) for row in runs if row["seed"] is not None]
        cells.append(", ".join(seeds))
        for key in ("date", "commit"):
            cells.append(", ".join(dict.fromkeys(row[key] for row in runs)))
        out.append(" | ".join(["", *cells, ""]).strip())
    machines = dict.fromkeys(row["machine"] for _, runs in lines for row in runs)
    return [*out, "", f"Machine: {'; '.join(machines)}."]


def _judged(
    lines: Sequence[tuple[str, list[Mapping[str, Any]]]],
) -> tuple[str, list[str], list[str]]:
    """Returns the split to show, its tasks, and the tasks that were trained.

    A task that was not trained does not count in the mean.
    """
    scores = lines[0][1][0]["scores"]
    split = "test" if "test" in scores else "dev"
    tasks = list(scores[split])
    trained = [task for task in tasks if task in scores.get("dev", tasks)]
    return split, tasks, trained


def _panels(
    lines: Sequence[tuple[str, list[Mapping[str, Any]]]], rows: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """Returns the data of the plot: panel -> row -> the values of its seeds."""
    split, _, trained = _judged(lines)
    panels = {
        f"mean nDCG@10 on {split}, all dims": {
            rows[name].about: [_mean(row, split, trained) for row in runs]
            for name, runs in lines
        },
        f"mean nDCG@10 on {split}, 1/4 of the dims": {
            rows[name].about: [
                _mean(row, split, trained, dim)
                for row in runs
                if (dim := str(_largest(row) // 4)) in _dims(row)
            ]
            for name, runs in lines
        },
    }
    panels = {name: panel for name, panel in panels.items() if any(panel.values())}
    classes = {
        rows[name].about: [row["accuracy"] for row in runs if "accuracy" in row]
        for name, runs in lines
    }
    if any(classes.values()):
        panels["accuracy of classes"] = classes
    return panels


def _dims(row: Mapping[str, Any]) -> set[str]:
    scores = next(iter(next(iter(row["scores"].values())).values()))
    return set(scores) - {"all"}


def _largest(row: Mapping[str, Any]) -> int:
    """Returns the largest dim, or 0 if a row has no dims."""
    return max(map(int, _dims(row)), default=0)


def _full(row: Mapping[str, Any], split: str, task: str) -> float:
    scores = row["scores"][split][task]
    return scores["all"] if "all" in scores else scores[max(scores, key=int)]


def _mean(
    row: Mapping[str, Any], split: str, tasks: Sequence[str], dim: str = ""
) -> float:
    scores = row["scores"][split]
    values = [scores[t][dim] if dim else _full(row, split, t) for t in tasks]
    return sum(values) / len(values)


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    """Returns the mean and, for several values, the minimum and the maximum."""
    if not values:
        return ""
    mean = format(sum(values) / len(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{form}} to {max(values):{form}})"
