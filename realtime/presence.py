"""How many sockets watch drops in all processes together: each keeps its own number in Redis."""

import asyncio
import os
import socket

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from realtime.limits import open_connections

REPORT_SECONDS = 2.0
# A process that is gone is forgotten after this.
FORGET_SECONDS = 6


def prefix() -> str:
    # Other installations may use the same Redis.
    return f"{settings.CHANNEL_PREFIX}:sockets:"


async def report_forever() -> None:
    """Keep this process's number; while Redis is away, nobody can read it either."""
    async with Redis.from_url(settings.REDIS_URL) as redis:
        while True:
            try:
                name = f"{prefix()}{socket.gethostname()}:{os.getpid()}"
                await redis.set(name, open_connections.watching, ex=FORGET_SECONDS)
            except (RedisError, OSError):
                pass
            await asyncio.sleep(REPORT_SECONDS)


async def count_sockets() -> int | None:
    """Return how many sockets and event streams watch drops, None while Redis is away."""
    try:
        async with Redis.from_url(settings.REDIS_URL) as redis:
            names = [name async for name in redis.scan_iter(f"{prefix()}*")]
            numbers = await redis.mget(names) if names else []
            return sum(int(number) for number in numbers if number is not None)
    except (RedisError, OSError):
        return None
