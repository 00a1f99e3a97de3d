"""Hand committed events to the channel layer, without making anybody wait for Redis."""

import asyncio
import atexit
import contextlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections import deque
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
FLUSH_POLL_SECONDS = 0.005
# The first news after a quiet moment goes out at once, what comes in this time after it in one
# message: in a sale each message costs its sender and each hub as much as a reservation or two.
PAUSE_SECONDS = 0.02


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
        self._waiting: deque[NewsOfDrop] = deque()
        # To wake the loop costs, so whoever brings news does so only where it sleeps.
        self._is_asleep = False
        self._wake = asyncio.Event()
        self._is_sending = False
        self._is_failing = False

    def put(self, news: Sequence[NewsOfDrop]) -> None:
        for of_drop in news:
            if len(self._waiting) < MAX_WAITING_NEWS:
                self._waiting.append(of_drop)
        if self._is_asleep:
            self._loop.call_soon_threadsafe(self._wake.set)

    def flush(self) -> None:
        """Wait until everything is sent, but not for long."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_SECONDS
        while (self._waiting or self._is_sending) and time.monotonic() < deadline:
            time.sleep(FLUSH_POLL_SECONDS)

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._send_forever())

    async def _send_forever(self) -> None:
        layer = get_channel_layer()
        while True:
            await self._sleep_until_news()
            # Before it is taken, so that nobody sees it neither waiting nor being sent.
            self._is_sending = True
            news = self._take_waiting()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                    await layer.group_send(GROUP, {"type": "drop.events", "news": news})
                self._report(None)
            except Exception as exc:
                self._report(exc)
                # After a failure what waits is old: the hubs have read it from the log.
                self._waiting.clear()
            self._is_sending = False
            if not self._waiting:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _sleep_until_news(self) -> None:
        # Said first, then looked: what comes in between is seen by one of both.
        self._is_asleep = True
        while not self._waiting:
            await self._wake.wait()
            self._wake.clear()
        self._is_asleep = False

    def _take_waiting(self) -> list[NewsOfDrop]:
        """Return what waits by now, in order, for one message: most of its cost is the message."""
        news: list[NewsOfDrop] = []
        events = 0
        while self._waiting and events < MAX_EVENTS_PER_MESSAGE:
            news.append(self._waiting.popleft())
            events += len(news[-1]["events"])
        return news

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
