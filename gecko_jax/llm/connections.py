"""HTTP requests with one deadline, a bounded reply and an interrupt.

A socket's timeout restarts with every byte that arrives. Here one timer per request
covers connecting, headers and body, and shuts the socket down when it fires.
`Connections.abort` does the same to all requests. Redirects are not followed, and
proxies are not used.
"""

import contextlib
import functools
import http.client
import select
import socket
import threading
import urllib.parse
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from gecko_jax.llm import wire

_CLIENTS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


class Reply(NamedTuple):
    """A reply: HTTP status, headers by lower-case name, and decompressed body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connections:
    """The connections to one server; threads share them."""

    def __init__(self, url: str, headers: Mapping[str, str]):
        try:
            parts = urllib.parse.urlsplit(url.rstrip("/"))
            client = functools.partial(_CLIENTS[parts.scheme], parts.hostname or "")
            client(port=parts.port)  # Checks host and port.
        except (ValueError, KeyError, http.client.InvalidURL) as error:
            raise ValueError(
                f"llm.url={url!r}: not a URL ({error}); write it as http://host:port"
            ) from error
        self._new = functools.partial(client, port=parts.port)
        self._root = parts.path
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()

    def close(self) -> None:
        """Closes the idle connections."""
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    def abort(self) -> None:
        """Ends every open request, which raises `wire.NoAnswer` in its thread."""
        with self._lock:
            for connection in self._busy:
                _shut(connection)

    def request(
        self, method: str, path: str, body: bytes | None, seconds: float, max_bytes: int
    ) -> Reply:
        """Sends a request and returns the reply.

        The path is below the root of the server, and the body is JSON. `seconds` is the
        deadline from connecting to the last byte, `max_bytes` the largest body of the
        reply, compressed or not. Raises `wire.NoAnswer` for the reason "connection",
        "timeout", "cut_off" or "too_large".
        """
        headers = dict(self._headers)
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = self._take(seconds)
        is_late = threading.Event()

        def expire() -> None:
            is_late.set()
            _shut(connection)

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        reason, is_reusable = "connection", False
        try:
            if connection.sock is None:
                connection.connect()
            reason = "cut_off"
            # A server may reply and close before it has read the whole request.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self._root + path, body, headers)
            response = connection.getresponse()
            content = response.read(max_bytes + 1)
            if is_late.is_set():  # The timer may have cut a body without a length.
                raise TimeoutError
            is_reusable = response.isclosed() and not response.will_close
        except (OSError, http.client.HTTPException, ValueError) as error:
            if is_late.is_set() or isinstance(error, TimeoutError):
                late = f"no reply within {seconds:g} s"
                raise wire.NoAnswer("timeout", late) from error
            raise wire.NoAnswer(reason, f"{type(error).__name__}: {error}") from error
        finally:
            timer.cancel()
            timer.join()  # It must not fire once another request has the connection.
            with self._lock:
                self._busy.discard(connection)
                if is_reusable and not is_late.is_set():
                    self._idle.append(connection)
                else:
                    connection.close()
        if len(content) <= max_bytes and response.length:
            raise wire.NoAnswer("cut_off", f"{response.length:,} bytes are missing")
        fields = {name.lower(): value for name, value in response.headers.items()}
        encoding = fields.get("content-encoding", "identity").strip().lower()
        if len(content) <= max_bytes:
            content = _decompress(content, encoding, max_bytes)
        if len(content) > max_bytes:
            detail = f"the reply has more than {max_bytes:,} bytes"
            raise wire.NoAnswer("too_large", detail)
        return Reply(response.status, fields, content)

    def _take(self, seconds: float) -> http.client.HTTPConnection:
        """Returns an idle connection that the server has not closed, or a new one."""
        with self._lock:
            connection = self._new(timeout=seconds)
            while self._idle:
                idle = self._idle.pop()
                poll = select.poll()
                poll.register(idle.sock, select.POLLIN)
                if not poll.poll(0):
                    connection = idle
                    break
                idle.close()  # Nothing was requested, so what arrived is the end.
            self._busy.add(connection)
        return connection


def _shut(connection: http.client.HTTPConnection) -> None:
    """Wakes the thread that reads or writes this connection with an error."""
    if (sock := connection.sock) is not None:
        with contextlib.suppress(OSError):
            # Not TLS's own shutdown, which may only run in the thread that reads.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _decompress(content: bytes, encoding: str, max_bytes: int) -> bytes:
    """Returns at most one byte more than `max_bytes`."""
    if encoding == "identity":
        return content
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise wire.NoAnswer("cut_off", f"the reply is encoded as {encoding!r}")
    # Detects gzip and zlib by their headers.
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        content = decompressor.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise wire.NoAnswer("cut_off", f"badly compressed ({error})") from error
    if len(content) <= max_bytes and not decompressor.eof:
        raise wire.NoAnswer("cut_off", "the compressed reply has no end")
    return content
