"""Hand committed events to the channel layer, without making anybody wait for Redis."""

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from channels.layers import get_channel_layer

if TYPE_CHECKING:
    from realtime.services import NewEvent

logger = logging.getLogger(__name__)

GROUP = "drops"
# News are a hint; hubs read from the event log what they don't carry.
MAX_EVENTS_PER_MESSAGE = 100
MAX_WAITING_NEWS = 1000
SEND_TIMEOUT_SECONDS = 5
FLUSH_TIMEOUT_SECONDS = 1


def publish(events: Mapping[uuid.UUID, Sequence["NewEvent"]], at: datetime) -> None:
    """Queue the news about drops for all processes; returns at once and never fails.

    Call it after the commit. What gets lost here (Redis is away, the process dies) the
    hubs find in the event log within a second. Followers in this process are told first,
    so that it never answers from a memory older than its own writes; then its own hub, whose
    clients need not wait for the way through Redis.
    """
    news: list[NewsOfDrop] = []
    for drop_id, its_events in events.items():
        name = str(drop_id)
        tell_followers(name, [(e.seq, e.type, e.data) for e in its_events])
        news.append(
            {
                "drop_id": name,
                "seq": its_events[-1].seq,
                "events": [
                    {"seq": e.seq, "type": e.type, "ts": at.timestamp(), "data": e.data}
                    for e in its_events
                ]
                if len(its_events) <= MAX_EVENTS_PER_MESSAGE
                else [],
            }
        )
    for loop, hear in list(_hearers.items()):
        with contextlib.suppress(RuntimeError):
            # It raises where the loop has ended meanwhile.
            loop.call_soon_threadsafe(hear, news)
    _publisher().put(news)


# What a hub is told of one drop: its id, the newest ``seq``, and the events.
NewsOfDrop = dict[str, Any]

_hearers: weakref.WeakKeyDictionary[
    asyncio.AbstractEventLoop, Callable[[Sequence[NewsOfDrop]], None]
] = weakref.WeakKeyDictionary()


def hear_directly(hear: Callable[[Sequence[NewsOfDrop]], None]) -> None:
    """Call ``hear`` in this event loop with all that this process publishes, once more."""
    _hearers[asyncio.get_running_loop()] = hear


# (seq, type, data)
News = tuple[int, str, dict[str, Any]]
Follower = Callable[[str, Sequence[News]], None]

_followers: list[Follower] = []


def follow(follower: Follower) -> None:
    """Call ``follower(drop_id, events)`` for each change this process makes or hears of.

    In any thread; it must be quick and must not fail. Without events it means: something
    changed, look for yourself.
    """
    _followers.append(follower)


def tell_followers(drop_id: str, events: Sequence[News]) -> None:
    for follower in _followers:
        follower(drop_id, events)


class Publisher(threading.Thread):
    """The process's only sender: one thread, one event loop, one Redis connection."""

    def __init__(self) -> None:
        super().__init__(name="event-publisher", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._is_idle = threading.Event()
        self._is_failing = False

    def put(self, news: Sequence[NewsOfDrop]) -> None:
        self._is_idle.clear()
        self._loop.call_soon_threadsafe(self._enqueue, news)

    def flush(self) -> None:
        """Wait until everything is sent, but not for long."""
        self._is_idle.wait(FLUSH_TIMEOUT_SECONDS)

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._send_forever())

    def _enqueue(self, news: Sequence[NewsOfDrop]) -> None:
        for of_drop in news:
            if self._waiting.qsize() < MAX_WAITING_NEWS:
                self._waiting.put_nowait(of_drop)

    async def _send_forever(self) -> None:
        layer = get_channel_layer()
        while True:
            news = await self._take_waiting()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                    await layer.group_send(GROUP, {"type": "drop.events", "news": news})
                self._report(None)
            except Exception as exc:
                self._report(exc)
                # After a failure what waits is old: the hubs have read it from the log.
                self._drop_waiting()
            if self._waiting.empty():
                self._is_idle.set()

    async def _take_waiting(self) -> list[dict[str, Any]]:
        """Return what waits by now, in order, for one message: most of its cost is the message."""
        news = [await self._waiting.get()]
        events = len(news[0]["events"])
        while not self._waiting.empty() and events < MAX_EVENTS_PER_MESSAGE:
            news.append(self._waiting.get_nowait())
            events += len(news[-1]["events"])
        return news

    def _drop_waiting(self) -> None:
        while not self._waiting.empty():
            self._waiting.get_nowait()

    def _report(self, failure: Exception | None) -> None:
        """Log the beginning and the end of an outage, not each message in it."""
        if failure and not self._is_failing:
            logger.warning("events can't be published, clients get them from the log: %r", failure)
        elif self._is_failing and not failure:
            logger.info("events are published again")
        self._is_failing = failure is not None


_current: Publisher | None = None
_current_pid = 0
_start_lock = threading.Lock()


def _publisher() -> Publisher:
    """Return this process's publisher; a forked child needs one of its own."""
    global _current, _current_pid
    with _start_lock:
        if _current is None or _current_pid != os.getpid():
            _current, _current_pid = Publisher(), os.getpid()
            _current.start()
            atexit.register(_current.flush)
        return _current


def flush() -> None:
    """Wait briefly until what was published has left this process."""
    if _current is not None and _current_pid == os.getpid():
        _current.flush()
