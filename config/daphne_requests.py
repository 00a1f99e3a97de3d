"""daphne's requests, with limits, and with a shorter way for plain ones.

Large bodies and slow senders are refused before the application hears of them: by itself
daphne hands over a request when it is complete, having written its body to disk, and lets a
sender take for ever. Source of the hooks: twisted.web.http.Request, whose methods are called as
a request arrives.
"""

import re
import time
from io import BytesIO
from typing import Any

import daphne.server
import orjson
from daphne.http_protocol import HTTPFactory, WebRequest
from django.conf import settings
from twisted.internet import reactor as _reactor
from twisted.internet.tcp import Connection

from config.answers import cors_headers, security_headers
from config.body_limit import body_limit
from config.daphne_sockets import escape
from config.hot_routes import scheme_of
from config.middleware import request_id
from config.problems import CONTENT_TYPE, BodyTooLarge, problem

# Twisted types its own as a module.
reactor: Any = _reactor

# What is read, and thrown away, of a refused body, so that its sender comes to read the answer.
LINGER_BYTES = 4 * 1024 * 1024
LINGER_SECONDS = 5
# How long a connection is kept for another request; Twisted's own choice.
IDLE_SECONDS = 60
SWEEP_SECONDS = 0.5

# What is no matter of course, daphne itself looks at.
SPECIAL_HEADERS = frozenset({b"upgrade", b"daphne-root-path"})
PLAIN_HEADER_NAME = re.compile(rb"[a-z0-9-]+")
# Names come as UTF-8. daphne takes one of its bytes, as in Å and in most Arabic names, for a line
# break: that is what it would be to the library that opens its sockets, and only to that.
UNUSUAL_IN_HEADER = re.compile(rb"[^\x20-\x7e\x80-\xff]")
PLAIN_PATH = re.compile(rb"/[A-Za-z0-9._~/-]*")


class LimitedRequest(WebRequest):
    """A request that ends early when it is too large, or takes too long to arrive."""

    received_bytes = 0
    is_refused = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._factory: LimitedFactory = self.channel.factory
        self._factory.idle.pop(self.channel, None)
        self._factory.arriving[self] = time.monotonic() + settings.REQUEST_SECONDS

    @property
    def limit(self) -> int:
        return body_limit(self.channel._path.decode("latin-1"))

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
        self._factory.arriving.pop(self, None)
        if self.is_refused:
            self.channel.loseConnection()
        else:
            super().requestReceived(command, path, version)

    def process(self) -> Any:
        """Call the application; whatever is out of the ordinary is left to daphne.

        The same scope as daphne's, without the generator, the look-ups and the copies of
        ``WebRequest.process``, which take a tenth of the time of a hot request.
        """
        scope = self._plain_scope()
        if scope is None:
            # Else daphne would believe any client where the application is mounted, and serve
            # /x/metrics as /metrics, which a proxy refuses. Sockets begin here as well.
            self.requestHeaders.removeHeader(b"daphne-root-path")
            self._escape_handshake()
            return super().process()
        self.request_start = time.time()
        self.client_addr, self.server_addr = scope["client"], scope["server"]
        self.client_scheme, self.query_string = "http", scope["query_string"]
        self.application_queue = self.server.create_application(self, scope)
        if self.application_queue is not None:
            body = self.content.getvalue()
            self.application_queue.put_nowait(
                {"type": "http.request", "body": body, "more_body": False}
            )
        return None

    def _escape_handshake(self) -> None:
        upgrade = self.requestHeaders.getRawHeaders(b"upgrade", [b""])[0]
        if upgrade.lower() == b"websocket":
            for name, values in list(self.requestHeaders.getAllRawHeaders()):
                self.requestHeaders.setRawHeaders(name, [escape(value) for value in values])

    def _plain_scope(self) -> dict[str, Any] | None:
        server, transport = self.server, self.channel.transport
        path, _, query = self.uri.partition(b"?")
        if (
            server.proxy_forwarded_address_header
            or not isinstance(transport, Connection)
            or transport.TLS
            # A Unix socket has none.
            or not hasattr(self.client, "host")
            or len(self.content.getbuffer()) >= server.request_buffer_size
            or not PLAIN_PATH.fullmatch(path)
            or not query.isascii()
        ):
            return None
        headers = []
        for name, values in self.requestHeaders.getAllRawHeaders():
            key = name.lower()
            if key in SPECIAL_HEADERS or not PLAIN_HEADER_NAME.fullmatch(key):
                return None
            for value in values:
                if UNUSUAL_IN_HEADER.search(value):
                    return None
                headers.append((key, value))
        return {
            "type": "http",
            "http_version": self.clientproto[5:].decode("ascii"),
            "method": self.method.decode("ascii"),
            "path": path.decode("ascii"),
            "raw_path": path,
            "root_path": server.root_path,
            "scheme": "http",
            "query_string": query,
            "headers": headers,
            "client": [self.client.host, self.client.port],
            "server": [self.host.host, self.host.port],
        }

    def connectionLost(self, reason: Any) -> None:
        self._factory.arriving.pop(self, None)
        super().connectionLost(reason)

    def finish(self) -> None:
        # Twisted takes the channel away from a request that is done.
        if getattr(self, "channel", None) is not None:
            # Before the next request, which may be here already.
            self._factory.idle[self.channel] = time.monotonic() + IDLE_SECONDS
        super().finish()

    def _refuse(self) -> None:
        self.is_refused = True
        identifier = request_id(self._header(b"X-Request-Id") or "")
        own_scheme = {"scheme": "https" if self.isSecure() else "http"}
        scheme = scheme_of(own_scheme, self._header(b"X-Forwarded-Proto"))
        body = orjson.dumps(problem(BodyTooLarge(), identifier))
        headers = [
            (b"content-type", CONTENT_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", identifier.encode()),
            (b"connection", b"close"),
            *security_headers(scheme),
            *cors_headers(self._header(b"Origin")),
        ]
        lines = [b"HTTP/1.1 413 Content Too Large", *(b"%b: %b" % header for header in headers)]
        transport = self.channel.transport
        transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        # Closed at once, the connection would be reset, and the answer lost with it.
        transport.loseWriteConnection()
        self._factory.arriving[self] = time.monotonic() + LINGER_SECONDS

    def _header(self, name: bytes) -> str | None:
        values = self.requestHeaders.getRawHeaders(name)
        return values[0].decode("latin-1") if values else None

    def _abort(self) -> None:
        if self.channel is not None:
            self.channel.transport.abortConnection()


class LimitedFactory(HTTPFactory):
    """Makes the limited requests, and ends what takes too long.

    Nearly nothing does, so all share one clock: Twisted's timers, a new one for each request
    and for each pause between two, cost as much as a tenth of a whole request.
    """

    def __init__(self, server: Any) -> None:
        super().__init__(server)
        self.timeOut = None
        # When (``time.monotonic``) the time of a request is up that is not complete yet.
        self.arriving: dict[LimitedRequest, float] = {}
        # The same of connections on which no request is under way.
        self.idle: dict[Any, float] = {}

    def startFactory(self) -> None:
        super().startFactory()
        self._end_overdue()

    def buildProtocol(self, addr: Any) -> Any:
        protocol = super().buildProtocol(addr)
        protocol.requestFactory = LimitedRequest
        # From the first byte on; the request has its own time once its first line is there.
        self.idle[protocol._channel] = time.monotonic() + settings.REQUEST_SECONDS
        return protocol

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for request in [request for request, at in self.arriving.items() if at <= now]:
            del self.arriving[request]
            request._abort()
        for channel in [channel for channel, at in self.idle.items() if at <= now]:
            del self.idle[channel]
            if channel.transport is not None:
                channel.transport.abortConnection()
        reactor.callLater(SWEEP_SECONDS, self._end_overdue)

    def log(self, request: Any) -> None:
        """Twisted would make a line for each request, which daphne has it throw away."""


def install() -> None:
    """Let every server that daphne makes from now on have the limits, however it is started."""
    daphne.server.HTTPFactory = LimitedFactory
