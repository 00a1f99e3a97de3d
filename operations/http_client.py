"""A small HTTP client for thousands of shoppers in one process: one connection each."""

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import orjson

ANSWER_SECONDS = 15.0


class Lost(Exception):
    """There is no answer, so nobody knows whether the request was carried out."""


class ClosedIdle(ConnectionError):
    """The connection ended without a byte of the answer."""


@dataclass(frozen=True)
class Server:
    """The public address of an installation."""

    host: str
    port: int
    is_tls: bool

    @classmethod
    def at(cls, url: str) -> "Server":
        """Return the server of an ``http://`` or ``https://`` address.

        Raises:
            ValueError: it is no such address, or has a path.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in "/":
            raise ValueError(f"{url} is not like https://shop.example.com")
        is_tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls)

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"

    def url(self, scheme: str) -> str:
        return f"{scheme}{'s' if self.is_tls else ''}://{self.netloc}"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def data(self) -> dict:
        """Return the JSON object of the body, or an empty one where there is none."""
        try:
            data = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return {}
        return data if isinstance(data, dict) else {}


@lru_cache(1)
def tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


class Connection(asyncio.Protocol):
    """One keep-alive connection, which carries one request at a time."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._received = b""

    async def ask(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """Send a request without a body and return its answer; connect first where needed.

        Raises:
            Lost: no connection, or it ended before the answer, or there was none in time.
        """
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._server.netloc}", "Content-Length: 0"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        request = "\r\n".join([*lines, "\r\n"]).encode()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if self._transport is not None and not self._transport.is_closing():
                    # As a browser does: a server may close what was idle at this very moment,
                    # and then the same request goes out on a new connection.
                    with contextlib.suppress(ClosedIdle):
                        return await self._send(request)
                await self._connect()
                return await self._send(request)
        except (OSError, TimeoutError) as exc:
            self.close()
            raise Lost(str(exc) or "no answer in time") from exc

    async def _connect(self) -> None:
        await asyncio.get_running_loop().create_connection(
            lambda: self,
            self._server.host,
            self._server.port,
            ssl=tls_context() if self._server.is_tls else None,
        )

    async def _send(self, request: bytes) -> Answer:
        assert self._transport is not None  # noqa: S101
        self._answer, self._received = asyncio.get_running_loop().create_future(), b""
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or self._answer is None or self._answer.done():
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if "content-length" not in headers:
            self._answer.set_exception(ConnectionError("an answer without Content-Length"))
        elif len(body) >= int(headers["content-length"]):
            self._answer.set_result(Answer(int(first.split()[1]), headers, body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            kind = ConnectionError if self._received else ClosedIdle
            self._answer.set_exception(kind("the connection ended before the answer"))
