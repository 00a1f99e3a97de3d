"""One hub per process: it follows the event log and fans each frame out to its sockets.

The channel layer only brings the news faster. Whatever it loses, repeats or brings out
of order, the sequence numbers show, and the hub reads the missing events from the log.
"""

import asyncio
import contextlib
import logging
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from channels.db import database_sync_to_async
from channels.layers import get_channel_layer
from django.core.exceptions import ObjectDoesNotExist
from django.db import DatabaseError
from psycopg_pool import PoolTimeout

from config.ids import is_rehearsal_id
from operations import metrics
from realtime import log, presence
from realtime.conflation import Waiting
from realtime.frames import (
    EventFrame,
    Message,
    Series,
    heartbeat_frame,
    snapshot_frame,
    text_message,
)
from realtime.limits import Allowance
from realtime.private import PrivateNews
from realtime.publisher import GROUP, NewsOfDrop, hear_directly, tell_followers
from realtime.wire import Connection, write_now

logger = logging.getLogger(__name__)

CATCH_UP_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
RETRY_SECONDS = 1.0
OUTAGES = (DatabaseError, PoolTimeout)

# docs/adr/0008-conflation.md says why these numbers.
TURN_SECONDS = 0.05
SINGLES_PER_SECOND = 50
SINGLES_BURST = 100
SENDS_OF_SINGLES_PER_TURN = 20_000
FRAMES_PER_SECOND = 1000
FRAMES_BURST = 250
SOCKETS_PER_SLICE = 50
# Who caused the event waits for an answer at that very moment.
FIRST_SOCKETS = 5
LONGEST_BREAK_SECONDS = 0.1

# Events that a client who lost its connection for a moment gets without a query.
REMEMBERED_EVENTS = 500
REMEMBER_SECONDS = 60.0
SNAPSHOT_SECONDS = 1.0


class Socket(Protocol):
    """What the hub needs of a connection; none of it may block or fail."""

    def offer(self, frame: EventFrame, prev: int, message: Message) -> None:
        """Send ``message``, which is ``frame`` after ``prev``."""

    def offer_heartbeat(self, key: str, message: Message) -> None: ...
    def reconnect(self) -> None: ...


class Listener(Protocol):
    """Takes every event of a drop as it comes; it must not block or fail either."""

    def hear(self, frames: list[EventFrame]) -> None: ...
    def reconnect(self) -> None: ...


class Feed:
    """A drop's newest event, its newest frame, and what happened in between."""

    __slots__ = (
        "early", "is_due", "next_turn", "recent", "sent", "seq", "singles", "touched", "waiting",
    )  # fmt: skip

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self.sent = seq
        # Who has a newer frame than that, and which.
        self.early: dict[Socket, int] = {}
        self.waiting: Waiting | None = None
        self.singles: Allowance | None = None
        self.recent: deque[EventFrame] | None = None
        # By the loop's clock: when it may be its turn again, and its last event came.
        self.next_turn = 0.0
        self.touched = 0.0
        self.is_due = False

    def newer_state(self, frame: EventFrame) -> EventFrame | None:
        """Return what would replace ``frame`` if it were still to be sent, or None.

        Only what has nothing but older ones of its kind before it: the others wait for their turn.
        """
        if frame.seq != self.sent or self.waiting is None:
            return None
        return self.waiting.only_state(frame.type)

    def remember(self, frame: EventFrame) -> None:
        if self.recent is None:
            self.recent = deque(maxlen=REMEMBERED_EVENTS)
        self.recent.append(frame)


class Snapshot:
    """The state of one drop, or of all current ones, as one frame."""

    def __init__(self, drops: list[dict[str, Any]], at: datetime, frames_before: int) -> None:
        self.message = text_message(snapshot_frame(drops, at))
        self.seqs: dict[str, int] = {drop["id"]: drop["seq"] for drop in drops}
        self.frames_before = frames_before
        self.read_at = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() - self.read_at < SNAPSHOT_SECONDS


class Hub:
    """Follows every drop from the moment it starts; lives in one event loop."""

    def __init__(self) -> None:
        # A drop that isn't in here is newer than the hub.
        self._feeds: dict[str, Feed] = {}
        self._watching_all: set[Socket] = set()
        self._watching: dict[str, set[Socket]] = {}
        self._listening: dict[str, set[Listener]] = {}
        # Of sockets that get everything at once, where to write it.
        self._connections: dict[Socket, Connection] = {}
        self._due: asyncio.Queue[str] = asyncio.Queue()
        self._frames = Allowance(FRAMES_PER_SECOND, FRAMES_BURST)
        # Those, too, that nobody watched: a state from before them is too old.
        self._frames_sent = 0
        # A heartbeat must not overtake the frames that it counts.
        self._sending = asyncio.Lock()
        self._turn_of: str | None = None
        self._snapshots: dict[str | None, Snapshot] = {}
        self._readings: dict[str | None, asyncio.Task[Snapshot]] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: list[asyncio.Task] = []
        self._started: asyncio.Future[None] | None = None
        self.private = PrivateNews()
        # By the monotonic clock, when this hub last knew all that the log tells.
        self.level_at: float | None = None

    # --- Starting -----------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to follow the log; callers after the first wait for the same start.

        Raises:
            DatabaseError, PoolTimeout: the log can't be read; the next call tries again.
        """
        if self._started is None:
            self._started = asyncio.ensure_future(self._start())
        started = self._started
        try:
            await asyncio.shield(started)
        except OUTAGES:
            # Somebody who heard of it earlier may have begun anew.
            if self._started is started:
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
            except OUTAGES as exc:
                logger.warning("the event log can't be read: %s", exc)
                await asyncio.sleep(RETRY_SECONDS)

    async def _start(self) -> None:
        seqs = await database_sync_to_async(log.current_seqs)()
        self._feeds = {drop_id: Feed(seq) for drop_id, seq in seqs.items()}
        self.level_at = time.monotonic()
        hear_directly(self._hear)
        self._tasks = [
            asyncio.create_task(work)
            for work in (
                self._listen(),
                self._catch_up_forever(),
                self._send_forever(),
                self._beat(),
                self.private.tell_forever(),
                presence.report_forever(),
            )
        ]

    # --- Who watches --------------------------------------------------------------------

    def watch_all(self, socket: Socket) -> None:
        self._watching_all.add(socket)

    def watch(self, socket: Socket, drop_id: str) -> None:
        self._watching.setdefault(drop_id, set()).add(socket)
        if feed := self._feeds.get(drop_id):
            # It starts over, with a state or with what it missed.
            feed.early.pop(socket, None)

    def unwatch(self, socket: Socket, drop_id: str) -> None:
        leave(self._watching, drop_id, socket)

    def forget(self, socket: Socket, drop_ids: Iterable[str]) -> None:
        """Drop ``socket``, which watches ``drop_ids``."""
        self._watching_all.discard(socket)
        self._connections.pop(socket, None)
        for drop_id in drop_ids:
            self.unwatch(socket, drop_id)

    def write_to(self, socket: Socket, connection: Connection | None) -> None:
        """Write what ``socket`` watches to its connection, or, with None, offer it again.

        A frame that can't be written at once is offered in any case.
        """
        if connection is None:
            self._connections.pop(socket, None)
        else:
            self._connections[socket] = connection

    def listen(self, listener: Listener, drop_id: str) -> None:
        self._listening.setdefault(drop_id, set()).add(listener)

    def unlisten(self, listener: Listener, drop_id: str) -> None:
        leave(self._listening, drop_id, listener)

    def sent(self, drop_id: str) -> int:
        """Return the ``seq`` of the drop's newest frame: what is up to there isn't sent again."""
        feed = self._feeds.get(drop_id)
        return feed.sent if feed else 0

    def may_bring(self, drop_id: str, seq: int) -> bool:
        """Say whether a socket that watched before may yet be brought frames up to ``seq``."""
        return seq > self.sent(drop_id) or drop_id == self._turn_of

    def heard(self, drop_id: str) -> int:
        """Return the ``seq`` of the drop's newest event: listeners hear only what follows it."""
        feed = self._feeds.get(drop_id)
        return feed.seq if feed else 0

    def _groups(self, drop_id: str) -> tuple[set[Socket], set[Socket]]:
        """Return who watches this drop, and who watches all and is shown it."""
        # A rehearsal is shown to those who ask for it by its id, and to nobody else.
        watching_all = set() if is_rehearsal_id(drop_id) else self._watching_all
        return self._watching.get(drop_id, set()), watching_all

    def _audience(self, drop_id: str) -> set[Socket]:
        watching, watching_all = self._groups(drop_id)
        return watching | watching_all

    # --- What a new socket gets first ---------------------------------------------------

    async def snapshot(self, drop_id: str | None, at_least: int = 0) -> Snapshot:
        """Return the state of the drop, or of all current ones, that the next frames continue.

        Read once for all who ask at that time. Call it when the socket is watching.

        Args:
            at_least: the ``seq`` that the drop's state must have reached.
        Raises:
            ObjectDoesNotExist: there is no drop with this id.
            DatabaseError, PoolTimeout: the database can't be reached.
        """
        frames_before = self._frames_sent
        needed = max(self.sent(drop_id), at_least) if drop_id else 0

        def goes_on_here(snapshot: Snapshot) -> bool:
            if drop_id is None:
                return snapshot.frames_before >= frames_before
            return snapshot.seqs[drop_id] >= needed

        known = self._snapshots.get(drop_id)
        if known is not None and known.is_fresh and goes_on_here(known):
            return known
        # What was being read already may be too old; what is read after that can't be.
        snapshot = await self._join_reading(drop_id)
        return snapshot if goes_on_here(snapshot) else await self._join_reading(drop_id)

    async def _join_reading(self, drop_id: str | None) -> Snapshot:
        reading = self._readings.get(drop_id)
        if reading is None:
            reading = self._readings[drop_id] = asyncio.create_task(self._read(drop_id))
            reading.add_done_callback(note_outcome)
        return await asyncio.shield(reading)

    async def _read(self, drop_id: str | None) -> Snapshot:
        frames_before = self._frames_sent
        try:
            drops, at = await database_sync_to_async(log.snapshot)(drop_id)
            snapshot = self._snapshots[drop_id] = Snapshot(drops, at, frames_before)
            return snapshot
        finally:
            del self._readings[drop_id]

    def remembered_after(self, drop_id: str, seq: int) -> list[EventFrame] | None:
        """Return the drop's events after ``seq``, or None if they aren't all in memory."""
        feed = self._feeds.get(drop_id)
        if feed is None or seq > feed.seq:
            return None
        if seq == feed.seq:
            return []
        if not feed.recent or feed.recent[0].seq > seq + 1:
            return None
        return [frame for frame in feed.recent if frame.seq > seq]

    # --- Where events come from ---------------------------------------------------------

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
                        for news in message["news"]:
                            await self._take(news)
                    except OUTAGES as exc:
                        logger.warning("the event log can't be read: %s", exc)
                    except Exception:
                        # Subscribing again would not mend a message that makes no sense.
                        logger.exception("a message could not be used")
            except asyncio.CancelledError:
                raise
            except Exception as exc:
                logger.warning("no news from the channel layer: %r", exc)
                # The layer keeps the channel of an attempt that failed, and would fill it for
                # ever; in this event loop nobody but the hub uses the layer.
                with contextlib.suppress(Exception):
                    await layer.flush()
                await asyncio.sleep(RETRY_SECONDS)

    async def _catch_up_forever(self) -> None:
        """Compare with the database again and again, and read what never arrived."""
        while True:
            await asyncio.sleep(CATCH_UP_SECONDS)
            before = {drop_id: feed.seq for drop_id, feed in self._feeds.items()}
            try:
                seqs = await database_sync_to_async(log.current_seqs)()
                for drop_id, seq in seqs.items():
                    known = self._feed(drop_id).seq
                    if seq > known:
                        await self._read_missed(drop_id, seq)
                    elif seq < known and known == before.get(drop_id):
                        self._start_over(drop_id, seq)
                for drop_id in before.keys() - seqs.keys():
                    if before[drop_id]:
                        self._leave_gone(drop_id)
            except OUTAGES as exc:
                logger.warning("the event log can't be read: %s", exc)
            except Exception:
                # Whatever it was, clients must not be left without events for it.
                logger.exception("catching up failed; trying again")
            else:
                self.level_at = time.monotonic()
            self._forget_old()

    def _feed(self, drop_id: str) -> Feed:
        feed = self._feeds.get(drop_id)
        if feed is None:
            feed = self._feeds[drop_id] = Feed(0)
        return feed

    def _start_over(self, drop_id: str, seq: int) -> None:
        """Follow a drop whose numbers went back: a restored backup, or fresh demo data.

        Its clients know a past that is gone; they are told to connect again.
        """
        is_new_here = self._feed(drop_id).seq == 0
        self._feeds[drop_id] = Feed(seq)
        self._snapshots.clear()
        if is_new_here:
            return
        for client in [*self._audience(drop_id), *self._listening.get(drop_id, ())]:
            client.reconnect()

    def _leave_gone(self, drop_id: str) -> None:
        """Forget a drop without events: it is gone, with a rehearsal or a past that was replaced.

        Who follows it would hear heartbeats for ever. Who watches all is left alone: there is
        no frame that removes a drop, and other drops come to an end by their status.
        """
        del self._feeds[drop_id]
        for client in [*self._watching.get(drop_id, ()), *self._listening.get(drop_id, ())]:
            client.reconnect()

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        for feed in self._feeds.values():
            if feed.recent and now - feed.touched > REMEMBER_SECONDS:
                feed.recent = feed.waiting = feed.singles = None
        for key in [key for key, snapshot in self._snapshots.items() if not snapshot.is_fresh]:
            del self._snapshots[key]

    def _hear(self, all_news: Sequence[NewsOfDrop]) -> None:
        """Take this process's own news at once, where they join on.

        They come through the channel layer as well, and by then what they join on to has come.
        """
        for news in all_news:
            events = news["events"]
            if events and events[0]["seq"] == self._feed(news["drop_id"]).seq + 1:
                self._pass_on(news["drop_id"], as_logged(events))

    async def _take(self, news: NewsOfDrop) -> None:
        """Pass on a drop's events; where they don't join on, read the log instead."""
        drop_id, events = news["drop_id"], news["events"]
        known = self._feed(drop_id).seq
        if news["seq"] <= known:
            return
        if not events or events[0]["seq"] > known + 1:
            return await self._read_missed(drop_id, news["seq"])
        self._pass_on(drop_id, as_logged(events))

    async def _read_missed(self, drop_id: str, up_to: int) -> None:
        if not self._has_audience(drop_id):
            return self._skip(drop_id, up_to)
        # One reader per drop: two would pass the same events on twice, or in the wrong order.
        lock = self._locks.setdefault(drop_id, asyncio.Lock())
        async with lock:
            while (known := self._feed(drop_id).seq) < up_to:
                events = await database_sync_to_async(log.events_after)(drop_id, known)
                is_gone = not events or events[0][0] > known + 1
                if is_gone and known == self._feed(drop_id).seq:
                    # Pruned meanwhile, or never logged: nobody can be told of these.
                    return self._start_over(drop_id, up_to)
                self._pass_on(drop_id, events)

    def _has_audience(self, drop_id: str) -> bool:
        return bool(
            self._watching_all or self._watching.get(drop_id) or self._listening.get(drop_id)
        )

    def _skip(self, drop_id: str, up_to: int) -> None:
        """Leave out events that nobody here has asked for, like those of 10,000 expired holds."""
        feed = self._feed(drop_id)
        feed.seq = feed.sent = up_to
        self._frames_sent += 1
        feed.recent = feed.waiting = None
        tell_followers(drop_id, [])
        self.private.look_soon()

    # --- Where they go ------------------------------------------------------------------

    def _pass_on(self, drop_id: str, events: Iterable[log.LoggedEvent]) -> None:
        """Take events in order, each once; runs without a pause, so nothing comes between.

        Followers and listeners get each event. To sockets they go in turns, with what is
        outdated by then left out.
        """
        feed = self._feed(drop_id)
        frames: list[EventFrame] = []
        for seq, event_type, at, data in events:
            if seq == feed.seq + 1:
                feed.seq = seq
                frames.append(EventFrame(drop_id, seq, event_type, at, data))
        if not frames:
            return
        tell_followers(drop_id, [(frame.seq, frame.type, frame.data) for frame in frames])
        self.private.look_soon()
        for listener in list(self._listening.get(drop_id, ())):
            listener.hear(frames)
        if not (self._watching_all or drop_id in self._watching):
            feed.sent = feed.seq
            self._frames_sent += 1
            feed.recent = feed.waiting = None
            return
        if feed.waiting is None:
            feed.waiting = Waiting()
        for frame in frames:
            feed.waiting.add(frame)
            feed.remember(frame)
        loop = asyncio.get_running_loop()
        feed.touched = loop.time()
        if not feed.is_due:
            feed.is_due = True
            if feed.touched >= feed.next_turn:
                self._due.put_nowait(drop_id)
            else:
                loop.call_at(feed.next_turn, self._due.put_nowait, drop_id)

    async def _send_forever(self) -> None:
        """Give each drop with news its turn; rest in between if requests want the loop as well."""
        loop = asyncio.get_running_loop()
        while True:
            drop_id = await self._due.get()
            began = loop.time()
            try:
                async with self._sending:
                    self._turn_of = drop_id
                    given_away = await self._take_turn(drop_id)
            except Exception:
                logger.exception("sending failed; the drop's clients will find out by themselves")
                given_away = LONGEST_BREAK_SECONDS
            self._turn_of = None
            spent = loop.time() - began
            if spent > TURN_SECONDS / 10:
                # They had the loop between the slices too, and may have half as much again.
                await asyncio.sleep(min(given_away / 2, LONGEST_BREAK_SECONDS))

    async def _take_turn(self, drop_id: str) -> float:
        """Send what waits; return for how many seconds others had the loop meanwhile."""
        loop, given_away = asyncio.get_running_loop(), 0.0
        feed = self._feed(drop_id)
        feed.is_due = False
        feed.next_turn = loop.time() + TURN_SECONDS
        audience = list(self._audience(drop_id))
        prev, frames = self._frames_of_turn(feed, len(audience))
        if not frames:
            return given_away
        for frame in frames:
            if self._frames.left() < 1:
                await asyncio.sleep(1 / FRAMES_PER_SECOND)
            self._frames.spend()
            metrics.event_lag_seconds.observe(max(0.0, time.time() - frame.at.timestamp()))
        metrics.frames_sent.add(len(frames) * len(audience))
        series = Series(prev, frames)
        first, size = 0, min(FIRST_SOCKETS, SOCKETS_PER_SLICE)
        while first < len(audience):
            self._send(feed, series, audience[first : first + size])
            first, size = first + size, min(2 * size, SOCKETS_PER_SLICE)
            # Requests have their turn as well.
            given_away -= time.perf_counter()
            await asyncio.sleep(0)
            given_away += time.perf_counter()
            newest = feed.newer_state(frames[-1])
            if newest is not None and newest is not series.last:
                series = Series(prev, [*frames[:-1], newest])
        if feed.early:
            feed.early = {socket: seq for socket, seq in feed.early.items() if seq > feed.sent}
        return given_away

    def _send(self, feed: Feed, series: Series, sockets: Iterable[Socket]) -> None:
        """Send ``series`` to those who still watch, without what they have."""
        watching, watching_all = self._groups(series.last.drop_id)
        early, newest = feed.early, series.last.seq
        is_early = newest > feed.sent
        for socket in sockets:
            if socket not in watching and socket not in watching_all:
                continue
            its = series
            if early and (had := early.get(socket)) is not None:
                rest = series.after(had)
                if rest is None:
                    continue
                its = rest
                del early[socket]
            connection = self._connections.get(socket)
            if connection is None or not write_now(connection, its.wire):
                for prev, frame, message in zip(its.prevs, its.frames, its.messages, strict=True):
                    socket.offer(frame, prev, message)
            if is_early:
                early[socket] = newest

    def _frames_of_turn(self, feed: Feed, sockets: int) -> tuple[int, list[EventFrame]]:
        """Take what waits, with the ``seq`` before it; from then on it counts as sent."""
        prev = feed.sent
        if feed.waiting is None:
            return prev, []
        if feed.singles is None:
            feed.singles = Allowance(SINGLES_PER_SECOND, SINGLES_BURST)
        most = min(int(feed.singles.left()), max(5, SENDS_OF_SINGLES_PER_TURN // (sockets or 1)))
        feed.singles.spend(min(len(feed.waiting.singles), most))
        had = feed.waiting.added
        frames = feed.waiting.take(most)
        self._frames_sent += len(frames)
        metrics.frames_conflated.add(had - len(frames))
        if frames:
            feed.sent = frames[-1].seq
        return prev, frames

    # --- Heartbeats ---------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            try:
                await self._beat_once()
            except OUTAGES as exc:
                logger.warning("no heartbeat without the database: %s", exc)
            except Exception:
                # Without heartbeats every client would take its connection for dead.
                logger.exception("a heartbeat failed; trying again")

    async def _beat_once(self) -> None:
        for drop_id, sockets in list(self._watching.items()):
            await self._send_heartbeat(drop_id, [drop_id], sockets - self._watching_all)
        if self._watching_all:
            current = await database_sync_to_async(log.current_drop_ids)()
            await self._send_heartbeat("", current, self._watching_all)
            # What they watch by its id besides: a drop that is over, or a rehearsal.
            for drop_id in self._watching.keys() - set(current):
                both = self._watching.get(drop_id, set()) & self._watching_all
                if both:
                    await self._send_heartbeat(drop_id, [drop_id], both)

    async def _send_heartbeat(
        self, key: str, drop_ids: Iterable[str], sockets: Iterable[Socket]
    ) -> None:
        audience = list(sockets)
        async with self._sending:
            seqs = {drop_id: self.sent(drop_id) for drop_id in drop_ids}
            message = text_message(heartbeat_frame(seqs, datetime.now(UTC)))
            for first in range(0, len(audience), SOCKETS_PER_SLICE):
                for socket in audience[first : first + SOCKETS_PER_SLICE]:
                    socket.offer_heartbeat(key, message)
                await asyncio.sleep(0)


def as_logged(events: Iterable[dict[str, Any]]) -> Iterator[log.LoggedEvent]:
    """Return the events of a message as the log has them."""
    for event in events:
        at = datetime.fromtimestamp(event["ts"], UTC)
        yield event["seq"], event["type"], at, event["data"]


def leave(groups: dict[str, set], key: str, member: Any) -> None:
    """Remove ``member`` from the group, and the group with its last member."""
    group = groups.get(key, set())
    group.discard(member)
    if not group:
        groups.pop(key, None)


def note_outcome(reading: asyncio.Task) -> None:
    """Look at the outcome of a reading for which perhaps nobody waits any more."""
    if not reading.cancelled() and isinstance(reading.exception(), ObjectDoesNotExist):
        return


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()


def get_hub() -> Hub:
    """Return the hub of the running event loop."""
    return _hubs.setdefault(asyncio.get_running_loop(), Hub())


def seconds_behind() -> float:
    """Return how long ago a hub of this process last knew all events; 0 where none runs.

    May be called in any thread.
    """
    level = [hub.level_at for loop, hub in list(_hubs.items()) if not loop.is_closed()]
    return max((time.monotonic() - at for at in level if at is not None), default=0.0)
