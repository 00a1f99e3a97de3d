"""Remember for a moment that a drop has nothing to give, and refuse without a query.

In a drop most requests are too late. This memory may refuse, never accept: it holds a
drop's state as it was read at most ``MAX_AGE_SECONDS`` ago and is forgotten as soon as
this process makes or hears of a change. Whoever has something of the drop is never
refused here, because they may be asking for what they hold; nor who had something once
and comes with an idempotency key, because they may be asking for their first answer.
Users are not looked up: one whom staff switched off may hear that a drop is sold out
instead of who they are not (docs/adr/0019).
"""

import asyncio
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from asgiref.sync import sync_to_async
from django.db import Error, connection
from psycopg_pool import PoolTimeout
from rest_framework.exceptions import APIException

from config.hot_routes import PreparedProblem
from config.problems import Refusal
from drops.exceptions import (
    DropCancelled,
    DropEnded,
    DropNotStarted,
    DropPaused,
    refusal_unless_live,
)
from drops.models import Drop, Variant
from realtime.publisher import follow
from reservations.exceptions import FullyReserved, SoldOut
from reservations.models import Reservation, ReservationQuerySet
from reservations.services import COUNTS_AGAINST_LIMIT, Claim, next_release_at, shortage_of

MAX_AGE_SECONDS = 0.25
# Read again before that, so that a storm of requests never reaches the database at once.
RENEW_AFTER_SECONDS = 0.15
# A drop with more claimants than this is not remembered: reading them would cost too much.
MAX_CLAIMANTS = 20_000
# How long such a drop is left alone.
TOO_MANY_SECONDS = 10.0
# Different refusals of one drop: by variant and quantity, which the client chooses.
MAX_REFUSALS = 100

# Refusals that say something about the drop, not about who asked.
MEMORABLE = (SoldOut, FullyReserved, DropNotStarted, DropEnded, DropPaused, DropCancelled)


@dataclass
class Remembered:
    """What was read of a drop, and until when (``time.monotonic``) it may be used."""

    drop: Drop
    variants: dict[uuid.UUID, Variant]
    claimants: frozenset[uuid.UUID]
    # Whose hold has ended; None where these are too many to remember.
    former: frozenset[uuid.UUID] | None
    next_release_at: datetime | None
    read_at: datetime
    until: float = 0.0
    renew_at: float = 0.0
    is_renewing: bool = False
    refusals: dict[tuple[uuid.UUID | None, int], PreparedProblem | None] = field(
        default_factory=dict
    )

    def extend(self, read_at: datetime, read_since: float) -> None:
        """Trust the state for as long as nothing happens by the mere passing of time."""
        ends = [MAX_AGE_SECONDS]
        for at in (self.drop.starts_at, self.drop.ends_at):
            if at is not None and at > self.read_at:
                ends.append((at - read_at).total_seconds())
        if self.next_release_at is not None:
            # A hold that is due already is returned to whoever asks the database next.
            ends.append((self.next_release_at - read_at).total_seconds())
        self.until = read_since + min(ends)
        self.renew_at = read_since + RENEW_AFTER_SECONDS

    def refusal(self, claim: Claim) -> PreparedProblem | None:
        key = claim.variant_id, claim.quantity
        if key not in self.refusals:
            if len(self.refusals) >= MAX_REFUSALS:
                self.refusals.clear()
            refusal = self._work_out(claim)
            self.refusals[key] = None if refusal is None else PreparedProblem(refusal)
        return self.refusals[key]

    def _work_out(self, claim: Claim) -> Refusal | None:
        if claim.variant_id is not None:
            variant = self.variants.get(claim.variant_id)
        else:
            variant = next(iter(self.variants.values())) if len(self.variants) == 1 else None
        if variant is None:
            return None
        if refusal := refusal_unless_live(self.drop, self.read_at):
            return refusal
        limit = self.drop.max_per_user
        if limit is not None and claim.quantity > limit:
            return None
        if variant.available_stock >= claim.quantity:
            return None
        return shortage_of(variant, self.next_release_at)


@dataclass
class Reading:
    """A drop that is being read; no longer current once something changed meanwhile."""

    is_current: bool = True


class ShortageMemory:
    """What one process remembers; all of it lives in one event loop but ``forget``."""

    def __init__(self) -> None:
        self._remembered: dict[uuid.UUID, Remembered] = {}
        self._reading: dict[uuid.UUID, Reading] = {}
        # Drops with too many claimants, and when to look again.
        self._too_many: dict[uuid.UUID, float] = {}
        # The loop itself keeps only weak references to its tasks.
        self._tasks: set[asyncio.Task] = set()
        follow(self.forget)

    def refusal(
        self, drop_id: uuid.UUID, claim: Claim, *, may_be_repeat: bool = False
    ) -> PreparedProblem | None:
        """Return why ``claim`` fails, where that is certain enough, else None."""
        known = self._remembered.get(drop_id)
        if known is None:
            return None
        now = time.monotonic()
        if now >= known.until:
            self._remembered.pop(drop_id, None)
            return None
        if now >= known.renew_at and not known.is_renewing:
            known.is_renewing = True
            self._start(self._renew(known))
        if claim.user_id in known.claimants:
            return None
        if may_be_repeat and (known.former is None or claim.user_id in known.former):
            return None
        return known.refusal(claim)

    def learn(self, drop_id: uuid.UUID, refusal: APIException) -> None:
        """Read the drop's state in the background, where ``refusal`` will meet others too."""
        if not isinstance(refusal, MEMORABLE):
            return
        if drop_id in self._reading or drop_id in self._remembered:
            return
        if time.monotonic() < self._too_many.get(drop_id, 0.0):
            return
        self._reading[drop_id] = Reading()
        self._start(self._learn(drop_id))

    def forget(self, drop_id: str, events: Any = ()) -> None:
        """Forget a drop that changed; runs in any thread."""
        key = uuid.UUID(drop_id)
        # In this order, the reverse of who remembers: one of the two notices the other.
        reading = self._reading.get(key)
        if reading is not None:
            reading.is_current = False
        self._remembered.pop(key, None)

    def _forget_unasked(self, now: float) -> None:
        """Forget drops that nobody asks for any more, and so nobody finds too old."""
        for drop_id, known in list(self._remembered.items()):
            if now >= known.until:
                self._remembered.pop(drop_id, None)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _learn(self, drop_id: uuid.UUID) -> None:
        since = time.monotonic()
        try:
            known = await sync_to_async(read_state, thread_sensitive=False)(drop_id)
            if known is None:
                self._too_many[drop_id] = since + TOO_MANY_SECONDS
            else:
                known.extend(known.read_at, since)
                self._forget_unasked(since)
                self._remembered[drop_id] = known
                if not self._reading[drop_id].is_current:
                    self._remembered.pop(drop_id, None)
        except (Error, PoolTimeout, Drop.DoesNotExist):
            pass  # Nothing learned: the next claim asks the database itself.
        finally:
            del self._reading[drop_id]

    async def _renew(self, known: Remembered) -> None:
        """Use the state for longer if the drop's sequence says that nothing changed."""
        since = time.monotonic()
        try:
            found = await sync_to_async(read_seq, thread_sensitive=False)(known.drop.pk)
            if found is not None and found[0] == known.drop.seq:
                known.extend(found[1], since)
        except (Error, PoolTimeout):
            pass  # It ends by itself.
        finally:
            known.is_renewing = False


def read_state(drop_id: uuid.UUID) -> Remembered | None:
    """Read what a refusal needs, or None for a drop with too many claimants."""
    try:
        drop = Drop.objects.read_now().get(pk=drop_id)
        reservations = Reservation.objects.filter(drop=drop_id)
        claimants = users_of(reservations.filter(status__in=COUNTS_AGAINST_LIMIT))
        if claimants is None:
            return None
        return Remembered(
            drop=drop,
            variants={variant.pk: variant for variant in drop.variants.all()},
            claimants=claimants,
            former=users_of(reservations.exclude(status__in=COUNTS_AGAINST_LIMIT)),
            next_release_at=next_release_at(drop) if drop.held_stock else None,
            read_at=drop.read_at,
        )
    finally:
        connection.close()


def users_of(reservations: ReservationQuerySet) -> frozenset[uuid.UUID] | None:
    """Return who made ``reservations``, or None where these are too many."""
    users = (
        reservations.order_by().values_list("user_id", flat=True).distinct()[: MAX_CLAIMANTS + 1]
    )
    return frozenset(users) if len(users) <= MAX_CLAIMANTS else None


def read_seq(drop_id: uuid.UUID) -> tuple[int, datetime] | None:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT seq, now() FROM drops_drop WHERE id = %s", [drop_id])
            return cursor.fetchone()
    finally:
        connection.close()
