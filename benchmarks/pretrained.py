"""The model that comes along: its text, and its card. `make pretrained` runs both.

    python benchmarks/pretrained.py text --output=runs/pretrained/text
    python benchmarks/pretrained.py text --data=DIR --output=runs/pretrained/text
    python benchmarks/pretrained.py card runs/pretrained/model --output=DIR ...

`text` takes the pairs whose licence lets a model that learned from them be passed on:
those of the bundled corpus, and those of a data folder with `train.jsonl.gz`, where
each row names its source (`src`). A row's licence is the one it names, or that of its
source in `pretrained_sources.json`. A row is left out if its licence is not in that
file's list of permissive ones, if nothing says its licence, or if it is third-party
code inside a package; and if it holds a query or a judged passage of the bundled
held-out set or of the data folder's `eval/*/*`, by the rule of `gecko data show
--decontaminate`. What is left out is counted, by task and reason, in `text.json`. Every
second query is written as a search, as the queries of most users are, and not with the
description of its task.

`card` copies a model folder and writes its README.md: scores, stages, text, licences.
"""

import argparse
import collections
import datetime
import json
import pathlib
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import measured
import quality_data
import text_licences

import gecko_jax.config
from gecko_jax.data import mining
from gecko_jax.formats import model_folder, parameters
from gecko_jax.io import progress, writing
from gecko_jax.text import overlap, text_formats

CARD = pathlib.Path(__file__).with_name("pretrained_card.md")


def main() -> None:
    """Writes the text or the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("text")
    verb.add_argument("--data", type=pathlib.Path, metavar="DIR", help="more text")
    verb.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    verb.set_defaults(run=write_text)
    verb = verbs.add_parser("card")
    verb.add_argument("model", type=pathlib.Path, metavar="DIR", help="model folder")
    verb.add_argument("--text", required=True, type=pathlib.Path, metavar="DIR")
    verb.add_argument(
        "--stages",
        required=True,
        nargs="+",
        type=pathlib.Path,
        metavar="DIR",
        help="workdirs, the first stage first",
    )
    verb.add_argument("--results", required=True, type=pathlib.Path, metavar="FILE")
    verb.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    verb.add_argument(
        "--settings", nargs="*", default=[], metavar="NAME=VALUE", help="of make"
    )
    verb.set_defaults(run=write_card)
    options = parser.parse_args()
    options.run(options)


# --- Text ---------------------------------------------------------------------------


def write_text(options: argparse.Namespace) -> None:
    """Writes train.jsonl.gz and text.json."""
    folders = {"quickstart": quality_data.QUICKSTART}
    if options.data:
        folders |= quality_data.judged_folders(options.data)
    known = quality_data.held_out(folders)
    table = text_licences.Sources.load()
    kept: dict[tuple[str, str, str], int] = collections.Counter()
    left_out: dict[tuple[str, str, str], int] = collections.Counter()

    def rows() -> Iterator[dict[str, Any]]:
        seen = set()
        for row in progress.track(text_licences.read(options.data), "Choosing text"):
            licence, reason = table.judge(row)
            texts = row["query"], row["positive"]
            if not reason and any(known.holds(side) for side in texts):
                reason = "held out for judging"
            if not reason and texts in seen:
                reason = "comes twice"
            if reason:
                left_out[row["task"], text_licences.source(row), reason] += 1
                continue
            seen.add(texts)
            kept[row["task"], text_licences.source(row), licence] += 1
            row["licence"] = licence
            if len(seen) % 2:
                row["task_description"] = text_formats.DEFAULT_TASK
            yield row

    options.output.mkdir(parents=True, exist_ok=True)
    mining.write_lines(options.output / "train.jsonl.gz", rows())
    report = {
        "kept": counts(kept, "licence"),
        "left_out": counts(left_out, "reason"),
        "clear_of": list(known.sets),
    }
    with writing.write_file(options.output / "text.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    by_task = collections.Counter()
    for (task, *_), count in kept.items():
        by_task[task] += count
    print(f"{options.output / 'train.jsonl.gz'}: {sum(kept.values()):,} pairs")
    for task, count in sorted(by_task.items()):
        print(f"  {task:10} {count:>8,}")
    reasons = collections.Counter()
    for (*_, reason), count in left_out.items():
        reasons[reason] += count
    for reason, count in reasons.most_common():
        print(f"  left out   {count:>8,}  {reason}")


def counts(found: dict[tuple[str, str, str], int], what: str) -> list[dict[str, Any]]:
    """Returns counts as records, the most of each task first."""
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -item[1]))
    # Sources of a single pair, such as packages described, are counted together.
    shown: dict[tuple[str, str, str], int] = collections.Counter()
    for (task, name, value), count in ordered:
        shown[task, name if count > 1 else "others", value] += count
    return [
        {
            "task": task,
            "source": re.sub(r"^\w+:|/$", "", name),
            what: value,
            "pairs": count,
        }
        for (task, name, value), count in shown.items()
    ]


# --- Card ---------------------------------------------------------------------------

# What tells one stage from another.
STAGE_KEYS = (
    "model.num_layers",
    "train.num_steps",
    "data.batch_size",
    "data.num_negatives",
    "data.query_length",
    "data.passage_length",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.token_rate",
    "loss.temperature",
    "loss.mrl_dims",
    "seed",
)


def write_card(options: argparse.Namespace) -> None:
    """Copies a model folder, with a card."""
    from gecko_jax import evaluation

    opened = model_folder.open_model(options.model)
    results = evaluation.read(options.results).check_model(opened)
    refuse_paths(opened.provenance)
    chosen = json.loads((options.text / "text.json").read_text())
    held = [path for path in options.model.iterdir() if path.name != "README.md"]
    leaves = parameters.flatten(opened.params).values()
    config = opened.encoder_config
    left_out: dict[str, int] = collections.Counter()
    for row in chosen["left_out"]:
        left_out[f"{row['task']}: {row['reason']}"] += row["pairs"]
    card = CARD.read_text().format(
        name=options.output.name,
        parameters=sum(leaf.size for leaf in leaves) / 1e6,
        layers=config.num_layers,
        width=config.model_dim,
        dims=", ".join(map(str, sorted(opened.mrl_dims))),
        size=sum(path.stat().st_size for path in held) / 1e6,
        revision=opened.revision,
        step=opened.step,
        query_length=opened.query_length,
        passage_length=opened.passage_length,
        tasks=", ".join(f"`{task}`" for task in sorted(opened.provenance["tasks"])),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        scores=scores_table(results, sorted(opened.mrl_dims)),
        command=make_command(options.settings, has_data=len(chosen["clear_of"]) > 1),
        commit=measured.commit(),
        stages=stages_table(options.stages),
        kept=table(
            ["task", "source", "licence", "pairs"],
            ([*row.values()] for row in chosen["kept"]),
        ),
        left_out=table(["task and reason", "pairs"], left_out.items()),
        clear_of=", ".join(f"`{name}`" for name in chosen["clear_of"]),
        common=overlap.COMMON_WORDS,
    )
    with writing.write_folder(options.output) as folder:
        for path in held:
            shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def make_command(settings: Sequence[str], has_data: bool) -> str:
    """Returns the command that makes the model, a setting a line."""
    words = ["make pretrained", *(["DATA=DIR"] if has_data else [])]
    for setting in settings:
        name, _, value = setting.partition("=")
        if value.strip():
            words.append(f"{name}={shlex.quote(' '.join(value.split()))}")
    return " \\\n    ".join(words)


def refuse_paths(provenance: Mapping[str, Any]) -> None:
    """Refuses a model that would carry the paths of a machine along."""
    for key, value in gecko_jax.config.flatten(provenance).items():
        values = value if isinstance(value, tuple) else (value,)
        for path in values:
            if isinstance(path, str) and path.startswith("/"):
                raise SystemExit(
                    f"gecko.json: {key} is {path}; train with paths relative to the "
                    "repository"
                )


def scores_table(results: Any, dims: Sequence[int]) -> str:
    """Returns nDCG@10 of each set, and their mean where there are several."""
    from gecko_jax.evaluation import tables

    found: dict[str, dict[str, float]] = {}
    for row in results.rows:
        column = {tables.MODEL: str(row.dim), tables.BM25: "BM25"}.get(row.system)
        if row.task == tables.ALL and column and "ndcg_at_10" in row.metrics:
            found.setdefault(row.set, {})[column] = row.metrics["ndcg_at_10"]
    columns = [*map(str, dims), "BM25"]
    lines = [
        [name, *(f"{scores[column]:.3f}" for column in columns)]
        for name, scores in found.items()
    ]
    return table(["set", *(f"{dim} dims" for dim in dims), "BM25"], lines)


def stages_table(stages: Sequence[pathlib.Path]) -> str:
    """Returns the keys that tell the stages apart, one stage a column."""
    flat = [
        gecko_jax.config.flatten(json.loads((stage / "config.json").read_text()))
        for stage in stages
    ]
    lines = [[f"`{key}`", *(one[key] for one in flat)] for key in STAGE_KEYS]
    return table(["", *(stage.name for stage in stages)], lines)


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown."""

    def cell(value: Any) -> str:
        if isinstance(value, tuple):
            return ", ".join(map(str, value))
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = [list(head), ["---"] * len(head), *(list(map(cell, line)) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
