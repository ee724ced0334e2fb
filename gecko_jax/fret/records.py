"""Folders of shards, which the stages read and write.

    generate/stage.json             facts that decide the content of the stage
    generate/shard-00000.jsonl      one record per line; complete or absent
    generate/.done.json             counts; written once every shard exists

A shard is written to a temporary name and renamed. A process holds a lock while it
makes a shard, and the system releases the lock when the process exits or is killed, so
several processes may share a folder. Where locks do not work, as between machines on
a bucket, `worker=(i, n)` assigns every n-th shard to each.
"""

import contextlib
import fcntl
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.io import field_rules, reading, writing

DROPPED = "dropped"  # Field with the reason why a record ends here.
LOCKS = ".locks"  # Folder of lock files in a workdir.
_FACTS, _DONE = "stage.json", ".done.json"

_USAGE = field_rules.map_of(field_rules.COUNT)
_MAYBE_TEXT = field_rules.optional(field_rules.TEXT)
_DONE_FIELDS = {
    "stage": field_rules.NAME,
    "hash": field_rules.NAME,
    "shards": field_rules.COUNT,
    "records": field_rules.COUNT,
    "kept": field_rules.COUNT,
    DROPPED: field_rules.map_of(field_rules.COUNT),
    "usage": _USAGE,
    "bytes": field_rules.list_of(field_rules.COUNT),
    "sha256": field_rules.optional(field_rules.NAME),  # Of the exported file.
}
_DROPPED_FIELDS = {"id": field_rules.COUNT, DROPPED: field_rules.NAME}
_DROPPED_FIELDS |= {"detail": _MAYBE_TEXT, "usage": field_rules.optional(_USAGE)}
_ID = field_rules.Kind("text or a whole number", lambda v: type(v) in (str, int))
_RANKS = field_rules.nullable(field_rules.list_of(field_rules.integer(1)))


def kinds(stage: str, num_passages: int) -> dict[str, field_rules.Kind]:
    """Returns the fields of a stage's kept records, which name passages by number."""
    passage = field_rules.integer(0, num_passages - 1)
    passages = field_rules.list_of(passage)
    number, log_prob = field_rules.number(), field_rules.LOG_PROB
    fields = {
        "passages": {
            "title": field_rules.TEXT,
            "text": field_rules.NAME,
            **dict.fromkeys(
                ("source", "source_id", "licence", "license", "src", "url"), _MAYBE_TEXT
            ),
            "passage_id": field_rules.optional(_ID),
        },
        "pairs": {
            "task": field_rules.NAME,
            "query": field_rules.NAME,
            "positive": passage,
            "negatives": passages,
            "answers": field_rules.list_of(passage, 1),
            "line": field_rules.NAME,
        },
        "generate": {
            **dict.fromkeys(("task", "query", "prompt", "model"), field_rules.NAME),
            "shots": field_rules.list_of(field_rules.COUNT),
            "usage": _USAGE,
        },
        "retrieve": {
            "candidates": field_rules.list_of(passage, 2),
            "scores": field_rules.list_of(field_rules.nullable(number), 2),
            "seed_rank": field_rules.nullable(field_rules.integer(1)),
            "seed": field_rules.optional(passage),
        },
        "likelihood": {
            "log_probs": field_rules.list_of(log_prob, 1),
            "generic_log_prob": field_rules.optional(log_prob),
            "num_tokens": field_rules.integer(1),
            "usage": _USAGE,
        },
        "relevance": {
            "label_log_probs": field_rules.list_of(field_rules.list_of(log_prob, 2), 1),
            "usage": _USAGE,
        },
        "fuse": {
            "positive": passage,
            "negative": field_rules.nullable(passage),
            **dict.fromkeys(
                ("negatives", "positives", "false_negatives"),
                field_rules.optional(passages),
            ),
            "moved": field_rules.FLAG,
            "ranks": field_rules.object_of({"likelihood": _RANKS, "relevance": _RANKS}),
            "fused": field_rules.list_of(number, 2),
            "information": field_rules.optional(number),
        },
    }
    return {"id": field_rules.COUNT, **fields.get(stage, {})}


class Stage:
    """A folder of shards, which `begin` makes."""

    def __init__(
        self,
        workdir: pathlib.Path,
        name: str,
        facts: Mapping[str, Any],
        suffix: str = ".jsonl",
        seeds: Sequence[Sequence[int]] | None = None,  # ids of each shard; None: any
        num_passages: int = 0,  # 0 while the passages are made
    ):
        self.name = name
        self.folder = workdir / name
        # Settings, prompts, model, code version and the hash of the stage before.
        self.facts = json.loads(json.dumps(facts, default=list))
        self._suffix = suffix
        self._seeds = seeds
        self._kinds = kinds(name, num_passages)
        self._remedy = (
            f"restore it, or remove {self.folder} and the folders of the stages after "
            "it: the same command makes them again from the kept answers"
        )

    @property
    def hash(self) -> str:
        """Hash of everything that decides the stage's records."""
        encoded = json.dumps([self.name, self.facts], sort_keys=True)
        return hashlib.sha256(encoded.encode()).hexdigest()[:16]

    def begin(self) -> None:
        """Writes the facts, or compares them with those of an earlier run."""
        self.compare()
        path = self.folder / _FACTS
        if not path.exists():
            with writing.write_file(path) as temporary:
                temporary.write_text(json.dumps(self.facts, indent=2) + "\n")

    def compare(self) -> None:
        """Raises a ValueError that lists what differs from an earlier run's facts."""
        path = self.folder / _FACTS
        if not path.exists():
            return
        remedy = "remove the folder, or restore the file"
        before = reading.read_object(path, {}, remedy=remedy)
        if changed := list(_differences(before, self.facts)):
            raise ValueError(
                f"{self.folder}: begun with other settings. Set these back, remove "
                "the folder and those of the stages after it to make them again, or "
                "choose another workdir:\n  " + "\n  ".join(changed)
            )

    def shard_path(self, shard: int) -> pathlib.Path:
        """Returns the path of a shard."""
        return self.folder / f"shard-{shard:05}{self._suffix}"

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self.shard_path(shard).exists()

    def read(self, shard: int) -> list[dict[str, Any]]:
        """Returns the records of a finished shard, including dropped ones, checked."""
        remedy = f"the shard was changed: {self._remedy}"
        seeds = None if self._seeds is None else set(self._seeds[shard])
        result: dict[int, dict[str, Any]] = {}
        for place, record in reading.read_records(self.shard_path(shard)):
            fields = _DROPPED_FIELDS if DROPPED in record else self._kinds
            field_rules.check(place, record, fields, remedy)
            number = record["id"]
            if number in result or (seeds is not None and number not in seeds):
                raise ValueError(f"{place}: id {number} is not of this shard; {remedy}")
            if "candidates" in fields:
                candidates, seed = record["candidates"], record.get("seed", number)
                if seed not in candidates or len({*candidates}) < len(candidates):
                    raise ValueError(
                        f"{place}: the candidates lack the seed, or repeat one; "
                        f"{remedy}"
                    )
            result[number] = record
        return list(result.values())

    def write(self, shard: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a complete shard."""
        path = self.shard_path(shard)
        with writing.write_file(path) as new, new.open("w", encoding="utf-8") as lines:
            lines.writelines(map(to_line, records))

    def finish(self, num_shards: int, **facts: Any) -> dict[str, Any]:
        """Counts the records, closes the stage, and returns its `.done.json`."""
        num_records = 0
        usage: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for shard in range(num_shards if self._suffix == ".jsonl" else 0):
            for record in self.read(shard):
                num_records += 1
                reasons.update([record[DROPPED]] if DROPPED in record else [])
                usage.update(record.get("usage", {}))
        done = {
            "stage": self.name,
            "hash": self.hash,
            "shards": num_shards,
            "records": num_records,
            "kept": 0,
            "dropped": dict(sorted(reasons.items())),
            "usage": dict(sorted(usage.items())),
            "bytes": [self.shard_path(n).stat().st_size for n in range(num_shards)],
            **facts,
        }
        done["kept"] = done["records"] - sum(done["dropped"].values())
        with writing.write_file(self.folder / _DONE) as temporary:
            temporary.write_text(json.dumps(done, indent=2, default=list) + "\n")
        return done

    def done(self) -> dict[str, Any] | None:
        """Returns the checked content of `.done.json`; None if the stage has none."""
        path = self.folder / _DONE
        remedy = "remove it, and the same command writes it again"
        try:
            done = reading.read_object(path, _DONE_FIELDS, remedy=remedy)
        except FileNotFoundError:
            return None
        # An export counts its rows and has no shards.
        if (
            done["stage"] != self.name
            or done["shards"] != len(done["bytes"])
            or done["kept"] != done["records"] - sum(done[DROPPED].values())
        ):
            raise ValueError(f"{path}: its counts contradict each other; {remedy}")
        for shard, expected in enumerate(done["bytes"]):
            file = self.shard_path(shard)
            size = file.stat().st_size if file.exists() else 0
            if size != expected:
                raise ValueError(
                    f"{file}: has {size:,} bytes, and had {expected:,} when its stage "
                    f"ended; {self._remedy}"
                )
        return done


def to_line(record: Mapping[str, Any]) -> str:
    """Returns a record as a line; equal records have equal bytes."""
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def try_lock(path: pathlib.Path) -> Iterator[bool]:
    """Yields whether this process got the lock, without waiting for it.

    The file stays; the lock ends with the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            has_lock = True
        except BlockingIOError:
            has_lock = False
        yield has_lock


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yields `key: was ..., is ...` for every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            path = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), path)
    elif before != now:
        yield f"{key}: was {before!r}, is {now!r}"
