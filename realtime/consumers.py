import asyncio
import contextlib
from typing import Any

import orjson
from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.core.exceptions import ObjectDoesNotExist
from django.db import DatabaseError

from config.addresses import client_address
from config.problems import RateLimited
from config.rate_limits import rate_limits
from realtime import log
from realtime.frames import is_uuid, pong_frame, snapshot_frame
from realtime.hub import Hub, get_hub
from users.exceptions import InvalidIdentity
from users.identity import Identity, identify_socket

MAX_WAITING_FRAMES = 1000

BAD_MESSAGE = 4400
INVALID_IDENTITY = 4401
NOT_FOUND = 4404
TOO_OFTEN = 4429
TOO_SLOW = 4408
SERVICE_RESTART = 1012
TRY_AGAIN_LATER = 1013


class DropConsumer(AsyncWebsocketConsumer):
    """A socket that watches all drops, or one: ``/ws/drops`` and ``/ws/drops/{id}``.

    Frames come from the hub, not through the channel layer: a channel per socket would
    cost one Redis subscription, one decoding and one thread hop for each frame.
    """

    channel_layer_alias = "none: the hub listens for all sockets"

    hub: Hub
    writer: asyncio.Task | None = None

    async def connect(self) -> None:
        await self.accept()
        self.frames: asyncio.Queue[str] = asyncio.Queue(MAX_WAITING_FRAMES)
        # The newest frame sent, by drop: a snapshot may be ahead of the hub.
        self.seqs: dict[str, int] = {}
        # Frames of drops whose snapshot is still being read.
        self.held_back: list[tuple[str, int, str]] | None = None
        drop_id = self.scope["url_route"]["kwargs"].get("drop_id")
        if drop_id is not None and not is_uuid(drop_id):
            return await self.close(NOT_FOUND, "no such drop")
        try:
            identity = identify_socket(self.scope)
            await self._check_rate(identity)
            self.hub = get_hub()
            await self.hub.start()
            self.writer = asyncio.create_task(self._write())
            await self._begin(drop_id.lower() if drop_id else None)
        except InvalidIdentity:
            await self.close(INVALID_IDENTITY, "invalid identity")
        except RateLimited:
            await self.close(TOO_OFTEN, "too many connections, try again later")
        except DatabaseError:
            await self.close(TRY_AGAIN_LATER, "try again later")

    async def _check_rate(self, identity: Identity | None) -> None:
        """Count the connection; who has no identity is counted by address alone.

        Raises:
            RateLimited: there were too many of this user or address.
        """
        client = self.scope.get("client")
        forwarded_for = dict(self.scope["headers"]).get(b"x-forwarded-for")
        await rate_limits().check_soon(
            "socket",
            identity.user_id if identity else None,
            lambda: client_address(
                client[0] if client else None,
                forwarded_for.decode("latin-1") if forwarded_for else None,
            ),
        )

    async def disconnect(self, code: int) -> None:
        if self.writer is not None:
            self.hub.forget(self)
            self.writer.cancel()

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        message = parse_message(text_data)
        if self.writer is None:
            return
        if message is None:
            return await self.close(BAD_MESSAGE, "not a message this socket knows")
        if message["action"] == "ping":
            return self._queue(pong_frame())
        drop_id = message["dropId"].lower()
        if message["action"] == "unsubscribe":
            return self.hub.unwatch(self, drop_id)
        try:
            await self._begin(drop_id)
        except DatabaseError:
            await self.close(TRY_AGAIN_LATER, "try again later")

    async def _begin(self, drop_id: str | None) -> None:
        """Watch from now on, then send the state that the watched events continue."""
        self.held_back = []
        if drop_id is None:
            self.hub.watch_all(self)
        else:
            self.hub.watch(self, drop_id)
        try:
            drops, now = await database_sync_to_async(log.snapshot)(drop_id)
        except ObjectDoesNotExist:
            self.hub.unwatch(self, str(drop_id))
            return await self.close(NOT_FOUND, "no such drop")
        self._queue(snapshot_frame(drops, now))
        self.seqs |= {drop["id"]: drop["seq"] for drop in drops}
        held_back, self.held_back = self.held_back, None
        for held in held_back or []:
            self.offer(*held)

    def offer(self, drop_id: str, seq: int, frame: str) -> None:
        if self.held_back is not None:
            self.held_back.append((drop_id, seq, frame))
        elif seq > self.seqs.get(drop_id, 0):
            self.seqs[drop_id] = seq
            self._queue(frame)

    def offer_heartbeat(self, frame: str) -> None:
        self._queue(frame)

    def reconnect(self) -> None:
        self._close_soon(SERVICE_RESTART, "connect again")

    def _close_soon(self, code: int, reason: str) -> None:
        self.hub.forget(self)
        closing = asyncio.ensure_future(self.close(code, reason))
        # The loop itself keeps only a weak reference.
        self.closing = closing

    def _queue(self, frame: str) -> None:
        try:
            self.frames.put_nowait(frame)
        except asyncio.QueueFull:
            self._close_soon(TOO_SLOW, "too slow")

    async def _write(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await self.send(text_data=await self.frames.get())


class NotFoundConsumer(AsyncWebsocketConsumer):
    """Any other address."""

    channel_layer_alias = DropConsumer.channel_layer_alias

    async def connect(self) -> None:
        await self.accept()
        await self.close(NOT_FOUND, "no such socket")


def parse_message(text: str | None) -> dict[str, Any] | None:
    """Return a client's message, or None for anything that is not one."""
    try:
        message = orjson.loads(text or "")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(message, dict):
        return None
    if message.get("action") == "ping":
        return message
    is_known = message.get("action") in ("subscribe", "unsubscribe")
    return message if is_known and is_uuid(message.get("dropId")) else None
