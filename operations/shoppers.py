"""Synthetic shoppers: they arrive at once, reserve, think, buy or don't, and watch meanwhile."""

import asyncio
import contextlib
import random
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import orjson
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException

from operations.credentials import Credentials
from operations.http_client import Answer, Connection, Lost, Server
from operations.strain import Strain

# How often one shopper asks for a pair, and repeats a request that was not answered or refused
# for the moment only.
MOST_TRIES = 3
MOST_REPEATS = 3
# Those who buy do so before this part of their hold's life is over.
LATEST_PURCHASE = 0.8
WATCHERS_AT_ONCE = 50
# For the last frames to arrive when everything has happened.
SETTLE_SECONDS = 3.0
POLL_SECONDS = 0.05
FRAMES_KNOWN_AT_ONCE = 5000


@dataclass(frozen=True)
class Plan:
    """``users`` come to ``drop_id`` within ``arrive_seconds``; some of the holders buy."""

    server: Server
    drop_id: uuid.UUID
    users: Sequence[uuid.UUID]
    credentials: Credentials
    ttl: int
    conversion: float
    arrive_seconds: float
    watchers: int
    seed: int = 1

    @property
    def path(self) -> str:
        return f"/api/drops/{self.drop_id}"

    @property
    def longest_seconds(self) -> float:
        """Return after what time the rehearsal ends, whatever has not happened by then."""
        return self.arrive_seconds + MOST_TRIES * (self.ttl + 5) + 60


@dataclass
class Seen:
    """What the shoppers saw, while it happens and afterwards. Latencies and delays in ms."""

    arrived: int = 0
    done: int = 0
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    # Of each kind of request how often it was answered how: a status, or a refusal's code.
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    statuses: Counter[int] = field(default_factory=Counter)
    # Requests without an answer, and shoppers who gave up on one.
    lost_connections: int = 0
    unanswered: int = 0
    # What was confirmed, by id.
    reservations: dict[str, uuid.UUID] = field(default_factory=dict)
    purchases: dict[str, uuid.UUID] = field(default_factory=dict)
    # Monotonic: when the first request went out, and the last shopper's first claim was settled.
    began: float = 0.0
    rush_over: float = 0.0
    rush_answers: int = 0
    watchers: "list[Watcher]" = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    strain: Strain = field(default_factory=Strain)

    @property
    def rush_seconds(self) -> float:
        return max(self.rush_over - self.began, 0.001)


@dataclass
class Watcher:
    """What one socket shows, and whether its frames joined on."""

    seq: int = 0
    stock: int | None = None
    is_open: bool = False
    gaps: int = 0
    problem: str = ""


class Crowd:
    """Carries out one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seen = Seen()
        self._random = random.Random(plan.seed)  # noqa: S311 - nobody's secret
        self._frames: dict[str | bytes, dict] = {}
        self._opening = asyncio.Semaphore(WATCHERS_AT_ONCE)

    async def watch_and_shop(self, settle: Callable[[], Awaitable[int]]) -> None:
        """Run the rehearsal; ``settle`` returns the last event's ``seq`` when no hold is left.

        Ends by itself after ``plan.longest_seconds``.
        """
        seen = self.seen
        sockets = [asyncio.create_task(self._watch()) for _ in range(self.plan.watchers)]
        sampling = asyncio.create_task(seen.strain.measure())
        try:
            async with asyncio.timeout(self.plan.longest_seconds):
                await self._watchers_ready()
                seen.began = time.monotonic()
                # Planned as one list, so that the same seed gives the same rehearsal.
                await asyncio.gather(
                    *(
                        self._shop(
                            user,
                            arrives=self._random.uniform(0, self.plan.arrive_seconds),
                            thinks=self._random.uniform(0, LATEST_PURCHASE) * self.plan.ttl,
                            buys=self._random.random() < self.plan.conversion,
                        )
                        for user in self.plan.users
                    )
                )
                await self._wait_for_frames(await settle())
        except TimeoutError:
            pass  # Those who are not done show it.
        finally:
            sampling.cancel()
            for task in sockets:
                task.cancel()
            await asyncio.gather(sampling, *sockets, return_exceptions=True)

    # --- Shoppers -------------------------------------------------------------------------

    async def _shop(self, user: uuid.UUID, *, arrives: float, thinks: float, buys: bool) -> None:
        await asyncio.sleep(arrives)
        self.seen.arrived += 1
        connection = Connection(self.plan.server)
        try:
            await self._ask(connection, "open", "GET", "", user)
            hold = await self._reserve(connection, user)
            if hold is not None:
                self.seen.reservations[hold] = user
                if buys:
                    await asyncio.sleep(thinks)
                    await self._purchase(connection, user)
        finally:
            connection.close()
        # Not for those whom the end cuts short.
        self.seen.done += 1

    async def _reserve(self, connection: Connection, user: uuid.UUID) -> str | None:
        """Return the id of the user's reservation; ask again when a hold may have ended."""
        for attempt in range(MOST_TRIES):
            answer = await self._ask(connection, "reserve", "POST", "/reserve", user)
            if attempt == 0:
                self.seen.rush_answers += answer is not None
                self.seen.rush_over = time.monotonic()
            if answer is None:
                return None
            if answer.status in (200, 201):
                return answer.data.get("id", "")
            release = answer.data.get("next_release_at")
            if not release or attempt == MOST_TRIES - 1:
                return None
            await asyncio.sleep(self._until(release))
        return None

    async def _purchase(self, connection: Connection, user: uuid.UUID) -> None:
        answer = await self._ask(connection, "purchase", "POST", "/purchase", user)
        if answer is not None and answer.status in (200, 201):
            self.seen.purchases[answer.data.get("id", "")] = user

    def _until(self, moment: str) -> float:
        """Return how long to wait for ``moment``; people don't come in the same millisecond."""
        wait = datetime.fromisoformat(moment).timestamp() - time.time()
        return min(max(wait, 0.0), self.plan.ttl + 1.0) + self._random.uniform(0, 1)

    async def _ask(
        self, connection: Connection, kind: str, method: str, path: str, user: uuid.UUID
    ) -> Answer | None:
        """Ask until there is an answer that stands, but not too often; None without any."""
        answer = None
        path = self.plan.path + path
        for _ in range(1 + MOST_REPEATS):
            # To look, nobody needs to be anybody; and who repeats signs anew.
            who: Mapping[str, str] = (
                {} if method == "GET" else self.plan.credentials(method, path, user)
            )
            asked = time.monotonic()
            try:
                answer = await connection.ask(method, path, who)
            except Lost:
                # Safe to repeat: reserve and purchase answer with what they did already.
                self.seen.lost_connections += 1
                self.seen.outcomes[kind]["no answer"] += 1
                await asyncio.sleep(0.2)
                continue
            self.seen.latencies[kind].append((time.monotonic() - asked) * 1000)
            self.seen.statuses[answer.status] += 1
            outcome = answer.data.get("code") if answer.status >= 400 else None
            self.seen.outcomes[kind][outcome or str(answer.status)] += 1
            if answer.status not in (429, 503):
                return answer
            retry_after = answer.headers.get("retry-after", "1")
            wait = float(retry_after) if retry_after.isdigit() else 1.0
            await asyncio.sleep(min(wait, 5.0) + self._random.uniform(0, 0.5))
        self.seen.unanswered += 1
        return answer

    # --- Watchers -------------------------------------------------------------------------

    async def _watch(self) -> None:
        watcher = Watcher()
        self.seen.watchers.append(watcher)
        url = f"{self.plan.server.url('ws')}/ws/drops/{self.plan.drop_id}"
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with self._opening:
                    socket = await stack.enter_async_context(
                        connect(url, compression=None, max_queue=None, open_timeout=15, proxy=None)
                    )
                async for text in socket:
                    self._look(watcher, text)
            watcher.problem = f"closed with {socket.close_code} {socket.close_reason}"
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as exc:
            watcher.problem = str(exc) or type(exc).__name__
        watcher.is_open = False

    def _look(self, watcher: Watcher, text: str | bytes) -> None:
        frame = self._frames.get(text)
        if frame is None:
            # The same text goes to all; it is read once.
            if len(self._frames) >= FRAMES_KNOWN_AT_ONCE:
                self._frames.clear()
            frame = self._frames[text] = orjson.loads(text)
            frame["at"] = datetime.fromisoformat(frame["ts"]).timestamp()
        data = frame["data"]
        if frame["type"] == "SNAPSHOT":
            (drop,) = data["drops"]
            watcher.seq, watcher.stock, watcher.is_open = drop["seq"], drop["available_stock"], True
        elif "seq" in frame:
            self.seen.delays.append((time.time() - frame["at"]) * 1000)
            watcher.gaps += frame["prev"] != watcher.seq
            watcher.seq = frame["seq"]
            if "drop" in data:
                watcher.stock = data["drop"]["available_stock"]
            watcher.stock = data.get("availableStock", watcher.stock)

    async def _watchers_ready(self) -> None:
        def is_ready(watcher: Watcher) -> bool:
            return watcher.is_open or bool(watcher.problem)

        # Asked now and then: an event per frame would cost each of them something.
        while sum(map(is_ready, self.seen.watchers)) < self.plan.watchers:  # noqa: ASYNC110
            await asyncio.sleep(POLL_SECONDS)

    async def _wait_for_frames(self, seq: int) -> None:
        """Wait until every open watcher has been told of event ``seq``, but not for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                while any(w.is_open and w.seq < seq for w in self.seen.watchers):  # noqa: ASYNC110
                    await asyncio.sleep(POLL_SECONDS)
