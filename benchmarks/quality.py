"""Quality of models trained with gecko_jax, other systems, and ablations.

    python benchmarks/quality.py --data=quickstart --output=results/quality
    python benchmarks/quality.py --data=DIR --output=DIR --rows=gecko,sbert --steps=1000
    python benchmarks/quality.py --data=DIR --output=DIR --rows=ablations
    python benchmarks/quality.py --data=DIR --output=DIR --rows=search
    python benchmarks/quality.py --output=results/quality --table=docs/results.md

`quality_data` describes data folders; `quickstart` is the bundled corpus. Each row is a
JSON file with its seed, date, commit, wall time, pairs/s, peak memory and scores. A
separate process makes each row. A second run skips the rows whose file exists and
resumes an interrupted training, which loses at most two minutes. The table contains the
rows that exist, with a plot for each part. OUTPUT/table.md is updated after each row.

The ablations use three seeds and a fixed subset of the pairs, and are evaluated on dev
if there is such a split. A row takes one to five minutes on one core.
`--rows=base,no-mask` selects rows; `--subset=0 --split=test` and more steps train at
full length. sentence-transformers needs gecko-jax[torch]; TF-IDF and labelled texts
need gecko-jax[eval]. The search tries changes of the recipe in the same way, with one
seed, on dev. The rows with a teacher first embed all pairs of the folder, once, with
the model that `--pretrained` names.
"""

import argparse
import datetime
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import measured
import quality_data
import quality_makers
import quality_table
import quality_teacher
import side_by_side
from quality_rows import GROUPS, ROWS, VOCABULARY_SIZE

from gecko_jax.io import writing

# Defaults of the rows of each table.
DEFAULTS: dict[str, dict[str, Any]] = {
    "ladder": {"seeds": "0", "subset": 0, "split": ""},
    "ablations": {"seeds": "0,1,2", "subset": 24_000, "split": "dev"},
    "search": {"seeds": "0", "subset": 24_000, "split": "dev"},
}


def main() -> None:
    """Makes the missing rows, or writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="quickstart", help="data folder (quickstart)")
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument(
        "--rows",
        default="ladder",
        help=f"{', '.join(GROUPS)}, or rows of one of them: {', '.join(ROWS)}",
    )
    for name, about in (
        ("seeds", "seeds, such as 0,1,2"),
        ("subset", "pairs to train on, 0 for all"),
        ("split", "split to evaluate on, dev or test; empty for both"),
    ):
        usual = (f"{group}: {of[name] or 'empty'}" for group, of in DEFAULTS.items())
        parser.add_argument(
            f"--{name}",
            type=type(DEFAULTS["ladder"][name]),
            help=f"{about} ({'; '.join(usual)})",
        )
    for name, about in (
        ("steps", "steps of the first stage"),
        ("second-steps", "steps of the second stage"),
        ("batch-size", "batch size of both stages"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=0, help=f"{about} (0: the row's own)"
        )
    parser.add_argument(
        "--pretrained",
        default="sentence-transformers/all-MiniLM-L6-v2",
        metavar="MODEL",
        help="sentence-transformers model of the row `pretrained` and of the teacher",
    )
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        quality_table.write(options.output / "rows", options.table, ROWS, GROUPS)
        return
    names = GROUPS.get(options.rows) or tuple(options.rows.split(","))
    if options.split not in (None, "", "dev", "test"):
        parser.error(f"--split={options.split}: must be dev, test or empty")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--rows: {unknown[0]} is none of {', '.join(ROWS)}")
    groups = [group for group, rows in GROUPS.items() if set(names) <= set(rows)]
    if not groups:
        parser.error(f"--rows={options.rows}: name rows of one table at a time")
    for key, value in DEFAULTS[groups[0]].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if options.worker:
        make_row(options.worker, int(options.seeds), options)
        return
    # `subprocess.run` kills the worker when this is raised.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    data = find_data(options)
    without = [name for name in names if ROWS[name].classes and not data.classes]
    if without:
        print(f"{options.data}: has no texts with labels, so no {', '.join(without)}")
        names = tuple(name for name in names if name not in without)
    for size in dict.fromkeys(
        ROWS[name].vocabulary_size
        for name in names
        if ROWS[name].kind in ("gecko", "sbert")
    ):
        quality_data.prepare(data, options.output, size)
    teacher = quality_data.prepared(data, options.output, VOCABULARY_SIZE).teacher
    for seed in options.seeds.split(","):
        for name in names:
            path = row_path(name, int(seed), options)
            if path.exists():
                print(f"{path}: there")
                continue
            if is_taught(name) and not teacher.exists():
                quality_teacher.teach(options.pretrained, data.train, teacher)
            arguments = [*sys.argv[1:], f"--seeds={seed}", f"--worker={name}"]
            if subprocess.run([sys.executable, __file__, *arguments]).returncode:
                raise SystemExit(
                    f"{name}, seed {seed}: failed; run the command again to resume"
                )
            quality_table.write(
                options.output / "rows", options.output / "table.md", ROWS, GROUPS
            )


def is_taught(name: str) -> bool:
    """Returns whether the row is distilled from the pretrained model."""
    return "loss.matching_weight" in ROWS[name].both


def find_data(options: argparse.Namespace) -> quality_data.Data:
    """Returns the data that the options name."""
    return quality_data.find(options.data, options.subset, options.split)


def row_path(name: str, seed: int, options: argparse.Namespace) -> pathlib.Path:
    """Returns the file of a row, named after all of its settings."""
    row = ROWS[name]
    label = f"{name}-{find_data(options).name}"
    if row.kind in ("gecko", "sbert"):
        overrides = (options.steps, options.second_steps, options.batch_size)
        label += "-{}+{}x{}".format(*overrides) if any(overrides) else ""
        label += f"-seed{seed}"
    return options.output / "rows" / f"{label}.json"


def make_row(name: str, seed: int, options: argparse.Namespace) -> None:
    """Makes one row and writes its file."""
    row, data = ROWS[name], find_data(options)
    facts = quality_makers.MAKERS[row.kind](row, data, seed, options)
    facts = {
        "row": name,
        "data": data.name,
        "seed": seed if row.kind in ("gecko", "sbert") else None,
        "steps": [options.steps, options.second_steps],
        "batch_size": options.batch_size,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": measured.commit(),
        "machine": measured.machine(),
        "peak_gib": side_by_side.host_peak(),
        **facts,
    }
    with writing.write_file(row_path(name, seed, options)) as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{row_path(name, seed, options)}: made")


if __name__ == "__main__":
    main()
