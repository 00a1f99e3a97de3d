"""Settle many waiting requests for one drop in one transaction.

The cost of a hot row is the time a transaction keeps its lock, commit included, not the
work per unit. So per process and drop at most one transaction is in flight; requests that
arrive meanwhile wait in a queue and go out together in the next. Nobody waits for a timer,
and an answer is given only after the commit.
"""

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from django.db import DatabaseError, InterfaceError, OperationalError, connection
from psycopg_pool import PoolTimeout

from config.problems import Busy

logger = logging.getLogger(__name__)

MAX_BATCH = 256
MAX_WAIT_SECONDS = 2.0
# How many drops are written to at once; each takes a database connection.
MAX_DROPS_AT_ONCE = 4
# Weight of the newest batch in the running mean of how long a batch takes.
SMOOTHING = 0.2

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Settle = Callable[[uuid.UUID, Sequence[Any]], list[Any]]


@dataclass(slots=True)
class Waiting(Generic[Request, Answer]):
    """A request and the place where its answer will appear."""

    request: Request
    settle: Settle
    answer: asyncio.Future[Answer]
    # Two requests with the same key never share a batch: the second needs the first's commit.
    key: Hashable | None

    def fail(self, reason: Exception) -> None:
        # A client that is gone has cancelled its future.
        if not self.answer.done():
            self.answer.set_exception(reason)


@dataclass(slots=True)
class Lane:
    """What waits for one drop."""

    drop_id: uuid.UUID
    queue: deque[Waiting] = field(default_factory=deque)
    # Kept here, because the loop itself keeps only weak references to its tasks.
    task: asyncio.Task[None] | None = None
    batch_seconds: float = 0.0
    # When the batch in flight went out.
    started_at: float | None = None

    def expected_wait_seconds(self) -> float:
        # A batch may be stuck; that it has been so far says how long it may still be.
        elapsed = 0.0 if self.started_at is None else time.monotonic() - self.started_at
        return elapsed + (len(self.queue) / MAX_BATCH + 1) * self.batch_seconds

    def take_batch(self) -> list[Waiting]:
        """Take the oldest request and all others of its kind, in order, up to ``MAX_BATCH``."""
        settle = self.queue[0].settle
        batch: list[Waiting] = []
        keys: set[Hashable] = set()
        left: deque[Waiting] = deque()
        while self.queue and len(batch) < MAX_BATCH:
            waiting = self.queue.popleft()
            if waiting.settle is not settle or (waiting.key is not None and waiting.key in keys):
                left.append(waiting)
                continue
            keys.add(waiting.key)
            if not waiting.answer.done():
                batch.append(waiting)
        left.extend(self.queue)
        self.queue = left
        return batch


class GroupCommit:
    """The queues of one event loop, one per drop that somebody wants something of."""

    def __init__(self) -> None:
        self._lanes: dict[uuid.UUID, Lane] = {}
        self._executor = ThreadPoolExecutor(MAX_DROPS_AT_ONCE, "group-commit")

    async def submit(
        self, drop_id: uuid.UUID, settle: Settle, request: Any, key: Hashable | None = None
    ) -> Any:
        """Return what ``settle(drop_id, requests)`` returns for ``request``.

        ``settle`` runs in a thread, takes several requests at once and returns one answer
        for each, after its commit.

        Raises:
            Busy: the queue is so long that the answer would take more than two seconds.
            Exception: what ``settle`` raised for this very request.
        """
        lane = self._lanes.get(drop_id)
        if lane is None:
            lane = self._lanes[drop_id] = Lane(drop_id)
        if lane.expected_wait_seconds() > MAX_WAIT_SECONDS:
            raise Busy
        waiting: Waiting = Waiting(request, settle, asyncio.get_running_loop().create_future(), key)
        lane.queue.append(waiting)
        if lane.task is None:
            lane.task = asyncio.create_task(self._run(lane))
        return await waiting.answer

    async def _run(self, lane: Lane) -> None:
        """Settle batch after batch until nothing waits; then the lane is gone."""
        batch: list[Waiting] = []
        try:
            while lane.queue:
                batch = lane.take_batch()
                if batch:
                    await self._settle(lane, batch)
        except Exception as exc:
            # A mistake in here must not let anybody wait forever.
            for waiting in (*batch, *lane.queue):
                waiting.fail(exc)
        finally:
            del self._lanes[lane.drop_id]

    async def _settle(self, lane: Lane, batch: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        lane.started_at = time.monotonic()
        requests = [waiting.request for waiting in batch]
        answers = await loop.run_in_executor(
            self._executor, settle_apart, batch[0].settle, lane.drop_id, requests
        )
        took = time.monotonic() - lane.started_at
        lane.started_at = None
        lane.batch_seconds += SMOOTHING * (took - lane.batch_seconds)
        for waiting, answer in zip(batch, answers, strict=True):
            if isinstance(answer, Failure):
                waiting.fail(answer.reason)
            elif not waiting.answer.done():
                waiting.answer.set_result(answer)


@dataclass(frozen=True, slots=True)
class Failure:
    """Stands for the answer of a request that could not be settled."""

    reason: Exception


def settle_apart(settle: Settle, drop_id: uuid.UUID, requests: Sequence[Any]) -> list[Any]:
    """Settle ``requests`` together; where that breaks, in halves, down to the one to blame.

    Without the database all of them fail at once: apart they would fare no better, and
    each would wait for the others.
    """
    try:
        return settle(drop_id, requests)
    except (OperationalError, InterfaceError, PoolTimeout) as exc:
        logger.warning("a batch of %d failed: %s", len(requests), exc)
        connection.close()
        return [Failure(exc)] * len(requests)
    except Exception as exc:
        if isinstance(exc, DatabaseError):
            connection.close()
        if len(requests) == 1:
            return [Failure(exc)]
        logger.exception("a batch of %d broke; settling its halves", len(requests))
    middle = len(requests) // 2
    return settle_apart(settle, drop_id, requests[:middle]) + settle_apart(
        settle, drop_id, requests[middle:]
    )
