"""Licences of the texts that the bundled model may learn from.

`pretrained_sources.json` names the licences that let a model be passed on, and the
licence of each source of the pair files (`train.jsonl`, `train.jsonl.gz`).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import quality_data

from gecko_jax.io import reading

SOURCES = pathlib.Path(__file__).with_name("pretrained_sources.json")
# Code of others inside a package, under licences that the package's does not name.
THIRD_PARTY = re.compile(r"/(_vendor|extern|externals)/")


@dataclasses.dataclass(frozen=True)
class Sources:
    """Licences of sources.

    Attributes:
        permissive: Licences that let a model be passed on.
        licences: Licence of each source, by its name (`source`).
        reasons: Reasons why other sources are left out, by name.
    """

    permissive: frozenset[str]
    licences: dict[str, str]
    reasons: dict[str, str]

    @classmethod
    def load(cls) -> Sources:
        """Reads the table."""
        values = json.loads(SOURCES.read_text())
        return cls(
            frozenset(values["permissive"]), values["licences"], values["left_out"]
        )

    def judge(self, row: dict[str, Any]) -> tuple[str, str]:
        """Returns the licence of a row, and why it is left out; either may be ""."""
        name = source(row)
        licence = row.get("licence") or self.licences.get(name, "")
        if not licence:
            return "", self.reasons.get(name, "licence not known")
        if licence not in self.permissive:
            return licence, f"{licence} does not let it"
        if THIRD_PARTY.search(row["src"]):
            return "", "third-party code inside a package"
        return licence, ""


def source(row: dict[str, Any]) -> str:
    """Returns the name of a row's source: "a/" of a/b.py, "term:jargon" of jargon.

    A source without files is one of its task: there may be a package called jargon.
    """
    name, slash, _ = row["src"].partition("/")
    return name + slash if slash else f"{row['task']}:{name}"


def read(data: pathlib.Path | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of the bundled corpus, then those of a data folder."""
    paths = [quality_data.QUICKSTART / "train.jsonl"]
    if data:
        paths.append(data / "train.jsonl.gz")
    for path in paths:
        for place, row in reading.read_records(path):
            if "passage" in row:
                row["positive"] = row.pop("passage")
            names = ("task", "query", "positive", "src", "licence")
            row = {name: row[name] for name in names if name in row}
            if missing := {"task", "query", "positive", "src"} - row.keys():
                raise SystemExit(f"{place}: field {min(missing)!r} is missing")
            yield row
