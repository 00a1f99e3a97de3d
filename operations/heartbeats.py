"""Signs of life of processes that serve no requests: written by them, read by probes."""

import os
import socket
import time
from dataclasses import dataclass

from django.db import connection

BEAT_SECONDS = 2.0
# Who was silent for this long is gone, and forgotten with the next new sign of life.
KEPT_HOURS = 24


@dataclass
class Pulse:
    """A process's own heartbeat, written at most every ``BEAT_SECONDS``."""

    name: str
    _beaten_at: float = float("-inf")

    def beat(self) -> None:
        """Write it if it is time.

        Raises:
            DatabaseError, PoolTimeout: the database can't be reached.
        """
        now = time.monotonic()
        if now - self._beaten_at >= BEAT_SECONDS:
            is_first = self._beaten_at == float("-inf")
            self._beaten_at = now
            write(self.name)
            if is_first:
                prune()


def write(name: str, *, differences: int | None = None) -> None:
    """Write that this process is alive now, in one statement."""
    process = f"{socket.gethostname()[:100]}:{os.getpid()}"
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO operations_heartbeat (name, process, beaten_at, differences)
            VALUES (%s, %s, clock_timestamp(), %s)
            ON CONFLICT (name, process) DO UPDATE
            SET beaten_at = EXCLUDED.beaten_at, differences = EXCLUDED.differences
            """,
            [name, process, differences],
        )


def prune() -> None:
    """Forget processes that are gone, but of each name the newest: how long, it still says."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            DELETE FROM operations_heartbeat AS old
            WHERE beaten_at < clock_timestamp() - make_interval(hours => %s)
              AND EXISTS (SELECT FROM operations_heartbeat AS newer
                          WHERE newer.name = old.name AND newer.beaten_at > old.beaten_at)
            """,
            [KEPT_HOURS],
        )


@dataclass(frozen=True)
class Signs:
    """How old the newest sign of life is, in seconds, how many live, and what was found."""

    age_seconds: float
    alive: int
    differences: int | None


def read(alive_within_seconds: float) -> dict[str, Signs]:
    """Return the signs of life by name; who beat within the given time counts as alive."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT DISTINCT ON (name) name,
                   extract(epoch FROM clock_timestamp() - beaten_at)::float,
                   count(*) FILTER (
                       WHERE beaten_at > clock_timestamp() - make_interval(secs => %s)
                   ) OVER (PARTITION BY name),
                   differences
            FROM operations_heartbeat
            ORDER BY name, beaten_at DESC
            """,
            [alive_within_seconds],
        )
        return {name: Signs(max(0.0, age), *rest) for name, age, *rest in cursor.fetchall()}
