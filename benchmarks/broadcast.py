"""A bare broadcast server of the library ``websockets``: the most that fan-out can be (W0).

``python -m benchmarks.broadcast PORT CONTROL_PORT``. A POST to the control port sends one frame,
of the size of a ``STOCK_UPDATED``, to all sockets; ``POST /<n>`` sends n of them. It knows no
drops, asks no database and checks nothing.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any, cast

from websockets.asyncio.server import ServerConnection, broadcast, serve

DROP_ID = "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11"
VARIANT_ID = "c0a8f6a4-70f5-4f0c-8f53-0a3c5d5f7a42"
# As long as the answer to a reserve.
BODY = b"x" * 400
ANSWER = b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)

connections: set[ServerConnection] = set()
newest = 0


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def frame() -> str:
    """Return the next frame."""
    global newest
    newest += 1
    stock = 10_000_000 - newest
    data = {
        "dropId": DROP_ID,
        "availableStock": stock,
        "availability": "available",
        "variants": [{"id": VARIANT_ID, "availableStock": stock}],
    }
    members = {"type": "STOCK_UPDATED", "dropId": DROP_ID, "seq": newest, "prev": newest - 1}
    return json.dumps(members | {"ts": now(), "data": data}, separators=(",", ":"))


async def watch(connection: ServerConnection) -> None:
    drop = {"id": DROP_ID, "seq": newest, "available_stock": 10_000_000 - newest}
    await connection.send(json.dumps({"type": "SNAPSHOT", "ts": now(), "data": {"drops": [drop]}}))
    connections.add(connection)
    try:
        await connection.wait_closed()
    finally:
        connections.discard(connection)


class Control(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        path = data.split(b" ", 2)[1].strip(b"/")
        self._transport.write(ANSWER)
        # Kept, because the loop itself keeps only a weak reference.
        self._sending = asyncio.ensure_future(self._send(int(path) if path.isdigit() else 1))

    async def _send(self, count: int) -> None:
        for _ in range(count):
            broadcast(connections, frame())
            await asyncio.sleep(0)


async def main(port: int, control_port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_server(Control, "127.0.0.1", control_port)
    async with serve(
        watch, "127.0.0.1", port, compression=None, ping_interval=None, backlog=1024
    ) as server:
        await server.serve_forever()


def run(main: Coroutine[Any, Any, None]) -> None:
    runner: Callable[..., None] = asyncio.run
    try:
        import uvloop
    except ImportError:
        pass
    else:
        runner = uvloop.run
    runner(main)


if __name__ == "__main__":
    run(main(int(sys.argv[1]), int(sys.argv[2])))
