"""How many sockets watch drops in all processes together: each keeps its own number in Redis."""

import asyncio
import contextlib
import os
import socket
from typing import Any

from django.conf import settings
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from realtime.limits import open_connections

REPORT_SECONDS = 2.0
# A process that is gone is forgotten after this.
FORGET_SECONDS = 6
# The pulse does not wait longer for a Redis that hangs.
TIMEOUT_SECONDS = 1.0


def names_key() -> str:
    """Return where the processes' names are: to look for them among all keys takes seconds."""
    # Other installations may use the same Redis.
    return f"{settings.CHANNEL_PREFIX}:sockets"


def number_key(process: str) -> str:
    return f"{names_key()}:{process}"


def connect() -> Any:
    return Redis.from_url(
        settings.REDIS_URL,
        decode_responses=True,
        socket_connect_timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )


async def report_forever() -> None:
    """Keep this process's number; while Redis is away, nobody can read it either."""
    async with connect() as redis:
        while True:
            with contextlib.suppress(RedisError, OSError):
                await report(redis, open_connections.watching)
            await asyncio.sleep(REPORT_SECONDS)


async def report(redis: Any, number: int) -> None:
    process = f"{socket.gethostname()}:{os.getpid()}"
    async with redis.pipeline(transaction=False) as both:
        both.set(number_key(process), number, ex=FORGET_SECONDS)
        both.sadd(names_key(), process)
        both.expire(names_key(), FORGET_SECONDS)
        await both.execute()


async def count_sockets() -> int | None:
    """Return how many sockets and event streams watch drops, None while Redis is away."""
    try:
        async with connect() as redis:
            processes = sorted(await redis.smembers(names_key()))
            numbers = await redis.mget(map(number_key, processes)) if processes else []
            gone = [name for name, number in zip(processes, numbers, strict=True) if number is None]
            if gone:
                await redis.srem(names_key(), *gone)
            return sum(int(number) for number in numbers if number is not None)
    except (RedisError, OSError):
        return None
