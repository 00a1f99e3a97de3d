"""Demo data, built in memory step by step as the services would have made it.

Everything follows from the seed, ids included; only the times move with the clock.
"""

import hashlib
import itertools
import json
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

from django.apps import apps
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import Group
from django.core.management.color import no_style
from django.db import connection
from django.db.models import Model
from faker import Faker
from rest_framework.renderers import JSONRenderer
from rest_framework.serializers import BaseSerializer

from config.ids import id_at
from control.roles import ROLES
from drops.models import Drop, DropStatus, StockAdjustment, Variant
from drops.services import LockedDrop, drop_payload
from purchases.models import Purchase, PurchaseStatus
from purchases.serializers import PurchaseSerializer
from purchases.services import FEED_LENGTH, feed_entry, sell, set_feed
from realtime.models import Event, EventType
from reservations.models import Reservation, ReservationStatus
from reservations.serializers import ReservationSerializer
from users.models import IdempotencyKey, User

# The time of seeding as ids tell it: before that of any real row.
SEEDED_AT = datetime(2026, 1, 1, tzinfo=UTC)
# What the README's curl lines and ``manage.py up`` name. The demo user has nothing of the
# demo drop, so reserving it works.
DEMO_USER_ID = uuid.UUID("00000000-0000-4000-8000-000000000001")
DEMO_USERNAME = "demo"
DEMO_DROP_ID = uuid.UUID("00000000-0000-4000-8000-00000000d001")
ADMIN_ID = uuid.UUID("00000000-0000-4000-8000-00000000ad01")
ADMIN_USERNAME = ADMIN_PASSWORD = "admin"  # noqa: S105 - only ever given out in DEBUG
# One for each role; the password is the name, as with the admin.
STAFF_IDS = {
    role: uuid.UUID(f"00000000-0000-4000-8000-00000000ad{number:02}")
    for number, role in enumerate(ROLES, start=2)
}

# In this order, so that each row comes after those it refers to.
MODELS: tuple[type[Model], ...] = (
    User,
    Drop,
    Variant,
    Reservation,
    Purchase,
    StockAdjustment,
    Event,
    IdempotencyKey,
)
SHOPPERS = 75
KEYS_PER_ROUTE = 12
# Not the setting: with it, another environment would get other data from the same seed.
HOLD = timedelta(seconds=60)
SIZES = tuple(f"EU {size}" for size in range(40, 47))
# When something happens, and what: called with the time as ``at``.
Step = tuple[datetime, Callable[..., None]]
CLOSED_BY_STAFF = {DropStatus.PAUSED, DropStatus.ENDED, DropStatus.CANCELLED}
ADJUSTMENTS = (
    (6, "A second delivery arrived"),
    (2, "Recount: one box more than listed"),
    (1, "Returned by the photographer"),
    (-1, "Damaged in the warehouse"),
    (-2, "Kept for the shop window"),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A drop of the catalogue, and what its sale has come to so far, in units.

    ``stock`` is one number, or one per size from EU 40 up.
    """

    model: str
    colourway: str
    price: str
    stock: int | Sequence[int]
    currency: str = "USD"
    image: str = ""
    description: str = ""
    max_per_user: int | None = 1
    status: DropStatus = DropStatus.LIVE
    created_hours_ago: float = 72
    starts_in_hours: float | None = None
    ends_in_hours: float | None = None
    closed_hours_ago: float = 1
    sold: int = 0
    held: int = 0
    expired: int = 0
    released: int = 0
    voided: int = 0
    refunded: int = 0
    hold_seconds_left: tuple[int, int] = (20, 300)
    demo_user_bought: bool = False


DEMO_PLAN = Plan(
    model="Fennmoor Open Mile",
    colourway="Daybreak",
    description="Five hundred pairs in one size: take one, let it go, take it again.",
    price="120.00",
    stock=500,
    image="glacier-runner",
    max_per_user=5,
    created_hours_ago=0.7,
    sold=34,
    held=5,
    expired=4,
    released=3,
    refunded=1,
)

CATALOGUE = (
    # Live
    Plan(
        model="Brindlewick Courier",
        colourway="Ember",
        description="Charcoal mesh over a cream sole, with a heel you can see from afar.",
        price="199.00",
        stock=(6, 8, 10, 12, 10, 8, 6),
        image="ember-runner",
        max_per_user=2,
        status=DropStatus.SCHEDULED,
        starts_in_hours=-3,
        sold=26,
        held=4,
        expired=5,
        released=2,
        voided=1,
        refunded=2,
    ),
    Plan(
        model="Osterhav Tidewalker",
        colourway="Moss",
        description="Waxed canvas, made for harbours and wet grass.",
        price="165.00",
        currency="EUR",
        stock=(4, 6, 8, 8, 6, 4, 2),
        image="moss-hightop",
        status=DropStatus.SCHEDULED,
        starts_in_hours=-6,
        ends_in_hours=18,
        sold=17,
        held=3,
        expired=3,
        released=1,
        demo_user_bought=True,
    ),
    Plan(
        model="Tallowmere Arc",
        colourway="Coral",
        description="A quiet court shoe with one loud line.",
        price="145.00",
        currency="GBP",
        stock=(5, 5, 8, 10, 8, 5, 3),
        image="coral-court",
        created_hours_ago=5,
        sold=9,
        held=2,
        expired=2,
        refunded=1,
    ),
    Plan(
        model="Quillfoot Billow",
        colourway="Citrus",
        description="More sole than shoe. Two days only.",
        price="25000",
        currency="JPY",
        stock=(3, 6, 9, 12, 9, 6, 3),
        image="citrus-chunky",
        max_per_user=2,
        status=DropStatus.SCHEDULED,
        starts_in_hours=-2,
        ends_in_hours=46,
        sold=21,
        held=4,
        expired=4,
        released=2,
    ),
    Plan(
        model="Marrowby Lull",
        colourway="Plum",
        description="Knitted in one piece; stretches to fit.",
        price="1290.00",
        currency="SEK",
        stock=40,
        image="plum-slipon",
        max_per_user=None,
        created_hours_ago=8,
        sold=11,
        held=2,
        expired=1,
        released=1,
    ),
    # Nearly sold out
    Plan(
        model="Pelloway Ridge",
        colourway="Canyon",
        description="Lugs, loops and a little gold.",
        price="219.00",
        currency="CAD",
        stock=(2, 4, 6, 6, 4, 2, 2),
        image="canyon-trail",
        status=DropStatus.SCHEDULED,
        starts_in_hours=-4,
        sold=21,
        held=3,
        expired=4,
        hold_seconds_left=(240, 600),
    ),
    Plan(
        model="Lindgarth Slate",
        colourway="Graphite",
        price="310.00",
        stock=24,
        created_hours_ago=30,
        sold=23,
        expired=2,
        released=1,
        demo_user_bought=True,
    ),
    # Fully reserved
    Plan(
        model="Fennmoor Lantern",
        colourway="Midnight",
        description="The badge glows for an hour after dusk.",
        price="240.00",
        currency="EUR",
        stock=(1, 2, 2, 3, 2, 1, 1),
        image="midnight-hightop",
        status=DropStatus.SCHEDULED,
        starts_in_hours=-1,
        sold=4,
        held=8,
        expired=2,
        hold_seconds_left=(900, 2400),
    ),
    Plan(
        model="Brindlewick Relay",
        colourway="Chalk",
        price="54.500",
        currency="KWD",
        stock=10,
        created_hours_ago=2,
        held=10,
        released=1,
        hold_seconds_left=(900, 2400),
    ),
    # Sold out
    Plan(
        model="Osterhav Fjordline",
        colourway="Frost",
        description="Gone in a morning.",
        price="230.00",
        currency="EUR",
        stock=(2, 4, 5, 6, 5, 4, 2),
        image="glacier-runner",
        status=DropStatus.SCHEDULED,
        starts_in_hours=-7,
        sold=28,
        expired=5,
        released=2,
        voided=2,
        refunded=1,
    ),
    Plan(
        model="Quillfoot Vesper",
        colourway="Obsidian",
        price="280.00",
        currency="CHF",
        stock=18,
        max_per_user=2,
        created_hours_ago=20,
        sold=18,
        expired=2,
    ),
    # Ended: by the window, by staff, by the window after the last pair
    Plan(
        model="Marrowby Parade",
        colourway="Saffron",
        price="175.00",
        stock=(4, 6, 8, 8, 8, 6, 2),
        status=DropStatus.SCHEDULED,
        created_hours_ago=130,
        starts_in_hours=-96,
        ends_in_hours=-72,
        sold=31,
        expired=4,
        released=2,
        refunded=3,
    ),
    Plan(
        model="Pelloway Switchback",
        colourway="Fern",
        price="155.00",
        currency="GBP",
        stock=30,
        image="moss-hightop",
        max_per_user=2,
        status=DropStatus.ENDED,
        created_hours_ago=60,
        closed_hours_ago=20,
        sold=12,
        expired=2,
        released=2,
        demo_user_bought=True,
    ),
    Plan(
        model="Lindgarth Keystone",
        colourway="Rust",
        price="205.00",
        currency="EUR",
        stock=(1, 2, 3, 4, 3, 2, 1),
        image="canyon-trail",
        status=DropStatus.SCHEDULED,
        created_hours_ago=220,
        starts_in_hours=-190,
        ends_in_hours=-166,
        sold=16,
        expired=3,
    ),
    # Paused
    Plan(
        model="Fennmoor Drift",
        colourway="Sandstorm",
        description="Paused while we recount size 43.",
        price="160.00",
        stock=(3, 4, 6, 6, 6, 4, 3),
        status=DropStatus.PAUSED,
        starts_in_hours=-9,
        sold=13,
        expired=2,
        voided=2,
    ),
    Plan(
        model="Quillfoot Hush",
        colourway="Lilac",
        price="219000",
        currency="KRW",
        stock=20,
        image="plum-slipon",
        status=DropStatus.PAUSED,
        created_hours_ago=12,
        sold=3,
        released=1,
    ),
    # Cancelled: after the first sales, and before the start
    Plan(
        model="Brindlewick Foundry",
        colourway="Brass",
        description="Cancelled: the eyelets rusted. Every order was refunded.",
        price="260.00",
        stock=(2, 4, 6, 6, 6, 4, 2),
        status=DropStatus.CANCELLED,
        created_hours_ago=90,
        starts_in_hours=-50,
        closed_hours_ago=47,
        refunded=8,
        voided=3,
    ),
    Plan(
        model="Tallowmere Gable",
        colourway="Ivory",
        price="150.00",
        currency="EUR",
        stock=60,
        status=DropStatus.CANCELLED,
        starts_in_hours=60,
        closed_hours_ago=10,
    ),
    # Upcoming; the first starts while somebody is looking
    Plan(
        model="Osterhav Polaris",
        colourway="Aurora",
        description="Starts in ten minutes. Be quick.",
        price="250.00",
        currency="EUR",
        stock=(2, 3, 4, 5, 4, 3, 2),
        image="midnight-hightop",
        status=DropStatus.SCHEDULED,
        starts_in_hours=1 / 6,
        ends_in_hours=24,
    ),
    Plan(
        model="Marrowby Comet",
        colourway="Vermilion",
        price="185.00",
        stock=80,
        image="ember-runner",
        max_per_user=2,
        status=DropStatus.SCHEDULED,
        starts_in_hours=2,
    ),
    Plan(
        model="Pelloway Summit",
        colourway="Basalt",
        price="32000",
        currency="JPY",
        stock=(5, 10, 15, 20, 15, 10, 5),
        status=DropStatus.SCHEDULED,
        starts_in_hours=26,
        ends_in_hours=50,
    ),
    Plan(
        model="Lindgarth Meridian",
        colourway="Olive",
        price="195.00",
        currency="GBP",
        stock=120,
        status=DropStatus.SCHEDULED,
        created_hours_ago=20,
        starts_in_hours=120,
        ends_in_hours=144,
    ),
    # Drafts
    Plan(
        model="Fennmoor Prototype",
        colourway="Bone",
        description="Waiting for photographs.",
        price="210.00",
        stock=25,
        status=DropStatus.DRAFT,
        created_hours_ago=26,
    ),
    Plan(
        model="Quillfoot Echo",
        colourway="Cobalt",
        price="1450.00",
        currency="NOK",
        stock=(4, 8, 12, 16, 12, 8, 4),
        image="glacier-runner",
        status=DropStatus.DRAFT,
        created_hours_ago=50,
        starts_in_hours=700,
    ),
)


@dataclass(frozen=True)
class Present:
    """What the database holds already and an append must not store again."""

    batch: int = 0
    usernames: frozenset[str] = frozenset()
    admin: User | None = None
    demo_user: User | None = None
    has_demo_drop: bool = False


@dataclass(frozen=True)
class Answer:
    """What a client was told, to be told again on a repeat."""

    at: datetime
    user: User
    route: str
    body: str
    document: bytes


@dataclass(kw_only=True)
class DropHistory(LockedDrop):
    """A drop and all that happened to it, one method per use case, without a database.

    Stock and events go through ``LockedDrop``, as they do in the services.
    """

    id_at: Callable[[datetime], uuid.UUID]
    answers_since: datetime
    events: list[Event] = field(default_factory=list)
    purchases: list[Purchase] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def save(self, now: datetime) -> None:
        for event in self._events:
            if "drop" in event.data:
                event.data["drop"] = drop_payload(self.drop, now) | {"seq": event.seq}
            self.events.append(
                Event(
                    drop=self.drop,
                    seq=event.seq,
                    type=event.type,
                    data=event.data,
                    created_at=now,
                )
            )
        self._events.clear()
        self._moves.clear()

    def publish(self, at: datetime) -> None:
        self.record_drop(EventType.DROP_CREATED)
        self.save(at)

    def change_status(self, status: DropStatus, at: datetime) -> None:
        self.drop.status = status
        self.record_drop(EventType.DROP_UPDATED)
        self.save(at)

    def adjust(self, adjustment: StockAdjustment, at: datetime) -> None:
        units = adjustment.delta
        self.move(adjustment.variant, available=units, total=units)
        if self.drop.status != DropStatus.DRAFT:
            self.record_stock()
            self.record_drop(EventType.DROP_UPDATED)
        self.save(at)

    def hold(self, reservation: Reservation, at: datetime) -> None:
        self.move(reservation.variant, available=-reservation.quantity)
        self.record_stock()
        self.save(at)
        reservation.read_at = at
        body: dict[str, Any] = {"quantity": reservation.quantity}
        if len(self.variants) > 1:
            body["variant"] = str(reservation.variant_id)
        self.answer(reservation.user, "reserve", body, ReservationSerializer(reservation), at)

    def buy(self, reservation: Reservation, at: datetime) -> None:
        availability_before = self.drop.availability
        reservation.read_at = at
        purchase = sell(self, reservation, number=0)
        purchase.pk = self.id_at(at)
        reservation.status = ReservationStatus.CONSUMED
        self.purchases.append(purchase)
        self.record_feed()
        if self.drop.availability != availability_before:
            self.record_stock()
        self.save(at)
        self.answer(purchase.user, "purchase", {}, PurchaseSerializer(purchase), at)

    def refund(self, reservation: Reservation, at: datetime) -> None:
        """Give the money back and the units to the stock."""
        purchase = reservation.purchase
        purchase.status = PurchaseStatus.REFUNDED
        reservation.status = ReservationStatus.VOIDED
        self.move(reservation.variant, available=purchase.quantity, sold=-purchase.quantity)
        self.record_feed()
        self.record_stock()
        self.save(at)

    def end_hold(self, reservation: Reservation, status: ReservationStatus, at: datetime) -> None:
        reservation.status = status
        self.move(reservation.variant, available=reservation.quantity)
        if status == ReservationStatus.EXPIRED:
            self.record(
                EventType.RESERVATION_EXPIRED,
                {"dropId": str(self.drop.pk), "reservationId": str(reservation.pk)},
            )
        self.record_stock()
        self.save(at)

    def record_feed(self) -> None:
        paid = [p for p in reversed(self.purchases) if p.status == PurchaseStatus.PAID]
        entries = [feed_entry(purchase) for purchase in paid[:FEED_LENGTH]]
        if entries != self.drop.latest_purchasers:
            set_feed(self, entries)

    def answer(
        self, user: User, action: str, body: dict[str, Any], row: BaseSerializer, at: datetime
    ) -> None:
        """Keep what the client was told just now: it depends on the stock of this moment."""
        if at >= self.answers_since:
            route = f"POST /api/drops/{self.drop.pk}/{action}"
            document = JSONRenderer().render(row.data)
            self.answers.append(Answer(at, user, route, json.dumps(body), document))


class DemoData:
    """All rows of one seed, in memory, in ``rows`` by model."""

    def __init__(
        self, seed: int, now: datetime, present: Present | None = None, *, admin_login: bool
    ) -> None:
        self.now = now
        self.present = present or Present()
        self.random = random_of(seed, self.present.batch)
        self.rows: dict[type[Model], list[Any]] = {model: [] for model in MODELS}
        self.answers: list[Answer] = []
        self.shoppers = self.make_shoppers(f"{seed}:{self.present.batch}")
        self.demo_user = self.present.demo_user or self.make_demo_user()
        self.admin = self.present.admin or self.make_admin(admin_login)
        for plan in CATALOGUE:
            self.make_drop(plan, self.new_id())
        if not self.present.has_demo_drop:
            self.make_drop(DEMO_PLAN, DEMO_DROP_ID)
        # Each drop's rows are in order already; this mixes the drops, as time did.
        for model in (StockAdjustment, Event):
            self.rows[model].sort(key=attrgetter("created_at"))
        self.make_idempotency_keys()
        # Never beside an admin whom somebody else has made: the passwords are known.
        if admin_login and not self.present.admin:
            self.make_staff()

    def new_id(self) -> uuid.UUID:
        return new_id(self.random)

    def id_at(self, at: datetime) -> uuid.UUID:
        """Return an id that sorts by the time, and comes before those of all later rows."""
        # Not the time itself, which is another each time that the same data is made.
        as_seeded = SEEDED_AT + (at - self.now)
        return id_at(round(as_seeded.timestamp() * 1000), self.random.getrandbits(80))

    def ago(self, **duration: float) -> datetime:
        return self.now - timedelta(**duration)

    def seconds(self, low: float, high: float) -> timedelta:
        return timedelta(seconds=round(self.random.uniform(low, high), 3))

    def make_user(self, user_id: uuid.UUID, name: str, **fields: Any) -> User:
        if name in self.present.usernames:
            name = f"{name}_{user_id.hex[-6:]}"
        joined = self.ago(days=10) - self.seconds(0, 40 * 86_400)
        user = User(pk=user_id, username=name, date_joined=joined, **fields)
        self.rows[User].append(user)
        return user

    def make_shoppers(self, names_seed: str) -> list[User]:
        fake = Faker("en_US")
        fake.seed_instance(names_seed)
        return [self.make_user(self.new_id(), fake.unique.user_name()) for _ in range(SHOPPERS)]

    def make_demo_user(self) -> User:
        return self.make_user(DEMO_USER_ID, DEMO_USERNAME)

    def make_admin(self, login: bool) -> User:
        """Make the creator of the drops; staff only where everybody may know the password."""
        # The salt belongs to what the seed determines.
        salt = f"{self.random.getrandbits(128):032x}"
        return self.make_user(
            ADMIN_ID,
            ADMIN_USERNAME,
            password=make_password(ADMIN_PASSWORD, salt) if login else "!",
            is_staff=login,
            is_superuser=login,
        )

    def make_staff(self) -> None:
        """Make somebody for each role; ``give_roles`` makes it theirs."""
        for role, user_id in STAFF_IDS.items():
            salt = f"{self.random.getrandbits(128):032x}"
            self.make_user(user_id, role, password=make_password(role, salt), is_staff=True)

    def make_drop(self, plan: Plan, drop_id: uuid.UUID) -> None:
        history = self.make_history(plan, drop_id)
        steps = [*self.plan_sale(plan, history), *self.plan_staff_work(plan, history)]
        for at, step in sorted(steps, key=itemgetter(0)):
            step(at=at)
        self.rows[Drop].append(history.drop)
        self.rows[Variant] += history.variants.values()
        self.rows[Purchase] += history.purchases
        self.rows[Event] += history.events
        self.answers += history.answers

    def make_history(self, plan: Plan, drop_id: uuid.UUID) -> DropHistory:
        edition = f" {self.present.batch + 1}" if self.present.batch else ""
        starts_at = self.in_hours(plan.starts_in_hours)
        if plan.status in CLOSED_BY_STAFF:
            status = DropStatus.SCHEDULED if starts_at else DropStatus.LIVE
        else:
            status = plan.status
        drop = Drop(
            pk=drop_id,
            name=f"{plan.model}{edition} '{plan.colourway}'",
            description=plan.description,
            image_url=f"/static/storefront/shoes/{plan.image}.svg" if plan.image else "",
            price=Decimal(plan.price),
            currency=plan.currency,
            starts_at=starts_at,
            ends_at=self.in_hours(plan.ends_in_hours),
            status=status,
            max_per_user=plan.max_per_user,
            created_by=self.admin,
            created_at=self.ago(hours=plan.created_hours_ago) - self.seconds(0, 600),
        )
        sizes = (
            {Variant.ONE_SIZE: plan.stock}
            if isinstance(plan.stock, int)
            else dict(zip(SIZES, plan.stock, strict=True))
        )
        variants = [
            Variant(
                pk=self.new_id(),
                drop=drop,
                label=label,
                position=position,
                total_stock=units,
                available_stock=units,
            )
            for position, (label, units) in enumerate(sizes.items())
        ]
        drop.total_stock = drop.available_stock = sum(sizes.values())
        # Where ``drop.variants`` is looked up for the payloads of the events.
        drop._prefetched_objects_cache = {"variants": variants}  # type: ignore[attr-defined]
        return DropHistory(
            drop,
            {variant.pk: variant for variant in variants},
            id_at=self.id_at,
            answers_since=self.ago(hours=1),
        )

    def in_hours(self, hours: float | None) -> datetime | None:
        return None if hours is None else self.now + timedelta(hours=hours)

    def plan_staff_work(self, plan: Plan, history: DropHistory) -> Iterator[Step]:
        """Yield what staff do, with the time."""
        drop = history.drop
        if plan.status != DropStatus.DRAFT:
            yield drop.created_at, history.publish
        variant = max(history.variants.values(), key=attrgetter("total_stock"))
        delta, reason = self.random.choice(
            [choice for choice in ADJUSTMENTS if choice[0] < variant.total_stock]
        )
        # The other way round first, so that the plan's numbers are right in the end.
        for stock in (variant, drop):
            stock.total_stock -= delta
            stock.available_stock -= delta
        adjustment = StockAdjustment(
            variant=variant,
            delta=delta,
            reason=reason,
            created_by=self.admin,
            created_at=drop.created_at + self.seconds(20, 200),
        )
        self.rows[StockAdjustment].append(adjustment)
        yield adjustment.created_at, partial(history.adjust, adjustment)
        if plan.status in CLOSED_BY_STAFF:
            closed_at = self.ago(hours=plan.closed_hours_ago)
            yield closed_at, partial(history.change_status, plan.status)

    def plan_sale(self, plan: Plan, history: DropHistory) -> Iterator[Step]:
        """Yield what shoppers do, with the time.

        Whatever comes back to the stock does so in the first part of the sale. In the second
        the units are there for those who keep them, and nobody has to be refused.
        """
        drop = history.drop
        opens_at = drop.starts_at or drop.created_at + timedelta(minutes=5)
        closes_at = self.ago(minutes=3)
        if drop.ends_at:
            closes_at = min(closes_at, drop.ends_at)
        if plan.status in CLOSED_BY_STAFF:
            closes_at = min(closes_at, self.ago(hours=plan.closed_hours_ago))
        length = (closes_at - opens_at).total_seconds()
        first, second = (0, length * 0.3), (length * 0.4, length - HOLD.total_seconds())
        reserve = partial(self.make_reservation, plan, history)
        shoppers = iter(self.random.sample(self.shoppers, len(self.shoppers)))
        buyers = itertools.chain([self.demo_user] if plan.demo_user_bought else [], shoppers)
        within_hold = (1, HOLD.total_seconds() * 0.8)

        free = {pk: variant.total_stock for pk, variant in history.variants.items()}
        coming_back = dict(free)
        for variant, quantity in self.share_out(plan, plan.sold, history, free):
            at = opens_at + self.seconds(*second)
            reservation = reserve(next(buyers), variant, quantity, at)
            yield at, partial(history.hold, reservation)
            yield at + self.seconds(*within_hold), partial(history.buy, reservation)
        for variant, quantity in self.share_out(plan, plan.held, history, free):
            at = self.now - self.seconds(1, 40)
            reservation = reserve(next(shoppers), variant, quantity, at)
            reservation.expires_at = self.now + self.seconds(*plan.hold_seconds_left)
            yield at, partial(history.hold, reservation)

        for variant, quantity in self.share_out(plan, plan.refunded, history, coming_back):
            at = opens_at + self.seconds(*first)
            reservation = reserve(next(shoppers), variant, quantity, at)
            bought_at = at + self.seconds(*within_hold)
            after = closes_at if plan.status == DropStatus.CANCELLED else bought_at
            yield at, partial(history.hold, reservation)
            yield bought_at, partial(history.buy, reservation)
            yield after + self.seconds(30, length * 0.05), partial(history.refund, reservation)
        for status, units in (
            (ReservationStatus.EXPIRED, plan.expired),
            (ReservationStatus.RELEASED, plan.released),
            (ReservationStatus.VOIDED, plan.voided),
        ):
            for variant, quantity in self.share_out(plan, units, history, coming_back):
                at = opens_at + self.seconds(*first)
                reservation = reserve(next(shoppers), variant, quantity, at)
                ended_at = at + self.seconds(*within_hold)
                if status == ReservationStatus.EXPIRED:
                    ended_at = reservation.expires_at + self.seconds(0, 1)
                yield at, partial(history.hold, reservation)
                yield ended_at, partial(history.end_hold, reservation, status)

    def share_out(
        self, plan: Plan, units: int, history: DropHistory, free: dict[uuid.UUID, int]
    ) -> Iterator[tuple[Variant, int]]:
        """Split ``units`` into claims on sizes that have them, and take them from ``free``."""
        at_most = 1 if plan.max_per_user == 1 else 2
        while units:
            pk = self.random.choice([pk for pk, left in free.items() if left > 0])
            quantity = min(units, free[pk], self.random.choice((1, 1, 1, at_most)))
            free[pk] -= quantity
            units -= quantity
            yield history.variants[pk], quantity

    def make_reservation(
        self,
        plan: Plan,
        history: DropHistory,
        user: User,
        variant: Variant,
        quantity: int,
        at: datetime,
    ) -> Reservation:
        reservation = Reservation(
            pk=self.id_at(at),
            drop=history.drop,
            variant=variant,
            user=user,
            quantity=quantity,
            unit_price=history.drop.price,
            currency=plan.currency,
            created_at=at,
            expires_at=at + HOLD,
        )
        self.rows[Reservation].append(reservation)
        return reservation

    def make_idempotency_keys(self) -> None:
        """Keep the answers to the newest requests, as if these had come with a key."""
        self.answers.sort(key=attrgetter("at"))
        for action in ("reserve", "purchase"):
            newest = [answer for answer in self.answers if answer.route.endswith(action)]
            for answer in newest[-KEYS_PER_ROUTE:]:
                self.rows[IdempotencyKey].append(
                    IdempotencyKey(
                        user=answer.user,
                        route=answer.route,
                        key=str(self.new_id()),
                        fingerprint=hashlib.sha256(answer.body.encode()).hexdigest(),
                        status=201,
                        body=answer.document.decode(),
                        created_at=answer.at,
                    )
                )


def random_of(seed: int, batch: int) -> random.Random:
    return random.Random(f"{seed}:{batch}")  # noqa: S311 - meant to be repeatable


def new_id(source: random.Random) -> uuid.UUID:
    return uuid.UUID(int=source.getrandbits(128), version=4)


def find_present(seed: int) -> Present:
    """Look up what an append to this database must leave as it is."""
    batch = next(
        batch
        for batch in itertools.count()
        # The first id of each batch is a shopper's.
        if not User.objects.filter(pk=new_id(random_of(seed, batch))).exists()
    )
    return Present(
        batch=batch,
        usernames=frozenset(User.objects.values_list("username", flat=True)),
        # By its id first: it may have been given another name.
        admin=User.objects.filter(pk=ADMIN_ID).first()
        or User.objects.filter(username=ADMIN_USERNAME).first(),
        demo_user=User.objects.filter(pk=DEMO_USER_ID).first(),
        has_demo_drop=Drop.objects.filter(pk=DEMO_DROP_ID).exists(),
    )


def give_roles() -> None:
    """Put the demo staff into the groups of their roles."""
    groups = Group.objects.in_bulk(ROLES, field_name="name")
    for user in User.objects.filter(pk__in=STAFF_IDS.values()):
        user.groups.set([group for role, group in groups.items() if STAFF_IDS[role] == user.pk])


def truncate_tables() -> None:
    """Empty the project's tables, and what refers to them; numbers start at 1 again."""
    tables = {
        model._meta.db_table
        for model in apps.get_models(include_auto_created=True)
        if model._meta.app_label in {"users", "drops", "reservations", "purchases", "realtime"}
    }
    for statement in connection.ops.sql_flush(
        no_style(), sorted(tables), reset_sequences=True, allow_cascade=True
    ):
        with connection.cursor() as cursor:
            cursor.execute(statement)
