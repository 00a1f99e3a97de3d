"""The HTTP application inside the test's own process, with the hot routes or without them.

Called as a server calls it, so a request may be anything that ASGI can carry.
"""

import asyncio
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from django.db import connection
from django.test import override_settings

from config.asgi import http_application
from config.asgi_types import Application
from drops.group_commit import GroupCommit
from realtime import publisher
from realtime.hub import get_hub

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Request:
    """``headers`` may repeat a name; several ``chunks`` go without a Content-Length."""

    method: str
    address: str
    chunks: tuple[bytes, ...] = ()
    headers: tuple[tuple[str, str | bytes], ...] = ()

    def raw_headers(self) -> Headers:
        given = [(name.lower().encode(), as_bytes(value)) for name, value in self.headers]
        implied = [(b"host", b"testserver")]
        if len(self.chunks) > 1:
            implied.append((b"transfer-encoding", b"chunked"))
        elif self.chunks:
            implied.append((b"content-length", str(len(self.chunks[0])).encode()))
        names = {name for name, _ in given}
        return [header for header in implied if header[0] not in names] + given


def as_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1")


@dataclass
class Response:
    status: int = 0
    headers: Headers = field(default_factory=list)
    body: bytes = b""

    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return dict(self.headers).get(name.encode(), b"").decode("latin-1") or None


class Lane:
    """An ASGI application and how to ask it."""

    def __init__(self, application: Application) -> None:
        self.application = application

    async def send(self, request: Request) -> Response:
        path, _, query = request.address.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": request.raw_headers(),
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 80),
        }
        waiting = list(request.chunks) or [b""]
        response = Response()
        is_answered = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if waiting:
                chunk = waiting.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}
            # The client stays until it has its answer.
            await is_answered.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                response.status = message["status"]
                response.headers = [(bytes(n).lower(), bytes(v)) for n, v in message["headers"]]
            else:
                response.body += message.get("body", b"")
                # A stream has no end: who reads it leaves with its first piece.
                is_stream = response.header("content-type") == "text/event-stream"
                if is_stream or not message.get("more_body"):
                    is_answered.set()

        await self.application(scope, receive, send)
        return response

    async def get(self, address: str, **headers: str) -> Response:
        return await self.send(Request("GET", address, headers=tuple(headers.items())))

    async def post(self, address: str, user: Any, body: Any = None, **headers: str) -> Response:
        return await self.send(post(address, user, body, **headers))


def post(address: str, user: Any = None, body: Any = None, **headers: str) -> Request:
    """Return a plain POST; names of ``headers`` have underscores for hyphens."""
    chunks = () if body is None else (json.dumps(body).encode(),)
    given = [(name.replace("_", "-"), value) for name, value in headers.items()]
    if user is not None:
        given.append(("X-User-Id", str(getattr(user, "pk", user))))
    if chunks:
        given.append(("Content-Type", "application/json"))
    return Request("POST", address, chunks, tuple(given))


@contextmanager
def hot_lane(*, hears_others: bool = False) -> Iterator[Lane]:
    """Serve by the hot routes, with nothing remembered; leave nothing behind."""
    followers = list(publisher._followers)
    with override_settings(HOT_ROUTES=True):
        application = http_application()
    if not hears_others:
        application.on_first_request = lambda: None
    group = application.routes[0].endpoint.group
    try:
        yield Lane(application)
    finally:
        publisher._followers[:] = followers
        give_connections_back(group)


@contextmanager
def viewset_lane() -> Iterator[Lane]:
    """Serve by the viewsets alone."""
    with override_settings(HOT_ROUTES=False):
        yield Lane(http_application())


def give_connections_back(group: GroupCommit) -> None:
    """Close the database connection of each of a group commit's threads, and end them."""
    for executor in group.executors:
        threads = executor._max_workers
        everybody_is_here = threading.Barrier(threads)

        def close(here: threading.Barrier = everybody_is_here) -> None:
            here.wait(10)
            connection.close()

        for closed in [executor.submit(close) for _ in range(threads)]:
            closed.result(10)
        executor.shutdown()


async def hub_hears_others() -> None:
    """Return once this process takes news from the channel layer."""
    from channels.layers import get_channel_layer

    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    await get_hub().start()
    publisher.follow(lambda drop_id, events: loop.call_soon_threadsafe(heard.set))
    number = 0
    while not heard.is_set():
        number += 1
        event = {"seq": 1, "type": "STOCK_UPDATED", "ts": 0.0, "data": {}}
        drop_id = f"00000000-0000-0000-0000-{number:012}"
        news = [{"drop_id": drop_id, "seq": 1, "events": [event]}]
        message = {"type": "drop.events", "news": news}
        await get_channel_layer().group_send(publisher.GROUP, message)
        try:
            await asyncio.wait_for(heard.wait(), 0.05)
        except TimeoutError:
            continue


async def background_work(*names: str) -> None:
    """Return once all running tasks with these coroutines have ended."""
    tasks = [task for task in asyncio.all_tasks() if is_one_of(task, names)]
    await asyncio.gather(*tasks)


def is_one_of(task: asyncio.Task, names: Iterable[str]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "") in names
