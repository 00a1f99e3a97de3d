"""``manage.py expire_reservations`` as a process of its own."""

import signal
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.models import F

from config.database import read_clock
from drops.models import Drop, Variant
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from realtime.models import Event, EventType
from reservations import services
from reservations.management.commands import expire_reservations
from reservations.models import Reservation, ReservationStatus
from reservations.services import expire_drops
from reservations.tests.factories import ReservationFactory
from tests.servers import Process
from users.models import User

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = timedelta(hours=1)
# A loop that sleeps this long wakes for a hold, or not while the test lasts.
SLEEPY = {"EXPIRY_POLL_MS": "60000"}


def create_overdue_holds(count: int) -> Drop:
    """Make a drop of ``count`` units, all of them held by a user each, all overdue."""
    drop = DropFactory(sizes={"EU 42": count - count // 2, "EU 43": count // 2})
    users = User.objects.bulk_create(
        User(username=f"holder_{number}", password="") for number in range(count)
    )
    sizes = [variant.pk for variant in drop.variants.all()]
    now = read_clock()
    Reservation.objects.bulk_create(
        Reservation(
            drop=drop,
            variant_id=sizes[number % 2],
            user=user,
            quantity=1,
            unit_price=drop.price,
            currency=drop.currency,
            created_at=now - timedelta(minutes=2),
            expires_at=now - timedelta(minutes=1),
        )
        for number, user in enumerate(users)
    )
    for stock in (Drop.objects.filter(pk=drop.pk), Variant.objects.filter(drop=drop)):
        stock.update(available_stock=0)
    return drop


def expired() -> int:
    return Reservation.objects.filter(status=ReservationStatus.EXPIRED).count()


def expired_of(drop: Drop) -> int:
    return drop.reservations.filter(status=ReservationStatus.EXPIRED).count()


def wait_until(is_true: Callable[[], bool], process: Process, timeout: float = 60) -> None:
    """Ask the database again and again: nothing tells this process of the other's commits."""
    give_up_at = time.monotonic() + timeout
    while not is_true():
        assert process.is_running, process.log
        assert time.monotonic() < give_up_at, process.log
        time.sleep(0.01)


def told_reservation_ids() -> list[uuid.UUID]:
    events = Event.objects.filter(type=EventType.RESERVATION_EXPIRED)
    return [uuid.UUID(data["reservationId"]) for data in events.values_list("data", flat=True)]


def is_as_it_was_before_the_holds(drop: Drop) -> bool:
    drop.refresh_from_db()
    return drop.available_stock == drop.total_stock and audit_stock().differences == []


@pytest.mark.servers
def test_ten_thousand_holds_are_back_with_their_events(start_expiry):
    # How long that takes is a benchmark (expiry); here other tests have the machine too.
    drop = create_overdue_holds(10_000)
    loop = start_expiry(**SLEEPY)

    wait_until(lambda: expired() == 10_000, loop)

    assert is_as_it_was_before_the_holds(drop)
    told = told_reservation_ids()
    assert len(told) == 10_000
    assert set(told) == set(Reservation.objects.values_list("pk", flat=True))
    assert drop.events.count() == drop.seq == 10_025  # and the stock after each 400


@pytest.mark.servers
def test_two_loops_expire_nothing_twice(start_expiry):
    drop = create_overdue_holds(2000)
    loops = [start_expiry("--batch", "50", **SLEEPY) for _ in range(2)]

    wait_until(lambda: expired() == 2000, loops[0])

    for loop in loops:
        loop.wait_for_line("expiring reservations")
        loop.send_signal(signal.SIGTERM)
        assert loop.wait() == 0
    assert is_as_it_was_before_the_holds(drop)
    told = told_reservation_ids()
    assert len(told) == len(set(told)) == 2000
    assert drop.seq == 2040


@pytest.mark.servers
def test_wakes_when_a_hold_is_due_and_stops_at_once_on_sigterm(start_expiry):
    hold = ReservationFactory(expires_at=read_clock() + timedelta(seconds=3))
    loop = start_expiry(**SLEEPY)
    loop.wait_for_line("expiring reservations")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep_until(%s)", [hold.expires_at])
    due = time.monotonic()

    wait_until(lambda: expired() == 1, loop)
    assert time.monotonic() - due < 5

    stopping = time.monotonic()
    loop.send_signal(signal.SIGTERM)
    assert loop.wait() == 0
    assert time.monotonic() - stopping < 5


@pytest.mark.servers
def test_announces_windows_within_a_second_and_once_though_it_sleeps(start_expiry):
    loops = [start_expiry(**SLEEPY) for _ in range(2)]
    for loop in loops:
        loop.wait_for_line("expiring reservations")
    drop = DropFactory(
        status="scheduled",
        starts_at=read_clock() + timedelta(seconds=1),
        ends_at=read_clock() + timedelta(seconds=2.5),
    )

    wait_until(lambda: drop.events.count() == 2, loops[0])

    opened, closed = drop.events.order_by("seq")
    assert [event.data["drop"]["status"] for event in (opened, closed)] == ["live", "ended"]
    assert opened.created_at - drop.starts_at < timedelta(seconds=1)
    assert closed.created_at - drop.ends_at < timedelta(seconds=1)
    time.sleep(0.6)
    assert drop.events.count() == 2


@pytest.mark.servers
def test_stops_between_two_batches_of_a_backlog(start_expiry):
    drop = create_overdue_holds(5000)
    loop = start_expiry("--batch", "10", **SLEEPY)
    wait_until(lambda: expired() > 0, loop)

    stopping = time.monotonic()
    loop.send_signal(signal.SIGTERM)
    assert loop.wait() == 0

    assert time.monotonic() - stopping < 5
    assert 0 < expired() < 5000
    drop.refresh_from_db()
    assert drop.available_stock == expired()
    assert audit_stock().differences == []


@pytest.mark.django_db(transaction=True)
def test_a_long_backlog_keeps_up_no_other_drop(monkeypatch):
    long = create_overdue_holds(40)
    command = expire_reservations.Command()
    other: list[Reservation] = []

    def sweep(drop_ids, batch, meanwhile):
        if not other:
            # It comes due when the backlog is being swept already.
            other.append(ReservationFactory(overdue=True))
        time.sleep(0.05)
        return expire_drops(drop_ids, batch)

    monkeypatch.setattr(expire_reservations, "expire_drops", sweep)
    while not other or not expired_of(other[0].drop):
        assert command.step(1) == 0

    assert 0 < expired_of(long) < 20


@pytest.mark.django_db(transaction=True)
def test_holds_of_many_drops_keep_up_no_window(monkeypatch):
    expire_drop, drops = services._expire_drop, []
    for _ in range(5):
        ReservationFactory(overdue=True)

    def expire_slowly(drop_id, batch):
        if not drops:
            # It opens when the first is being swept already.
            opens_at = read_clock()
            drops.append(DropFactory(starts_at=opens_at, window_told_at=opens_at - HOUR))
        time.sleep(0.25)
        return expire_drop(drop_id, batch)

    monkeypatch.setattr(services, "_expire_drop", expire_slowly)
    expire_reservations.Command().step(400)

    assert expired() == 5
    assert drops[0].events.get().created_at - drops[0].starts_at < timedelta(seconds=1)


def test_sleeps_no_longer_than_a_hold_lasts_that_is_made_meanwhile(settings):
    settings.EXPIRY_POLL_MS = 60_000
    settings.RESERVATION_TTL_SECONDS = 10

    assert expire_reservations.Command().step(400) == 10


@pytest.mark.servers
@pytest.mark.restarts_database
def test_survives_a_restart_of_the_database(start_expiry, servers):
    if servers is None:
        pytest.skip("an outside PostgreSQL can't be restarted")
    ReservationFactory(overdue=True)
    loop = start_expiry(EXPIRY_POLL_MS="50")
    wait_until(lambda: expired() == 1, loop)

    with connection.cursor() as cursor:
        cursor.execute("CHECKPOINT")  # test servers don't wait for the disk
    connection.close()
    connection.close_pool()
    servers.restart_postgres()
    ReservationFactory(overdue=True)

    wait_until(lambda: expired() == 2, loop)


def test_once_expires_all_that_is_due_and_nothing_else():
    overdue = ReservationFactory.create_batch(3, overdue=True)
    active = ReservationFactory()
    output = StringIO()

    call_command("expire_reservations", "--once", "--batch", "2", stdout=output)

    assert output.getvalue() == "3 reservations expired.\n"
    assert set(told_reservation_ids()) == {hold.pk for hold in overdue}
    active.refresh_from_db()
    assert active.status == ReservationStatus.ACTIVE
    assert not Drop.objects.exclude(total_stock=F("available_stock")).exclude(pk=active.drop_id)


def test_once_with_nothing_due_does_nothing():
    output = StringIO()

    call_command("expire_reservations", "--once", stdout=output)

    assert output.getvalue() == "0 reservations expired.\n"


@pytest.mark.parametrize("batch", ["0", "-1", "many"])
def test_refuses_a_batch_that_is_no_positive_number(batch):
    with pytest.raises(CommandError, match="batch"):
        call_command("expire_reservations", "--once", "--batch", batch)
