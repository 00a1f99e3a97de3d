"""A Hypothesis state machine: any history of requests, answered as the model says.

Each request goes by the hot routes or by the viewsets, as it comes, to the real database;
after each step the stock is compared and all invariants are audited.
"""

import asyncio
import uuid
from contextlib import ExitStack
from datetime import timedelta
from decimal import Decimal
from typing import Any, ClassVar

from django.db import connection
from django.test import override_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from rest_framework.exceptions import ValidationError

from drops.exceptions import StockCommitted
from drops.services import adjust_stock, create_drop, update_drop
from purchases.audit import audit_stock
from realtime import publisher
from reservations.services import expire_all_due
from tests.clock import WINDOW, Clock
from tests.hot import Lane, Response, background_work, hot_lane, post, viewset_lane
from tests.hot import Request as HttpRequest
from tests.model import Claimed, Model, Outcome
from users.models import User

TTL = timedelta(seconds=60)
# More than all readings of the clock within a step take, so that deadlines lie apart.
BETWEEN_STEPS = 10 * WINDOW
USERS = 3

LANES = st.sampled_from(["hot", "viewsets"])
USER = st.integers(0, USERS - 1)
KEY = st.sampled_from([None, None, "one", "two", "three"])


class Shop(RuleBasedStateMachine):
    """One drop, a few users and staff; a new drop now and then."""

    clock: ClassVar[Clock]
    runner: ClassVar[asyncio.Runner]
    lanes: ClassVar[dict[str, Lane]]
    users: ClassVar[list[User]]
    staff: ClassVar[User]
    steps: ClassVar[int] = 0

    @initialize(
        sizes=st.sampled_from([{"One size": 2}, {"S": 1, "M": 3}]),
        limit=st.sampled_from([None, 1, 3]),
        seconds=st.sampled_from([None, None, 40, 200]),
    )
    def create(self, sizes: dict[str, int], limit: int | None, seconds: int | None) -> None:
        self.clock.move(BETWEEN_STEPS)
        ends_at = self.clock.at + timedelta(seconds=seconds) if seconds else None
        self.drop = create_drop(
            self.staff,
            name="Model",
            price=Decimal("10.00"),
            total_stock=sum(sizes.values()),
            variants=[{"label": label, "total_stock": units} for label, units in sizes.items()],
            max_per_user=limit,
            status="live",
            ends_at=ends_at,
        )
        self.sizes = dict(self.drop.variants.values_list("label", "pk"))
        self.model = Model(dict(sizes), limit, ends_at)

    # --- Shoppers -----------------------------------------------------------------------

    @rule(
        lane=LANES,
        user=USER,
        size=st.integers(0, 2),
        quantity=st.sampled_from([1, 1, 1, 2, 3]),
        key=KEY,
    )
    def reserve(self, lane: str, user: int, size: int, quantity: int, key: str | None) -> None:
        names = [None, *self.sizes]
        label = names[size % len(names)]
        body: dict[str, Any] = {"quantity": quantity}
        if label is not None:
            body["variant"] = str(self.sizes[label])
        if self.is_repeat(lane, user, "reserve", body, key):
            return
        expected = self.model.reserve(user, label, quantity, self.now)
        response = self.ask(lane, user, "reserve", body, key, expected)
        document = response.json()
        if response.status == 201:
            label = label or next(iter(self.sizes))
            # Exactly as promised: neither shorter nor beyond the end of the drop.
            ends_at = min(self.now + TTL, self.model.ends_at or self.now + TTL)
            claim = Claimed(label, quantity, self.deadline(document["id"]), document["id"])
            assert timedelta(0) <= claim.ends_at - ends_at < WINDOW
            self.model.reserved(user, claim)
        elif response.status == 200:
            hold = self.model.claims[user]
            assert (document["id"], document["quantity"]) == (hold.reservation_id, hold.quantity)

    @rule(lane=LANES, user=USER, key=KEY)
    def purchase(self, lane: str, user: int, key: str | None) -> None:
        if self.is_repeat(lane, user, "purchase", {}, key):
            return
        expected = self.model.purchase(user, self.now)
        response = self.ask(lane, user, "purchase", {}, key, expected)
        if response.status < 300:
            claim = self.model.claims[user]
            assert response.json()["reservation_id"] == claim.reservation_id

    @precondition(lambda self: self.model.claims)
    @rule(lane=LANES, number=st.integers(0, 50), old=st.booleans())
    def release(self, lane: str, number: int, old: bool) -> None:
        claims = list(self.model.claims.items())
        user, claim = claims[number % len(claims)]
        if old and (ended := [c for c in self.model.ended if c.state != "ACTIVE"]):
            claim = ended[number % len(ended)]
            user = User.objects.get(reservations=claim.reservation_id)
        expected = self.model.release(claim, self.now)
        address = f"/api/reservations/{claim.reservation_id}"
        headers = (("X-User-Id", self.id_of(user)),)
        response = self.send(lane, HttpRequest("DELETE", address, headers=headers))
        assert outcome_of(response) == expected

    @precondition(lambda self: self.model.answers)
    @rule(lane=LANES, number=st.integers(0, 50), same=st.booleans())
    def repeat(self, lane: str, number: int, same: bool) -> None:
        requests = list(self.model.answers.items())
        (user, call, key), (body, _) = requests[number % len(requests)]
        self.is_repeat(lane, user, call, body if same else body | {"quantity": 9}, key)

    # --- Time ---------------------------------------------------------------------------

    # Sums of these never meet a deadline by chance.
    @rule(seconds=st.sampled_from([7.3, 41.9]))
    def let_time_pass(self, seconds: float) -> None:
        self.move_to(self.clock.at + timedelta(seconds=seconds))

    @precondition(lambda self: self.next_deadline is not None)
    @rule(just_before=st.booleans())
    def move_to_the_next_deadline(self, just_before: bool) -> None:
        assert self.next_deadline is not None
        self.move_to(self.next_deadline - (WINDOW if just_before else timedelta(0)))

    @rule()
    def expire(self) -> None:
        expire_all_due()
        _, overdue = self.stored_stock()
        assert not any(overdue.values())

    # --- Staff --------------------------------------------------------------------------

    @rule(size=st.integers(0, 1), delta=st.sampled_from([-2, -1, 1, 2]))
    def adjust(self, size: int, delta: int) -> None:
        label = list(self.sizes)[size % len(self.sizes)]
        available, _ = self.stored_stock()
        try:
            adjust_stock(self.sizes[label], delta, reason="count", user=self.staff)
        except StockCommitted:
            # Overdue units can't be withdrawn before something swept them: that is allowed.
            assert available[label] + delta < 0
        else:
            self.model.total[label] += delta

    @rule(status=st.sampled_from(["live", "paused", "live", "paused", "live", "cancelled"]))
    def set_status(self, status: str) -> None:
        try:
            update_drop(self.drop.pk, status=status)
        except ValidationError:
            assert self.model.status == "cancelled"
        else:
            self.model.status = status

    @precondition(lambda self: self.model.refusal(self.now) not in (None, "drop_paused"))
    @rule(sizes=st.sampled_from([{"One size": 1}, {"S": 2, "M": 1, "L": 1}]))
    def create_the_next(self, sizes: dict[str, int]) -> None:
        self.create(sizes, 2, None)

    # --- After each step ----------------------------------------------------------------

    @invariant()
    def nothing_is_wrong(self) -> None:
        available, overdue = self.stored_stock()
        for label, units in available.items():
            assert units + overdue[label] == self.model.available(label, self.now)
        assert audit_stock(self.drop.pk).differences == []
        type(self).steps += 1
        self.move_to(self.clock.at + BETWEEN_STEPS)

    # --- How ----------------------------------------------------------------------------

    @property
    def now(self) -> Any:
        return self.clock.at

    @property
    def next_deadline(self) -> Any:
        ends = [
            claim.ends_at
            for claim in self.model.claims.values()
            if claim.state == "ACTIVE" and claim.ends_at - WINDOW > self.now
        ]
        return min(ends, default=None)

    def move_to(self, at: Any) -> None:
        self.clock.move_to(at)
        # The memory of a shortage measures its 250 ms by this machine's clock, which stands.
        publisher.tell_followers(str(self.drop.pk), [])

    def is_repeat(
        self, lane: str, user: int, call: str, body: dict[str, Any], key: str | None
    ) -> bool:
        """Send a request whose key was used before, and say whether it was one."""
        first = self.model.answers.get((user, call, key)) if key else None
        if first is None:
            return False
        sent, answer = first
        response = self.ask(lane, user, call, body, key)
        if sent == body:
            assert response.body == answer
            assert response.header("idempotent-replayed") == "true"
        else:
            assert outcome_of(response) == (422, "idempotency_key_reused")
        return True

    def ask(
        self,
        lane: str,
        user: int,
        call: str,
        body: dict[str, Any],
        key: str | None,
        expected: Outcome | None = None,
    ) -> Response:
        headers = {"Idempotency_Key": key} if key else {}
        address = f"/api/drops/{self.drop.pk}/{call}"
        response = self.send(lane, post(address, self.users[user], body, **headers))
        if expected is not None:
            assert outcome_of(response) == expected
            assert response.header("idempotent-replayed") is None
            if key and response.status < 300:
                self.model.answers[user, call, key] = body, response.body
        return response

    def send(self, lane: str, request: HttpRequest) -> Response:
        async def send() -> Response:
            response = await self.lanes[lane].send(request)
            # The next request shall meet the memory of a shortage, where this one makes one.
            await background_work("ShortageMemory._learn", "ShortageMemory._renew")
            return response

        return self.runner.run(send())

    def id_of(self, user: int | User) -> str:
        return str(user.pk if isinstance(user, User) else self.users[user].pk)

    def deadline(self, reservation_id: str) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT expires_at FROM reservations_reservation WHERE id = %s", [reservation_id]
            )
            return cursor.fetchone()[0]

    def stored_stock(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the available units by size, and the held ones whose time is up."""
        with connection.cursor() as cursor:
            cursor.execute(
                """
                SELECT v.label, v.available_stock, coalesce(sum(r.quantity), 0)
                FROM drops_variant v
                LEFT JOIN reservations_reservation r
                  ON r.variant_id = v.id AND r.drop_id = v.drop_id
                 AND r.status = 'ACTIVE' AND r.expires_at <= %s
                WHERE v.drop_id = %s
                GROUP BY v.id
                """,
                [self.now + WINDOW / 2, self.drop.pk],
            )
            rows = cursor.fetchall()
        return {row[0]: row[1] for row in rows}, {row[0]: int(row[2]) for row in rows}


def outcome_of(response: Response) -> Outcome:
    return response.status, response.json().get("code") if response.status >= 400 else None


def open_shop(stack: ExitStack, clock: Clock) -> type[Shop]:
    """Return the machine with its two lanes open until ``stack`` is left."""
    # Beside pytest Django allows no host and creates no user.
    stack.enter_context(
        override_settings(ALLOWED_HOSTS=["testserver"], RESERVATION_TTL_SECONDS=TTL.total_seconds())
    )
    Shop.clock = clock
    lanes = {"hot": hot_lane(), "viewsets": viewset_lane()}
    Shop.runner = stack.enter_context(asyncio.Runner())
    Shop.lanes = {name: stack.enter_context(lane) for name, lane in lanes.items()}
    number = uuid.uuid4().hex[:8]
    Shop.users = User.objects.bulk_create(
        User(username=f"model_{number}_{user}", password="") for user in range(USERS)
    )
    Shop.staff = User.objects.create(username=f"model_{number}_staff", is_staff=True)
    Shop.steps = 0
    return Shop
