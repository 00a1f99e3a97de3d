"""Guards that are taken away one at a time, each with the test that must notice.

A suite proves only what it would notice. Every mutant here is the product with one guard
missing; ``caught_by`` names the test that fails then, and passes otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from django.db import connection
from django.db.backends.signals import connection_created
from django.db.models.functions import Now

from drops.models import Drop
from drops.services import LOCK_DROPS, lock_drop
from drops.tests import test_models as test_drop_models
from purchases.tests import test_models as test_purchase_models
from purchases.tests import test_services as test_purchase_services
from realtime.tests import test_services as test_event_services
from reservations.models import Reservation, ReservationQuerySet, ReservationStatus
from reservations.services import Settlement
from reservations.tests import test_models as test_reservation_models
from reservations.tests import test_services as test_reservation_services
from tests import test_interleavings, test_model, test_races
from tests.clock import stopped_clock
from tests.interleaving import world
from tests.shop import open_shop
from tests.unguarded import without_constraints, without_row_locks
from users import idempotency


@dataclass(frozen=True)
class Mutant:
    """A guard, how to take it away, and the test that notices."""

    guard: str
    without: Callable[[], AbstractContextManager[Any]]
    caught_by: Callable[..., None]
    arguments: dict[str, Any] = field(default_factory=lambda: {"db": None})
    # Opens the fixture that the test takes as its first argument.
    fixture: Callable[[], AbstractContextManager[Any]] | None = None

    @property
    def test_name(self) -> str:
        return f"{self.caught_by.__module__}.{self.caught_by.__name__}"

    def run_test(self) -> None:
        with ExitStack() as stack:
            fixture = [stack.enter_context(self.fixture())] if self.fixture else []
            self.caught_by(*fixture, **self.arguments)

    def check(self) -> None:
        """Run the test without the guard.

        Raises:
            AssertionError: the test has noticed nothing.
        """
        try:
            with self.without():
                self.run_test()
        except (Exception, pytest.fail.Exception):
            return
        raise AssertionError(f"{self.test_name} passes without {self.guard}")


@contextmanager
def shop() -> Iterator[Any]:
    with stopped_clock() as clock, ExitStack() as stack:
        yield open_shop(stack, clock)


@contextmanager
def statements_changed(change: Callable[[str], str]) -> Iterator[None]:
    """Rewrite the statements of connections that begin within the block."""

    def execute_changed(execute: Callable[..., Any], sql: str, *args: Any) -> Any:
        return execute(change(sql), *args)

    def on_connect(connection: Any, **signal: Any) -> None:
        if execute_changed not in connection.execute_wrappers:
            connection.execute_wrappers.append(execute_changed)

    connection_created.connect(on_connect)
    try:
        yield
    finally:
        connection_created.disconnect(on_connect)
        # This thread may have connected anew as well, and lives on.
        if execute_changed in connection.execute_wrappers:
            connection.execute_wrappers.remove(execute_changed)


@contextmanager
def lock_with_a_number_read_before() -> Iterator[None]:
    """Number events by what the drop's row said before its lock was won."""

    def lock(drop_id: Any) -> Any:
        seq = Drop.objects.values_list("seq", flat=True).get(pk=drop_id)
        locked = lock_drop(drop_id)
        locked.drop.seq = seq
        return locked

    with patch("reservations.services.lock_drop", lock):
        yield


def no_stock_check(self: Any, claim: Any, share: Any, variant: Any) -> None:
    if self.refusal:
        raise self.refusal


MUTANTS = [
    Mutant(
        "the lock of the drop's row",
        without_row_locks,
        test_races.test_one_of_two_users_gets_the_last_unit,
        {},
    ),
    Mutant(
        "the constraint on the stock",
        partial(without_constraints, "drop_stock_between_zero_and_total"),
        test_drop_models.test_the_database_refuses_a_bad_drop,
        {
            "db": None,
            "bad": {"available_stock": 11},
            "constraint": "drop_stock_between_zero_and_total",
        },
    ),
    Mutant(
        "the unique index of active reservations",
        partial(without_constraints, "one_active_reservation_per_user_and_drop"),
        test_reservation_models.test_the_database_allows_one_active_reservation_per_user_and_drop,
        {"db": None, "trait": "expired"},
    ),
    Mutant(
        "the unique index of purchases",
        partial(without_constraints, "purchases_purchase_reservation_id_key"),
        test_purchase_models.test_the_database_allows_one_purchase_per_reservation,
    ),
    Mutant(
        "the check of the stock in reserve",
        partial(patch.object, Settlement, "check", no_stock_check),
        test_reservation_services.test_is_sold_out_when_every_unit_was_bought,
    ),
    Mutant(
        "the check of the limit per user",
        partial(patch, "reservations.services.COUNTS_AGAINST_LIMIT", (ReservationStatus.ACTIVE,)),
        test_reservation_services.test_the_limit_counts_what_is_held_and_what_was_bought,
    ),
    Mutant(
        "the check of the deadline in purchase",
        partial(patch.object, Reservation, "is_overdue_at", lambda self, now: False),
        test_purchase_services.test_comes_too_late_before_and_after_the_sweep_alike,
    ),
    Mutant(
        "the clock read after the lock was won",
        partial(statements_changed, lambda sql: sql.replace("clock_timestamp()", "now()")),
        test_races.test_a_purchase_that_waited_past_the_deadline_comes_too_late,
        {},
    ),
    Mutant(
        "the condition of expiry that the hold is still active",
        partial(
            patch.object,
            ReservationQuerySet,
            "overdue",
            lambda self, now=None: self.filter(expires_at__lte=now or Now()),
        ),
        test_reservation_services.test_expires_what_is_overdue_and_nothing_else,
    ),
    Mutant(
        "the order of the locks",
        partial(
            patch.dict,
            LOCK_DROPS,
            {
                wait: query.replace("UPDATE OF drop, variant", "UPDATE OF variant, drop")
                for wait, query in LOCK_DROPS.items()
            },
        ),
        test_races.test_the_drop_is_locked_before_its_variants,
        {},
    ),
    Mutant(
        "the number of an event taken under the lock",
        lock_with_a_number_read_before,
        test_interleavings.test_every_order_gives_what_some_serial_order_gives,
        {"kinds": ("reserve", "release")},
        world,
    ),
    Mutant(
        "the wait of news for the commit",
        partial(patch, "realtime.services.transaction.on_commit", lambda publish: publish()),
        test_event_services.test_what_is_rolled_back_is_not_published,
    ),
    Mutant(
        "the claim of an idempotency key",
        partial(patch.object, idempotency, "claim_keys", lambda keys: [None] * len(keys)),
        test_model.test_a_repeat_is_replayed_on_either_lane_and_another_body_refused,
        {},
        shop,
    ),
]
