"""Settle many waiting requests in one transaction, across drops.

The cost of a hot row is the time a transaction keeps its lock, commit included, not the
work per unit, and most of a small transaction's cost is the transaction. So per process one
transaction is in flight; requests that arrive meanwhile, for whatever drops, wait in a queue
and go out together in the next. Nobody waits for a timer, and an answer is given only after
the commit.

That transaction waits only a moment for locks: processes that sell the same drops take turns.
A drop that somebody else keeps locked for longer is left out of it and gets a queue of its own
until that is empty, so a crowd on one drop hardly ever waits for another drop's lock.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.db import DatabaseError, connection
from psycopg.errors import LockNotAvailable
from rest_framework.exceptions import APIException

from config.problems import Busy, Unavailable, may_pass
from drops.services import Wait
from operations import metrics

logger = logging.getLogger(__name__)

MAX_BATCH = 256
MAX_WAIT_SECONDS = 2.0
# How long a client waits at most. A database that answers at all ends a batch sooner; one that
# hangs, its machine for instance, would keep the client for as long as it does.
ANSWER_SECONDS = 5.0
# How many drops that others have locked are waited for at once; each takes a connection.
MAX_DROPS_APART = 3
# Weight of the newest batch in the running mean of how long a batch takes.
SMOOTHING = 0.2


class Settle(Protocol):
    """Settle the requests of several drops; runs in a thread.

    Returns:
        One answer per request, by drop, after the commit; with ``Wait.NOT``, without the
        drops that somebody else keeps locked.
    Raises:
        OperationalError: by ``LockNotAvailable``, with ``Wait.BRIEFLY``: one is kept locked.
    """

    def __call__(
        self, batch: dict[uuid.UUID, list[Any]], *, wait: Wait
    ) -> dict[uuid.UUID, list[Any]]: ...


@dataclass(slots=True)
class Waiting:
    """A request and the place where its answer will appear."""

    drop_id: uuid.UUID
    request: Any
    settle: Settle
    answer: asyncio.Future[Any]
    # Two requests with the same key never share a batch: the second needs the first's commit.
    key: Hashable | None
    # By the monotonic clock.
    since: float

    def fail(self, reason: Exception) -> None:
        # A client that is gone has cancelled its future.
        if not self.answer.done():
            self.answer.set_exception(reason)


@dataclass(slots=True)
class Lane:
    """A queue of which one batch at a time is settled."""

    # The drop that has this lane for itself; None for the lane of all others.
    drop_id: uuid.UUID | None
    executor: ThreadPoolExecutor
    queue: deque[Waiting] = field(default_factory=deque)
    # Kept here, because the loop itself keeps only weak references to its tasks.
    task: asyncio.Task[None] | None = None
    batch_seconds: float = 0.0
    in_flight: list[Waiting] = field(default_factory=list)
    # When the batch in flight went out.
    started_at: float | None = None
    # One for all who wait: a timer for each would cost more than the rest of its way.
    timer: asyncio.TimerHandle | None = None

    # The loop appends to the queue, the thread takes from it; this is for whoever must see both
    # what waits and what is in flight.
    taking: threading.Lock = field(default_factory=threading.Lock)

    @property
    def wait(self) -> Wait:
        return Wait.BRIEFLY if self.drop_id is None else Wait.AS_LONG_AS_IT_TAKES

    def unanswered(self) -> list[Waiting]:
        with self.taking:
            return [one for one in (*self.in_flight, *self.queue) if not one.answer.done()]

    def watch(self) -> None:
        """See to it that whoever waits for ``ANSWER_SECONDS`` is told so."""
        if self.timer is None and (waiting := self.unanswered()):
            left = min(one.since for one in waiting) + ANSWER_SECONDS - time.monotonic()
            self.timer = asyncio.get_running_loop().call_later(left, self._give_up)

    def _give_up(self) -> None:
        self.timer = None
        long_ago = time.monotonic() - ANSWER_SECONDS
        for one in self.unanswered():
            if one.since <= long_ago:
                # The batch may still be committed; that is what a repeat is safe for.
                one.fail(Unavailable())
        self.watch()

    def expected_wait_seconds(self) -> float:
        if self.task is None:
            # It goes out at once, however long the last batch took. Were it refused, nothing
            # would ever show that the database is well again.
            return 0.0
        # A batch may be stuck; that it has been so far says how long it may still be.
        started_at = self.started_at
        elapsed = 0.0 if started_at is None else time.monotonic() - started_at
        return elapsed + (len(self.queue) / MAX_BATCH + 1) * self.batch_seconds

    def take_batch(self) -> list[Waiting]:
        """Take the oldest request and all others of its kind, in order, up to ``MAX_BATCH``."""
        with self.taking:
            batch: list[Waiting] = []
            keys: set[Hashable] = set()
            left: list[Waiting] = []
            settle: Settle | None = None
            while self.queue and len(batch) < MAX_BATCH:
                waiting = self.queue.popleft()
                settle = settle or waiting.settle
                if waiting.settle is not settle or (
                    waiting.key is not None and waiting.key in keys
                ):
                    left.append(waiting)
                    continue
                keys.add(waiting.key)
                if not waiting.answer.done():
                    batch.append(waiting)
            self.queue.extendleft(reversed(left))
            self.in_flight = batch
        return batch

    def take_drop(self, drop_id: uuid.UUID) -> list[Waiting]:
        """Take whatever waits for the drop."""
        taken = [waiting for waiting in self.queue if waiting.drop_id == drop_id]
        self.queue = deque(waiting for waiting in self.queue if waiting.drop_id != drop_id)
        return taken


class GroupCommit:
    """The queues of one event loop: one for all drops, and one for each that others use too."""

    def __init__(self) -> None:
        # Of its own, so that whoever waits for a lock never takes the thread of all others.
        self._together = Lane(None, ThreadPoolExecutor(1, "group-commit"))
        self._apart: dict[uuid.UUID, Lane] = {}
        self._apart_executor = ThreadPoolExecutor(MAX_DROPS_APART, "group-commit-apart")

    @property
    def executors(self) -> tuple[ThreadPoolExecutor, ...]:
        return self._together.executor, self._apart_executor

    async def submit(
        self, drop_id: uuid.UUID, settle: Settle, request: Any, key: Hashable | None = None
    ) -> Any:
        """Return what ``settle`` answers to ``request``, after its commit.

        Raises:
            Busy: the queue is so long that the answer would take more than two seconds.
            Unavailable: there was no answer within ``ANSWER_SECONDS``.
            Exception: what ``settle`` raised for this very request.
        """
        lane = self._apart.get(drop_id, self._together)
        if lane.expected_wait_seconds() > MAX_WAIT_SECONDS:
            raise Busy
        answer = asyncio.get_running_loop().create_future()
        lane.queue.append(Waiting(drop_id, request, settle, answer, key, time.monotonic()))
        if lane.timer is None:
            lane.watch()
        self._start(lane)
        return await answer

    def _start(self, lane: Lane) -> None:
        if lane.task is None:
            lane.task = asyncio.create_task(self._run(lane))

    async def _run(self, lane: Lane) -> None:
        """Settle batch after batch until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while lane.queue:
                left_out = await loop.run_in_executor(lane.executor, settle_batches, lane, loop)
                for drop_id, waiting in left_out.items():
                    self._set_apart(drop_id, waiting)
        except Exception as exc:
            # A mistake in here must not let anybody wait forever.
            for one in lane.unanswered():
                one.fail(exc)
            lane.queue.clear()
        finally:
            lane.task, lane.in_flight, lane.started_at = None, [], None
            if lane.drop_id is not None:
                del self._apart[lane.drop_id]

    def _set_apart(self, drop_id: uuid.UUID, waiting: list[Waiting]) -> None:
        """Let a drop that somebody else has locked be waited for on its own."""
        lane = self._apart[drop_id] = Lane(drop_id, self._apart_executor)
        # From now on, though it may have to wait for a thread: others' locks take as long.
        lane.started_at = time.monotonic()
        lane.queue.extend(waiting)
        lane.queue.extend(self._together.take_drop(drop_id))
        lane.watch()
        self._start(lane)


WaitingByDrop = dict[uuid.UUID, list[Waiting]]


def settle_batches(lane: Lane, loop: asyncio.AbstractEventLoop) -> WaitingByDrop:
    """Settle what waits in ``lane``, batch after batch; runs in its thread.

    A batch follows the one before at once. Were it the loop's turn to send it, it would wait
    for all that the loop is doing: a fifth of the time, with the database idle.

    Returns:
        What was left out of the last batch, by drop: it comes before what waits for these drops.
    """
    while lane.queue:
        batch = lane.take_batch()
        if not batch:
            continue
        by_drop: WaitingByDrop = {}
        for one in batch:
            by_drop.setdefault(one.drop_id, []).append(one)
        started_at = lane.started_at = time.monotonic()
        for answered in settle_apart(batch[0].settle, by_drop.copy(), lane.wait):
            loop.call_soon_threadsafe(give_answers, answered)
            for drop_id in {one.drop_id for one, _ in answered}:
                by_drop.pop(drop_id, None)
        took = time.monotonic() - started_at
        lane.batch_seconds += SMOOTHING * (took - lane.batch_seconds)
        # Once for the batch, not for each claim: the first has waited longest.
        metrics.queue_wait_seconds.observe(started_at - batch[0].since)
        metrics.batch_claims.observe(len(batch))
        metrics.batch_seconds.observe(took)
        # One batch at a time where lanes share threads, so that each has its turn.
        if by_drop or lane.drop_id is not None:
            return by_drop
    return {}


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands for the answer of a request that could not be settled."""

    reason: Exception


Answered = Sequence[tuple[Waiting, Any]]


def give_answers(answered: Answered) -> None:
    for one, answer in answered:
        if isinstance(answer, Failure):
            one.fail(answer.reason)
        elif not one.answer.done():
            one.answer.set_result(answer)


def settle_apart(settle: Settle, batch: WaitingByDrop, wait: Wait) -> Iterator[Answered]:
    """Settle a batch; where that breaks, drop by drop and in halves, down to the one to blame.

    Without the database all of it fails at once: apart the requests would fare no better,
    and each would wait for the others.

    Yields:
        The answers of each part, as soon as it is committed.
    Raises:
        ValueError: some got none.
    """
    count = sum(map(len, batch.values()))
    requests = {pk: [one.request for one in of_drop] for pk, of_drop in batch.items()}
    try:
        answers = settle(requests, wait=wait)
    except Exception as exc:
        if wait is Wait.BRIEFLY and isinstance(exc.__cause__, LockNotAvailable):
            yield from settle_apart(settle, batch, Wait.NOT)
            return
        is_outage = may_pass(exc)
        if is_outage:
            logger.warning("a batch of %d failed: %s", count, exc)
        if is_outage or isinstance(exc, DatabaseError):
            connection.close()
        if is_outage or count == 1:
            yield [(one, Failure(exc)) for of_drop in batch.values() for one in of_drop]
            return
        if not isinstance(exc, APIException):
            logger.exception("a batch of %d broke; settling its parts", count)
    else:
        yield [
            pair
            for drop_id, of_drop in answers.items()
            for pair in zip(batch[drop_id], of_drop, strict=False)
        ]
        missing = sum(len(batch[pk]) - len(of_drop) for pk, of_drop in answers.items())
        if missing:
            raise ValueError(f"{missing} requests got no answer")
        return
    if len(batch) > 1:
        for drop_id, of_drop in batch.items():
            yield from settle_apart(settle, {drop_id: of_drop}, wait)
        return
    ((drop_id, of_drop),) = batch.items()
    # Half of a drop's answers would be of no use, so now its lock is waited for.
    for half in (of_drop[: count // 2], of_drop[count // 2 :]):
        yield from settle_apart(settle, {drop_id: half}, Wait.AS_LONG_AS_IT_TAKES)
