"""A small HTTP client for what wrk can't do: send at given moments, whatever comes back.

Run as a process of its own, ``python -m benchmarks.client PLAN``, where PLAN is the JSON of a
``Plan``; prints the JSON of a ``Report``. Latency counts from the moment at which a request
was meant to go out: when the server stalls, those that had to wait show it.
"""

import asyncio
import contextlib
import gc
import json
import math
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from benchmarks.users import user_id

CONNECTS_AT_ONCE = 200
TICK_SECONDS = 0.001
LEAD_SECONDS = 0.2  # between the last connection and the first request
ANSWER_SECONDS = 15  # how long to wait for answers after the last request


@dataclass(frozen=True)
class Plan:
    """``count`` requests, one each ``interval_seconds``, each as the next user; SIGTERM ends it.

    Without ``connections`` each request gets a connection of its own: open beforehand where
    ``connect_first``, else opened when the request is due.
    """

    port: int
    path: str
    first_user: int
    count: int
    interval_seconds: float
    connections: int | None = 128
    connect_first: bool = True
    # The requests go to these, and ``path``, in turn.
    other_paths: Sequence[str] = ()


@dataclass
class Report:
    """``answers`` has one (time due, latency in ms) per answer, in the order they came."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    statuses: dict[str, int] = field(default_factory=dict)
    unanswered: int = 0
    # When the first request was due, the last one was written, the last answer came.
    started: float = 0.0
    written: float = 0.0
    finished: float = 0.0

    def latencies_ms(self, since: float = 0.0, until: float = math.inf) -> list[float]:
        return [latency for due, latency in self.answers if since <= due <= until]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile; NaN without values."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on its way."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self.due = 0.0
        self.is_waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def send(self, request: bytes, due: float) -> None:
        if self._transport is None or self._transport.is_closing():
            self._client.lost(self)
            return
        self.due, self.is_waiting = due, True
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or len(body) < content_length(head):
            return
        self._received = b""
        self.is_waiting = False
        self._client.answered(self, head[9:12].decode())

    def connection_lost(self, exc: Exception | None) -> None:
        if self.is_waiting:
            self.is_waiting = False
            self._client.lost(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


class Client:
    """Sends what a plan says and keeps what came back."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = Report()
        self._statuses: Counter[str] = Counter()
        self._connections: list[Connection] = []
        self._idle: deque[Connection] = deque()
        # Requests without a connection, and when they were due.
        self._waiting: deque[tuple[bytes, float]] = deque()
        self._sent = self._settled = 0
        self._is_stopping = False
        self._all_settled = asyncio.Event()
        # Monotonic times become the wall clock's by this.
        self._offset = time.time() - time.monotonic()

    async def run(self) -> Report:
        if self.plan.connect_first:
            await self._connect(self.plan.connections or self.plan.count)
        requests = [self._request(index) for index in range(self.plan.count)]
        gc.freeze()
        gc.disable()
        start = time.monotonic() + LEAD_SECONDS
        self.report.started = start + self._offset
        tasks = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop)
        for index, request in enumerate(requests):
            due = start + index * self.plan.interval_seconds
            if (wait := due - time.monotonic()) > 0:
                # No shorter than uvloop's clock ticks, or the loop would spin meanwhile.
                await asyncio.sleep(max(wait, TICK_SECONDS))
            if self._is_stopping:
                break
            self._sent += 1
            if not self.plan.connect_first:
                tasks.append(asyncio.create_task(self._send_on_new_connection(request, due)))
            elif self._idle:
                self._idle.popleft().send(request, due)
            else:
                self._waiting.append((request, due))
            if not index % 16:
                # Read answers even when all of this is late.
                await asyncio.sleep(0)
        self.report.written = time.time()
        self._is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                while self._settled < self._sent:
                    self._all_settled.clear()
                    await self._all_settled.wait()
        self.report.statuses = dict(self._statuses)
        self.report.unanswered = self._sent - len(self.report.answers)
        for connection in self._connections:
            connection.close()
        return self.report

    def stop(self) -> None:
        """Send nothing more; what is on its way may still be answered."""
        self._is_stopping = True

    def answered(self, connection: Connection, status: str) -> None:
        now = time.monotonic()
        self._statuses[status] += 1
        self.report.finished = now + self._offset
        self.report.answers.append((connection.due + self._offset, (now - connection.due) * 1000))
        if self._waiting:
            connection.send(*self._waiting.popleft())
        else:
            self._idle.append(connection)
        self._settle()

    def lost(self, connection: Connection) -> None:
        self._statuses["connection lost"] += 1
        self._settle()

    def _settle(self) -> None:
        self._settled += 1
        if self._is_stopping:
            self._all_settled.set()

    async def _connect(self, count: int) -> None:
        for start in range(0, count, CONNECTS_AT_ONCE):
            await asyncio.gather(
                *(self._open() for _ in range(start, min(start + CONNECTS_AT_ONCE, count)))
            )
        self._idle.extend(self._connections)

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: Connection(self), "127.0.0.1", self.plan.port
        )
        self._connections.append(connection)
        return connection

    async def _send_on_new_connection(self, request: bytes, due: float) -> None:
        try:
            connection = await self._open()
        except OSError:
            self._statuses["no connection"] += 1
            self._settle()
        else:
            connection.send(request, due)

    def _request(self, index: int) -> bytes:
        paths = [self.plan.path, *self.plan.other_paths]
        return (
            f"POST {paths[index % len(paths)]} HTTP/1.1\r\nHost: 127.0.0.1:{self.plan.port}\r\n"
            f"X-User-Id: {user_id(self.plan.first_user + index)}\r\nContent-Length: 0\r\n\r\n"
        ).encode()


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    try:
        import uvloop
    except ImportError:
        report = asyncio.run(Client(plan).run())
    else:
        report = uvloop.run(Client(plan).run())
    json.dump(asdict(report), sys.stdout)


if __name__ == "__main__":
    main()
