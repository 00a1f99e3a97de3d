"""One hub per process: it follows the event log and fans each frame out to its sockets.

The channel layer only brings the news faster. Whatever it loses, repeats or brings out
of order, the sequence numbers show, and the hub reads the missing events from the log.
"""

import asyncio
import logging
import weakref
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Protocol

from channels.db import database_sync_to_async
from channels.layers import get_channel_layer
from django.db import DatabaseError

from realtime import log
from realtime.frames import event_frame, heartbeat_frame
from realtime.publisher import GROUP, tell_followers

logger = logging.getLogger(__name__)

CATCH_UP_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
RETRY_SECONDS = 1.0


class Socket(Protocol):
    """What the hub needs of a connection; ``offer`` must neither block nor fail."""

    def offer(self, drop_id: str, seq: int, frame: str) -> None: ...
    def offer_heartbeat(self, frame: str) -> None: ...
    def reconnect(self) -> None: ...


class Hub:
    """Follows every drop from the moment it starts; lives in one event loop."""

    def __init__(self) -> None:
        # The newest event passed on, by drop. A drop that isn't in here is newer than the hub.
        self._seqs: dict[str, int] = {}
        self._watching_all: set[Socket] = set()
        self._watching: dict[str, set[Socket]] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: list[asyncio.Task] = []
        self._started: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Begin to follow the log; callers after the first wait for the same start.

        Raises:
            DatabaseError: the log can't be read; the next call tries again.
        """
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        try:
            await asyncio.shield(self._started)
        except DatabaseError:
            self._started = None
            raise

    def start_soon(self) -> None:
        """Begin to follow the log in the background, as soon as the database allows."""
        if self._started is None:
            # Kept, because the loop itself keeps only weak references to its tasks.
            self._starting = asyncio.create_task(self._start_until_it_works())

    async def _start_until_it_works(self) -> None:
        while True:
            try:
                return await self.start()
            except DatabaseError as exc:
                logger.warning("the event log can't be read: %s", exc)
                await asyncio.sleep(RETRY_SECONDS)

    async def _start(self) -> None:
        self._seqs = await database_sync_to_async(log.current_seqs)()
        self._tasks = [
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._catch_up_forever()),
            asyncio.create_task(self._beat()),
        ]

    def watch_all(self, socket: Socket) -> None:
        self._watching_all.add(socket)

    def watch(self, socket: Socket, drop_id: str) -> None:
        self._watching.setdefault(drop_id, set()).add(socket)

    def unwatch(self, socket: Socket, drop_id: str) -> None:
        sockets = self._watching.get(drop_id, set())
        sockets.discard(socket)
        if not sockets:
            self._watching.pop(drop_id, None)

    def forget(self, socket: Socket) -> None:
        """Drop ``socket`` from all it watches."""
        self._watching_all.discard(socket)
        for drop_id in [d for d, sockets in self._watching.items() if socket in sockets]:
            self.unwatch(socket, drop_id)

    async def _listen(self) -> None:
        """Take the news from the channel layer; while Redis is away, ``_catch_up`` goes on."""
        layer = get_channel_layer()
        while True:
            try:
                channel = await layer.new_channel()
                await layer.group_add(GROUP, channel)
                while True:
                    message = await layer.receive(channel)
                    try:
                        await self._take(message)
                    except DatabaseError as exc:
                        logger.warning("the event log can't be read: %s", exc)
                    except Exception:
                        # Subscribing again would not mend a message that makes no sense.
                        logger.exception("a message could not be used")
            except asyncio.CancelledError:
                raise
            except Exception as exc:
                logger.warning("no news from the channel layer: %r", exc)
                await asyncio.sleep(RETRY_SECONDS)

    async def _catch_up_forever(self) -> None:
        """Compare with the database again and again, and read what never arrived."""
        while True:
            await asyncio.sleep(CATCH_UP_SECONDS)
            before = dict(self._seqs)
            try:
                for drop_id, seq in (await database_sync_to_async(log.current_seqs)()).items():
                    known = self._seqs.get(drop_id, 0)
                    if seq > known:
                        await self._read_missed(drop_id, seq)
                    elif seq < known and known == before.get(drop_id):
                        self._start_over(drop_id, seq)
            except DatabaseError as exc:
                logger.warning("the event log can't be read: %s", exc)
            except Exception:
                # Whatever it was, clients must not be left without events for it.
                logger.exception("catching up failed; trying again")

    def _start_over(self, drop_id: str, seq: int) -> None:
        """Follow a drop whose numbers went back: a restored backup, or fresh demo data.

        Its sockets know a past that is gone; they are told to connect again.
        """
        self._seqs[drop_id] = seq
        for socket in self._watching_all | self._watching.get(drop_id, set()):
            socket.reconnect()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            now = datetime.now(UTC)
            if self._watching_all:
                frame = heartbeat_frame(self._seqs, now)
                for socket in list(self._watching_all):
                    socket.offer_heartbeat(frame)
            for drop_id, sockets in list(self._watching.items()):
                frame = heartbeat_frame({drop_id: self._seqs.get(drop_id, 0)}, now)
                for socket in sockets - self._watching_all:
                    socket.offer_heartbeat(frame)

    async def _take(self, message: dict[str, Any]) -> None:
        """Pass on the events of a message; where it does not join on, read the log instead."""
        drop_id, events = message["drop_id"], message["events"]
        if message["seq"] <= self._seqs.get(drop_id, 0):
            return
        if not events or events[0]["seq"] > self._seqs.get(drop_id, 0) + 1:
            return await self._read_missed(drop_id, message["seq"])
        self._pass_on(
            drop_id,
            (
                (e["seq"], e["type"], datetime.fromtimestamp(e["ts"], UTC), e["data"])
                for e in events
            ),
        )

    async def _read_missed(self, drop_id: str, up_to: int) -> None:
        # One reader per drop: two would pass the same events on twice, or in the wrong order.
        lock = self._locks.setdefault(drop_id, asyncio.Lock())
        async with lock:
            while (known := self._seqs.get(drop_id, 0)) < up_to:
                events = await database_sync_to_async(log.events_after)(drop_id, known)
                if not events:
                    return
                self._pass_on(drop_id, events)

    def _pass_on(self, drop_id: str, events: Iterable[log.LoggedEvent]) -> None:
        """Send events in order, each once; runs without a pause, so nothing comes between."""
        for seq, event_type, at, data in events:
            prev = self._seqs.get(drop_id, 0)
            if seq != prev + 1:
                continue
            self._seqs[drop_id] = seq
            tell_followers(drop_id, [(seq, event_type, data)])
            sockets = self._watching_all | self._watching.get(drop_id, set())
            if sockets:
                frame = event_frame(drop_id, seq, prev, event_type, at, data)
                for socket in sockets:
                    socket.offer(drop_id, seq, frame)


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()


def get_hub() -> Hub:
    """Return the hub of the running event loop."""
    return _hubs.setdefault(asyncio.get_running_loop(), Hub())
