"""A language model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, hosted.

Requests run concurrently. Each has one deadline and is retried, with growing and
jittered pauses, after 429, 5xx, a timeout or a truncated reply; if that fails, it
becomes a `Failure`. What no retry can fix (a wrong key, an unknown model, a server that
is gone) stops the run, which keeps its answers.
"""

import concurrent.futures
import dataclasses
import datetime
import email.utils
import json
import math
import os
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gecko_jax.io import inputs, reading, wording
from gecko_jax.llm import connections, pacing, protocol, request_log, wire

_Result = TypeVar("_Result")

_MAX_PAUSE_SECONDS = 60.0
# Time that an interrupt leaves to the requests in flight.
_GRACE_SECONDS = 1.0
# Size limit of a reply: bytes per prompt byte, each of which may be an echoed token
# with its number and alternatives; and the minimum and maximum of the limit.
_BYTES_PER_BYTE, _LEAST_BYTES, _MOST_BYTES = 512, 1 << 20, 1 << 26


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """Server and request settings, see the keys `llm` of `configs/fret.py`."""

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
) -> protocol.LanguageModel:
    """Returns the model of a server that answers, has it and accepts the key."""
    client = _Client(settings, budget)
    try:
        client.check_model()
    except BaseException:
        client.close()
        raise
    about = facts(settings)
    return protocol.LanguageModel(name(settings), about, client.ask, client.close)


def name(settings: ServerSettings) -> str:
    """Returns model and revision, as written into every record."""
    return settings.model + (f"@{settings.revision}" if settings.revision else "")


def facts(settings: ServerSettings) -> dict[str, Any]:
    """Returns what changes an answer; the address of the server does not."""
    names = ("model", "revision", "chat", "scoring", "top_log_probs")
    return {"backend": "server", **{name: getattr(settings, name) for name in names}}


class _Client:
    """The client of one server; threads share it."""

    def __init__(self, settings: ServerSettings, budget: request_log.Budget):
        self._settings = settings
        self._budget = budget
        key = _read_key(settings.api_key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._connections = connections.Connections(settings.url, headers)
        self.close = self._connections.close
        limits = (settings.requests_per_minute, settings.tokens_per_minute)
        self._pace = pacing.Pace(*limits)
        self._stop = self._pace.stop

    def check_model(self) -> None:
        """Raises unless the server answers and lists the model, or has no list."""
        path = "/v1/models"
        seconds = self._settings.timeout_seconds
        try:
            reply = self._connections.request("GET", path, None, seconds, _MOST_BYTES)
        except wire.NoAnswer as error:
            if error.reason == "too_large":
                return
            raise self._unreachable(error.detail) from error
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

    def ask(self, call: protocol.Call) -> None:
        """Sends the new requests of a call concurrently.

        When one request stops the run, the requests in flight are completed and their
        answers kept, since they are paid for. An interrupt ends them after a moment.
        """
        self._stop.clear()
        kinds = {"generate": self._generate, "score": self._score}
        answer = kinds.get(call.kind, self._labels)

        def work(number: int) -> None:
            if self._stop.is_set():
                return
            try:
                call.keep(number, answer(call.bodies[number]))
            except wire.NoAnswer as error:
                call.keep(number, protocol.Failure(error.reason, error.detail))
            except pacing.Stopped:
                pass
            except BaseException:
                self._stop.set()
                raise

        workers = min(self._settings.concurrency, len(call.new))
        pool = concurrent.futures.ThreadPoolExecutor(workers)
        futures = [pool.submit(work, number) for number in call.new]
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
            if not isinstance(error, Exception):  # An interrupt.
                pool.shutdown(wait=False, cancel_futures=True)
                try:
                    concurrent.futures.wait(futures, _GRACE_SECONDS)
                finally:
                    self._connections.abort()
                    # An aborted thread may still have an answer to keep.
                    concurrent.futures.wait(futures, _GRACE_SECONDS)
            raise
        finally:
            pool.shutdown(wait=False)

    def _generate(self, body: Mapping[str, Any]) -> protocol.Generation:
        chat, prompt = self._settings.chat, body["prompt"]
        fields = wire.generation_body(body, chat)
        reply, usage = self._post(fields, prompt, body["max_tokens"])
        return protocol.Generation(*wire.read_generation(reply, chat, prompt), usage)

    def _labels(self, body: Mapping[str, Any]) -> protocol.LabelScores:
        chat, prompt = self._settings.chat, body["prompt"]
        fields = wire.label_body(prompt, self._settings.top_log_probs, chat)
        reply, usage = self._post(fields, prompt, 1)
        numbers = wire.read_labels(reply, body["labels"], prompt)
        return protocol.LabelScores(tuple(numbers), usage)

    def _score(self, body: Mapping[str, Any]) -> protocol.Score:
        prompt, continuation = body["prompt"], body["continuation"]
        scoring = self._settings.scoring
        if scoring == "none" or self._settings.chat:
            raise ValueError(
                f"llm.scoring={scoring!r}, llm.chat={self._settings.chat}: this server "
                "scores no continuations; set fuse.likelihood_weight=0, or serve the "
                "model where it can echo"
            )
        text = prompt + continuation
        if scoring == "echo":
            reply, usage = self._post(wire.echo_body(text), text, 1)
            return protocol.Score(*wire.read_echo(reply, prompt, continuation), usage)
        head, tail = self._tokenize(prompt, True), self._tokenize(continuation, False)
        if scoring == "echo_tokens":
            fields = wire.echo_body([*head, *tail])
            reply, usage = self._post(fields, text, 1, len(head) + len(tail))
            value, count = wire.read_echo(reply, prompt, continuation, len(head))
            if count != len(tail):
                raise wire.NoAnswer("border", f"{count} tokens, {len(tail)} sent")
        else:
            fields = wire.forced_body(head, tail)
            reply, usage = self._post(fields, text, len(tail), len(head), "/completion")
            value = wire.read_forced(reply, head, tail, continuation)
        return protocol.Score(value, len(tail), usage)

    def _tokenize(self, text: str, is_beginning: bool) -> list[int]:
        # The fields of vLLM, then those of llama.cpp; each ignores the other's.
        fields = {"prompt": text, "add_special_tokens": is_beginning}
        fields |= {"content": text, "add_special": is_beginning}
        reply = self._retry(lambda: self._send("/tokenize", fields, text))
        return wire.read_tokens(reply, text)

    def _post(
        self,
        fields: dict[str, Any],
        text: str,
        max_tokens: int,
        num_tokens: int | None = None,
        path: str = "",
    ) -> tuple[dict[str, Any], protocol.Usage]:
        """Sends a request to the model, within the budget and the rate limits.

        `text` is what the model reads, of `num_tokens` tokens if known; `path` is by
        default that of OpenAI's API. Returns the reply, and the tokens it is charged
        for. Raises `wire.NoAnswer` if no try succeeded.
        """
        chat = self._settings.chat
        path = path or ("/v1/chat/completions" if chat else "/v1/completions")
        # A token has at least one byte, and a word has at least one token. A server
        # adds some tokens, and its chat template more.
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        max_read = num_tokens or num_bytes + (64 if chat else 8)
        min_read = num_tokens or len(text.split())

        def send() -> tuple[dict[str, Any], protocol.Usage]:
            self._pace.wait_for_turn()
            reserved = self._budget.reserve(max_read, max_tokens, waits=True)
            used = (0, 0)
            try:
                if self._stop.is_set():
                    raise pacing.Stopped
                reply = self._send(path, fields, text)
                used = wire.tokens_used(reply, min_read, max_read, max_tokens)
                return reply, protocol.Usage(*used)
            except wire.NoAnswer as error:
                # The server may have processed these requests, and may charge for them.
                if error.reason in ("timeout", "cut_off", "too_large", "bad_json"):
                    used = (max_read, max_tokens)
                raise
            finally:
                self._budget.settle(reserved, *used)
                self._pace.delay_by_tokens(sum(used))

        return self._retry(send)

    def _retry(self, send: Callable[[], _Result]) -> _Result:
        """Calls `send` until it succeeds or the retries are used up."""
        failure = wire.NoAnswer("not_asked", "")
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self._pause(attempt, failure.retry_after)
            if self._stop.is_set():
                raise pacing.Stopped
            try:
                return send()
            except wire.NoAnswer as error:
                failure = error
                if error.reason == "rejected":
                    break
        if failure.reason == "connection":
            raise self._unreachable(failure.detail)
        raise failure

    def _send(self, path: str, fields: dict[str, Any], text: str) -> dict[str, Any]:
        """Sends a request once and returns the JSON object of its reply."""
        content = json.dumps({"model": self._settings.model, **fields}).encode()
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        max_bytes = min(_LEAST_BYTES + _BYTES_PER_BYTE * num_bytes, _MOST_BYTES)
        seconds = self._settings.timeout_seconds
        reply = self._connections.request("POST", path, content, seconds, max_bytes)
        if reply.status in (408, 409, 425, 429) or reply.status >= 500:
            seconds = _seconds(reply.headers.get("retry-after", ""))
            raise wire.NoAnswer(f"status_{reply.status}", _text(reply), seconds)
        self._check_status("POST", path, reply)
        if reply.status >= 300:
            detail = f"status {reply.status}: {_text(reply)}"
            raise wire.NoAnswer("rejected", detail)
        try:
            parsed = reading.parse_json(reply.body)
        except ValueError as error:
            raise wire.NoAnswer("bad_json", f"{error}: {_text(reply)}") from None
        if not isinstance(parsed, dict):
            raise wire.NoAnswer("bad_json", inputs.kind(parsed))
        return parsed

    def _check_status(self, method: str, path: str, reply: connections.Reply) -> None:
        """Raises for a status that every other request would have, too."""
        where = f"{self._settings.url.rstrip('/')}{path}"
        if reply.status in (401, 403):
            raise ValueError(
                f"{where}: status {reply.status}, the key is refused; put a valid "
                "one into the variable that llm.api_key_env names"
            )
        if reply.status == 404 and method == "POST":
            raise ValueError(
                f"{where}: status 404, no such endpoint or model ({_text(reply)}); "
                f"check llm.url, llm.model={self._settings.model!r}, llm.chat and "
                f"llm.scoring={self._settings.scoring!r}"
            )

    def _unreachable(self, detail: str) -> OSError:
        return OSError(
            f"{self._settings.url}: no server answers ({detail}); start it, or set "
            "llm.url. All answers are kept, and the same command continues"
        )

    def _pause(self, attempt: int, retry_after: float) -> None:
        """Waits before a retry, at least as long as the server demands."""
        seconds = self._settings.retry_seconds * 2.0 ** (attempt - 1)
        seconds = max(seconds, retry_after)
        if retry_after:  # The demand concerns all requests.
            self._pace.delay_by(retry_after)
        # Jitter separates requests that failed together.
        seconds = min(seconds, _MAX_PAUSE_SECONDS) * random.uniform(0.75, 1.25)
        self._pace.wait(seconds)


def _read_key(variable: str) -> str:
    """Returns the API key in an environment variable; "" if no variable is named."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ValueError(
            f"llm.api_key_env={variable!r}: that variable is not set; export the key, "
            "or set llm.api_key_env='' if none is needed"
        )
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"llm.api_key_env={variable!r}: that variable holds characters that no key "
            "has; export the key again"
        )
    return key


def _text(reply: connections.Reply) -> str:
    """Returns the beginning of a reply, as errors show it."""
    return wording.printable(reply.body[:200].decode("utf-8", "replace"))


def _seconds(retry_after: str) -> float:
    """Parses a `Retry-After` header: seconds or a date; 0.0 if it is neither."""
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
