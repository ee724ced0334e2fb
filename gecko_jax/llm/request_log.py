"""Requests: what was asked before, what it cost, and how much may still be spent.

A request log is a JSON-lines file beside the shard whose requests it holds. A line is
written as soon as an answer comes, so a killed run has paid only for what was on its
way; the logs of a run are also its recording, which `llm.recorded` replays.

    requests/generate/shard-00000.jsonl     {"key": "3f...", "answer": {...}}
    requests/model.json                     {"name": "...", "facts": {...}}
"""

import errno
import json
import os
import pathlib
import threading
from typing import Any

from gecko_jax.io import field_rules, reading, writing

FOLDER = "requests"
_MODEL = "model.json"

_USAGE = {
    "prompt_tokens": field_rules.COUNT,
    "completion_tokens": field_rules.COUNT,
    "requests": field_rules.COUNT,
}
# What each kind of request is answered with; see `llm`.
ANSWERS = {
    "generate": {"text": field_rules.TEXT, "is_cut": field_rules.FLAG},
    "score": {"log_prob": field_rules.LOG_PROB, "num_tokens": field_rules.integer(1)},
    "labels": {"log_probs": field_rules.list_of(field_rules.LOG_PROB, 1)},
}
_DAMAGED = "the log is damaged: remove the line, and its request is sent again"


class RequestLog:
    """The answers of one shard, by the key of the request."""

    def __init__(self, path: pathlib.Path | None):
        """Reads what an earlier attempt left; a torn last line is cut off.

        Args:
            path: The file; None keeps the answers in memory alone.
        """
        self._answers: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._file: Any = None
        if path is None:
            return
        if path.exists():
            self._read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the answer that was kept under `key`."""
        return self._answers.get(key)

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keeps an answer; it is in the file when this returns.

        Raises:
            OSError: The disk is full; the file holds whole lines all the same.
        """
        record = {"key": key, "answer": answer}
        # Half of a surrogate pair, which only JSON can spell, stays spelled so.
        line = json.dumps(record).encode() + b"\n"
        with self._lock:
            if self._file is not None:
                self._append(line)
            self._answers[key] = answer

    def _append(self, line: bytes) -> None:
        try:
            written = self._file.write(line)
            if written < len(line):
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

    def __enter__(self) -> "RequestLog":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _read(self, path: pathlib.Path) -> None:
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            place = f"{path}:{number}"
            try:
                record = reading.parse_json(line)
            except ValueError as error:
                raise ValueError(f"{place}: not JSON ({error}); {_DAMAGED}") from None
            key, answer = _read_answer(place, record, _DAMAGED)
            self._answers[key] = answer


def _read_answer(place: str, record: Any, remedy: str) -> tuple[str, dict[str, Any]]:
    """Returns key and answer of a line of a request log."""
    found = {"key": field_rules.NAME, "answer": field_rules.OBJECT}
    field_rules.check(place, record, found, remedy)
    answer = record["answer"]
    for kinds in ANSWERS.values():
        if kinds.keys() & answer.keys():
            kinds = {**kinds, "usage": field_rules.object_of(_USAGE)}
            field_rules.check(f"{place}: answer", answer, kinds, remedy, only=True)
            return record["key"], answer
    raise ValueError(f"{place}: an answer of no kind that is known; {remedy}")


def write_model(workdir: pathlib.Path, name: str, facts: dict[str, Any]) -> None:
    """Says whose answers the logs of a run hold."""
    path = workdir / FOLDER / _MODEL
    if not path.exists():
        with writing.write_file(path) as temporary:
            temporary.write_text(json.dumps({"name": name, "facts": facts}, indent=2))


def read_recording(
    folder: str | os.PathLike,
) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the model's name and facts, and every answer of its logs.

    Args:
        folder: The workdir of a run, or its folder `requests`.

    Raises:
        ValueError: No recording there, or a damaged one.
    """
    root = pathlib.Path(folder)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    remedy = "give the workdir of a run of `gecko fret run`, or its folder 'requests'"
    path = root / _MODEL
    try:
        about = reading.parse_json(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: no {_MODEL} here, so no recorded answers; {remedy}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {remedy}") from None
    kinds = {
        "name": field_rules.NAME,
        "facts": field_rules.object_of(
            {"model": field_rules.NAME, "backend": field_rules.NAME}
        ),
    }
    field_rules.check(path, about, kinds, remedy)
    answers: dict[str, dict[str, Any]] = {}
    paths = [*root.rglob("*.jsonl"), *root.rglob("*.jsonl.gz")]
    for path in sorted(paths):
        # Half of a character may be in a text: `llm` marks it.
        for place, record in reading.read_records(path, any_characters=True):
            key, answer = _read_answer(
                place, record, "not a line of a request log; remove it"
            )
            answers[key] = answer
    return about["name"], about["facts"], answers


class BudgetError(Exception):
    """The run may send no more requests; what was answered is kept."""


class Budget:
    """What a run may still send, and what it has spent.

    A request is reserved before it is sent and settled when it is answered, so that
    what is on its way can never carry the run over its limit.
    """

    def __init__(
        self,
        max_requests: int | None = None,
        max_cost: int | float | None = None,
        price_input: int | float = 0.0,
        price_output: int | float = 0.0,
    ):
        """Starts with nothing spent.

        Args:
            max_requests: Most requests, each try counted; None for any number.
            max_cost: Most money, in the currency of the prices; None for any sum.
            price_input: Of a million prompt tokens.
            price_output: Of a million completion tokens.
        """
        if max_cost is not None and not (price_input or price_output):
            raise ValueError(
                f"max_cost={max_cost}: without prices nothing costs anything; set "
                "llm.price_input and llm.price_output (of a million tokens)"
            )
        self._max_requests = max_requests
        self._max_cost = max_cost
        self._prices = (price_input, price_output)
        self._lock = threading.Condition()
        self._reserved = 0.0
        self._num_reserved = 0
        self.requests = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def price(
        self, prompt_tokens: int | float, completion_tokens: int | float
    ) -> float:
        """Returns what so many tokens cost."""
        return (
            prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]
        ) / 1e6

    @property
    def cost(self) -> float:
        """What was spent."""
        return self.price(self.prompt_tokens, self.completion_tokens)

    def reserve(
        self, prompt_tokens: int, completion_tokens: int, *, waits: bool = False
    ) -> float:
        """Counts a request that is about to be sent, and returns its highest price.

        Args:
            prompt_tokens: Most tokens that it may read.
            completion_tokens: Most tokens that it may write.
            waits: Where the limit would be passed, waits for the requests of other
                threads, most of which cost less than their highest price.

        Raises:
            BudgetError: It would pass a limit.
        """
        price = self.price(prompt_tokens, completion_tokens)
        with self._lock:
            while True:
                if (
                    self._max_requests is not None
                    and self.requests >= self._max_requests
                ):
                    raise BudgetError(f"max_requests={self._max_requests:,} were sent")
                planned = self.cost + self._reserved + price
                if self._max_cost is None or planned <= self._max_cost:
                    break
                if not waits or not self._num_reserved:
                    raise BudgetError(
                        f"max_cost={self._max_cost:g}: {self.cost:.4f} is spent, and "
                        f"the next request might cost {price:.4f}"
                    )
                self._lock.wait()
            self.requests += 1
            self._reserved += price
            self._num_reserved += 1
        return price

    def settle(
        self, reserved: float, prompt_tokens: int = 0, completion_tokens: int = 0
    ) -> None:
        """Replaces a reservation by what was used."""
        with self._lock:
            self._num_reserved -= 1
            # Sums of floats leave a rest.
            self._reserved = max(self._reserved - reserved, 0.0)
            if not self._num_reserved:
                self._reserved = 0.0
            self.prompt_tokens += prompt_tokens
            self.completion_tokens += completion_tokens
            self._lock.notify_all()
