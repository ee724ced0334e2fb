"""A language model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, hosted.

Requests run side by side; each is tried again, with growing and jittered pauses, after
429, 5xx, a timeout or a reply that is cut off, and becomes a `Failure` when that does
not help. What no retry can mend (a wrong key, an unknown model, a server that is gone)
stops the run, which keeps what was answered.
"""

import concurrent.futures
import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gecko_jax.fret import llm, requests, wire

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_MAX_PAUSE_SECONDS = 60.0


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
        timeout_seconds: A try may take.
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


def connect(settings: ServerSettings, budget: requests.Budget) -> llm.CachedModel:
    """Returns the model of a server that answers and serves it.

    Raises:
        OSError: No server answers.
        ValueError: It does not serve the model, or refuses the key.
        ImportError: httpx is not installed.
    """
    client = _Client(settings, budget)
    try:
        client.check_model()
    except BaseException:
        client.close()
        raise
    return llm.CachedModel(
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


class _Client:
    """The connection, shared by all threads."""

    def __init__(self, settings: ServerSettings, budget: requests.Budget):
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                "a language model behind a server needs httpx: pip install "
                '"gecko-jax[fret]"'
            ) from error
        key = ""
        if settings.api_key_env:
            key = os.environ.get(settings.api_key_env, "")
            if not key:
                raise ValueError(
                    f"llm.api_key_env={settings.api_key_env!r}: that variable is not "
                    "set; export the key, or set llm.api_key_env='' if none is needed"
                )
        self._settings = settings
        self._budget = budget
        self._httpx = httpx
        self._http = httpx.Client(
            base_url=settings.url.rstrip("/"),
            timeout=settings.timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(
                max_connections=settings.concurrency,
                max_keepalive_connections=settings.concurrency,
            ),
            trust_env=False,
        )
        self._stop = threading.Event()
        self._pace = threading.Lock()
        self._next_send = 0.0

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def check_model(self) -> None:
        """Raises unless the server answers and lists the model, or lists none."""
        try:
            reply = self._http.get("/v1/models")
        except self._httpx.TransportError as error:
            raise self._gone(error) from error
        self._check_status(reply)
        try:
            listed = [entry["id"] for entry in reply.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return  # Not every server has the list.
        if listed and self._settings.model not in listed:
            raise ValueError(
                f"llm.model={self._settings.model!r}: {self._settings.url} does not "
                f"serve it; it has {', '.join(listed[:10])}"
            )

    def ask(
        self,
        kind: str,
        bodies: list[dict[str, Any]],
        new: Sequence[int],
        keep: Callable[[int, Any], None],
    ) -> None:
        """Sends the new requests side by side; see `llm.Ask`.

        When one stops the run, or the user does, those on their way are waited for
        and kept: they are paid for.
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
                keep(number, llm.Failure(error.reason, error.detail))
            except _Stopped:
                pass
            except BaseException:
                self._stop.set()
                raise

        workers = min(self._settings.concurrency, len(new))
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, number) for number in new]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                self._stop.set()
                raise

    def _generate(self, body: Mapping[str, Any]) -> llm.Generation | llm.Failure:
        chat = self._settings.chat
        fields = wire.generation_body(body, chat)
        reply = self._complete(fields, body["prompt"], body["max_tokens"])
        if isinstance(reply, llm.Failure):
            return reply
        text, is_cut = wire.read_generation(reply, chat)
        return llm.Generation(text, is_cut, _usage(reply))

    def _labels(self, body: Mapping[str, Any]) -> llm.LabelScores | llm.Failure:
        chat = self._settings.chat
        fields = wire.label_body(body["prompt"], self._settings.top_log_probs, chat)
        reply = self._complete(fields, body["prompt"], 1)
        if isinstance(reply, llm.Failure):
            return reply
        numbers = wire.read_labels(reply, body["labels"], chat)
        return llm.LabelScores(tuple(numbers), _usage(reply))

    def _score(self, body: Mapping[str, Any]) -> llm.Score | llm.Failure:
        prompt, continuation = body["prompt"], body["continuation"]
        if self._settings.scoring == "none" or self._settings.chat:
            raise ValueError(
                f"llm.scoring={self._settings.scoring!r}, llm.chat="
                f"{self._settings.chat}: this server scores no continuations; set "
                "fuse.likelihood_weight=0, or serve the model where it can echo"
            )
        if self._settings.scoring == "echo":
            fields = wire.echo_body(prompt + continuation)
            reply = self._complete(fields, prompt + continuation, 1)
            if isinstance(reply, llm.Failure):
                return reply
            value, count = wire.read_echo(reply, prompt, continuation)
            return llm.Score(value, count, _usage(reply))
        head, tail = self._tokenize(prompt, True), self._tokenize(continuation, False)
        for tokens in (head, tail):
            if isinstance(tokens, llm.Failure):
                return tokens
        assert isinstance(head, list)
        assert isinstance(tail, list)
        if not tail:
            raise wire.Malformed("border", "the continuation has no token")
        if self._settings.scoring == "echo_tokens":
            fields = wire.echo_body([*head, *tail])
            reply = self._complete(fields, prompt + continuation, 1)
            if isinstance(reply, llm.Failure):
                return reply
            value, count = wire.read_echo(reply, head, tail)
            return llm.Score(value, count, _usage(reply))
        fields = wire.forced_body(head, tail)
        reply = self._post("/completion", fields, len(prompt), len(tail))
        if isinstance(reply, llm.Failure):
            return reply
        return llm.Score(wire.read_forced(reply, tail), len(tail), _usage(reply))

    def _tokenize(self, text: str, is_beginning: bool) -> list[int] | llm.Failure:
        # The fields of vLLM, then those of llama.cpp: each passes over the other's.
        fields = {
            "model": self._settings.model,
            "prompt": text,
            "add_special_tokens": is_beginning,
            "content": text,
            "add_special": is_beginning,
        }
        reply = self._post("/tokenize", fields, None, 0)
        return reply if isinstance(reply, llm.Failure) else wire.read_tokens(reply)

    def _complete(self, fields: dict[str, Any], text: str, max_tokens: int) -> Any:
        path = "/v1/chat/completions" if self._settings.chat else "/v1/completions"
        body = {"model": self._settings.model, **fields}
        return self._post(path, body, len(text.encode()), max_tokens)

    def _post(
        self, path: str, body: dict[str, Any], num_bytes: int | None, max_tokens: int
    ) -> Any:
        """Returns the reply as JSON, or a failure once the tries are used up.

        Args:
            path: Of the endpoint.
            body: Sent as JSON.
            num_bytes: Of the prompt; None for a request that asks no model.
            max_tokens: Most tokens written.
        """
        failure = llm.Failure("not_asked")
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self._pause(attempt, failure)
            elif self._stop.is_set():
                raise _Stopped
            if num_bytes is None:
                reply, failure = self._try(path, body)
            else:
                self._wait_for_turn()
                # A token has rarely fewer than two bytes: a price not exceeded.
                reserved = self._budget.reserve(num_bytes // 2 + 8, max_tokens)
                used = (0, 0)
                try:
                    reply, failure = self._try(path, body)
                    used = wire.usage(reply) or used
                finally:
                    self._budget.settle(reserved, *used)
                self._charge(sum(used))
            if reply is not None:
                return reply
            if failure.reason == "rejected":
                return failure
        if failure.reason == "connection":
            raise self._gone(failure.detail)
        return failure

    def _try(self, path: str, body: dict[str, Any]) -> tuple[Any, llm.Failure]:
        try:
            reply = self._http.post(path, json=body)
        except self._httpx.TimeoutException as error:
            return None, llm.Failure("timeout", type(error).__name__)
        except self._httpx.ConnectError as error:
            return None, llm.Failure("connection", str(error))
        except self._httpx.TransportError as error:
            return None, llm.Failure("cut_off", f"{type(error).__name__}: {error}")
        if reply.status_code in _RETRIED:
            detail = reply.headers.get("retry-after", "") or reply.text[:200]
            return None, llm.Failure(f"status_{reply.status_code}", detail)
        self._check_status(reply)
        if reply.status_code >= 400:
            return None, llm.Failure("rejected", reply.text[:300])
        try:
            parsed = reply.json()
        except ValueError as error:
            return None, llm.Failure("bad_json", f"{error}: {reply.text[:200]}")
        if not isinstance(parsed, dict):
            return None, llm.Failure("bad_json", f"a {type(parsed).__name__}")
        return parsed, llm.Failure("")

    def _check_status(self, reply: Any) -> None:
        """Raises for what no other request would do better."""
        where = f"{self._settings.url}{reply.request.url.path}"
        if reply.status_code in (401, 403):
            raise ValueError(
                f"{where}: status {reply.status_code}, the key is refused; put a valid "
                "one into the variable that llm.api_key_env names"
            )
        if reply.status_code == 404 and reply.request.method == "POST":
            raise ValueError(
                f"{where}: status 404, no such endpoint or model "
                f"({reply.text[:200]}); check llm.url, llm.model="
                f"{self._settings.model!r}, llm.chat and llm.scoring="
                f"{self._settings.scoring!r}"
            )

    def _gone(self, error: object) -> OSError:
        return OSError(
            f"{self._settings.url}: no server answers ({error}); start it, or set "
            "llm.url. What was answered is kept, and the same command goes on"
        )

    def _pause(self, attempt: int, failure: llm.Failure) -> None:
        seconds = self._settings.retry_seconds * 2.0 ** (attempt - 1)
        if failure.reason in ("status_429", "status_503"):
            # Told by the server: all wait, not this request alone.
            told = _seconds(failure.detail)
            seconds = max(seconds, told)
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


def _usage(reply: Any) -> llm.Usage:
    return llm.Usage(*(wire.usage(reply) or (0, 0)))


def _seconds(text: str) -> float:
    try:
        return min(max(float(text), 0.0), _MAX_PAUSE_SECONDS)
    except ValueError:
        return 0.0
