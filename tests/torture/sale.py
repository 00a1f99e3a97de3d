"""A sale whose customers never give up, remember what they were told, and check it afterwards."""

import asyncio
import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.stack import Hot
from benchmarks.users import user_id
from tests.torture.stack import TortureStack

# How long the customers go on after the end, so that nobody is left without an answer.
GRACE_SECONDS = 20
ANSWER_SECONDS = 30
RETRY_SECONDS = (0.05, 0.3)
LAG_PROBE_SECONDS = 0.05
# What a customer may be told, besides success, while all is well.
REFUSALS = {"sold_out", "fully_reserved", "idempotency_in_progress"}
AWAY = {(503, "unavailable"), (503, "busy"), (429, "rate_limited")}
# Who asks again to release a hold, because the first answer was lost, finds it released.
RELEASED_BEFORE = (409, "reservation_not_active")
# How often a customer connects anew, to any server: otherwise a new one would get nobody.
MOVES = 0.1
MANY = 1_000_000
FEW = 60


@dataclass(frozen=True)
class Confirmed:
    """What a customer was told has happened."""

    user: str
    drop_id: str
    call: str
    id: str
    at: float
    port: int


@dataclass
class Verdict:
    """What the database says of what the customers were told."""

    confirmed: int = 0
    lost: int = 0
    doubled: int = 0
    oversold: int = 0
    unanswered: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def outcome(self) -> tuple[int, str | None]:
        return self.status, self.document.get("code") if self.status >= 400 else None


class Sale:
    """Customers with a connection each; every visit is a new user.

    A visit reserves one unit, and then purchases it, releases it or leaves it. Each request
    carries an idempotency key and is sent again, to any server, until it is answered.
    """

    def __init__(
        self,
        stack: TortureStack,
        ports: Callable[[], list[int]],
        *,
        customers: int,
        seed: int,
        pause_seconds: float = 0.25,
    ) -> None:
        self.stack = stack
        self.ports = ports
        self.customers = customers
        self.random = random.Random(seed)
        self.pause_seconds = pause_seconds
        self.many, self.few = self._open_drops()
        self.confirmed: list[Confirmed] = []
        self.outcomes: Counter[tuple[int, str | None]] = Counter()
        self.failures: list[tuple[float, tuple[int, str | None]]] = []
        self.broken = 0
        # Of these: nobody was listening, so nothing was begun.
        self.refused = 0
        # How long this very process was kept from its work, as a measure of the machine.
        self.longest_lag_seconds = 0.0
        # Of reserve and purchase: everything else waits for a database that hangs.
        self.slowest_seconds = 0.0
        self.unanswered: list[str] = []
        self.strange: list[str] = []
        self._next_user = 0
        self._is_over = False
        self._gives_up_at = float("inf")
        self._changed = threading.Condition()

    def _open_drops(self) -> tuple[Hot, Hot]:
        many, few = self.stack.fresh(drops=2, stock=MANY)
        for table, key in (("drops_variant", few.variant_id), ("drops_drop", few.drop_id)):
            self.stack.execute(
                f"UPDATE {table} SET total_stock = {FEW}, available_stock = {FEW}"
                " WHERE id = %(key)s",
                key=key,
            )
        # The newest event that names the stock must name what it is.
        self.stack.execute(
            "UPDATE realtime_event SET data = jsonb_set(data, '{drop,available_stock}', %(n)s)"
            " WHERE drop_id = %(key)s",
            key=few.drop_id,
            n=str(FEW),
        )
        return many, few

    # --- Running it ---------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator["Sale"]:
        """Let customers come while the block runs, and until each has an answer."""
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(asyncio.run, self._serve())
            try:
                yield self
            finally:
                self._gives_up_at = time.monotonic() + GRACE_SECONDS
                self._is_over = True
                working.result(GRACE_SECONDS + ANSWER_SECONDS + 10)

    def run_for(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait_for_success(self, ports: list[int], since: float, seconds: float = 30) -> float:
        """Return how long after ``since`` the last of ``ports`` confirmed something again."""

        def first() -> dict[int, float]:
            return {c.port: c.at for c in reversed(self.confirmed) if c.at >= since}

        with self._changed:
            if not self._changed.wait_for(lambda: set(ports) <= set(first()), seconds):
                silent = set(ports) - set(first())
                self.strange.append(f"{len(silent)} servers confirmed nothing for {seconds} s")
                return seconds
        return max(first()[port] for port in ports) - since

    def longest_silence(self) -> float:
        """Return the longest time in which nothing was confirmed at all."""
        times = sorted(c.at for c in self.confirmed)
        return max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)

    # --- Customers ----------------------------------------------------------------------

    async def _serve(self) -> None:
        watching = asyncio.create_task(self._watch_own_lag())
        await asyncio.gather(*(self._shop() for _ in range(self.customers)))
        watching.cancel()

    async def _watch_own_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_PROBE_SECONDS)
            lag = time.monotonic() - before - LAG_PROBE_SECONDS
            self.longest_lag_seconds = max(self.longest_lag_seconds, lag)

    async def _shop(self) -> None:
        line = Line(self)
        await asyncio.sleep(self.random.random() * self.pause_seconds * 2)
        try:
            while not self._is_over:
                self._next_user += 1
                await self._visit(line, user_id(self._next_user))
                await asyncio.sleep(self.random.random() * self.pause_seconds * 2)
        finally:
            line.close()

    async def _visit(self, line: "Line", user: str) -> None:
        drop = self.few if self.random.random() < 0.1 else self.many
        held = await self._insist(line, user, drop, "reserve", f"/api/drops/{drop.drop_id}/reserve")
        if held is None or held.status >= 400:
            return
        fate = self.random.random()
        if fate < 0.6:
            await self._insist(line, user, drop, "purchase", f"/api/drops/{drop.drop_id}/purchase")
        elif fate < 0.75:
            address = f"/api/reservations/{held.document['id']}"
            await self._insist(line, user, drop, "release", address)

    async def _insist(
        self, line: "Line", user: str, drop: Hot, call: str, address: str
    ) -> Answer | None:
        """Send one request until it is answered; then, now and then, once more."""
        key = str(uuid.UUID(int=self.random.getrandbits(128)))
        answer = await self._until_answered(line, user, call, address, key)
        if answer is None:
            self.unanswered.append(f"{call} of {user}")
            return None
        if answer.status < 300:
            confirmed = Confirmed(
                user, drop.drop_id, call, answer.document["id"], time.monotonic(), line.port
            )
            with self._changed:
                self.confirmed.append(confirmed)
                self._changed.notify_all()
            if call != "release" and self.random.random() < 0.05:
                again = await self._until_answered(line, user, call, address, key)
                if again is not None and (again.status, again.body) != (answer.status, answer.body):
                    self.strange.append(f"a repeated {call} got {again.outcome}, {again.body!r}")
        return answer

    async def _until_answered(
        self, line: "Line", user: str, call: str, address: str, key: str
    ) -> Answer | None:
        method = "DELETE" if call == "release" else "POST"
        while time.monotonic() < self._gives_up_at:
            started = time.monotonic()
            try:
                answer = await line.send(method, address, user, key)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as exc:
                self.broken += 1
                self.refused += isinstance(exc, ConnectionRefusedError)
                line.close()
                await asyncio.sleep(self.random.uniform(*RETRY_SECONDS))
                continue
            if call != "release":
                self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - started)
            self.outcomes[answer.outcome] += 1
            if answer.status < 300:
                return answer
            if answer.outcome in AWAY or answer.outcome == (409, "idempotency_in_progress"):
                self.failures.append((started, answer.outcome))
                if answer.status != 409 and "retry-after" not in answer.headers:
                    self.strange.append(f"{answer.outcome} without Retry-After")
                await asyncio.sleep(self.random.uniform(*RETRY_SECONDS))
                continue
            is_expected = answer.status == 409 and answer.outcome[1] in REFUSALS
            if not is_expected and not (call == "release" and answer.outcome == RELEASED_BEFORE):
                self.strange.append(f"{call} got {answer.outcome}")
            return answer
        return None

    # --- Judging it ---------------------------------------------------------------------

    def verdict(self) -> Verdict:
        """Compare what was confirmed with what is stored, once all customers have left."""
        execute = self.stack.execute
        reservations = {
            str(pk): (str(user), str(drop), status)
            for pk, user, drop, status in execute(
                "SELECT id, user_id, drop_id, status FROM reservations_reservation"
            )
        }
        purchases = {
            str(pk): (str(user), str(drop))
            for pk, user, drop in execute("SELECT id, user_id, drop_id FROM purchases_purchase")
        }
        verdict = Verdict(len(self.confirmed), unanswered=len(self.unanswered))
        for told in self.confirmed:
            if told.call == "purchase":
                is_there = purchases.get(told.id) == (told.user, told.drop_id)
            else:
                stored = reservations.get(told.id)
                is_there = stored is not None and stored[:2] == (told.user, told.drop_id)
                if told.call == "release":
                    is_there = is_there and stored is not None and stored[2] == "RELEASED"
            verdict.lost += not is_there
        # Every user asked for one unit, and everybody's every request had one key.
        for rows in (reservations.values(), purchases.values()):
            per_user = Counter(row[:2] for row in rows)
            verdict.doubled += sum(count - 1 for count in per_user.values())
        verdict.oversold = sum(
            max(0, units - total)
            for units, total in execute(
                """
                SELECT coalesce(sum(r.quantity), 0)::int, d.total_stock
                FROM drops_drop d
                LEFT JOIN reservations_reservation r
                  ON r.drop_id = d.id AND r.status IN ('ACTIVE', 'CONSUMED')
                GROUP BY d.id
                """
            )
        )
        verdict.problems = [*self.stack.audit(), *sorted(set(self.strange))]
        if verdict.unanswered:
            verdict.problems.append(f"{verdict.unanswered} requests were never answered")
        return verdict


class Line:
    """A customer's connection, to one server at a time."""

    def __init__(self, sale: Sale) -> None:
        self.sale = sale
        self.port = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, method: str, address: str, user: str, key: str) -> Answer:
        """Send a request and return the answer.

        Raises:
            OSError, asyncio.IncompleteReadError, TimeoutError: there was none.
        """
        async with asyncio.timeout(ANSWER_SECONDS):
            is_moving = self.sale.random.random() < MOVES
            if self._reader is not None and self._reader.at_eof():
                # Closed by the server while it was idle: no client sends anything there.
                self.close()
            if is_moving or self._writer is None or self.port not in self.sale.ports():
                self.close()
                self.port = self.sale.random.choice(self.sale.ports())
                self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
            assert self._reader is not None
            return await ask(self._reader, self._writer, method, address, user, key)

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
            self._writer = self._reader = None


async def ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    address: str,
    user: str,
    key: str,
    body: str = "",
) -> Answer:
    """Send one request and return its answer; the connection stays open."""
    content_type = "Content-Type: application/json\r\n" if body else ""
    writer.write(
        f"{method} {address} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-User-Id: {user}\r\n"
        f"Idempotency-Key: {key}\r\n{content_type}Content-Length: {len(body)}\r\n\r\n"
        f"{body}".encode()
    )
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines if line)
    content = await reader.readexactly(int(headers["content-length"]))
    return Answer(int(first.split()[1]), content, headers)


async def ask_once(port: int, *request: str) -> Answer:
    """Send one request on a connection of its own."""
    async with asyncio.timeout(ANSWER_SECONDS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            return await ask(reader, writer, *request)
        finally:
            writer.close()
