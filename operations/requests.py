"""One line and one measurement per HTTP request, whichever lane answers it.

``RequestLog`` stands in front of all that answers. Whoever finds something out about the
request writes it into the request's ``Record``; at the end there is one line of it.
"""

import asyncio
import atexit
import logging
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from time import perf_counter, time
from typing import Any
from uuid import UUID

import orjson
from django.conf import settings

from config.logs import masked
from config.servers import wrote_too_late
from operations import metrics

# How long lines may wait for company: a write for each would cost as much as the rest.
WRITE_SECONDS = 0.1
# Few enough to stay in memory that is warm: a thousand made each line cost twice as much.
MOST_WAITING_LINES = 100
# What nginx calls a request whose client went away before the answer.
CLIENT_IS_GONE = 499
METHODS = frozenset({"GET", "POST", "PATCH", "DELETE", "HEAD", "OPTIONS", "PUT"})
CLAIMS = {"/api/drops/{id}/reserve": "reserve", "/api/drops/{id}/purchase": "purchase"}

RECORD = "drops.record"


@dataclass(slots=True)
class Record:
    """What is known of one request; its attributes are the fields of the line."""

    lane: str = "viewset"
    route: str = "other"
    status: int = 0
    # The outcome: an error's code, or created, repeated, replayed or ok.
    code: str = ""
    request_id: str = ""
    user_id: UUID | str | None = None
    drop_id: UUID | str | None = None
    reservation_id: UUID | str | None = None


def record_of(scope: Any) -> Record:
    """Return the record of the request, or one that nobody reads, outside of ``RequestLog``."""
    return scope.get(RECORD) or Record()


class Lines:
    """Lines on their way to standard error, a few together."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._write = self._to_stderr

    def put(self, line: bytes) -> None:
        self._waiting.append(line)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(WRITE_SECONDS, self.flush)
        elif len(self._waiting) >= MOST_WAITING_LINES:
            self.flush()

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._write(b"".join(waiting))

    def _to_stderr(self, data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


lines = Lines()
# The last tenth of a second of a process that stops.
atexit.register(lines.flush)


class RequestLog:
    """Hand every request on, and note how it was answered; ``others`` serves what isn't HTTP.

    ``observers`` are called with each scope, record, start (``time.time``) and duration.
    """

    def __init__(
        self,
        http: Callable[..., Any],
        others: Callable[..., Any],
        *,
        samplers: Iterable[Callable[[], None]] = (),
        observers: Iterable[Callable[[Any, Record, float, float], None]] = (),
    ) -> None:
        self.http = http
        self.others = others
        self.observers = tuple(observers)
        self.samplers = tuple(samplers)
        is_wanted = settings.REQUEST_LOG and logging.getLogger("requests").isEnabledFor(
            logging.INFO
        )
        self.render = None if not is_wanted else readable_line if settings.DEBUG else json_line
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            self._tick(loop)
        if scope["type"] != "http":
            return await self.others(scope, receive, send)
        record = scope[RECORD] = Record()
        began = perf_counter()
        try:
            await self.http(scope, receive, send)
        except Exception as exc:
            if isinstance(exc, RuntimeError) and wrote_too_late(send):
                record.status = 0
            else:
                record.status = 500
                raise
        finally:
            self._finish(scope, record, perf_counter() - began)

    def _finish(self, scope: Any, record: Record, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        if not record.status:
            record.status, record.code = CLIENT_IS_GONE, record.code or "client_gone"
        elif not record.code:
            record.code = "ok" if record.status < 400 else "refused"
        # How long a stream lasts says nothing about how quickly it began.
        if record.lane != "stream":
            labels = record.lane, method, record.route, status_text(record.status)
            metrics.request_seconds.of(*labels).observe(seconds)
            if method == "POST" and (action := CLAIMS.get(record.route)):
                metrics.claims.of(action, record.code, record.lane).add()
        if self.render is not None:
            lines.put(self.render(scope, record, seconds))
        for observe in self.observers:
            observe(scope, record, time() - seconds, seconds)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sample and hand over the metrics of this process, now and once a second."""
        for sample in self.samplers:
            try:
                sample()
            except Exception:
                logging.getLogger(__name__).exception("a metric could not be read")
        metrics.flush()
        loop.call_later(metrics.FLUSH_SECONDS, self._tick, loop)


class StatusNoted:
    """Note the status of answers that are made by many hands: Django's, and in front of it."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self.application = application

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        record = record_of(scope)

        async def send_noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        await self.application(scope, receive, send_noted)


status_text: Callable[[int], str] = lru_cache(1000)(str)


def json_line(scope: Any, record: Record, seconds: float) -> bytes:
    """Return the line for machines."""
    line = {
        "timestamp": datetime.now(UTC),
        "level": "error" if record.status >= 500 else "info",
        "logger": "requests",
        "event": "request",
        "lane": record.lane,
        "method": scope["method"],
        # Without the query, which may hold a ticket.
        "path": scope["path"] if record.lane == "hot" else clean(scope["path"]),
        "route": record.route,
        "status": record.status,
        "code": record.code,
        "duration_ms": round(seconds * 1000, 3),
        "request_id": request_id_of(record),
        "user_id": record.user_id,
        "drop_id": record.drop_id,
        "reservation_id": record.reservation_id,
    }
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z)


def readable_line(scope: Any, record: Record, seconds: float) -> bytes:
    """Return the line for people."""
    at = datetime.now(UTC).strftime("%H:%M:%S")
    text = (
        f"{at} {record.status} {scope['method']} {clean(scope['path'])} {record.code} "
        f"{seconds * 1000:.1f} ms {record.lane} {request_id_of(record)}\n"
    )
    return text.encode(errors="replace")


def clean(path: str) -> str:
    """Return a path as a client wrote it, fit for a line."""
    return masked(path[:500]).encode(errors="replace").decode()


def request_id_of(record: Record) -> str:
    # A client may send anything as its id. What could be a secret has one of these.
    identifier = record.request_id
    return masked(identifier) if ":" in identifier or "." in identifier else identifier


NAMED_GROUP = re.compile(r"\(\?P<(\w+)>(?:[^()\[\]]|\[[^\]]*\])*\)")
CONVERTER = re.compile(r"<(?:\w+:)?(\w+)>")


@lru_cache(500)
def route_name(pattern: str) -> str:
    """Return Django's route as people write it: ``/api/drops/{id}/reserve``."""
    if pattern.startswith("admin"):
        return "/admin/"
    text = NAMED_GROUP.sub("{id}", pattern.replace("^", "").replace("/?$", "").replace("\\", ""))
    return "/" + CONVERTER.sub("{id}", text).removesuffix("$")
