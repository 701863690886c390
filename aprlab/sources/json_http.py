"""JSON over HTTP from a server that is not trusted: a deadline for the whole answer, a limit for its size, no redirects.

The standard library's sockets alone: a timeout of theirs holds for each byte, so a server that sends one now and then would hold
its caller forever. Here a timer closes the connection. Proxies and redirects are not followed, so a key goes to the server
that was named and nowhere else; it comes from the environment and is in no message.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

from aprlab.display.plain_text import printable
from aprlab.errors import AprlabError, UnsupportedError, UsageError

KEY = "APRLAB_SERVER_KEY"  # of the environment; sent as a bearer token
SECONDS = 120.0  # for one whole answer
MOST = 8 << 20  # bytes of one answer: a few tokens with the twenty likeliest of each are some kilobytes
SCHEMES = ("http", "https")


class ServerError(AprlabError):
    """The server cannot be reached, breaks off, or takes too long."""

    exit_code = 1


class ServerRefusal(UnsupportedError):
    """The server answers with a status that is not 200; `status` has it."""

    status = 0


class JsonServer:
    """A server at a base address.

    Args:
        url: ``http://host:port`` or ``https://…``, with or without a path such as ``/v1``.
        seconds: for one whole answer.

    Raises:
        UsageError: not such an address, one with a password or a query in it, or a key that would travel in the clear.
    """

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in SCHEMES or not parts.hostname or port == -1:
            raise UsageError("a server is http://HOST:PORT or https://HOST:PORT", code="server.address")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            said = f"a server's address has no user, password or query in it; a key goes into {KEY}"
            raise UsageError(said, code="server.address")
        self.secure, self.host, self.port = parts.scheme == "https", parts.hostname, port
        self.seconds, self.base = seconds, parts.path.rstrip("/")
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{self.base}"
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "aprlab"}
        self._headers |= self._authorization()

    def _authorization(self) -> dict[str, str]:
        key = os.environ.get(KEY, "")
        if not key:
            return {}
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UsageError(f"{KEY} is not one line of plain characters", code="server.key")
        if not self.secure and self.host not in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(f"{KEY} is set, and would travel in the clear to {self.url}; use https", code="server.key")
        return {"Authorization": f"Bearer {key}"}

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON that the server answers: GET, or POST where there is a body.

        Raises:
            ServerError: unreachable, broken off, or not done in time.
            ServerRefusal: another status than 200.
            UnsupportedError: more bytes than an answer has, or no JSON.
        """
        import http.client  # with TLS, 20 ms of every start

        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        link = kind(self.host, self.port, timeout=self.seconds)
        late = threading.Event()
        sockets: list[socket.socket] = []  # http.client forgets its own once an answer has begun
        timer = threading.Timer(self.seconds, self._give_up, (sockets, late))
        timer.daemon = True
        timer.start()
        try:
            link.connect()
            sockets.append(link.sock)
            status, data = self._exchange(link, path, body)
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise self._too_late(path) from None
            said = f"cannot be reached, or broke off: {printable(str(error) or type(error).__name__)[:200]}"
            raise ServerError(said, code="server.unreachable", path=self.url) from None
        finally:
            timer.cancel()
            link.close()
        if late.is_set():
            raise self._too_late(path)
        if status != 200:
            why = _why(data, self._headers.get("Authorization", "").removeprefix("Bearer "))
            refusal = ServerRefusal(f"{path}: HTTP {status}{why}", code="server.status", path=self.url)
            refusal.status = status
            raise refusal
        return self._parsed(path, data)

    def _exchange(self, link: Any, path: str, body: Any) -> tuple[int, bytes]:
        sent = None if body is None else json.dumps(body).encode()
        headers = self._headers if sent is None else {**self._headers, "Content-Type": "application/json"}
        link.request("GET" if sent is None else "POST", f"{self.base}{path}", sent, headers)
        answer = link.getresponse()
        data = answer.read(MOST + 1)
        if len(data) > MOST:
            said = f"{path}: the answer is longer than {MOST >> 20} MiB; it was cut off"
            raise UnsupportedError(said, code="server.too-long", path=self.url)
        if answer.length:  # a length was announced, and less came
            raise ConnectionError(f"{answer.length} bytes of the answer are missing")
        return answer.status, data

    def _parsed(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            start = printable(data[:60].decode(errors="replace"))
            said = f"{path}: the answer is no JSON; it begins {start!r}"
            raise UnsupportedError(said, code="server.not-json", path=self.url) from None

    def _too_late(self, path: str) -> ServerError:
        return ServerError(f"{path}: no whole answer in {self.seconds:g} s", code="server.timeout", path=self.url)

    @staticmethod
    def _give_up(sockets: list[socket.socket], late: threading.Event) -> None:
        late.set()
        for each in sockets:
            with contextlib.suppress(OSError):  # it is closed already
                each.shutdown(socket.SHUT_RDWR)


def _why(data: bytes, key: str) -> str:
    """What the body of a refusal says, on one short line, without the key that it may quote."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    error = found.get("error", found) if isinstance(found, dict) else {}
    text = error.get("message", "") if isinstance(error, dict) else error
    if not isinstance(text, str) or not text:
        return ""
    return f": {printable(' '.join((text.replace(key, '…') if key else text).split()))[:200]}"


__all__ = ["KEY", "JsonServer", "ServerError", "ServerRefusal"]
