"""Whether this process answers, and whether it and what it needs are fit for a sale."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock

import redis
from django.conf import settings
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder
from django.http import HttpRequest, JsonResponse
from redis.backoff import NoBackoff
from redis.retry import Retry

from operations import heartbeats
from realtime.hub import seconds_behind

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
# So that nobody who asks in a loop gets to the database each time.
REMEMBER_SECONDS = 1.0
# Five beats. A loop that waits for a drop's lock, or for a database that comes back, misses one.
HEARTBEAT_SECONDS = 15.0
# The hub compares itself with the event log once a second.
EVENT_LAG_SECONDS = 5.0

EXPIRY = "expire_reservations"
# Without these no request can be served; all else a sale does without.
NEEDED_FOR_TRAFFIC = ("database", "migrations")

OK, FAILING, UNKNOWN = "ok", "failing", "unknown"


def healthz(request: HttpRequest) -> JsonResponse:
    """Say that this process answers; what it depends on is another question."""
    return JsonResponse({"status": "ok"})


def readyz(request: HttpRequest) -> JsonResponse:
    """Say what is fit and what isn't, by name alone; 503 if anything isn't.

    With ``?for=traffic`` only what requests can't do without makes it a 503: a web process
    must not leave the rotation because Redis is away, or no expiry loop runs.
    """
    states = check()
    failed = [name for name, state in states.items() if state == FAILING]
    decisive = NEEDED_FOR_TRAFFIC if request.GET.get("for") == "traffic" else tuple(states)
    is_ready = not set(failed) & set(decisive)
    status = ("degraded" if failed else "ok") if is_ready else "failing"
    response = JsonResponse(
        {"status": status, "failed": failed, "checks": states}, status=200 if is_ready else 503
    )
    response["Cache-Control"] = "no-store"
    return response


class Probe:
    """A question that may hang, asked in a thread of its own, at most one at a time.

    Whoever asks waits for at most ``ANSWER_SECONDS``; a thread that hangs is not joined by
    others. Answers are remembered for ``REMEMBER_SECONDS``.
    """

    def __init__(self, ask: Callable[[], dict[str, str]], if_silent: dict[str, str]) -> None:
        self._ask = ask
        self._if_silent = if_silent
        self._executor = ThreadPoolExecutor(1, f"probe-{next(iter(if_silent))}")
        self._lock = Lock()
        self._asked_at = float("-inf")
        self._answer: Future[dict[str, str]] | None = None

    def start(self) -> "Future[dict[str, str]]":
        with self._lock:
            is_old = time.monotonic() - self._asked_at > REMEMBER_SECONDS
            if self._answer is None or (self._answer.done() and is_old):
                self._asked_at = time.monotonic()
                self._answer = self._executor.submit(self._ask)
            return self._answer

    def read(self, asked: "Future[dict[str, str]]", until: float) -> dict[str, str]:
        """Return what is fit, by the time ``until`` (``time.monotonic``) at the latest."""
        try:
            return asked.result(max(0.0, until - time.monotonic()))
        except Exception as exc:
            # Only here, never in the answer: it may name hosts and users.
            logger.warning("a probe failed: %r", exc)
            return self._if_silent


def ask_database() -> dict[str, str]:
    """Ask all that the database knows, over one connection of the pool that requests use."""
    try:
        applied = MigrationRecorder(connection).applied_migrations()
        signs = heartbeats.read(HEARTBEAT_SECONDS).get(EXPIRY) if is_migrated(applied) else None
    finally:
        connection.close()
    return {
        "database": OK,
        "migrations": OK if is_migrated(applied) else FAILING,
        "expiry": OK if signs is not None and signs.alive else FAILING,
    }


def is_migrated(applied: "dict | set") -> bool:
    return known_migrations() <= set(applied)


@lru_cache(1)
def known_migrations() -> frozenset[tuple[str, str]]:
    """Return the migrations of this code; read once, as code doesn't change while it runs."""
    loader = MigrationLoader(None, ignore_no_migrations=True)
    return frozenset(loader.disk_migrations)


@lru_cache(1)
def redis_client() -> redis.Redis:
    return redis.Redis.from_url(
        settings.REDIS_URL,
        socket_connect_timeout=ANSWER_SECONDS / 2,
        socket_timeout=ANSWER_SECONDS / 2,
        retry=Retry(NoBackoff(), 0),
    )


def ask_redis_itself() -> dict[str, str]:
    redis_client().ping()
    return {"redis": OK}


database_probe = Probe(
    ask_database, {"database": FAILING, "migrations": UNKNOWN, "expiry": UNKNOWN}
)
redis_probe = Probe(ask_redis_itself, {"redis": FAILING})


def check() -> dict[str, str]:
    """Return the state of everything, within ``ANSWER_SECONDS``."""
    until = time.monotonic() + ANSWER_SECONDS
    # Both at once, so that one that hangs takes no time from the other.
    asked = [(probe, probe.start()) for probe in (database_probe, redis_probe)]
    states: dict[str, str] = {}
    for probe, answer in asked:
        states |= probe.read(answer, until)
    return states | {"events": OK if seconds_behind() < EVENT_LAG_SECONDS else FAILING}
