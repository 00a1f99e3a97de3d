"""Thousands of WebSocket clients in one process: what they see, and when.

Run as a process of its own, ``python -m benchmarks.watchers PLAN``, where PLAN is the JSON of a
``Plan``; prints the JSON of a ``Report``. It shares the cores with the server, so it is cheap:
one epoll loop, and each distinct frame is parsed once however many sockets get it.
"""

import gc
import json
import math
import os
import random
import resource
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime

from benchmarks.users import user_id

CONNECTING_AT_ONCE = 100
CONNECT_SECONDS = 120
CHANGE_SECONDS = 10
# Longer than the pause that the server makes between two frames of a busy drop.
PAUSE_SECONDS = 0.15
# How long a client that was cut off stays away.
AWAY_SECONDS = 0.5
READ_BYTES = 65_536
# Of clients that never read, so that not everything fits into the kernel's buffers.
SMALL_BUFFER_BYTES = 4096
FRAMES_KNOWN_AT_ONCE = 20_000
TEXT, CLOSE, PING = 1, 8, 9
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)

# (drop, seq, prev, when it was committed by the wall clock, available stock or None)
Event = tuple[str, int, int, float, int | None]


@dataclass(frozen=True)
class Plan:
    """``sockets`` clients of ``path``, and what happens to them.

    With ``changes``, it sends as many requests itself, to ``post_path``, one after the other,
    each when all have seen the one before. Else it watches: prints ``ready`` when all are
    connected, takes figures after the line ``begin`` and reports after the line ``end``.
    """

    port: int
    path: str
    sockets: int
    changes: int = 0
    post_port: int = 0
    post_path: str = ""
    first_user: int = 1
    # Clients that connect and never read.
    unread: int = 0
    # The part of the clients that is cut off each second, for half a second.
    cut_each_second: float = 0.0


@dataclass
class Report:
    """Times in ms; what is no list is of the time between ``begin`` and ``end``.

    ``seconds`` goes from the first frame then to the last, of which ``frames`` came.
    """

    answers_ms: list[float] = field(default_factory=list)
    # From the request until the last client had the change.
    last_ms: list[float] = field(default_factory=list)
    catch_ups_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    frames: int = 0
    # From the commit to the client.
    delay_p50_ms: float = math.nan
    delay_p99_ms: float = math.nan
    # Of the stock that a client shows, at any moment: how long ago that was all there was.
    age_p99_ms: float = math.nan
    # Frames that did not join on, frames that were old, sockets that the server closed.
    gaps: int = 0
    repeats: int = 0
    closed: int = 0
    # What the clients ended with: the smallest and the largest.
    seqs: tuple[int, int] = (0, 0)
    stocks: tuple[int, int] = (0, 0)
    # When the last client's stock took its final value (Unix time).
    settled: float = 0.0
    problems: list[str] = field(default_factory=list)


class Histogram:
    """Counts times in bins of 0.1 ms, up to 20 s; also spans, in which each time counts once."""

    BINS = 200_000
    PER_MS = 10

    def __init__(self) -> None:
        self._steps = array("q", bytes(8 * (self.BINS + 1)))

    def add(self, seconds: float) -> None:
        index = min(self._bin(seconds), self.BINS - 1)
        self._steps[index] += 1
        self._steps[index + 1] -= 1

    def add_span(self, first: float, last: float) -> None:
        # As in ``add``, only the ends are written here; the sum over them comes later.
        self._steps[self._bin(first)] += 1
        self._steps[self._bin(last)] -= 1

    def _bin(self, seconds: float) -> int:
        return max(0, min(self.BINS, int(seconds * 1000 * self.PER_MS)))

    def percentile_ms(self, percent: float) -> float:
        counts, level = [], 0
        for step in self._steps:
            level += step
            counts.append(level)
        wanted = sum(counts) * percent / 100
        for index, count in enumerate(counts):
            wanted -= count
            if wanted <= 0 < count:
                return index / self.PER_MS
        return math.nan


class Watcher:
    """One client."""

    __slots__ = (
        "behind_since", "is_ready", "rest", "seqs", "shown", "sock", "stock", "stock_at", "target",
    )  # fmt: skip

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.rest = b""
        self.is_ready = False
        self.seqs: dict[str, int] = {}
        self.stock = 0
        self.stock_at = 0.0
        # By drop, when the stock that is shown was committed, and since when it is shown.
        self.shown: dict[str, tuple[float, float]] = {}
        # Of one that has come back: since when, and what it must reach.
        self.behind_since = 0.0
        self.target = 0


class Watchers:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.report = Report()
        self._epoll = select.epoll()
        self._by_fd: dict[int, Callable[[], None]] = {}
        self._known: dict[bytes, Event | None] = {}
        self._all = [Watcher() for _ in range(plan.sockets)]
        self._unread: list[socket.socket] = []
        self._ready = 0
        self._newest = 0
        # Of the change that all wait for.
        self._target = 0
        self._remaining = 0
        self._is_taking_figures = False
        self._first_frame = self._last_frame = 0.0
        self._delays, self._ages = Histogram(), Histogram()

    def run(self) -> Report:
        self._connect_all()
        gc.freeze()
        gc.disable()
        if self.plan.changes:
            self._make_changes()
        else:
            self._watch()
        if not self.report.closed:
            seqs = [max(watcher.seqs.values(), default=0) for watcher in self._all]
            stocks = [watcher.stock for watcher in self._all]
            self.report.seqs = min(seqs), max(seqs)
            self.report.stocks = min(stocks), max(stocks)
            self.report.settled = max(watcher.stock_at for watcher in self._all)
        return self.report

    # --- What happens ---------------------------------------------------------------------

    def _connect_all(self) -> None:
        deadline = time.monotonic() + CONNECT_SECONDS
        for started, watcher in enumerate(self._all):
            while started - self._ready >= CONNECTING_AT_ONCE:
                self._pump(1)
                self._check_connected(deadline)
            self._connect(watcher)
        while self._ready < len(self._all):
            self._pump(1)
            self._check_connected(deadline)
        for _ in range(self.plan.unread):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
            sock.connect(("127.0.0.1", self.plan.port))
            sock.sendall(HANDSHAKE.format(path=self.plan.path, port=self.plan.port).encode())
            self._unread.append(sock)

    def _check_connected(self, deadline: float) -> None:
        if self.report.closed or time.monotonic() > deadline:
            sys.exit(f"{self._ready} of {len(self._all)} sockets connected; {self.report.problems}")

    def _make_changes(self) -> None:
        """Send the requests, and time how long each takes to reach everybody."""
        post = socket.create_connection(("127.0.0.1", self.plan.post_port or self.plan.port))
        post.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        answered_at = 0.0

        def answer() -> None:
            nonlocal answered_at
            answered_at = time.perf_counter()
            head = post.recv(READ_BYTES)
            # The body may come in a piece of its own.
            if head.startswith(b"HTTP/") and not head.startswith(b"HTTP/1.1 201"):
                self.report.problems.append(head[:60].decode("latin-1"))

        self._register(post, answer)
        for number in range(self.plan.changes):
            self._pump_for(PAUSE_SECONDS)
            request = (
                f"POST {self.plan.post_path} HTTP/1.1\r\nHost: 127.0.0.1:{self.plan.port}\r\n"
                f"X-User-Id: {user_id(self.plan.first_user + number)}\r\n"
                "Content-Length: 0\r\n\r\n"
            ).encode()
            self._target, self._remaining = self._newest + 1, len(self._all)
            answered_at = last_at = 0.0
            started = time.perf_counter()
            post.sendall(request)
            while not answered_at or self._remaining:
                self._pump(1)
                if not self._remaining and not last_at:
                    last_at = time.perf_counter()
                if time.perf_counter() - started > CHANGE_SECONDS:
                    self.report.problems.append(f"{self._remaining} clients got no change")
                    return
            self.report.answers_ms.append((answered_at - started) * 1000)
            self.report.last_ms.append(((last_at or answered_at) - started) * 1000)

    def _watch(self) -> None:
        print("ready", flush=True)
        os.set_blocking(sys.stdin.fileno(), False)
        told: list[str] = []

        def listen() -> None:
            told.extend(sys.stdin.read().split())

        self._epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        self._by_fd[sys.stdin.fileno()] = listen
        while "begin" not in told:
            self._pump(1)
        self._is_taking_figures = True
        next_cut, cut = time.monotonic() + 1, 0
        away: list[tuple[float, Watcher]] = []
        while "end" not in told:
            self._pump(0.02)
            now = time.monotonic()
            if self.plan.cut_each_second and now >= next_cut:
                next_cut += 1
                count = round(len(self._all) * self.plan.cut_each_second)
                for index in range(cut, cut + count):
                    watcher = self._all[index % len(self._all)]
                    self._cut(watcher)
                    away.append((now + AWAY_SECONDS * random.uniform(0.5, 1.5), watcher))  # noqa: S311
                cut += count
            for back in [one for one in away if one[0] <= now]:
                away.remove(back)
                self._come_back(back[1])
        for _, watcher in away:
            self._come_back(watcher)
        # The last frames may still be on their way, and the last clients.
        self._is_taking_figures = False
        self.report.seconds = self._last_frame - self._first_frame
        self._pump_for(1)
        if any(watcher.target for watcher in self._all):
            self.report.problems.append("some clients have not caught up")
        self.report.delay_p50_ms = self._delays.percentile_ms(50)
        self.report.delay_p99_ms = self._delays.percentile_ms(99)
        self.report.age_p99_ms = self._ages.percentile_ms(99)

    # --- Sockets ----------------------------------------------------------------------------

    def _connect(self, watcher: Watcher, query: str = "") -> None:
        sock = socket.create_connection(("127.0.0.1", self.plan.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handshake = HANDSHAKE.format(path=self.plan.path + query, port=self.plan.port)
        sock.sendall(handshake.encode())
        watcher.sock, watcher.rest, watcher.is_ready = sock, b"", False
        self._register(sock, lambda: self._read(watcher, sock))

    def _register(self, sock: socket.socket, read: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._by_fd[sock.fileno()] = read
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _cut(self, watcher: Watcher) -> None:
        """Break the connection as a dying network does: without a word."""
        if watcher.sock is not None:
            linger = struct.pack("ii", 1, 0)
            watcher.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._leave(watcher)
            watcher.target = 0

    def _come_back(self, watcher: Watcher) -> None:
        (seq,) = watcher.seqs.values()
        watcher.behind_since = time.perf_counter()
        # Without anything missed there is nothing to wait for.
        watcher.target = self._newest if self._newest > seq else 0
        self._connect(watcher, f"?since={seq}")

    def _leave(self, watcher: Watcher) -> None:
        if watcher.sock is not None:
            self._epoll.unregister(watcher.sock.fileno())
            del self._by_fd[watcher.sock.fileno()]
            watcher.sock.close()
            watcher.sock = None

    def _pump_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._pump(left)

    def _pump(self, seconds: float) -> None:
        for fd, _ in self._epoll.poll(seconds, 1024):
            if read := self._by_fd.get(fd):
                read()

    def _read(self, watcher: Watcher, sock: socket.socket) -> None:
        try:
            data = sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self.report.closed += 1
            self._leave(watcher)
            return
        if watcher.rest:
            data = watcher.rest + data
        if not watcher.is_ready:
            head, separator, data = data.partition(b"\r\n\r\n")
            if not separator:
                watcher.rest = head
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.report.problems.append(head[:60].decode("latin-1"))
            watcher.is_ready = True
        frames, watcher.rest = split(data)
        for opcode, payload in frames:
            if opcode == TEXT:
                self._take(watcher, payload)
            elif opcode == PING:
                # Masked with zeros: the payload as it is.
                sock.send(bytes((0x8A, 0x80 | len(payload))) + bytes(4) + payload)
            elif opcode == CLOSE:
                self.report.problems.append(f"closed with {int.from_bytes(payload[:2])}")

    # --- Frames -------------------------------------------------------------------------------

    def _take(self, watcher: Watcher, payload: bytes) -> None:
        try:
            event = self._known[payload]
        except KeyError:
            event = self._learn(watcher, payload)
        if event is None:
            return
        drop_id, seq, prev, committed, stock = event
        known = watcher.seqs.get(drop_id, 0)
        if prev > known:
            self.report.gaps += 1
        if seq <= known:
            self.report.repeats += 1
            return
        watcher.seqs[drop_id] = seq
        if known < self._target <= seq:
            self._remaining -= 1
        if seq > self._newest:
            self._newest = seq
        if stock is not None:
            now = time.time()
            if stock != watcher.stock:
                watcher.stock, watcher.stock_at = stock, now
            if self._is_taking_figures:
                self.report.frames += 1
                self._first_frame = self._first_frame or now
                self._last_frame = now
                self._delays.add(now - committed)
                if shown := watcher.shown.get(drop_id):
                    # The ages that the stock shown until now went through.
                    self._ages.add_span(shown[1] - shown[0], now - shown[0])
            watcher.shown[drop_id] = committed, now
        if watcher.target and seq >= watcher.target:
            self.report.catch_ups_ms.append((time.perf_counter() - watcher.behind_since) * 1000)
            watcher.target = 0

    def _learn(self, watcher: Watcher, payload: bytes) -> Event | None:
        frame = json.loads(payload)
        event = None
        if "seq" in frame:
            committed = datetime.fromisoformat(frame["ts"]).timestamp()
            stock = frame["data"].get("availableStock")
            event = frame["dropId"], frame["seq"], frame["prev"], committed, stock
        elif frame["type"] == "SNAPSHOT":
            for drop in frame["data"]["drops"]:
                watcher.seqs[drop["id"]] = drop["seq"]
                watcher.stock, watcher.stock_at = drop["available_stock"], time.time()
                self._newest = max(self._newest, drop["seq"])
                if watcher.target and drop["seq"] >= watcher.target:
                    elapsed = time.perf_counter() - watcher.behind_since
                    self.report.catch_ups_ms.append(elapsed * 1000)
                    watcher.target = 0
            self._ready += 1
            return None
        if len(self._known) >= FRAMES_KNOWN_AT_ONCE:
            self._known.clear()
        self._known[payload] = event
        return event


def split(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the whole frames in ``data``, each with its opcode, and the rest.

    A server neither masks nor, here, fragments.
    Source: https://www.rfc-editor.org/rfc/rfc6455#section-5.2
    """
    frames = []
    start, size = 0, len(data)
    while size - start >= 2:
        length, head = data[start + 1], 2
        if length == 126:
            length, head = int.from_bytes(data[start + 2 : start + 4]), 4
        elif length == 127:
            length, head = int.from_bytes(data[start + 2 : start + 10]), 10
        end = start + head + length
        if size < start + head or size < end:
            break
        frames.append((data[start] & 15, data[start + head : end]))
        start = end
    return frames, data[start:]


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(plan.sockets + 1000, hard), hard))
    json.dump(asdict(Watchers(plan).run()), sys.stdout)


if __name__ == "__main__":
    main()
