"""``GET /api/drops/{id}/events`` as server-sent events, in front of Django.

A stream lasts for hours, and Django would keep a thread for it. Here a stream costs what a
socket costs: it is fed by the hub, with every event, and counted with the sockets.
"""

import asyncio
import contextlib
import re
import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any
from urllib.parse import parse_qsl

from channels.db import database_sync_to_async
from rest_framework.exceptions import APIException, NotFound, ValidationError

from config.answers import security_headers
from config.asgi_types import Application, Receive, Scope, Send
from config.body_limit import too_long
from config.hot_routes import (
    FallThrough,
    HotRequest,
    added_headers,
    counted,
    parse_uuid,
    problem_answer,
    read_request,
)
from config.origins import may_be_forged
from config.problems import to_api_exception
from config.rate_limits import rate_limits
from realtime import backpressure, log
from realtime.exceptions import ProcessIsFull, TooManyStreams
from realtime.frames import EventFrame, Message
from realtime.hub import OUTAGES, get_hub
from realtime.limits import open_connections
from realtime.private import end_with
from users.identity import Identity, identify, refuse_unknown

ADDRESS = re.compile(r"/api/drops/([^/]+)/events/?")
HEARTBEAT = b": heartbeat\n\n"
HEARTBEAT_SECONDS = 15.0
SLOWEST_READ_SECONDS = 5.0
# Events in memory per client that reads slowly; the largest have some kilobytes.
PAGE = 100
# Events that wait for one listener. Who is further behind comes again with its last id.
MAX_WAITING_EVENTS = 5000
# Browsers come again by themselves, after this long.
RETRY_MS = 2000


class StreamEnd(Exception):
    """The stream ends here; its client goes on with a new one."""


class EventStreams:
    """Serve event streams; hand every other request on."""

    def __init__(self, application: Application) -> None:
        self.application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        # The quick look is for the many that want something else.
        match = ADDRESS.fullmatch(path) if scope["method"] == "GET" and "events" in path else None
        if match is None or b"text/event-stream" not in dict(scope["headers"]).get(b"accept", b""):
            return await self.application(scope, receive, send)
        if too_long(scope):
            return await self.application(scope, receive, send)
        try:
            request = read_request(with_any_accept(scope), match.groups())
        except FallThrough:
            return await self.application(scope, receive, send)
        record = request.record
        record.lane, record.route = "stream", "/api/drops/{id}/events"
        record.request_id = request.request_id
        # First: who comes as the server is told to stop must not be overlooked.
        watch_signals()
        try:
            stream = await open_stream(request)
        except Exception as exc:
            return await refuse(request, await counted(to_api_exception(exc), request), send)
        record.status, record.drop_id = 200, stream.drop_id
        try:
            await stream.run(receive, send)
        finally:
            open_connections.leave(stream.address)


def with_any_accept(scope: Scope) -> Scope:
    """Leave the Accept header out, which asks for what only this module serves."""
    return scope | {"headers": [pair for pair in scope["headers"] if pair[0] != b"accept"]}


async def open_stream(request: HotRequest) -> "EventStream":
    """Return the stream that ``request`` asks for; it counts as open from then on.

    Raises:
        APIException: why there is none.
    """
    asking = request.asking()
    identity = identify(asking)
    if may_be_forged(asking.header):
        # As at sockets: pages of other sites may listen, but not as their visitor.
        identity = None
    drop_id = parse_uuid(request.args[0])
    if drop_id is None:
        raise NotFound
    after = read_after(request)
    address = request.client_address()
    user_id = request.record.user_id = identity.user_id if identity else None
    request.answer_headers = await rate_limits().check_soon("socket", user_id, lambda: address)
    if open_connections.is_full:
        raise ProcessIsFull
    if open_connections.is_full_for(address):
        raise TooManyStreams
    # At once: of many who come together each must see those before it.
    open_connections.enter(address)
    try:
        if identity is not None:
            await database_sync_to_async(refuse_unknown)(identity)
        await database_sync_to_async(log.published_seq)(str(drop_id))
        await get_hub().start()
    except BaseException:
        open_connections.leave(address)
        raise
    return EventStream(request, str(drop_id), after, address, identity)


def read_after(request: HotRequest) -> int | None:
    """Return the last event that the client has; the header is newer than the address."""
    headers = dict(request.scope["headers"])
    query = parse_qsl(request.query.decode("latin-1"), keep_blank_values=True)
    given = [value for name, value in query if name == "after"]
    if b"last-event-id" in headers:
        given = [headers[b"last-event-id"].decode("latin-1")]
    if not given:
        return None
    seq = log.read_seq(given[-1])
    if seq is None:
        raise ValidationError({"after": "Must be the seq of an event."})
    return seq


async def refuse(request: HotRequest, error: APIException, send: Send) -> None:
    answer = problem_answer(error, request.request_id)
    request.record.status, request.record.code = answer.status, answer.code
    content_type = (b"content-type", answer.content_type or b"")
    length = (b"content-length", str(len(answer.body)).encode())
    headers = [content_type, length, *answer.headers, *common_headers(request)]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


def common_headers(request: HotRequest) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-request-id", request.request_id.encode()),
        *security_headers(request.scheme),
        (b"vary", b"accept"),
        *added_headers(request),
    ]


class EventStream:
    """One client that listens to one drop."""

    def __init__(
        self,
        request: HotRequest,
        drop_id: str,
        after: int | None,
        address: str,
        identity: Identity | None,
    ) -> None:
        self.request = request
        self.drop_id = drop_id
        self.after = after
        self.address = address
        self.identity = identity
        self.waiting: asyncio.Queue[EventFrame | None] = asyncio.Queue(MAX_WAITING_EVENTS)

    def hear(self, frames: list[EventFrame]) -> None:
        try:
            for frame in frames:
                self.waiting.put_nowait(frame)
        except asyncio.QueueFull:
            self.reconnect()

    def reconnect(self) -> None:
        """End the stream as soon as possible; the client comes again with its last id."""
        while not self.waiting.empty():
            self.waiting.get_nowait()
        self.waiting.put_nowait(None)

    def tell(self, message: Message) -> None:
        """Say nothing: a stream tells of its drop alone."""

    def end_identity(self) -> None:
        # Who comes again is refused then.
        self.reconnect()

    async def run(self, receive: Receive, send: Send) -> None:
        hub = get_hub()
        hub.listen(self, self.drop_id)
        expiry = None
        if self.identity is not None:
            # Who looks there for news of users finds out, too, who was switched off.
            hub.private.add(self.identity.user_id, self)
            expiry = end_with(self.identity, self)
        _streams.add(self)
        if _is_stopping:
            self.reconnect()
        waiting_send = backpressure.waiting_send(send)
        telling = asyncio.ensure_future(self._tell(waiting_send))
        leaving = asyncio.ensure_future(client_is_gone(receive))
        try:
            await asyncio.wait([telling, leaving], return_when=asyncio.FIRST_COMPLETED)
            if telling.done() and isinstance(telling.exception(), TimeoutError):
                backpressure.abort(send)
        finally:
            telling.cancel()
            leaving.cancel()
            hub.unlisten(self, self.drop_id)
            if self.identity is not None:
                hub.private.remove(self.identity.user_id, self)
            if expiry is not None:
                expiry.cancel()
            _streams.discard(self)
            with contextlib.suppress(Exception):
                backpressure.finish(send)

    async def _tell(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-store"),
            # What nginx knows: such an answer must not be collected first.
            (b"x-accel-buffering", b"no"),
            *common_headers(self.request),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, f"retry: {RETRY_MS}\n\n".encode())
        # An answer that has begun can't become an error; who comes again is told of the outage.
        with contextlib.suppress(StreamEnd, *OUTAGES):
            seq = await self._tell_past(send)
            while True:
                seq = await self._tell_next(send, seq)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell_past(self, send: Send) -> int:
        """Send what was missed, or the state; return up to which event."""
        seq = self.after
        while seq is not None:
            events = await database_sync_to_async(log.missed_events)(self.drop_id, seq, PAGE)
            if events is None:
                break
            if not events:
                return seq
            frames = [EventFrame(self.drop_id, *event) for event in events]
            await self._send(send, chunk(frames))
            seq = frames[-1].seq
        hub = get_hub()
        # What was heard before it listened may wait for its turn at sockets, and won't come here.
        snapshot = await hub.snapshot(self.drop_id, hub.heard(self.drop_id))
        seq = snapshot.seqs[self.drop_id]
        text = snapshot.message["text"]
        await self._send(send, f"id: {seq}\nevent: SNAPSHOT\ndata: {text}\n\n".encode())
        return seq

    async def _tell_next(self, send: Send, seq: int) -> int:
        """Wait for news and send them; return up to which event."""
        try:
            async with asyncio.timeout(HEARTBEAT_SECONDS):
                news = [await self.waiting.get()]
        except TimeoutError:
            await self._send(send, HEARTBEAT)
            return seq
        while not self.waiting.empty() and len(news) < PAGE:
            news.append(self.waiting.get_nowait())
        frames = [frame for frame in news if frame is not None and frame.seq > seq]
        if frames and frames[0].seq == seq + 1:
            await self._send(send, chunk(frames))
            seq = frames[-1].seq
        elif frames:
            # Something is missing between the past and the news; it is in the log.
            raise StreamEnd
        if None in news:
            raise StreamEnd
        return seq

    async def _send(self, send: Send, body: bytes) -> None:
        """Send ``body``.

        Raises:
            TimeoutError: the client has not read for a while.
        """
        message: Message = {"type": "http.response.body", "body": body, "more_body": True}
        async with asyncio.timeout(SLOWEST_READ_SECONDS):
            await send(message)


def chunk(frames: Iterable[EventFrame]) -> bytes:
    """Return frames as server-sent events; their JSON has no line breaks."""
    return "".join(
        f"id: {frame.seq}\nevent: {frame.type}\ndata: {frame.text_after(frame.seq - 1)}\n\n"
        for frame in frames
    ).encode()


async def client_is_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_streams: set[EventStream] = set()
_is_watching_signals = False
_is_stopping = False


def watch_signals() -> None:
    """Have all streams end when the server is told to stop.

    Servers wait for open answers, and tell an application without the lifespan protocol
    nothing; so this process listens to the same signal, and hands it on.
    """
    global _is_watching_signals
    if _is_watching_signals:
        return
    _is_watching_signals = True
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def stop(number: int, frame: FrameType | None, before: Any = before) -> None:
            loop.call_soon_threadsafe(end_all)
            if callable(before):
                before(number, frame)

        # Only the main thread may; where the loop runs in another, there is no server.
        with contextlib.suppress(ValueError):
            if callable(before):
                signal.signal(number, stop)


def end_all() -> None:
    """End the streams there are, and those that are being opened as soon as they begin."""
    global _is_stopping
    _is_stopping = True
    for stream in list(_streams):
        stream.reconnect()
