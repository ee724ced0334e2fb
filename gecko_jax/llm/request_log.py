"""Request logs, which keep every answer of the language model, and the budget of a run.

A request log is a JSON-lines file next to the shard whose requests it holds. A line is
written as soon as an answer arrives, so a killed run loses only the requests in flight.
The logs of a run are also its recording, which `protocol.recorded` replays.

    requests/generate/shard-00000.jsonl     {"key": "3f...", "answer": {...}}
    requests/model.json                     {"name": "...", "facts": {...}}
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import threading
from typing import Any

from gecko_jax.io import field_rules, reading, writing

FOLDER = "requests"
_MODEL = "model.json"

_COUNTS = ("prompt_tokens", "completion_tokens", "requests")
_TOKENS: dict[str, field_rules.Kind] = dict.fromkeys(_COUNTS, field_rules.COUNT)
_USAGE = {"usage": field_rules.object_of(_TOKENS, only=True)}
# Fields of an answer to each kind of request.
_ANSWERS = (
    {"text": field_rules.TEXT, "is_cut": field_rules.FLAG, **_USAGE},
    {"log_prob": field_rules.LOG_PROB, "num_tokens": field_rules.integer(1), **_USAGE},
    {"log_probs": field_rules.list_of(field_rules.LOG_PROB, 1), **_USAGE},
)
_REMEDY = "the log is damaged: remove the line, and its request is sent again"


class RequestLog(contextlib.AbstractContextManager["RequestLog"]):
    """The answers of one shard, by request key."""

    def __init__(self, path: pathlib.Path | None, earlier: pathlib.Path | None = None):
        """Reads the answers of an earlier attempt and cuts off a torn last line.

        Without a path, answers are kept in memory only. `earlier` is a finished log
        whose answers count, too.
        """
        self._answers: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._file: Any = None
        if earlier is not None and earlier.exists():
            self._read(earlier)
        if path is None:
            return
        if path.exists():
            self._read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the answer with this key."""
        return self._answers.get(key)

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Stores an answer; it is in the file when this returns.

        Raises OSError if the disk is full; the file still holds whole lines.
        """
        # ASCII: a lone surrogate, which only JSON can spell, stays an escape.
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with self._lock:
            if self._file is not None:
                self._append(line)
            self._answers[key] = answer

    def _append(self, line: bytes) -> None:
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), self._size)
            raise OSError(
                error.errno,
                f"{self._path}: {error.strerror}; every answer before it is kept: free "
                "some space and run the same command again",
            ) from error
        self._size += len(line)

    def close(self) -> None:
        """Closes the file; the answers stay in memory."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _read(self, path: pathlib.Path) -> None:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
        for number, line in enumerate(content[:end].splitlines(), start=1):
            place = f"{path}:{number}"
            try:
                record = reading.parse_json(line)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON ({error}); {_REMEDY}") from None
            key, answer = _read_answer(place, record)
            self._answers[key] = answer


def _read_answer(place: str, record: Any) -> tuple[str, dict[str, Any]]:
    """Returns key and answer of a line of a request log."""
    fields = {"key": field_rules.NAME, "answer": field_rules.OBJECT}
    field_rules.check(place, record, fields, _REMEDY)
    answer = record["answer"]
    for fields in _ANSWERS:
        if (fields.keys() - {"usage"}) & answer.keys():
            field_rules.check(f"{place}: answer", answer, fields, _REMEDY, only=True)
            return record["key"], answer
    raise ValueError(f"{place}: the answer is of no known kind; {_REMEDY}")


def write_model(workdir: pathlib.Path, name: str, facts: dict[str, Any]) -> None:
    """Records which model's answers the logs of a run hold."""
    path = workdir / FOLDER / _MODEL
    if not path.exists():
        with writing.write_file(path) as temporary:
            temporary.write_text(json.dumps({"name": name, "facts": facts}, indent=2))


def read_recording(
    folder: str | os.PathLike,
) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the model's name, its facts, and every recorded answer by key."""
    root = pathlib.Path(folder)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    remedy = "give the workdir of a run of `gecko fret run`, or its folder 'requests'"
    path = root / _MODEL
    facts = {"model": field_rules.NAME, "backend": field_rules.NAME}
    fields = {"name": field_rules.NAME, "facts": field_rules.object_of(facts)}
    try:
        about = reading.read_object(path, fields, remedy=remedy)
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{folder}: no {_MODEL}, so no recorded answers"
        raise ValueError(f"{problem}; {remedy}") from None
    answers: dict[str, dict[str, Any]] = {}
    for path in sorted([*root.rglob("*.jsonl"), *root.rglob("*.jsonl.gz")]):
        # Texts may hold lone surrogates, which `protocol.from_record` replaces.
        records = reading.read_records(path, any_characters=True)
        answers |= dict(itertools.starmap(_read_answer, records))
    return about["name"], about["facts"], answers


class BudgetError(Exception):
    """The run may send no more requests; its answers are kept."""


class Budget:
    """The limits of a run, and what it has spent.

    A request is reserved before it is sent and settled when it is answered, so the
    requests in flight can never carry the run over its limit.
    """

    def __init__(
        self,
        max_requests: int | None = None,  # each try counted; None sets no limit
        max_cost: int | float | None = None,  # in the currency of the prices
        price_input: int | float = 0.0,  # of a million tokens read
        price_output: int | float = 0.0,  # of a million tokens written
    ):
        if max_cost is not None and not (price_input or price_output):
            raise ValueError(
                f"max_cost={max_cost}: it needs prices; set llm.price_input and "
                "llm.price_output (per million tokens)"
            )
        self._max_requests, self._max_cost = max_requests, max_cost
        self._prices = (price_input, price_output)
        self._lock = threading.Condition()
        self._reserved, self._num_reserved = 0.0, 0
        self.requests = self.prompt_tokens = self.completion_tokens = 0

    def price(self, read: int | float, written: int | float) -> float:
        """Returns the cost of tokens."""
        price_read, price_written = self._prices
        return (read * price_read + written * price_written) / 1e6

    @property
    def cost(self) -> float:
        """Cost so far."""
        return self.price(self.prompt_tokens, self.completion_tokens)

    def reserve(self, read: int, written: int, *, waits: bool = False) -> float:
        """Counts a request that is about to be sent, and returns its maximum cost.

        The tokens are the most that it may read and write. With `waits`, it waits at
        the cost limit for the requests of other threads, most of which cost less than
        was reserved for them. Raises BudgetError if the request would exceed a limit.
        """
        price = self.price(read, written)
        with self._lock:
            while True:
                limit = self._max_requests
                if limit is not None and self.requests >= limit:
                    raise BudgetError(f"max_requests={limit:,} were sent")
                planned = self.cost + self._reserved + price
                if self._max_cost is None or planned <= self._max_cost:
                    break
                if not waits or not self._num_reserved:
                    raise BudgetError(
                        f"max_cost={self._max_cost:g}: {self.cost:.4f} is spent, and "
                        f"the next request may cost {price:.4f}"
                    )
                self._lock.wait()
            self.requests += 1
            self._reserved += price
            self._num_reserved += 1
        return price

    def settle(self, reserved: float, read: int = 0, written: int = 0) -> None:
        """Replaces a reservation by the tokens used."""
        with self._lock:
            self._num_reserved -= 1
            # Rounding must not leave a remainder when nothing is reserved.
            remaining = max(self._reserved - reserved, 0.0)
            self._reserved = remaining if self._num_reserved else 0.0
            self.prompt_tokens += read
            self.completion_tokens += written
            self._lock.notify_all()
