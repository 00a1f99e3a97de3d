"""How often one user, and one address, may ask: moving windows shared through Redis.

A question to Redis per request would cost a hot request a good part of its time. So each
process lets the first tenth of a limit pass by its own count; who asks for more is counted
in Redis, those first requests included, and who is refused is refused from memory until
there is room again. Over all processes together a limit is exceeded by at most a tenth
of itself per further process. While Redis is away each process counts alone.
"""

import asyncio
import math
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from django.conf import settings
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import MovingWindowRateLimiter

from config.problems import RateLimited
from config.redis import ask_redis, connection_pool
from operations import metrics

SHARE_ALONE = 0.1
# By so much the clocks of machines may differ that count together; what differs by more was set.
CLOCKS_DIFFER_SECONDS = 1
# Beyond this many keys the counts of a window are forgotten early.
MAX_KEYS = 100_000

Headers = tuple[tuple[bytes, bytes], ...]
# An address, or a user's id as a number: with a crowd, texts would take megabytes more.
Key = str | int


@lru_cache(1)
def shared_windows() -> MovingWindowRateLimiter:
    storage = RedisStorage(
        "redis://",
        connection_pool=connection_pool(),
        key_prefix=f"{settings.CHANNEL_PREFIX}:rate",
    )
    return MovingWindowRateLimiter(storage)


@lru_cache(1)
def own_windows() -> MovingWindowRateLimiter:
    return MovingWindowRateLimiter(MemoryStorage())


class Limit:
    """One limit and what this process has counted of it."""

    def __init__(self, action: str, kind: str, rate: str) -> None:
        self.action = action
        self.kind = kind
        self.item: RateLimitItem = parse(rate)
        self.amount = self.item.amount
        self.seconds = self.item.get_expiry()
        self.alone = int(self.amount * SHARE_ALONE)
        self._what = "failed identities" if action == "identity" else "requests"
        self._refusals = metrics.rate_limited.of(action, kind)
        self._policy = f'"{kind}";q={self.amount};w={self.seconds}'.encode()
        self._kind = kind.encode()
        # Requests in this window of the clock, and in the one before it.
        self._counts: dict[Key, int] = {}
        self._counts_before: dict[Key, int] = {}
        self._turn_at = 0.0
        self._turning = threading.Lock()
        # Who was refused, and until when (``time.time``).
        self._refused: dict[Key, float] = {}

    def count(self, key: Key, now: float) -> int:
        """Count a request; return how many this process counts in about one window.

        Raises:
            RateLimited: there was no room a moment ago, and can't be any yet.
        """
        if not self._is_ahead(self._turn_at, now) or len(self._counts) > MAX_KEYS:
            self._turn(now)
        until = self._refused.get(key)
        if until is not None and self._is_ahead(until, now):
            raise self.refusal(until - now)
        count = self._counts.get(key, 0) + 1
        self._counts[key] = count
        return count + self._counts_before.get(key, 0)

    def _is_ahead(self, at: float, now: float) -> bool:
        """Say whether ``at`` is to come; more than a window ahead it was set by another clock."""
        return now < at <= now + self.seconds + CLOCKS_DIFFER_SECONDS

    def _turn(self, now: float) -> None:
        with self._turning:
            if not self._is_ahead(self._turn_at, now) or len(self._counts) > MAX_KEYS:
                self._counts_before = self._counts if now < self._turn_at + self.seconds else {}
                self._counts = {}
                self._turn_at = now + self.seconds
                self._refused = {
                    key: end for key, end in self._refused.items() if self._is_ahead(end, now)
                }

    def ask(self, key: Key, count: int) -> None:
        """Count the request where all processes do; may wait for Redis.

        Raises:
            RateLimited: there is no room for it.
        """
        # The first one to be shared brings along those that were let pass before it.
        cost = count if count == self.alone + 1 else 1
        until = ask_redis(
            lambda: self._room(shared_windows(), key, cost),
            lambda: self._room(own_windows(), key, cost),
        )
        if until is not None:
            self._refused[key] = until
            raise self.refusal(until - time.time())

    def _room(self, windows: MovingWindowRateLimiter, key: Key, cost: int) -> float | None:
        """Take the room for ``cost`` requests, or return when there will be some."""
        names = self.action, self.kind, str(key)
        if windows.hit(self.item, *names, cost=cost):
            return None
        return windows.get_window_stats(self.item, *names).reset_time

    def refusal(self, seconds: float) -> RateLimited:
        self._refusals.add()
        wait = max(1, min(math.ceil(seconds), self.seconds))
        return RateLimited(
            f"More than {self.amount} {self._what} in {self.seconds} s from this {self.kind}.",
            wait,
            self.headers(self.amount, wait),
        )

    def headers(self, count: int, seconds: int) -> Headers:
        return rate_headers(self._policy, self._kind, max(0, self.amount - count), seconds)


# Most requests are a user's first.
@lru_cache(256)
def rate_headers(policy: bytes, kind: bytes, left: int, seconds: int) -> Headers:
    return (
        (b"ratelimit-policy", policy),
        (b"ratelimit", b'"%b";r=%d;t=%d' % (kind, left, seconds)),
    )


class RateLimits:
    """The limits of all actions; one object per process."""

    def __init__(self) -> None:
        self._limits = {
            action: (
                Limit(action, "user", user) if user else None,
                Limit(action, "address", address) if address else None,
            )
            for action, (user, address) in settings.RATE_LIMITS.items()
        }
        self._executor = ThreadPoolExecutor(4, thread_name_prefix="rate-limits")

    def check(self, action: str, user_id: uuid.UUID | None, address: Callable[[], str]) -> Headers:
        """Count one request, and return the headers that say how many are left.

        Raises:
            RateLimited: there were too many.
        """
        questions, headers = self._count(action, user_id, address)
        for limit, key, count in questions:
            limit.ask(key, count)
        return headers

    async def check_soon(
        self, action: str, user_id: uuid.UUID | None, address: Callable[[], str]
    ) -> Headers:
        """Do the same in an event loop, which never waits for Redis."""
        questions, headers = self._count(action, user_id, address)
        for limit, key, count in questions:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, limit.ask, key, count)
        return headers

    def _count(
        self, action: str, user_id: uuid.UUID | None, address: Callable[[], str]
    ) -> tuple[list[tuple[Limit, Key, int]], Headers]:
        now = time.time()
        by_user, by_address = self._limits[action]
        questions: list[tuple[Limit, Key, int]] = []
        last = None
        if by_address is not None:
            client = address()
            count = by_address.count(client, now)
            last = by_address, count
            if count > by_address.alone:
                questions.append((by_address, client, count))
        if by_user is not None and user_id is not None:
            count = by_user.count(user_id.int, now)
            last = by_user, count
            if count > by_user.alone:
                questions.append((by_user, user_id.int, count))
        # One limit is named: the user's own, where there is one.
        return questions, last[0].headers(last[1], last[0].seconds) if last else ()


@lru_cache(1)
def rate_limits() -> RateLimits:
    return RateLimits()
