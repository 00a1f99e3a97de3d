"""How many connections this process holds, and how fast one may talk."""

import time
from collections import Counter

from django.conf import settings

# What the database's column of sequence numbers holds.
LARGEST_SEQ = 2**63 - 1


class OpenConnections:
    """The sockets and event streams of this process, all and by address."""

    def __init__(self) -> None:
        self._total = 0
        # Of these, sockets that watch no drop, like the control room's.
        self._others = 0
        self._by_address: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._total

    @property
    def watching(self) -> int:
        """How many watch drops."""
        return self._total - self._others

    @property
    def is_full(self) -> bool:
        return self._total >= settings.SOCKETS_PER_PROCESS

    def is_full_for(self, address: str) -> bool:
        limit = settings.SOCKETS_PER_ADDRESS
        return bool(limit) and self._by_address[address] >= limit

    def enter(self, address: str, *, is_watching: bool = True) -> None:
        self._total += 1
        self._others += not is_watching
        self._by_address[address] += 1

    def leave(self, address: str, *, is_watching: bool = True) -> None:
        self._total -= 1
        self._others -= not is_watching
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


open_connections = OpenConnections()


class Allowance:
    """``rate`` a second on average, and ``burst`` at once."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = time.monotonic()

    def left(self) -> float:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return self._left

    def spend(self, amount: float = 1) -> None:
        self._left -= amount
