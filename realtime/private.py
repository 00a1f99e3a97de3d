"""What only one user is told: news of that user's own holds and purchases.

Read from the rows themselves, once a second for all users with sockets here, as the hub
compares its numbers: nothing is published, so nothing can be lost on the way.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from channels.db import database_sync_to_async
from django.db import DatabaseError
from django.db.models.expressions import RawSQL
from psycopg_pool import PoolTimeout

from config.database import read_clock
from purchases.models import Purchase
from realtime.frames import Message, PrivateType, private_frame, text_message
from reservations.models import Reservation, ReservationStatus
from users.identity import Identity
from users.models import User

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
# Sooner where something happened, but never more than a twentieth of the time.
SHORTEST_PAUSE_SECONDS = 0.25
REST_PER_LOOK = 20
EXPIRING_SECONDS = 10.0
# Event loops refuse timers of thousands of years, which a token may well name.
LONGEST_TIMER_SECONDS = 365 * 86_400.0
# A purchase or a hold is dated before its commit, by less than this.
DATE_MARGIN = timedelta(seconds=20)

ENDED = {
    ReservationStatus.EXPIRED: PrivateType.HOLD_EXPIRED,
    ReservationStatus.RELEASED: PrivateType.HOLD_RELEASED,
    ReservationStatus.VOIDED: PrivateType.HOLD_RELEASED,
}


class PrivateSocket(Protocol):
    def tell(self, message: Message) -> None: ...

    def end_identity(self) -> None:
        """Be over: nothing vouches for the user any more."""


@dataclass(slots=True)
class Hold:
    """A hold of a user with sockets here, as it was last seen."""

    reservation: Reservation
    is_expiring_told: bool = False


@dataclass(slots=True)
class Rows:
    """What the database says of some users at ``now``."""

    now: datetime
    switched_off: list[uuid.UUID]
    holds: dict[uuid.UUID, Hold]
    ended: dict[uuid.UUID, str]
    # Made lately, and over already: perhaps since the look before.
    brief: list[Reservation]
    purchases: list[Purchase]


class PrivateNews:
    """Which sockets are whose, and what their users have been told."""

    def __init__(self) -> None:
        self._sockets: dict[uuid.UUID, set[PrivateSocket]] = {}
        # These have yet to learn what their user holds.
        self._new: list[tuple[uuid.UUID, PrivateSocket]] = []
        self._holds: dict[uuid.UUID, Hold] = {}
        # Whose last socket left since the last look; who is back by then knows of no past.
        self._left: set[uuid.UUID] = set()
        # Purchases and ends of holds that were told, or are older than the sockets, with the
        # time of the purchase or of the hold.
        self._told: dict[uuid.UUID, datetime] = {}
        # By the database's clock, when the rows were last read; looks may be far apart.
        self._looked_at: datetime | None = None
        # When each user's first socket came, by the monotonic clock.
        self._came: dict[uuid.UUID, float] = {}
        self._wake = asyncio.Event()

    def add(self, user_id: uuid.UUID, socket: PrivateSocket) -> None:
        self._sockets.setdefault(user_id, set()).add(socket)
        self._came.setdefault(user_id, time.monotonic())
        self._new.append((user_id, socket))
        self._wake.set()

    def remove(self, user_id: uuid.UUID, socket: PrivateSocket) -> None:
        sockets = self._sockets.get(user_id, set())
        sockets.discard(socket)
        if not sockets:
            self._sockets.pop(user_id, None)
            self._came.pop(user_id, None)
            self._left.add(user_id)
        if not self._sockets:
            self._looked_at = None

    def look_soon(self) -> None:
        """Have the rows read before a second is over: something happened somewhere."""
        if self._sockets:
            self._wake.set()

    async def tell_forever(self) -> None:
        while True:
            pause = SHORTEST_PAUSE_SECONDS
            # Once more when the last has left: what is known of its user is forgotten then.
            if self._sockets or self._left:
                began = time.monotonic()
                try:
                    await self._look()
                except (DatabaseError, PoolTimeout) as exc:
                    logger.warning("private news can't be read: %s", exc)
                    pause = LOOK_SECONDS
                except Exception:
                    logger.exception("telling private news failed; trying again")
                    pause = LOOK_SECONDS
                pause = max(pause, pause_after(time.monotonic() - began))
            await asyncio.sleep(pause)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS - SHORTEST_PAUSE_SECONDS):
                    await self._wake.wait()

    async def _look(self) -> None:
        began = time.monotonic()
        self._wake.clear()
        new, self._new = self._new, []
        left, self._left = self._left, set()
        for known in [pk for pk, hold in self._holds.items() if hold.reservation.user_id in left]:
            del self._holds[known]
        users = list(self._sockets)
        try:
            rows = await database_sync_to_async(read_rows)(
                users, list(self._holds), self._looked_at
            )
        except BaseException:
            self._new = new + self._new
            raise
        for user_id in rows.switched_off:
            for socket in list(self._sockets.get(user_id, ())):
                socket.end_identity()
        self._tell_new_sockets(rows, new)
        for purchase in rows.purchases:
            self._tell_once(PrivateType.PURCHASE_CONFIRMED, rows.now, purchase)
        self._looked_at = rows.now if self._sockets else None
        self._tell_ended(rows)
        for reservation in rows.brief:
            kind = ENDED[ReservationStatus(reservation.status)]
            self._tell_once(kind, rows.now, reservation)
        self._forget_told(rows.now)
        # The next look comes a second after the pause at the latest, and may itself take longer.
        self._tell_expiring(rows, LOOK_SECONDS + 2 * pause_after(time.monotonic() - began))

    def _tell_once(self, kind: PrivateType, now: datetime, subject: Reservation | Purchase) -> None:
        """Tell of what came to be since its user connected; of what was before, lists tell."""
        came = self._came.get(subject.user_id)
        if subject.pk in self._told or came is None:
            return
        self._told[subject.pk] = subject.created_at
        if subject.created_at >= now - timedelta(seconds=time.monotonic() - came):
            self._tell(kind, now, subject)

    def _tell_ended(self, rows: Rows) -> None:
        for pk in [pk for pk in self._holds if pk not in rows.holds]:
            reservation, status = self._holds.pop(pk).reservation, rows.ended.get(pk, "")
            self._told[pk] = reservation.created_at
            if status in ENDED and reservation.user_id not in self._left:
                reservation.status = status
                self._tell(ENDED[ReservationStatus(status)], rows.now, reservation)
        for pk, hold in rows.holds.items():
            # As it is now: somebody may have given it another end.
            self._holds.setdefault(pk, hold).reservation = hold.reservation

    def _forget_told(self, now: datetime) -> None:
        """Forget what the next look won't read again."""
        for pk in [pk for pk, at in self._told.items() if at <= now - DATE_MARGIN]:
            del self._told[pk]

    def _tell_new_sockets(self, rows: Rows, new: list[tuple[uuid.UUID, PrivateSocket]]) -> None:
        by_user: dict[uuid.UUID, list[Reservation]] = {}
        for hold in rows.holds.values():
            by_user.setdefault(hold.reservation.user_id, []).append(hold.reservation)
        for user_id, socket in new:
            if socket in self._sockets.get(user_id, ()):
                holds = {"holds": by_user.get(user_id, [])}
                socket.tell(text_message(private_frame(PrivateType.HOLDS, rows.now, holds)))

    def _tell_expiring(self, rows: Rows, ahead: float) -> None:
        """Have told in time what is due within the ``ahead`` seconds until the next look."""
        loop = asyncio.get_running_loop()
        for pk in rows.holds:
            hold = self._holds[pk]
            left = (hold.reservation.expires_at - rows.now).total_seconds() - EXPIRING_SECONDS
            if not hold.is_expiring_told and left < ahead:
                hold.is_expiring_told = True
                loop.call_later(max(0.0, left), self._tell_one_expires, pk, hold)

    def _tell_one_expires(self, pk: uuid.UUID, hold: Hold) -> None:
        # Another one if its user left and came back: then that one is told of.
        if self._holds.get(pk) is hold:
            self._tell(PrivateType.HOLD_EXPIRING, datetime.now(UTC), hold.reservation)

    def _tell(self, kind: PrivateType, at: datetime, subject: Reservation | Purchase) -> None:
        message = text_message(private_frame(kind, at, subject))
        for socket in list(self._sockets.get(subject.user_id, ())):
            socket.tell(message)


def end_with(identity: Identity, socket: PrivateSocket) -> asyncio.TimerHandle | None:
    """Have ``socket`` end when nothing vouches for its user any more, if that has a time."""
    if identity.expires_at is None:
        return None
    left = min(max(0.0, identity.expires_at - time.time()), LONGEST_TIMER_SECONDS)
    return asyncio.get_running_loop().call_later(left, socket.end_identity)


def pause_after(seconds: float) -> float:
    """Return how long to leave the database alone after a look that took ``seconds``."""
    return max(SHORTEST_PAUSE_SECONDS, REST_PER_LOOK * seconds)


def read_rows(
    users: Iterable[uuid.UUID], known: Iterable[uuid.UUID], since: datetime | None = None
) -> Rows:
    """Read what ``users`` hold, have just held or bought, and what became of the ``known`` holds.

    Also who of them was switched off.

    Args:
        since: when the rows were read before.
    """
    now = read_clock()
    lately = min(since or now, now) - DATE_MARGIN
    ids = rows_of(users)
    switched_off = User.objects.filter(pk__in=ids, is_active=False)
    # One step in an index for each user: both start with the user.
    active = Reservation.objects.active().filter(user__in=ids)
    holds = {
        reservation.pk: Hold(reservation) for reservation in active.order_by("expires_at", "pk")
    }
    gone = [pk for pk in known if pk not in holds]
    ended = (
        Reservation.objects.filter(pk__in=rows_of(gone)).values_list("pk", "status") if gone else []
    )
    made = Reservation.objects.filter(user__in=ids, created_at__gt=lately)
    bought = Purchase.objects.filter(user__in=ids, created_at__gt=lately)
    return Rows(
        now,
        list(switched_off.values_list("pk", flat=True)),
        holds,
        dict(ended),
        list(made.filter(status__in=[*ENDED]).order_by("created_at")),
        list(bought.order_by("created_at")),
    )


def rows_of(ids: Iterable[uuid.UUID]) -> RawSQL:
    """Return what says ``__in`` with one parameter, an array.

    With a parameter for each of 3,000 a look took a second, after which it rests for twenty.
    """
    return RawSQL("SELECT unnest(%b::uuid[])", [list(ids)])
