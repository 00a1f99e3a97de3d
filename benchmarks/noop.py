"""An ASGI application that does nothing: the most a server can give on a machine (H0).

Each request gets ``BENCH_STATUS`` and a body of ``BENCH_BYTES`` bytes.
"""

import os
from collections.abc import Awaitable, Callable
from typing import Any

_BODY = b"x" * int(os.environ.get("BENCH_BYTES", "2"))
_START = {
    "type": "http.response.start",
    "status": int(os.environ.get("BENCH_STATUS", "201")),
    "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_BODY)).encode()),
    ],
}
_BODY_MESSAGE = {"type": "http.response.body", "body": _BODY}


async def application(
    scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Awaitable]
) -> None:
    await send(_START)
    await send(_BODY_MESSAGE)
