"""Sockets inside the test's own process, called as a server calls them."""

import asyncio
import io
import json
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

from channels.routing import URLRouter

from realtime.routing import websocket_urlpatterns

application = URLRouter(websocket_urlpatterns)


class Socket:
    """A client that reads at once, or, while ``reads`` is cleared, not at all.

    With ``is_direct`` frames may also be written past the server's ``send``.
    """

    def __init__(
        self,
        path: str = "/ws/drops",
        headers: dict[str, str] | None = None,
        subprotocols: tuple[str, ...] = (),
        address: str = "127.0.0.1",
        *,
        is_direct: bool = False,
    ) -> None:
        path, _, query = path.partition("?")
        self.scope = {
            "type": "websocket",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [
                (name.lower().encode(), value.encode()) for name, value in (headers or {}).items()
            ],
            "subprotocols": list(subprotocols),
            "client": [address, 50000],
        }
        self.reads = asyncio.Event()
        self.reads.set()
        self.is_closed = asyncio.Event()
        self.accepted: dict[str, Any] | None = None
        self.code: int | None = None
        self.is_direct, self.direct_writes = is_direct, 0
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        send = WebSocketsSansIOProtocol(self).send if is_direct else self._send
        self.running = asyncio.ensure_future(application(self.scope, self._receive, send))

    async def _receive(self) -> dict[str, Any]:
        return await self._incoming.get()

    async def _send(self, message: dict[str, Any]) -> None:
        # As uvicorn's: it waits first, and writes then.
        await self.reads.wait()
        if message["type"] == "websocket.accept":
            self.accepted = message
        elif message["type"] == "websocket.close":
            self.code = message.get("code", 1000)
            self.is_closed.set()
            self._incoming.put_nowait({"type": "websocket.disconnect", "code": self.code})
        else:
            self._frames.put_nowait(json.loads(message["text"]))

    async def next(self) -> dict[str, Any]:
        """Return the next frame that is no heartbeat."""
        while True:
            frame = await asyncio.wait_for(self._frames.get(), 5)
            if frame["type"] != "HEARTBEAT":
                return frame

    async def up_to(self, seq: int) -> list[dict[str, Any]]:
        frames = [await self.next()]
        while frames[-1]["seq"] < seq:
            frames.append(await self.next())
        return frames

    def types(self) -> list[str]:
        """Return what kinds of frames have come and were not looked at."""
        return [self._frames.get_nowait()["type"] for _ in range(self._frames.qsize())]

    async def say(self, message: Any) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self._incoming.put_nowait({"type": "websocket.receive", "text": text})

    async def say_bytes(self, message: bytes) -> None:
        self._incoming.put_nowait({"type": "websocket.receive", "bytes": message})

    async def close_code(self) -> int | None:
        """Return how the server closes the socket, once its consumer has ended."""
        await asyncio.wait_for(self.is_closed.wait(), 10)
        await asyncio.wait_for(self.running, 5)
        return self.code

    async def leave(self) -> None:
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1001})
        await asyncio.wait_for(self.running, 5)


class WebSocketsSansIOProtocol:
    """Of uvicorn's, what ``wire`` looks at; it is its own transport."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self.transport = self

    async def send(self, message: dict[str, Any]) -> None:
        await self._socket._send(message)

    def is_closing(self) -> bool:
        return self._socket.is_closed.is_set()

    def get_write_buffer_size(self) -> int:
        return 0 if self._socket.reads.is_set() else 1

    def write(self, data: bytes) -> None:
        self._socket.direct_writes += 1
        while data:
            size, head = (int.from_bytes(data[2:4]), 4) if data[1] == 126 else (data[1], 2)
            self._socket._frames.put_nowait(json.loads(data[head : head + size]))
            data = data[head + size :]


def in_loop(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run ``scenario`` in an event loop of its own, and with it a hub of its own."""

    async def run() -> None:
        try:
            await scenario()
        finally:
            await end_the_others()

    asyncio.run(run())


async def end_the_others() -> None:
    """Cancel all other tasks, and show those that go on: else the loop waits for them forever."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        _, going_on = await asyncio.wait(others, timeout=10)
        for task in going_on:
            stack = io.StringIO()
            task.print_stack(file=stack)
            warnings.warn(f"a task was cancelled and went on:\n{stack.getvalue()}", stacklevel=1)
