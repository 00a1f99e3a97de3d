"""Have daphne refuse large bodies and slow senders before the application hears of them.

By itself it hands over a request when it is complete, having written its body to disk, and
lets a sender take for ever. Source of the hooks: twisted.web.http.Request, whose methods
are called as a request arrives.
"""

import time
from io import BytesIO
from typing import Any

import daphne.server
import orjson
from daphne.http_protocol import HTTPFactory, WebRequest
from django.conf import settings
from twisted.internet import reactor as _reactor

from config.answers import cors_headers, security_headers
from config.middleware import request_id
from config.problems import CONTENT_TYPE, BodyTooLarge, problem

# Twisted types its own as a module.
reactor: Any = _reactor

# What is read, and thrown away, of a refused body, so that its sender comes to read the answer.
LINGER_BYTES = 4 * 1024 * 1024
LINGER_SECONDS = 5
SWEEP_SECONDS = 0.5


class LimitedRequest(WebRequest):
    """A request that ends early when it is too large, or takes too long to arrive."""

    received_bytes = 0
    is_refused = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._deadlines = self.channel.factory.deadlines
        self._deadlines[self] = time.monotonic() + settings.REQUEST_SECONDS

    @property
    def limit(self) -> int:
        is_api = self.channel._path.startswith(b"/api/")
        return settings.MAX_BODY_BYTES if is_api else settings.DATA_UPLOAD_MAX_MEMORY_SIZE

    def gotLength(self, length: int | None) -> None:
        # In memory always: a body of unknown length would be a file from its first byte on.
        self.content = BytesIO()
        if length is not None and length > self.limit:
            self._refuse()

    def handleContentChunk(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if self.is_refused:
            if self.received_bytes > LINGER_BYTES:
                self._abort()
        elif self.received_bytes > self.limit:
            self._refuse()
        else:
            super().handleContentChunk(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        self._deadlines.pop(self, None)
        if self.is_refused:
            self.channel.loseConnection()
        else:
            super().requestReceived(command, path, version)

    def connectionLost(self, reason: Any) -> None:
        self._deadlines.pop(self, None)
        super().connectionLost(reason)

    def _refuse(self) -> None:
        self.is_refused = True
        identifier = request_id(self._header(b"X-Request-Id"))
        body = orjson.dumps(problem(BodyTooLarge(), identifier))
        headers = [
            (b"content-type", CONTENT_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", identifier.encode()),
            (b"connection", b"close"),
            *security_headers("http"),
            *cors_headers(self._header(b"Origin")),
        ]
        lines = [b"HTTP/1.1 413 Content Too Large", *(b"%b: %b" % header for header in headers)]
        transport = self.channel.transport
        transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        # Closed at once, the connection would be reset, and the answer lost with it.
        transport.loseWriteConnection()
        self._deadlines[self] = time.monotonic() + LINGER_SECONDS

    def _header(self, name: bytes) -> str:
        return (self.requestHeaders.getRawHeaders(name) or [b""])[0].decode("latin-1")

    def _abort(self) -> None:
        if self.channel is not None:
            self.channel.transport.abortConnection()


class LimitedFactory(HTTPFactory):
    """Makes the limited requests, and ends those that are still arriving when their time is up.

    Nearly all arrive at once, so they share one clock: a timer for each would cost as much as
    a tenth of a whole request.
    """

    def __init__(self, server: Any) -> None:
        super().__init__(server)
        # When (``time.monotonic``) the time of a request is up that is not complete yet.
        self.deadlines: dict[LimitedRequest, float] = {}

    def startFactory(self) -> None:
        super().startFactory()
        self._end_overdue()

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for request in [request for request, at in self.deadlines.items() if at <= now]:
            del self.deadlines[request]
            request._abort()
        reactor.callLater(SWEEP_SECONDS, self._end_overdue)

    def log(self, request: Any) -> None:
        """Twisted would make a line for each request, which daphne has it throw away."""

    def buildProtocol(self, addr: Any) -> Any:
        protocol = super().buildProtocol(addr)
        # From the first byte on; the request has its own time once its first line is there.
        silent = reactor.callLater(settings.REQUEST_SECONDS, close_if_silent, protocol)

        def make_request(*args: Any) -> LimitedRequest:
            if silent.active():
                silent.cancel()
            return LimitedRequest(*args)

        protocol.requestFactory = make_request
        return protocol


def close_if_silent(protocol: Any) -> None:
    transport = protocol._channel.transport
    if transport is not None:
        transport.abortConnection()


def install() -> None:
    """Let every server that daphne makes from now on have the limits, however it is started."""
    daphne.server.HTTPFactory = LimitedFactory
