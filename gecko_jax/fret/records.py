"""Records: the folders of shards that stages read and write.

    generate/stage.json             facts that decide what the stage writes
    generate/shard-00000.jsonl      a record a line; whole, or not there
    generate/.done.json             counts; there once every shard is

A shard is written under a temporary name and renamed. While a process works on one it
holds a lock that the system takes back when the process ends, however it ends; so
several may share a folder, and none waits for a dead one. Where locks do not reach, as
between machines on a bucket, `worker=(i, n)` gives each every n-th shard.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gecko_jax.io import field_rules, reading, writing

DROPPED = "dropped"  # A record with this field goes no further; it holds the reason.
LOCKS = ".locks"  # Folder of a workdir; holds nothing that is worth keeping.
_FACTS, _DONE = "stage.json", ".done.json"

_DONE_FIELDS = {
    "stage": field_rules.NAME,
    "hash": field_rules.NAME,
    "shards": field_rules.COUNT,
    "records": field_rules.COUNT,
    "kept": field_rules.COUNT,
    DROPPED: field_rules.map_of(field_rules.COUNT),
    "usage": field_rules.map_of(field_rules.COUNT),
    "bytes": field_rules.list_of(field_rules.COUNT),
    "sha256": field_rules.optional(field_rules.NAME),  # The exported file.
}
# Every record has an id; one that was dropped has nothing else that is read again.
_DROPPED_FIELDS = {
    DROPPED: field_rules.NAME,
    "detail": field_rules.optional(field_rules.TEXT),
    "usage": field_rules.optional(field_rules.map_of(field_rules.COUNT)),
}
_RANKS = field_rules.nullable(field_rules.list_of(field_rules.integer(1)))


def kinds(stage: str, num_passages: int) -> dict[str, field_rules.Kind]:
    """Returns the fields of a stage's records that were not dropped.

    Args:
        stage: Name of the stage.
        num_passages: Passages of the run, which other records name by their number.
    """
    passage = field_rules.integer(0, num_passages - 1)
    usage = {"usage": field_rules.map_of(field_rules.COUNT)}
    return {
        "passages": {
            "title": field_rules.TEXT,
            "text": field_rules.NAME,
            **dict.fromkeys(
                ("source", "source_id", "licence", "license", "src", "url"),
                field_rules.optional(field_rules.TEXT),
            ),
        },
        "generate": {
            "task": field_rules.NAME,
            "query": field_rules.NAME,
            "prompt": field_rules.NAME,
            "model": field_rules.NAME,
            "shots": field_rules.list_of(field_rules.COUNT),
            **usage,
        },
        "retrieve": {
            "candidates": field_rules.list_of(passage, 2),
            "scores": field_rules.list_of(
                field_rules.nullable(field_rules.number()), 2
            ),
            "seed_rank": field_rules.nullable(field_rules.integer(1)),
        },
        "likelihood": {
            "log_probs": field_rules.list_of(field_rules.LOG_PROB, 1),
            "generic_log_prob": field_rules.optional(field_rules.LOG_PROB),
            "num_tokens": field_rules.integer(1),
            **usage,
        },
        "relevance": {
            "label_log_probs": field_rules.list_of(
                field_rules.list_of(field_rules.LOG_PROB, 2), 1
            ),
            **usage,
        },
        "fuse": {
            "positive": passage,
            "negative": field_rules.nullable(passage),
            "moved": field_rules.FLAG,
            "ranks": field_rules.object_of({"likelihood": _RANKS, "relevance": _RANKS}),
            "fused": field_rules.list_of(field_rules.number(), 2),
            "information": field_rules.optional(field_rules.number()),
        },
    }.get(stage, {})


class Stage:
    """A folder of shards.

    Attributes:
        name: Of the stage, and of its folder.
        folder: Where its shards lie.
        facts: What decides the content: settings, prompts, model, code version and
            the hash of the stage before.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        name: str,
        facts: Mapping[str, Any],
        suffix: str = ".jsonl",
        seeds: Sequence[Sequence[int]] | None = None,
        num_passages: int = 0,
    ):
        """Names the folder; `begin` makes it.

        Args:
            workdir: Where the folder lies.
            name: Name of the stage, and of its folder.
            facts: See the class.
            suffix: How its shards' names end.
            seeds: The seed passages of each shard, by which records are known; None
                for any.
            num_passages: Passages of the run; 0 while they are made.
        """
        self.name = name
        self._seeds = seeds
        self._kinds = kinds(name, num_passages)
        self._suffix = suffix
        self.folder = workdir / name
        self.facts = json.loads(json.dumps(facts, default=list))

    @property
    def hash(self) -> str:
        """Changes with whatever the stage's records depend on."""
        encoded = json.dumps([self.name, self.facts], sort_keys=True)
        return hashlib.sha256(encoded.encode()).hexdigest()[:16]

    def begin(self) -> None:
        """Writes the facts, or compares them with those of an earlier run.

        Raises:
            ValueError: See `compare`.
        """
        self.compare()
        path = self.folder / _FACTS
        if not path.exists():
            with writing.write_file(path) as temporary:
                temporary.write_text(json.dumps(self.facts, indent=2) + "\n")

    def compare(self) -> None:
        """Compares the facts with those of an earlier run, if there was one.

        Raises:
            ValueError: The folder was begun with others; names each difference.
        """
        path = self.folder / _FACTS
        if not path.exists():
            return
        try:
            before = reading.parse_json(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path}: not JSON ({error}); remove the folder, or restore the file"
            ) from None
        changed = list(_differences(before, self.facts))
        if changed:
            raise ValueError(
                f"{self.folder}: begun with other settings. Set these back, remove "
                "the folder and those of the stages after it to make them anew, or "
                "choose another workdir:\n  " + "\n  ".join(changed)
            )

    def shard_path(self, shard: int) -> pathlib.Path:
        """Returns where a shard lies, or will."""
        return self.folder / f"shard-{shard:05}{self._suffix}"

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self.shard_path(shard).exists()

    def read(self, shard: int) -> list[dict[str, Any]]:
        """Returns the records of a finished shard, dropped ones among them.

        Raises:
            ValueError: A record is not as the stage writes it.
        """
        path = self.shard_path(shard)
        remedy = (
            "the shard was changed: restore it, or remove "
            f"{self.folder} and the folders of the stages after it, which the same "
            "command makes anew"
        )
        identity = {"id": field_rules.COUNT}
        seeds = None if self._seeds is None else set(self._seeds[shard])
        result: dict[int, dict[str, Any]] = {}
        for place, record in reading.read_records(path):
            found = _DROPPED_FIELDS if DROPPED in record else self._kinds
            field_rules.check(place, record, identity | found, remedy)
            number = record["id"]
            if number in result or (seeds is not None and number not in seeds):
                raise ValueError(f"{place}: id {number} is not of this shard; {remedy}")
            if self.name == "retrieve" and DROPPED not in record:
                chosen = record["candidates"]
                if number not in chosen or len({*chosen}) < len(chosen):
                    raise ValueError(
                        f"{place}: the candidates lack the seed, or one comes twice; "
                        f"{remedy}"
                    )
            result[number] = record
        return list(result.values())

    def write(self, shard: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes a shard whole."""
        with (
            writing.write_file(self.shard_path(shard)) as temporary,
            temporary.open("w", encoding="utf-8") as lines,
        ):
            for record in records:
                lines.write(to_line(record))

    def finish(self, num_shards: int, **facts: Any) -> dict[str, Any]:
        """Counts the records of every shard and closes the stage.

        Returns:
            What `.done.json` holds: shards and their bytes, records, those dropped by
            reason, tokens.
        """
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for shard in range(num_shards if self._suffix == ".jsonl" else 0):
            for record in self.read(shard):
                counts["records"] += 1
                if DROPPED in record:
                    reasons[record[DROPPED]] += 1
                for name, number in record.get("usage", {}).items():
                    counts[name] += number
        done = {
            "stage": self.name,
            "hash": self.hash,
            "shards": num_shards,
            "records": counts.pop("records", 0),
            "kept": 0,
            "dropped": dict(sorted(reasons.items())),
            "usage": dict(sorted(counts.items())),
            "bytes": [self.shard_path(n).stat().st_size for n in range(num_shards)],
            **facts,
        }
        done["kept"] = done["records"] - sum(done["dropped"].values())
        with writing.write_file(self.folder / _DONE) as temporary:
            temporary.write_text(json.dumps(done, indent=2, default=list) + "\n")
        return done

    def done(self) -> dict[str, Any] | None:
        """Returns what `.done.json` holds, None while the stage is unfinished.

        Raises:
            ValueError: It is damaged, or a shard is not as long as it was.
        """
        path = self.folder / _DONE
        remedy = "remove it, and the same command writes it again"
        try:
            done = reading.parse_json(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None
        field_rules.check(path, done, _DONE_FIELDS, remedy)
        # An export counts its rows, and has no shards.
        if (
            done["stage"] != self.name
            or done["shards"] != len(done["bytes"])
            or done["kept"] != done["records"] - sum(done[DROPPED].values())
        ):
            raise ValueError(f"{path}: its counts contradict each other; {remedy}")
        for shard, size in enumerate(done["bytes"]):
            found = self.shard_path(shard)
            there = found.stat().st_size if found.exists() else 0
            if there != size:
                raise ValueError(
                    f"{found}: has {there:,} bytes, and had {size:,} when its stage "
                    f"ended. Restore it, or remove {self.folder} and the folders of "
                    "the stages after it: the same command makes them anew, and asks "
                    "for no answer again"
                )
        return done


def to_line(record: Mapping[str, Any]) -> str:
    """Returns a record as a line; the same record is always the same bytes."""
    return json.dumps(record, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def try_lock(path: pathlib.Path) -> Iterator[bool]:
    """Gives whether the lock could be had; nobody is waited for.

    The file stays. It belongs to whoever holds it, and to nobody once that process
    has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            got = True
        except BlockingIOError:
            got = False
        yield got
    finally:
        os.close(handle)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yields `key: was ..., is ...` of every leaf that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            path = f"{key}.{name}" if key else name
            yield from _differences(before.get(name), now.get(name), path)
    elif before != now:
        yield f"{key}: was {before!r}, is {now!r}"
