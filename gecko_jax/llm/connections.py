"""Connections: an HTTP request with one deadline, a bounded reply, and an interrupt.

A timeout of a socket starts anew with every byte that arrives. Here the deadline is the
whole request's: connecting, headers and body together. A reply is read up to a number
of bytes, after decompression. `Connections.abort` ends every request at once.
"""

import contextlib
import dataclasses
import socket
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Bytes of a request that are sent before the deadline is looked at again.
_SENT_AT_ONCE = 65_536


class Failed(Exception):
    """No whole reply came.

    Attributes:
        reason: "connection", "timeout", "cut_off" or "too_large".
    """

    def __init__(self, reason: str, detail: str):
        """Keeps the reason apart from the detail."""
        super().__init__(detail)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a server sent.

    Attributes:
        status: HTTP status.
        headers: Fields by their names in lower case.
        body: Content, decompressed.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connections:
    """The connections to one server, shared by all threads."""

    def __init__(self, url: str, headers: Mapping[str, str], most: int):
        """Opens nothing yet.

        Args:
            url: Root of the server.
            headers: Sent with every request.
            most: Connections that are open at once.

        Raises:
            ImportError: httpcore is not installed.
            ValueError: No such URL can be.
        """
        try:
            import httpcore
        except ImportError as error:
            raise ImportError(
                "a language model behind a server needs httpcore: pip install "
                '"gecko-jax[fret]"'
            ) from error
        try:
            httpcore.URL(url)
        except (ValueError, TypeError) as error:
            raise ValueError(f"llm.url={url!r}: no URL ({error})") from error
        self._url = url.rstrip("/")
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._httpcore = httpcore
        self._deadline = threading.local()
        self._open: set[Any] = set()
        self._lock = threading.Lock()
        backend = _backend(httpcore, self._remaining, self._open, self._lock)
        self._pool = httpcore.ConnectionPool(
            max_connections=most,
            max_keepalive_connections=most,
            network_backend=backend,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._pool.close()

    def abort(self) -> None:
        """Ends every request that is on its way; each raises `Failed` in its thread."""
        with self._lock:
            streams = list(self._open)
        for stream in streams:
            with contextlib.suppress(OSError, AttributeError):
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def request(
        self, method: str, path: str, body: bytes | None, seconds: float, most: int
    ) -> Reply:
        """Returns the reply to a request.

        Args:
            method: "GET" or "POST".
            path: Below the root of the server.
            body: JSON; None for none.
            seconds: For all of it together.
            most: Bytes that the body of the reply may have.

        Raises:
            Failed: No whole reply came in time.
        """
        core = self._httpcore
        self._deadline.time = time.monotonic() + seconds
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            with self._pool.stream(
                method,
                self._url + path,
                headers=list(headers.items()),
                content=body,
                extensions={"timeout": {"pool": seconds}},
            ) as reply:
                fields = {
                    name.decode("latin-1").lower(): value.decode("latin-1")
                    for name, value in reply.headers
                }
                encoding = fields.get("content-encoding", "identity").strip().lower()
                content = _read(reply.iter_stream(), encoding, most)
                return Reply(reply.status, fields, content)
        except core.TimeoutException as error:
            raise Failed("timeout", f"no reply within {seconds:g} s") from error
        except core.ConnectError as error:
            raise Failed("connection", str(error)) from error
        except (core.NetworkError, core.ProtocolError) as error:
            raise Failed("cut_off", f"{type(error).__name__}: {error}") from error
        except (core.UnsupportedProtocol, UnicodeError) as error:
            raise Failed("connection", str(error)) from error

    def _remaining(self) -> float:
        """Returns the seconds that this thread's request may still take."""
        seconds = self._deadline.time - time.monotonic()
        if seconds <= 0:
            raise self._httpcore.ReadTimeout("deadline")
        return seconds


def _read(parts: Iterable[bytes], encoding: str, most: int) -> bytes:
    """Returns a body, decompressed as far as it may be long."""
    if encoding in ("gzip", "x-gzip", "deflate"):
        parts = _decompress(parts, most)
    elif encoding != "identity":
        raise Failed("cut_off", f"the reply is encoded as {encoding!r}")
    content = bytearray()
    for part in parts:
        content += part
        if len(content) > most:
            raise Failed("too_large", f"the reply has more than {most:,} bytes")
    return bytes(content)


def _decompress(parts: Iterable[bytes], most: int) -> Iterator[bytes]:
    # Gzip and zlib, told apart by their headers.
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        for part in parts:
            while part:
                yield decompressor.decompress(part, most + 1)
                part = decompressor.unconsumed_tail
    except zlib.error as error:
        raise Failed("cut_off", f"badly compressed ({error})") from error
    if not decompressor.eof:
        raise Failed("cut_off", "the compressed reply has no end")


def _backend(httpcore: Any, remaining: Any, opened: set[Any], lock: Any) -> Any:
    """Returns sockets that know the deadline of the request that uses them.

    Args:
        httpcore: The module, which is imported where it is needed.
        remaining: Returns the seconds that are left, or raises.
        opened: Streams that are open, for `Connections.abort`.
        lock: Guards `opened`.
    """

    class Stream(httpcore.NetworkStream):
        def __init__(self, stream: Any):
            self._stream = stream
            with lock:
                opened.add(stream)

        def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
            return self._stream.read(max_bytes, remaining())

        def write(self, buffer: bytes, timeout: float | None = None) -> None:
            for start in range(0, len(buffer), _SENT_AT_ONCE):
                part = buffer[start : start + _SENT_AT_ONCE]
                self._stream.write(part, remaining())

        def close(self) -> None:
            with lock:
                opened.discard(self._stream)
            self._stream.close()

        def start_tls(
            self,
            ssl_context: Any,
            server_hostname: str | None = None,
            timeout: float | None = None,
        ) -> Any:
            stream = self._stream.start_tls(ssl_context, server_hostname, remaining())
            with lock:
                opened.discard(self._stream)
            return Stream(stream)

        def get_extra_info(self, info: str) -> Any:
            return self._stream.get_extra_info(info)

    class Backend(httpcore.NetworkBackend):
        def __init__(self) -> None:
            self._backend = httpcore.SyncBackend()

        def connect_tcp(self, host: str, port: int, *unused: Any, **other: Any) -> Any:
            return Stream(self._backend.connect_tcp(host, port, timeout=remaining()))

        def sleep(self, seconds: float) -> None:
            self._backend.sleep(seconds)

    return Backend()
