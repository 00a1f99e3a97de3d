"""What a client sees through a real socket of real server processes."""

import asyncio
import contextlib
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import httpx
import pytest
import websockets.asyncio.client
from django.db import transaction
from rest_framework.exceptions import APIException
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from config.database import read_clock
from drops.models import Drop, DropStatus
from drops.services import adjust_stock, create_drop, update_drop
from drops.tests.factories import DropFactory
from purchases.services import purchase
from realtime import services
from realtime.models import Event
from reservations.models import Reservation
from reservations.services import Claim, expire_all_due, release, reserve
from tests.concurrency import at_once
from tests.servers import Process, WebServer
from users.models import User
from users.tests.factories import UserFactory

pytestmark = pytest.mark.servers

BAD_MESSAGE, INVALID_IDENTITY, NOT_FOUND = 4400, 4401, 4404
STOCK = "STOCK_UPDATED"
# Until which time after Redis has returned all must be as if it had never been away.
BACK_SECONDS = 5
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")
# Without a proxy of the environment, and never slowed down by our own reading.
PLAINLY: dict[str, Any] = {"proxy": None, "compression": None, "max_queue": None}


class Listener:
    """A client that keeps every frame from the moment it connects."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def next(self, timeout: float = 5) -> dict[str, Any]:
        """Return the next frame that is no heartbeat."""
        deadline = time.monotonic() + timeout
        while True:
            frame = json.loads(self.socket.recv(deadline - time.monotonic()))
            if frame["type"] != "HEARTBEAT":
                return frame

    def events(self, last_seq: int) -> list[dict[str, Any]]:
        """Return the frames up to the one with ``last_seq``."""
        frames = [self.next()]
        while frames[-1]["seq"] < last_seq:
            frames.append(self.next())
        return frames

    def send(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def close_code(self) -> int:
        """Return the code with which the server closes, whatever it sends before."""
        try:
            while True:
                self.next()
        except ConnectionClosed as closed:
            return closed.rcvd.code


@pytest.fixture
def listen() -> Iterator[Callable[..., Listener]]:
    with contextlib.ExitStack() as stack:

        def start(server: WebServer, path: str = "/ws/drops", headers: Any = None) -> Listener:
            socket = connect(server.ws_url + path, additional_headers=headers, **PLAINLY)
            return Listener(stack.enter_context(socket))

        yield start


@pytest.fixture
def follow(listen) -> Callable[..., Listener]:
    """Return a function that connects, to one drop or to all, and takes the snapshot."""

    def start(server: WebServer, drop: Drop | None = None) -> Listener:
        listener = listen(server, f"/ws/drops/{drop.pk}" if drop else "/ws/drops")
        assert listener.next()["type"] == "SNAPSHOT"
        return listener

    return start


def make_overdue(reservation_id: uuid.UUID | str) -> None:
    Reservation.objects.filter(pk=reservation_id).update(
        created_at="2020-01-01T00:00:00Z", expires_at="2020-01-01T00:01:00Z"
    )


# --- Snapshots --------------------------------------------------------------------------


def test_a_socket_of_one_drop_starts_with_its_snapshot(web_servers, listen, client_of):
    drop, user = DropFactory(sizes={"EU 42": 3, "EU 43": 4}), UserFactory()
    reserve(drop.pk, Claim(user.pk, drop.variants.first().pk))
    purchase(drop.pk, user.pk)

    frame = listen(web_servers[0], f"/ws/drops/{drop.pk}").next()

    assert frame.keys() == {"type", "ts", "data"}
    assert frame["type"] == "SNAPSHOT"
    assert INSTANT.fullmatch(frame["ts"])
    assert frame["data"] == {"drops": [client_of().get(f"/api/drops/{drop.pk}").json()]}
    assert frame["data"]["drops"][0]["seq"] == 3


def test_a_socket_of_all_drops_starts_with_the_current_ones(web_servers, listen):
    current = [DropFactory(), DropFactory(upcoming=True), DropFactory(status=DropStatus.PAUSED)]
    DropFactory(draft=True)
    DropFactory(over=True)
    DropFactory(status=DropStatus.CANCELLED)

    frame = listen(web_servers[1], "/ws/drops/").next()

    assert frame["type"] == "SNAPSHOT"
    assert [drop["id"] for drop in frame["data"]["drops"]] == [str(drop.pk) for drop in current]


def test_a_snapshot_of_nothing_is_empty(web_server, listen):
    assert listen(web_server).next()["data"] == {"drops": []}


# --- Events -----------------------------------------------------------------------------


def test_the_six_event_types_arrive_from_another_process(web_servers, follow):
    writer, reader = web_servers
    listener = follow(reader)
    user = UserFactory()
    sizes = [{"label": "EU 42", "total_stock": 1}, {"label": "EU 43", "total_stock": 1}]
    body = {"name": "Ember", "price": "199.00", "status": "live", "variants": sizes}
    with httpx.Client(base_url=f"{writer.url}/api", headers={"X-User-Id": str(user.pk)}) as api:
        # Each waits for the one before, because of changes in a row only the newest is sent.
        created = api.post("/drops", json=body | {"max_per_user": 2}).json()
        drop_id, small, large = created["id"], *(v["id"] for v in created["variants"])
        frames = listener.events(last_seq=1)
        changed = api.patch(f"/drops/{drop_id}", json={"name": "Ember II"}).json()
        frames += listener.events(last_seq=2)
        api.post(f"/drops/{drop_id}/reserve", json={"variant": small})
        frames += listener.events(last_seq=3)
        bought = api.post(f"/drops/{drop_id}/purchase").json()
        frames += listener.events(last_seq=5)
        hold = api.post(f"/drops/{drop_id}/reserve", json={"variant": large}).json()
        frames += listener.events(last_seq=6)
        make_overdue(hold["id"])
        api.post("/internal/expire-now")
        frames += listener.events(last_seq=8)

    purchaser = {
        "userId": str(user.pk),
        "username": user.username,
        "qty": 1,
        "createdAt": bought["created_at"],
    }
    assert [(frame["type"], frame["data"]) for frame in frames] == [
        ("DROP_CREATED", {"drop": created}),
        ("DROP_UPDATED", {"drop": changed}),
        ("STOCK_UPDATED", stock(drop_id, {small: 0, large: 1}, "available")),
        (
            "PURCHASE_COMPLETED",
            {
                "dropId": drop_id,
                "username": user.username,
                "purchasedAt": bought["created_at"],
                "qty": 1,
            },
        ),
        ("ACTIVITY_UPDATED", {"dropId": drop_id, "latestPurchasers": [purchaser], "soldStock": 1}),
        ("STOCK_UPDATED", stock(drop_id, {small: 0, large: 0}, "fully_reserved", sold=1)),
        ("RESERVATION_EXPIRED", {"dropId": drop_id, "reservationId": hold["id"]}),
        ("STOCK_UPDATED", stock(drop_id, {small: 0, large: 1}, "available", sold=1)),
    ]
    assert [(frame["prev"], frame["seq"]) for frame in frames] == [(n, n + 1) for n in range(8)]
    for frame in frames:
        assert frame.keys() == {"type", "dropId", "seq", "prev", "ts", "data"}
        assert frame["dropId"] == drop_id
        assert INSTANT.fullmatch(frame["ts"])


def stock(
    drop_id: str, variants: dict[str, int], availability: str, sold: int = 0
) -> dict[str, Any]:
    return {
        "dropId": drop_id,
        "availableStock": sum(variants.values()),
        "availability": availability,
        "soldStock": sold,
        "variants": [{"id": pk, "availableStock": units} for pk, units in variants.items()],
    }


def test_every_process_tells_of_a_drop_created_anywhere(web_servers, follow):
    listeners = [follow(server) for server in web_servers]

    drop = create_drop(
        UserFactory(), name="Ember", price=Decimal("199.00"), total_stock=3, status="live"
    )

    for listener in listeners:
        frame = listener.next()
        assert (frame["type"], frame["dropId"], frame["seq"]) == ("DROP_CREATED", str(drop.pk), 1)


def test_a_draft_is_announced_when_it_is_published(web_servers, follow):
    listener = follow(web_servers[0])

    drop = create_drop(UserFactory(), name="Ember", price=Decimal("199.00"), total_stock=3)
    update_drop(drop.pk, name="Ember II")
    adjust_stock(drop.variants.get().pk, 2, reason="more", user=UserFactory(staff=True))
    update_drop(drop.pk, status=DropStatus.LIVE)

    frame = listener.next()
    assert (frame["type"], frame["prev"], frame["seq"]) == ("DROP_CREATED", 0, 1)
    announced = frame["data"]["drop"]
    assert (announced["name"], announced["status"], announced["total_stock"]) == (
        "Ember II",
        "live",
        5,
    )


def test_an_event_arrives_only_after_its_commit(web_servers, follow):
    drop, user = DropFactory(), UserFactory()
    listener = follow(web_servers[0], drop)

    with transaction.atomic():
        reserve(drop.pk, Claim(user.pk))
        listener.send(action="ping")
        assert listener.next()["type"] == "PONG"

    assert (frame := listener.next())["type"] == "STOCK_UPDATED"
    assert frame["data"]["availableStock"] == 9


def test_a_transaction_that_is_rolled_back_sends_nothing(web_servers, follow):
    drop = DropFactory()
    listener = follow(web_servers[0], drop)

    with transaction.atomic():
        reserve(drop.pk, Claim(UserFactory().pk, quantity=1))
        transaction.set_rollback(True)
    assert Event.objects.count() == 0
    reserve(drop.pk, Claim(UserFactory().pk))

    frame = listener.next()
    assert (frame["prev"], frame["seq"], frame["data"]["availableStock"]) == (0, 1, 9)


# --- Order ------------------------------------------------------------------------------


def test_all_see_the_stream_in_order_and_once_while_two_processes_write(web_servers, follow):
    drop, users = DropFactory(total_stock=60), UserFactory.create_batch(80)
    listeners = [follow(server, target) for server in web_servers for target in (drop, None)]

    def shop(server: WebServer, shoppers: list[User]) -> None:
        with httpx.Client(base_url=f"{server.url}/api/drops/{drop.pk}") as api:
            for user in shoppers:
                headers = {"X-User-Id": str(user.pk)}
                api.post("/reserve", headers=headers)
                api.post("/purchase", headers=headers)

    at_once(*(partial(shop, web_servers[n % 2], users[n::8]) for n in range(8)))

    drop.refresh_from_db()
    assert (drop.available_stock, drop.sold_stock) == (0, 60)
    log = list(drop.events.order_by("seq").values_list("seq", "type", "data"))
    assert [seq for seq, _, _ in log] == list(range(1, drop.seq + 1))
    purchases = [event for event in log if event[1] == "PURCHASE_COMPLETED"]
    for listener in listeners:
        frames = listener.events(last_seq=drop.seq)
        seen = [(frame["seq"], frame["type"], frame["data"]) for frame in frames]
        # Only states are left out, where a newer one follows.
        assert [event for event in log if event in seen] == seen
        assert [event for event in seen if event[1] == "PURCHASE_COMPLETED"] == purchases
        assert [frame["prev"] for frame in frames] == [0, *(frame["seq"] for frame in frames)][:-1]


def test_a_client_that_folds_the_stream_ends_with_what_rest_says(web_servers, listen, client_of):
    drop = DropFactory(sizes={"EU 42": 8, "EU 43": 8, "EU 44": 8}, max_per_user=4)
    users = UserFactory.create_batch(10)
    states: list[tuple[Listener, dict[str, Any]]] = []

    def write(seed: int) -> None:
        for number in range(40):
            change_something(random.Random(100 * seed + number), drop, users)

    def connect_meanwhile() -> None:
        for number in range(6):
            listener = listen(web_servers[number % 2], f"/ws/drops/{drop.pk}")
            states.append((listener, listener.next()["data"]["drops"][0]))

    at_once(partial(write, 1), partial(write, 2), connect_meanwhile)
    update_drop(drop.pk, name="The end")

    in_rest = client_of().get(f"/api/drops/{drop.pk}").json()
    assert in_rest["seq"] > 40
    assert [seen["seq"] < in_rest["seq"] for _, seen in states] == [True] * 6
    for listener, seen in states:
        for frame in listener.events(last_seq=in_rest["seq"]):
            assert frame["prev"] == seen["seq"]
            fold(seen, frame)
        assert seen == in_rest


def change_something(choose: random.Random, drop: Drop, users: list[User]) -> None:
    user, variant = choose.choice(users), choose.choice(list(drop.variants.all()))
    hold = Reservation.objects.active().filter(user=user).first()
    claim = Claim(user.pk, variant.pk, choose.randint(1, 2))
    staff = users[0]
    changes: list[Callable[[], Any]] = [
        partial(reserve, drop.pk, claim),
        partial(reserve, drop.pk, claim),
        partial(purchase, drop.pk, user.pk),
        partial(adjust_stock, variant.pk, choose.choice((-1, 2)), reason="count", user=staff),
        partial(update_drop, drop.pk, description=f"Edition {choose.random()}"),
    ]
    if hold:
        changes += [partial(release, hold.pk, user), partial(expire, hold)]
    try:
        choose.choice(changes)()
    except APIException:
        return


def expire(hold: Reservation) -> None:
    make_overdue(hold.pk)
    expire_all_due()


def fold(drop: dict[str, Any], frame: dict[str, Any]) -> None:
    """Apply a frame as the contract tells a client to."""
    data = frame["data"]
    if frame["type"] in ("DROP_CREATED", "DROP_UPDATED"):
        drop.update(data["drop"])
    elif frame["type"] == "STOCK_UPDATED":
        units = {variant["id"]: variant["availableStock"] for variant in data["variants"]}
        drop["available_stock"] = data["availableStock"]
        drop["availability"] = data["availability"]
        for variant in drop["variants"]:
            variant["available_stock"] = units[variant["id"]]
    elif frame["type"] == "ACTIVITY_UPDATED":
        drop["activity_feed"]["latest_purchasers"] = [
            {
                "user_id": entry["userId"],
                "username": entry["username"],
                "qty": entry["qty"],
                "created_at": entry["createdAt"],
            }
            for entry in data["latestPurchasers"]
        ]
    drop["seq"] = frame["seq"]


# --- What gets lost ---------------------------------------------------------------------


def test_events_that_were_never_published_arrive_all_the_same(web_servers, follow, monkeypatch):
    drop, users = DropFactory(), UserFactory.create_batch(3)
    listeners = [follow(web_servers[0], drop), follow(web_servers[1])]
    monkeypatch.setattr(services, "publish", lambda events, at: None)

    for user in users:
        reserve(drop.pk, Claim(user.pk))
    committed = time.monotonic()

    for listener in listeners:
        frames = listener.events(last_seq=3)
        assert frames[0]["prev"] == 0
        assert frames[-1]["data"]["availableStock"] == 7
    assert time.monotonic() - committed < 2


def test_events_arrive_while_redis_is_away_and_at_once_when_it_is_back(
    servers, session_web_servers, transactional_db, follow
):
    if servers is None:
        pytest.skip("an outside Redis can't be stopped")
    drop, user = DropFactory(), UserFactory()
    listeners = [follow(server, drop) for server in session_web_servers]
    address = f"{session_web_servers[0].url}/api/drops/{drop.pk}"

    servers.stop_valkey()
    try:
        started = time.monotonic()
        answer = httpx.post(f"{address}/reserve", headers={"X-User-Id": str(user.pk)})
        assert answer.status_code == 201
        assert [listener.next(timeout=2)["seq"] for listener in listeners] == [1, 1]
        assert time.monotonic() - started < 2
    finally:
        servers.start_valkey()

    expect_news_through_redis(drop, listeners, time.monotonic() + BACK_SECONDS)


def expect_news_through_redis(drop: Drop, listeners: list[Listener], give_up_at: float) -> None:
    """The log alone would take half a second on average; three in a row come through Redis."""
    in_a_row = 0
    while in_a_row < 3:
        assert time.monotonic() < give_up_at
        started = time.monotonic()
        update_drop(drop.pk, name=str(started))
        for listener in listeners:
            listener.next(timeout=2)
        in_a_row = in_a_row + 1 if time.monotonic() - started < 0.2 else 0


@pytest.mark.slow
def test_who_watches_all_drops_misses_nothing_of_ten_seconds_without_redis(
    servers, session_web_servers, session_uvicorn, transactional_db, follow
):
    if servers is None:
        pytest.skip("an outside Redis can't be stopped")
    known, user = DropFactory(), UserFactory()
    listeners = [follow(server) for server in (*session_web_servers, session_uvicorn)]

    servers.stop_valkey()
    try:
        away_until = time.monotonic() + 10
        new = create_drop(
            user, name="Ember", price=Decimal("199.00"), total_stock=3, status=DropStatus.LIVE
        )
        reserve(known.pk, Claim(user.pk))
        for listener in listeners:
            frames = sorted(listener.next(timeout=2)["type"] for _ in range(2))
            assert frames == ["DROP_CREATED", STOCK]
        with pytest.raises(TimeoutError):
            listeners[0].next(timeout=away_until - time.monotonic())
        # Nobody has been told of these when Redis returns.
        late = create_drop(
            user, name="Aurora", price=Decimal("199.00"), total_stock=3, status=DropStatus.LIVE
        )
        reserve(new.pk, Claim(user.pk))
        release(Reservation.objects.get(drop=known).pk, user)
    finally:
        servers.start_valkey()

    back = time.monotonic()
    for listener in listeners:
        frames = [listener.next(timeout=back + BACK_SECONDS - time.monotonic()) for _ in range(3)]
        assert {
            frame["dropId"]: (frame["type"], frame["prev"], frame["seq"]) for frame in frames
        } == {
            str(late.pk): ("DROP_CREATED", 0, 1),
            str(new.pk): (STOCK, 1, 2),
            str(known.pk): (STOCK, 1, 2),
        }
    expect_news_through_redis(known, listeners, back + BACK_SECONDS)


@pytest.mark.slow
def test_a_socket_survives_half_a_minute_of_silence(web_servers, session_uvicorn, follow):
    """Longer than any timeout of Redis, and than the servers' own pings."""
    drop = DropFactory()
    listeners = [follow(server, drop) for server in (*web_servers, session_uvicorn)]

    with pytest.raises(TimeoutError):
        listeners[0].next(timeout=30)
    reserve(drop.pk, Claim(UserFactory().pk))

    assert [listener.next()["seq"] for listener in listeners] == [1, 1, 1]


def test_events_of_a_process_that_was_killed_after_its_commit_arrive(web_servers, follow):
    drop, user = DropFactory(), UserFactory()
    listeners = [follow(server, drop) for server in web_servers]

    # The commit, and then nothing: no publisher, no flush at the end.
    code = (
        "import os, uuid, django; django.setup()\n"
        "from realtime import publisher; publisher.Publisher.put = lambda self, news: None\n"
        "from reservations.services import Claim, reserve\n"
        f"reserve(uuid.UUID('{drop.pk}'), Claim(uuid.UUID('{user.pk}')))\n"
        "print('committed', flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    process = Process("-c", code)
    process.wait_for_line("committed")
    committed = time.monotonic()

    assert [listener.next(timeout=5)["seq"] for listener in listeners] == [1, 1]
    assert time.monotonic() - committed < 2
    assert process.wait() == -9


def test_two_processes_and_two_loops_tell_every_client_each_thing_once(
    web_servers, follow, start_expiry
):
    drop = DropFactory(total_stock=40, starts_at=read_clock() + timedelta(hours=1))
    users = UserFactory.create_batch(20)
    loops = [start_expiry() for _ in range(2)]
    for loop in loops:
        loop.wait_for_line("expiring reservations")
    listeners = [follow(server, target) for server in web_servers for target in (drop, None)]
    Drop.objects.filter(pk=drop.pk).update(starts_at=read_clock() + timedelta(seconds=0.5))
    opened = [listener.next() for listener in listeners]
    assert [(f["type"], f["data"]["drop"]["status"]) for f in opened] == [
        ("DROP_UPDATED", "live")
    ] * 4

    def shop(server: WebServer, shoppers: list[User]) -> None:
        with httpx.Client(base_url=f"{server.url}/api/drops/{drop.pk}") as api:
            for user in shoppers:
                assert api.post("/reserve", headers={"X-User-Id": str(user.pk)}).status_code == 201

    at_once(*(partial(shop, web_servers[n % 2], users[n::4]) for n in range(4)))
    soon = read_clock() + timedelta(milliseconds=300)
    Reservation.objects.update(expires_at=soon)

    def is_back() -> bool:
        drop.refresh_from_db()
        return drop.available_stock == 40

    give_up_at = time.monotonic() + 10
    while not is_back():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    holds = {str(pk) for pk in Reservation.objects.values_list("pk", flat=True)}
    for listener, first in zip(listeners, opened, strict=True):
        frames = [first, *listener.events(last_seq=drop.seq)]
        assert [frame["prev"] for frame in frames] == [0, *(f["seq"] for f in frames)][:-1]
        told = [f["data"]["reservationId"] for f in frames if f["type"] == "RESERVATION_EXPIRED"]
        assert (len(told), set(told)) == (20, holds)
        assert [f["data"]["availableStock"] for f in frames if f["type"] == STOCK][-1] == 40


# --- Private events ---------------------------------------------------------------------


def test_a_user_is_told_each_thing_once_on_each_socket_wherever_it_is(
    web_servers, session_uvicorn, listen
):
    user, drops = UserFactory(), DropFactory.create_batch(3)
    servers = [*web_servers, web_servers[0], session_uvicorn]
    listeners = [listen(server, headers={"X-User-Id": str(user.pk)}) for server in servers]
    for listener in listeners:
        assert [listener.next()["type"] for _ in range(2)] == ["SNAPSHOT", "HOLDS"]

    expired, released, bought = (reserve(drop.pk, Claim(user.pk)) for drop in drops)
    # Until all know the hold with its first end.
    time.sleep(1.5)
    ends = read_clock() + timedelta(seconds=13)
    Reservation.objects.filter(pk=expired.pk).update(expires_at=ends)
    for listener in listeners:
        frame = next_private(listener)
        early = ends - datetime.now(UTC)
        assert frame["type"] == "HOLD_EXPIRING"
        assert frame["data"]["reservationId"] == str(expired.pk)
        assert timedelta(seconds=9) < early < timedelta(seconds=11)

    release(released.pk, user)
    purchase(bought.drop_id, user.pk)
    expire(expired)
    told = [[next_private(listener) for _ in range(3)] for listener in listeners]
    # A second time would be with the next look, after a second.
    with pytest.raises(TimeoutError):
        next_private(listeners[0], timeout=2.5)
    for listener, frames in zip(listeners, told, strict=True):
        assert {frame["type"]: frame["data"]["reservationId"] for frame in frames} == {
            "HOLD_RELEASED": str(released.pk),
            "PURCHASE_CONFIRMED": str(bought.pk),
            "HOLD_EXPIRED": str(expired.pk),
        }
        listener.send(action="ping")
        assert next_private(listener)["type"] == "PONG"


def next_private(listener: Listener, timeout: float = 5) -> dict[str, Any]:
    """Return the next frame that is no event of a drop."""
    give_up_at = time.monotonic() + timeout
    while "seq" in (frame := listener.next(give_up_at - time.monotonic())):
        continue
    return frame


# --- Messages ---------------------------------------------------------------------------


def test_a_ping_is_answered(web_server, follow):
    listener = follow(web_server)

    listener.send(action="ping")

    frame = listener.next()
    assert (frame["type"], frame["data"]) == ("PONG", {})


def test_a_socket_of_one_drop_can_watch_another_for_a_while(web_server, follow, transactional_db):
    own, other, user = DropFactory(), DropFactory(), UserFactory()
    listener = follow(web_server, own)

    listener.send(action="subscribe", dropId=str(other.pk).upper())
    snapshot = listener.next()
    assert (snapshot["type"], snapshot["data"]["drops"][0]["id"]) == ("SNAPSHOT", str(other.pk))
    hold = reserve(other.pk, Claim(user.pk))
    assert (listener.next()["dropId"]) == str(other.pk)

    listener.send(action="unsubscribe", dropId=str(other.pk))
    listener.send(action="ping")
    assert listener.next()["type"] == "PONG"
    release(hold.pk, user)
    reserve(own.pk, Claim(user.pk))
    assert listener.next()["dropId"] == str(own.pk)


def test_a_socket_of_one_drop_hears_nothing_of_others(web_servers, follow):
    own, other, user = DropFactory(), DropFactory(), UserFactory()
    listener = follow(web_servers[0], own)

    reserve(other.pk, Claim(user.pk))
    reserve(own.pk, Claim(user.pk))

    assert listener.next()["dropId"] == str(own.pk)


# --- Refusals ---------------------------------------------------------------------------

SOME_ID = "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11"
GARBAGE: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": "{",
    "no object": "[1, 2]",
    "a number": "NaN",
    "a string": '"ping"',
    "null": "null",
    "no action": "{}",
    "an unknown action": '{"action": "buy"}',
    "an action that is no text": '{"action": ["ping"]}',
    "no drop": '{"action": "subscribe"}',
    "no drop id": '{"action": "subscribe", "dropId": "all"}',
    "a number as drop id": '{"action": "unsubscribe", "dropId": 7}',
    "a drop id in braces": f'{{"action": "subscribe", "dropId": "{{{SOME_ID}}}"}}',
    "a NUL": '{"action": "ping\\u0000"}',
    "a lone surrogate": '{"action": "\\ud800"}',
    "too deep": "[" * 5000,
    "binary": b'{"action": "ping"}',
    "binary noise": bytes(range(256)),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_closes_on_what_is_no_message(web_server, follow, garbage):
    listener = follow(web_server)

    listener.socket.send(garbage)

    assert listener.close_code() == BAD_MESSAGE
    assert follow(web_server)


def test_a_storm_of_garbage_ends_one_socket_only(web_server, follow):
    bystander, culprit = follow(web_server), follow(web_server)

    with contextlib.suppress(ConnectionClosed):  # the server may be quicker
        for number in range(200):
            culprit.socket.send(f"garbage {number}")
    assert culprit.close_code() == BAD_MESSAGE

    bystander.send(action="ping")
    assert bystander.next()["type"] == "PONG"


def test_a_huge_message_ends_the_socket_and_not_the_server(web_server, follow):
    listener = follow(web_server)

    with contextlib.suppress(ConnectionClosed):  # the server may end it before it is through
        listener.socket.send("x" * 2_000_000)
    with pytest.raises(ConnectionClosed):
        listener.next()

    assert follow(web_server)


def test_a_thousand_fuzzed_messages_are_refused(web_servers, follow):
    choose = random.Random(11)
    messages = [fuzzed(choose) for _ in range(1000)]

    async def send(message: str | bytes, server: WebServer) -> int:
        address = f"{server.ws_url}/ws/drops"
        async with websockets.asyncio.client.connect(address, **PLAINLY) as socket:
            await socket.send(message)
            await socket.wait_closed()
            return socket.close_code

    async def answer(message: str | bytes, server: WebServer, turn: asyncio.Semaphore) -> int:
        async with turn:
            code = await send(message, server)
            # On a busy machine a connection may end before its closing frame is read (1006):
            # that says nothing about the message, so it is sent once more.
            return code if code != CloseCode.ABNORMAL_CLOSURE else await send(message, server)

    async def send_all() -> list[int]:
        turn = asyncio.Semaphore(20)
        return await asyncio.gather(
            *(answer(message, web_servers[n % 2], turn) for n, message in enumerate(messages))
        )

    assert asyncio.run(send_all()) == [BAD_MESSAGE] * 1000
    assert all(follow(server) for server in web_servers)


def fuzzed(choose: random.Random) -> str | bytes:
    """Return bytes, text, JSON or a broken message; never one that the server knows."""
    text = "".join(chr(choose.choice((choose.randint(0, 0xD7FF), 34, 123))) for _ in range(20))
    broken = f'{{"action": "subscribe", "dropId": "{SOME_ID}"}}'[: choose.randint(0, 68)]
    anything: list[Any] = [None, True, choose.random(), -(10**30), text, [text], {text: text}]
    json_text = json.dumps(
        {"action": choose.choice(anything), "dropId": choose.choice(anything), text: text}
    )
    return choose.choice([choose.randbytes(40), text, broken, json_text])


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        (f"/ws/drops/{SOME_ID}", {}, NOT_FOUND),
        ("/ws/drops/1", {}, NOT_FOUND),
        ("/ws/drops/%00", {}, NOT_FOUND),
        (f"/ws/drops/{uuid.UUID(SOME_ID).hex}", {}, NOT_FOUND),
        ("/", {}, NOT_FOUND),
        ("/ws", {}, NOT_FOUND),
        ("/ws/drops/a/b", {}, NOT_FOUND),
        ("/api/drops", {}, NOT_FOUND),
        ("/ws/drops", {"X-User-Id": "me"}, INVALID_IDENTITY),
        ("/ws/drops", {"X-User-Id": ""}, INVALID_IDENTITY),
        ("/ws/drops", {"X-User-Id": "\xff"}, INVALID_IDENTITY),
        ("/ws/drops", [("X-User-Id", SOME_ID), ("X-User-Id", SOME_ID)], INVALID_IDENTITY),
    ],
)
def test_closes_with_the_reason_as_code(web_server, listen, path, headers, code):
    assert listen(web_server, path, headers).close_code() == code


def test_closes_with_1012_when_the_past_was_replaced(web_server, follow, transactional_db):
    drop = DropFactory()
    listener = follow(web_server, drop)
    update_drop(drop.pk, name="Ember")
    update_drop(drop.pk, name="Aurora")
    listener.events(last_seq=drop.seq + 2)

    # As after a backup was restored.
    Drop.objects.filter(pk=drop.pk).update(seq=drop.seq + 1)

    assert listener.close_code() == CloseCode.SERVICE_RESTART


def test_a_subscription_to_an_unknown_drop_closes(web_server, follow):
    listener = follow(web_server)

    listener.send(action="subscribe", dropId=SOME_ID)

    assert listener.close_code() == NOT_FOUND


def test_a_valid_identity_is_accepted(web_server, listen, transactional_db):
    listener = listen(
        web_server, headers={"X-User-Id": SOME_ID, "Origin": "https://anywhere.example"}
    )

    assert [listener.next()["type"] for _ in range(2)] == ["SNAPSHOT", "HOLDS"]
    assert User.objects.count() == 0


def test_a_ticket_in_a_subprotocol_identifies_a_browser(web_server, transactional_db):
    headers = {"X-User-Id": str(UserFactory().pk)}
    ticket = httpx.post(f"{web_server.url}/api/ws-ticket", headers=headers).json()["ticket"]
    offer: Any = ["drops.v1", f"ticket.{ticket}"]

    with connect(f"{web_server.ws_url}/ws/drops", subprotocols=offer, **PLAINLY) as socket:
        assert socket.subprotocol == "drops.v1"
        assert [Listener(socket).next()["type"] for _ in range(2)] == ["SNAPSHOT", "HOLDS"]
    with connect(f"{web_server.ws_url}/ws/drops", subprotocols=offer, **PLAINLY) as socket:
        assert Listener(socket).close_code() == INVALID_IDENTITY
