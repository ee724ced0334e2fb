"""A language model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, hosted.

Requests run side by side. Each has one deadline and is tried again, with growing and
jittered pauses, after 429, 5xx, a timeout or a reply that is cut off; it becomes a
`Failure` when that does not help. What no retry can mend (a wrong key, an unknown
model, a server that is gone) stops the run, which keeps what was answered.
"""

import concurrent.futures
import dataclasses
import datetime
import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gecko_jax.io import inputs, reading, wording
from gecko_jax.llm import connections, protocol, request_log, wire

_RETRIED = frozenset({408, 409, 425, 429})  # And every status from 500 on.
_MAX_PAUSE_SECONDS = 60.0
# Seconds that an interrupt leaves to the requests on their way.
_GRACE_SECONDS = 1.0
# Failures of a request that the server may have answered, and so charged for.
_MAYBE_CHARGED = ("timeout", "cut_off", "too_large", "bad_json")
# Tokens that a server may add to a prompt, by its form.
_ADDED_TOKENS = {False: 8, True: 64}
# Bytes of a reply: for each byte of the prompt, which may be an echoed token with its
# number and its neighbours, and at least and at most for all.
_BYTES_PER_BYTE, _LEAST_BYTES, _MOST_BYTES = 512, 1 << 20, 1 << 26


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Where a model is served, and how it is asked.

    Attributes:
        url: Root of the server, without `/v1`.
        model: Name under which it is served.
        revision: Of its weights: a commit or a checksum; recorded with every row.
        api_key_env: Environment variable that holds the key; "" for none.
        chat: Ask through the chat API, which cannot score.
        scoring: One of `wire.SCORING`.
        top_log_probs: First tokens listed when labels are scored.
        concurrency: Requests on their way at once.
        retries: Further tries of a request.
        retry_seconds: Before the first further try; doubled each time.
        timeout_seconds: Seconds that a try may take, from connecting to the last byte.
        requests_per_minute: At most; 0 for no limit.
        tokens_per_minute: At most, read and written; 0 for no limit.
    """

    url: str
    model: str
    revision: str
    api_key_env: str
    chat: bool
    scoring: str
    top_log_probs: int
    concurrency: int
    retries: int
    retry_seconds: float
    timeout_seconds: float
    requests_per_minute: int
    tokens_per_minute: int


def connect(
    settings: ServerSettings, budget: request_log.Budget
) -> protocol.CachedModel:
    """Returns the model of a server that answers and serves it.

    Raises:
        OSError: No server answers.
        ValueError: It does not serve the model, or refuses the key.
        ImportError: httpcore is not installed.
    """
    client = _Client(settings, budget)
    try:
        client.check_model()
    except BaseException:
        client.close()
        raise
    return protocol.CachedModel(
        name(settings), facts(settings), client.ask, close=client.close
    )


def name(settings: ServerSettings) -> str:
    """Returns model and revision, as written beside every record."""
    return settings.model + (f"@{settings.revision}" if settings.revision else "")


def facts(settings: ServerSettings) -> dict[str, Any]:
    """Returns what decides an answer; where the model is served does not."""
    return {
        "backend": "server",
        "model": settings.model,
        "revision": settings.revision,
        "chat": settings.chat,
        "scoring": settings.scoring,
        "top_log_probs": settings.top_log_probs,
    }


class _Stopped(Exception):
    """Another request has stopped the run."""


class _Answer(NamedTuple):
    """A reply as JSON, and the tokens it is charged for."""

    content: dict[str, Any]
    usage: protocol.Usage


class _Client:
    """The connection, shared by all threads."""

    def __init__(self, settings: ServerSettings, budget: request_log.Budget):
        key = ""
        if settings.api_key_env:
            key = os.environ.get(settings.api_key_env, "").strip()
            if not key:
                raise ValueError(
                    f"llm.api_key_env={settings.api_key_env!r}: that variable is not "
                    "set; export the key, or set llm.api_key_env='' if none is needed"
                )
            if not (key.isascii() and key.isprintable()):
                raise ValueError(
                    f"llm.api_key_env={settings.api_key_env!r}: that variable holds "
                    "characters that no key has; export the key again"
                )
        self._settings = settings
        self._budget = budget
        self._connections = connections.Connections(
            settings.url,
            {"Authorization": f"Bearer {key}"} if key else {},
            settings.concurrency,
        )
        self._stop = threading.Event()
        self._pace = threading.Lock()
        self._next_send = 0.0

    def close(self) -> None:
        """Closes the connections."""
        self._connections.close()

    def check_model(self) -> None:
        """Raises unless the server answers and lists the model, or lists none."""
        path = "/v1/models"
        try:
            reply = self._connections.request(
                "GET", path, None, self._settings.timeout_seconds, _MOST_BYTES
            )
        except connections.Failed as error:
            if error.reason == "too_large":
                return
            raise self._gone(error) from error
        self._check_status("GET", path, reply)
        try:
            listed = [entry["id"] for entry in reading.parse_json(reply.body)["data"]]
        except (ValueError, KeyError, TypeError):
            return  # Not every server has the list.
        if listed and self._settings.model not in listed:
            names = ", ".join(wording.printable(str(name)) for name in listed[:10])
            raise ValueError(
                f"llm.model={self._settings.model!r}: {self._settings.url} does not "
                f"serve it; it has {names}"
            )

    def ask(
        self,
        kind: str,
        bodies: list[dict[str, Any]],
        new: Sequence[int],
        keep: Callable[[int, Any], None],
    ) -> None:
        """Sends the new requests side by side; see `llm.Ask`.

        When one stops the run, those on their way are waited for and kept: they are
        paid for. An interrupt gives them a moment and then ends them.
        """
        self._stop.clear()
        answer = {
            "generate": self._generate,
            "score": self._score,
            "labels": self._labels,
        }[kind]

        def work(number: int) -> None:
            if self._stop.is_set():
                return
            try:
                keep(number, answer(bodies[number]))
            except wire.Malformed as error:
                keep(number, protocol.Failure(error.reason, error.detail))
            except _Stopped:
                pass
            except BaseException:
                self._stop.set()
                raise

        workers = min(self._settings.concurrency, len(new))
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        futures = [pool.submit(work, number) for number in new]
        try:
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except Exception:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        except BaseException as error:
            self._stop.set()
            if not isinstance(error, Exception):
                self._interrupt(pool, futures)
            raise
        finally:
            pool.shutdown(wait=False)

    def _interrupt(
        self,
        pool: concurrent.futures.ThreadPoolExecutor,
        futures: Sequence[concurrent.futures.Future[None]],
    ) -> None:
        """Ends the requests that are on their way, after a moment for the last ones."""
        pool.shutdown(wait=False, cancel_futures=True)
        try:
            concurrent.futures.wait(futures, _GRACE_SECONDS)
        finally:
            self._connections.abort()
            # Threads that are woken so may still have an answer to keep.
            concurrent.futures.wait(futures, _GRACE_SECONDS)

    def _generate(self, body: Mapping[str, Any]) -> protocol.Generation:
        chat, prompt = self._settings.chat, body["prompt"]
        fields = wire.generation_body(body, chat)
        answer = self._complete(fields, prompt, body["max_tokens"])
        text, is_cut = wire.read_generation(answer.content, chat, prompt)
        return protocol.Generation(text, is_cut, answer.usage)

    def _labels(self, body: Mapping[str, Any]) -> protocol.LabelScores:
        chat, prompt = self._settings.chat, body["prompt"]
        fields = wire.label_body(prompt, self._settings.top_log_probs, chat)
        answer = self._complete(fields, prompt, 1)
        numbers = wire.read_labels(answer.content, body["labels"], chat, prompt)
        return protocol.LabelScores(tuple(numbers), answer.usage)

    def _score(self, body: Mapping[str, Any]) -> protocol.Score:
        prompt, continuation = body["prompt"], body["continuation"]
        if self._settings.scoring == "none" or self._settings.chat:
            raise ValueError(
                f"llm.scoring={self._settings.scoring!r}, llm.chat="
                f"{self._settings.chat}: this server scores no continuations; set "
                "fuse.likelihood_weight=0, or serve the model where it can echo"
            )
        text = prompt + continuation
        if self._settings.scoring == "echo":
            answer = self._complete(wire.echo_body(text), text, 1)
            value, count = wire.read_echo(answer.content, prompt, continuation)
            return protocol.Score(value, count, answer.usage)
        head, tail = self._tokenize(prompt, True), self._tokenize(continuation, False)
        if self._settings.scoring == "echo_tokens":
            fields = wire.echo_body([*head, *tail])
            num_tokens = len(head) + len(tail)
            answer = self._complete(fields, text, 1, num_tokens)
            value, count = wire.read_echo(
                answer.content, prompt, continuation, len(head)
            )
            if count != len(tail):
                raise wire.Malformed("border", f"{count} tokens, {len(tail)} sent")
            return protocol.Score(value, count, answer.usage)
        fields = wire.forced_body(head, tail)
        answer = self._post("/completion", fields, text, len(tail), len(head))
        value = wire.read_forced(answer.content, head, tail, continuation)
        return protocol.Score(value, len(tail), answer.usage)

    def _tokenize(self, text: str, is_beginning: bool) -> list[int]:
        # The fields of vLLM, then those of llama.cpp: each passes over the other's.
        fields = {
            "model": self._settings.model,
            "prompt": text,
            "add_special_tokens": is_beginning,
            "content": text,
            "add_special": is_beginning,
        }
        return wire.read_tokens(self._post("/tokenize", fields, text).content, text)

    def _complete(
        self,
        fields: dict[str, Any],
        text: str,
        max_tokens: int,
        num_tokens: int | None = None,
    ) -> _Answer:
        path = "/v1/chat/completions" if self._settings.chat else "/v1/completions"
        body = {"model": self._settings.model, **fields}
        return self._post(path, body, text, max_tokens, num_tokens)

    def _post(
        self,
        path: str,
        body: dict[str, Any],
        text: str,
        max_tokens: int | None = None,
        num_tokens: int | None = None,
    ) -> _Answer:
        """Returns the reply.

        Args:
            path: Path of the endpoint.
            body: Sent as JSON.
            text: The text that the server reads.
            max_tokens: Most tokens written; None for a request that asks no model.
            num_tokens: Tokens of the prompt where they are known.

        Raises:
            wire.Malformed: None came, and the tries are used up.
        """
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        most_bytes = min(_LEAST_BYTES + _BYTES_PER_BYTE * num_bytes, _MOST_BYTES)
        # A token has at least a byte, and a word at least a token.
        most = num_tokens or num_bytes + _ADDED_TOKENS[self._settings.chat]
        least = num_tokens or wire.num_words(text)
        content = json.dumps(body).encode()
        failure, told = protocol.Failure("not_asked"), 0.0
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self._pause(attempt, told)
            elif self._stop.is_set():
                raise _Stopped
            if max_tokens is None:
                reply, failure, told = self._try(path, content, most_bytes)
                used = (0, 0)
            else:
                self._wait_for_turn()
                reserved = self._budget.reserve(most, max_tokens, waits=True)
                used = (0, 0)
                try:
                    if self._stop.is_set():
                        raise _Stopped
                    reply, failure, told = self._try(path, content, most_bytes)
                    if reply is not None:
                        used = wire.tokens_used(reply, least, most, max_tokens)
                    elif failure.reason in _MAYBE_CHARGED:
                        used = (most, max_tokens)
                finally:
                    self._budget.settle(reserved, *used)
                self._charge(sum(used))
            if reply is not None:
                return _Answer(reply, protocol.Usage(*used))
            if failure.reason == "rejected":
                break
            if self._stop.is_set():
                raise _Stopped
        if failure.reason == "connection":
            raise self._gone(failure.detail)
        raise wire.Malformed(failure.reason, failure.detail)

    def _try(
        self, path: str, content: bytes, most_bytes: int
    ) -> tuple[dict[str, Any] | None, protocol.Failure, float]:
        """Returns the reply or the failure, and the seconds the server asks to wait."""
        try:
            reply = self._connections.request(
                "POST", path, content, self._settings.timeout_seconds, most_bytes
            )
        except connections.Failed as error:
            return None, protocol.Failure(error.reason, str(error)), 0.0
        if reply.status in _RETRIED or reply.status >= 500:
            told = _seconds(reply.headers.get("retry-after", ""))
            return None, protocol.Failure(f"status_{reply.status}", _text(reply)), told
        self._check_status("POST", path, reply)
        if reply.status >= 300:
            detail = f"status {reply.status}: {_text(reply)}"
            return None, protocol.Failure("rejected", detail), 0.0
        try:
            parsed = reading.parse_json(reply.body)
        except ValueError as error:  # Not JSON, or not UTF-8.
            detail = f"{error}: {_text(reply)}"
            return None, protocol.Failure("bad_json", detail), 0.0
        if not isinstance(parsed, dict):
            return None, protocol.Failure("bad_json", inputs.kind(parsed)), 0.0
        return parsed, protocol.Failure(""), 0.0

    def _check_status(self, method: str, path: str, reply: connections.Reply) -> None:
        """Raises for what no other request would do better."""
        where = f"{self._settings.url.rstrip('/')}{path}"
        if reply.status in (401, 403):
            raise ValueError(
                f"{where}: status {reply.status}, the key is refused; put a valid "
                "one into the variable that llm.api_key_env names"
            )
        if reply.status == 404 and method == "POST":
            raise ValueError(
                f"{where}: status 404, no such endpoint or model "
                f"({_text(reply)}); check llm.url, llm.model="
                f"{self._settings.model!r}, llm.chat and llm.scoring="
                f"{self._settings.scoring!r}"
            )

    def _gone(self, error: object) -> OSError:
        return OSError(
            f"{self._settings.url}: no server answers ({error}); start it, or set "
            "llm.url. What was answered is kept, and the same command goes on"
        )

    def _pause(self, attempt: int, told: float) -> None:
        """Waits before another try, at least as long as the server asks for."""
        seconds = self._settings.retry_seconds * 2.0 ** (attempt - 1)
        seconds = max(seconds, told)
        if told:  # It is meant for all requests, not for this one alone.
            with self._pace:
                self._next_send = max(self._next_send, time.monotonic() + told)
        # Jitter keeps requests that failed together from coming back together.
        seconds = min(seconds, _MAX_PAUSE_SECONDS) * random.uniform(0.75, 1.25)
        if self._stop.wait(seconds):
            raise _Stopped

    def _wait_for_turn(self) -> None:
        per_request = self._settings.requests_per_minute
        with self._pace:
            now = time.monotonic()
            turn = max(self._next_send, now)
            if per_request:
                self._next_send = turn + 60.0 / per_request
        if turn > now and self._stop.wait(turn - now):
            raise _Stopped

    def _charge(self, tokens: int) -> None:
        """Puts off the next requests by the time that the tokens stand for."""
        if self._settings.tokens_per_minute:
            with self._pace:
                begin = max(self._next_send, time.monotonic())
                share = tokens / self._settings.tokens_per_minute
                self._next_send = begin + 60.0 * share


def _text(reply: connections.Reply) -> str:
    """Returns the beginning of a reply, as errors show it."""
    return wording.printable(reply.body[:200].decode("utf-8", "replace"))


def _seconds(retry_after: str) -> float:
    """Returns the seconds that a `Retry-After` asks for: a number, or a date."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(retry_after)
            date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
            seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _MAX_PAUSE_SECONDS) if math.isfinite(seconds) else 0.0
