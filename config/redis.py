"""Ask Redis for what processes share beside the channel layer; do without while it is away."""

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

logger = logging.getLogger(__name__)

# A request waits for it, so better no answer than a late one.
TIMEOUT_SECONDS = 0.5
# How long Redis is left alone after it failed, so that an outage costs nobody a timeout.
PAUSE_SECONDS = 1.0

_away_until = float("-inf")

Result = TypeVar("Result")


@lru_cache(1)
def connection_pool() -> redis.ConnectionPool:
    return redis.ConnectionPool.from_url(
        settings.REDIS_URL,
        socket_connect_timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )


@lru_cache(1)
def client() -> redis.Redis:
    return redis.Redis(connection_pool=connection_pool())


def ask_redis(ask: Callable[[], Result], instead: Callable[[], Result]) -> Result:
    """Return what ``ask`` learns from Redis, or what ``instead`` says while Redis is away."""
    global _away_until
    if time.monotonic() < _away_until:
        return instead()
    try:
        return ask()
    except (redis.RedisError, OSError) as exc:
        _away_until = time.monotonic() + PAUSE_SECONDS
        logger.warning("Redis is away, this process decides alone: %s", exc)
        return instead()
