"""Writes the bundled model, with its card. `make pretrained` runs this.

    python benchmarks/pretrained.py MODEL --text=DIR --results=FILE --output=DIR

MODEL is a folder of `distilled.py`, `--text` the output of `text.py`, and `--results`
the results of `gecko evaluate`. The card (README.md) has scores, searches, the recipe,
and the source and licence of the text.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import shutil
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import measured
import quality_data

import gecko_jax.config
from gecko_jax.formats import model_folder
from gecko_jax.io import writing

if typing.TYPE_CHECKING:
    from gecko_jax.evaluation import tables

CARD = pathlib.Path(__file__).with_name("pretrained_card.md")
# Questions, and the passages of `quickstart` that answer them.
SEARCHES = {
    "how are modules found on import": ("t554", "t89"),
    "copy a database while others use it": ("d179", "d170", "d134"),
    "read a dump back into a database": ("d130",),
    "two transactions wait for each other": ("t569",),
    "stop a server with ctrl-c": ("d140",),
    "large wading bird": ("t460", "t368"),
    "a country in Africa": ("d68",),
    "who discovered penicillin": ("d71",),
    "woman doctor who fought for the vote": ("t388",),
    "dog resting with its head down": ("d69",),
}
# Longest part of a passage in the card, in characters.
SHOWN = 100


def main() -> None:
    """Parses the flags and writes the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path, metavar="DIR", help="model folder")
    parser.add_argument("--text", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--results", required=True, type=pathlib.Path, metavar="FILE")
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    write_card(parser.parse_args())


def write_card(options: argparse.Namespace) -> None:
    """Copies a model folder, with a card."""
    from gecko_jax import evaluation

    opened = model_folder.open_model(options.model)
    results = evaluation.read(options.results).check_model(opened)
    provenance = opened.provenance
    refuse_paths(provenance)
    chosen = json.loads((options.text / "text.json").read_text())
    paths = [path for path in options.model.iterdir() if path.name != "README.md"]
    left_out: dict[str, int] = collections.Counter()
    for row in chosen["left_out"]:
        left_out[row["reason"]] += row["rows"]
    corpus, searches = search(options.model)
    card = CARD.read_text().format(
        name=options.output.name,
        vocabulary=opened.encoder_config.vocab_size,
        dims=", ".join(map(str, sorted(opened.mrl_dims))),
        size=sum(path.stat().st_size for path in paths) / 1e6,
        revision=opened.revision,
        query_length=opened.query_length,
        passage_length=opened.passage_length,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        scores=scores_table(results, sorted(opened.mrl_dims, reverse=True)),
        passages=corpus,
        searches=table(["question", "first passage", "right"], searches),
        command=make_command(chosen["clear_of"]),
        commit=measured.commit(),
        texts=provenance["texts"],
        rows=provenance["rows"],
        steps=provenance["train"]["steps"],
        batch=provenance["train"]["batch"],
        pair_batch=provenance["train"]["pair_batch"],
        versions=", ".join(
            f"{name} {version}" for name, version in provenance["versions"].items()
        ),
        kept=table(
            ["source", "licence", "rows", "pairs"],
            ([*row.values()] for row in chosen["kept"]),
        ),
        left_out=table(["reason", "rows"], left_out.items()),
        clear_of=", ".join(f"`{name}`" for name in chosen["clear_of"]),
    )
    with writing.write_folder(options.output) as folder:
        for path in paths:
            shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.1f} MB")


def make_command(judged: Sequence[str]) -> str:
    """Returns the command that makes the model, given the sets that it is judged on."""
    words = ["make pretrained TEACHER=DIR T5_VOCABULARY=FILE"]
    if any("/" in name for name in judged):
        words.append("DATA=DIR")
    if files := [f"{n}.jsonl" for n in judged if "/" not in n and n != "quickstart"]:
        words.append(f'JUDGED="{" ".join(files)}"')
    return " ".join(words)


def refuse_paths(provenance: Mapping[str, Any]) -> None:
    """Refuses a model whose provenance has paths of this machine."""
    for key, value in gecko_jax.config.flatten(provenance).items():
        values = value if isinstance(value, tuple) else (value,)
        for path in values:
            if isinstance(path, str) and path.startswith("/"):
                raise SystemExit(f"gecko.json: {key} is a path of this machine: {path}")


def search(folder: pathlib.Path) -> tuple[int, list[list[str]]]:
    """Returns the number of passages, and the first passage for each question."""
    from gecko_jax.evaluation import sets
    from gecko_jax.inference import embedding

    (dataset,) = sets.load(quality_data.QUICKSTART)
    assert isinstance(dataset, sets.RetrievalSet)
    model = embedding.load(folder)
    queries = model.encode_queries(list(SEARCHES))
    passages = model.encode_passages(dataset.texts, titles=dataset.titles)
    lines = []
    for row, (query, answers) in enumerate(SEARCHES.items()):
        best = int((passages @ queries[row]).argmax())
        text = f"{dataset.titles[best]} {dataset.texts[best]}"
        right = "yes" if dataset.passage_ids[best] in answers else "no"
        shown = " ".join(text.split())[:SHOWN].replace("|", "\\|")
        lines.append([query, shown, right])
    return len(passages), sorted(lines, key=lambda line: line[-1], reverse=True)


def scores_table(results: tables.Results, dims: Sequence[int]) -> str:
    """Returns the main score of each set at every dim, and of baselines."""
    from gecko_jax.evaluation import tables

    # Of the hybrid, the last row counts: that of the largest dim.
    systems = {
        tables.HYBRID: f"{max(dims)} dims and BM25",
        tables.BM25: "BM25",
        tables.IDF_BAG: "random vectors, IDF weights",
    }
    scores: dict[str, dict[str, float]] = {}
    for row in results.rows:
        column = systems.get(row.system, str(row.dim))
        if row.task == tables.ALL and row.system in (tables.MODEL, *systems):
            # The main metric is the first one.
            scores.setdefault(row.set, {})[column] = next(iter(row.metrics.values()))
    columns = [*map(str, dims), *systems.values()]
    lines = [
        [name, *(f"{values[c]:.3f}" if c in values else "" for c in columns)]
        for name, values in scores.items()
    ]
    return table(["set", *(f"{dim} dims" for dim in dims), *systems.values()], lines)


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Returns a table in Markdown."""

    def cell(value: Any) -> str:
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = [list(head), ["---"] * len(head), *(list(map(cell, line)) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    main()
