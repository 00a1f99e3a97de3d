"""The hub, the publisher and the frames, without sockets: units on the real event log."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.db import DatabaseError

from drops.services import update_drop
from drops.tests.factories import DropFactory
from realtime import hub as hub_module
from realtime import log, publisher
from realtime.consumers import (
    MAX_WAITING_FRAMES,
    TOO_SLOW,
    DropConsumer,
    parse_message,
)
from realtime.frames import event_frame, heartbeat_frame, is_uuid, snapshot_frame
from realtime.hub import Hub, get_hub
from realtime.models import Event
from users.exceptions import InvalidIdentity
from users.identity import identify_socket

SOME_ID = "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11"
AT = datetime(2026, 11, 22, 18, 0, 0, 120_000, tzinfo=UTC)


class Socket:
    """Keeps what the hub offers, and lets a test wait for it."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def offer(self, drop_id: str, seq: int, frame: str) -> None:
        decoded = json.loads(frame)
        assert (decoded["dropId"], decoded["seq"]) == (drop_id, seq)
        self.frames.put_nowait(decoded)

    def offer_heartbeat(self, frame: str) -> None:
        self.frames.put_nowait(json.loads(frame))

    async def next(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.frames.get(), timeout=5)

    def waiting(self) -> list[tuple[int, int]]:
        """Take what is there, as (prev, seq)."""
        frames = [self.frames.get_nowait() for _ in range(self.frames.qsize())]
        return [(frame["prev"], frame["seq"]) for frame in frames]


def run_with_hub(scenario: Callable[[Hub], Awaitable[None]]) -> None:
    """Run ``scenario`` with a hub that listens; its tasks end with the loop."""

    async def run() -> None:
        hub = Hub()
        await hub.start()
        await scenario(hub)

    asyncio.run(run())


def message(drop: Any, *seqs: int, carries_events: bool = True) -> dict[str, Any]:
    """Return what the publisher sends about a drop's events ``seqs``."""
    events = [{"seq": n, "type": "STOCK_UPDATED", "ts": AT.timestamp(), "data": {}} for n in seqs]
    return {
        "type": "drop.events",
        "drop_id": str(drop.pk),
        "seq": seqs[-1],
        "events": events if carries_events else [],
    }


def drop_with_events(count: int) -> Any:
    """Make a drop whose events nobody has published."""
    drop = DropFactory(seq=count)
    Event.objects.bulk_create(
        Event(drop_id=drop.pk, seq=n, type="STOCK_UPDATED", data={"n": n}, created_at=AT)
        for n in range(1, count + 1)
    )
    return drop


# --- The hub ----------------------------------------------------------------------------


def test_passes_events_on_once_and_in_order():
    drop, hub, socket = DropFactory.build(), Hub(), Socket()
    hub.watch(socket, str(drop.pk))

    async def scenario() -> None:
        for seqs in [(1, 2), (2,), (1, 2), (3,), (2, 3, 4)]:
            await hub._take(message(drop, *seqs))

    asyncio.run(scenario())
    assert socket.waiting() == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.django_db(transaction=True)
def test_reads_from_the_log_what_a_message_leaves_out():
    drop, hub, socket = drop_with_events(5), Hub(), Socket()
    hub.watch(socket, str(drop.pk))

    async def scenario() -> None:
        await hub._take(message(drop, 1))
        assert socket.waiting() == [(0, 1)]
        await hub._take(message(drop, 3))
        # The log held even more by then, which its own messages then repeat.
        assert socket.waiting() == [(1, 2), (2, 3), (3, 4), (4, 5)]
        await hub._take(message(drop, 4, 5))
        assert socket.waiting() == []

    asyncio.run(scenario())


@pytest.mark.django_db(transaction=True)
def test_reads_from_the_log_what_a_message_has_no_room_for():
    drop, hub, socket = drop_with_events(5), Hub(), Socket()
    hub.watch(socket, str(drop.pk))

    asyncio.run(hub._take(message(drop, 5, carries_events=False)))

    assert socket.waiting() == [(n, n + 1) for n in range(5)]


@pytest.mark.django_db(transaction=True)
def test_two_who_read_what_was_missed_pass_it_on_once(monkeypatch):
    monkeypatch.setattr(log, "EVENTS_PER_READ", 3)
    drop, hub, socket = drop_with_events(10), Hub(), Socket()
    hub.watch_all(socket)

    async def scenario() -> None:
        await asyncio.gather(
            hub._take(message(drop, 10, carries_events=False)),
            hub._read_missed(str(drop.pk), 10),
            hub._take(message(drop, 4)),
        )

    asyncio.run(scenario())
    assert socket.waiting() == [(n, n + 1) for n in range(10)]


def test_a_socket_gets_what_it_watches_and_nothing_twice():
    mine, other, hub = DropFactory.build(), DropFactory.build(), Hub()
    of_one, of_all, of_both = Socket(), Socket(), Socket()
    hub.watch(of_one, str(mine.pk))
    hub.watch_all(of_all)
    hub.watch_all(of_both)
    hub.watch(of_both, str(mine.pk))

    async def scenario() -> None:
        for drop in (mine, other):
            await hub._take(message(drop, 1))
        assert [len(s.waiting()) for s in (of_one, of_all, of_both)] == [1, 2, 2]
        hub.unwatch(of_one, str(mine.pk))
        hub.unwatch(of_one, str(mine.pk))
        hub.forget(of_both)
        await hub._take(message(mine, 2))

    asyncio.run(scenario())
    assert [s.waiting() for s in (of_one, of_all, of_both)] == [[], [(1, 2)], []]


@pytest.mark.django_db(transaction=True)
def test_follows_the_log_from_where_it_starts():
    drop = drop_with_events(2)
    socket = Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch(socket, str(drop.pk))
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        frame = await socket.next()
        assert (frame["prev"], frame["seq"], frame["type"]) == (2, 3, "DROP_UPDATED")

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_finds_what_nobody_told_it(monkeypatch):
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 0.01)
    socket = Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch_all(socket)
        await sync_to_async(drop_with_events)(3)
        assert [(await socket.next())["seq"] for _ in range(3)] == [1, 2, 3]

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_a_heartbeat_carries_the_seq_of_each_watched_drop(monkeypatch):
    monkeypatch.setattr(hub_module, "HEARTBEAT_SECONDS", 0.01)
    first, second = str(drop_with_events(3).pk), str(drop_with_events(1).pk)
    of_one, of_both, of_all = Socket(), Socket(), Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch(of_one, first)
        hub.watch(of_both, first)
        hub.watch(of_both, second)
        hub.watch_all(of_all)
        assert heartbeat(await of_one.next()) == {first: 3}
        assert heartbeat(await of_both.next()) | heartbeat(await of_both.next()) == {
            first: 3,
            second: 1,
        }
        assert heartbeat(await of_all.next()) == {first: 3, second: 1}

    run_with_hub(scenario)


def heartbeat(frame: dict[str, Any]) -> dict[str, int]:
    assert frame.keys() == {"type", "ts", "data"}
    assert frame["type"] == "HEARTBEAT"
    return frame["data"]["seqs"]


@pytest.mark.django_db(transaction=True)
def test_a_broken_message_does_not_end_the_listening(monkeypatch, caplog):
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0.01)
    drop, socket = drop_with_events(1), Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch(socket, str(drop.pk))
        # Until the hub listens, messages are nobody's.
        while "could not be used" not in caplog.text:
            await get_channel_layer().group_send(publisher.GROUP, {"type": "from another version"})
            await asyncio.sleep(0)
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        assert (await socket.next())["seq"] == 2

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_a_start_that_fails_can_be_repeated(monkeypatch):
    def fail() -> dict[str, int]:
        raise DatabaseError("gone")

    async def scenario() -> None:
        hub = Hub()
        with monkeypatch.context() as patched:
            patched.setattr(log, "current_seqs", fail)
            outcomes = await asyncio.gather(hub.start(), hub.start(), return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [DatabaseError] * 2
        await hub.start()
        assert len(hub._tasks) == 3

    asyncio.run(scenario())


def test_each_event_loop_has_one_hub():
    async def scenario() -> Hub:
        assert get_hub() is get_hub()
        return get_hub()

    assert asyncio.run(scenario()) is not asyncio.run(scenario())


# --- The consumer -----------------------------------------------------------------------


def test_a_socket_that_does_not_read_is_closed(monkeypatch):
    closed: list[int] = []

    class SlowConsumer(DropConsumer):
        async def close(self, code: int | None = None, reason: str | None = None) -> None:
            closed.append(code)

    async def scenario() -> None:
        consumer = SlowConsumer()
        consumer.hub, consumer.frames = Hub(), asyncio.Queue(MAX_WAITING_FRAMES)
        consumer.seqs, consumer.held_back = {}, None
        consumer.hub.watch(consumer, SOME_ID)
        for seq in range(1, MAX_WAITING_FRAMES + 2):
            await hub_take(consumer.hub, seq)
        await asyncio.sleep(0)
        assert not consumer.hub._watching

    asyncio.run(scenario())
    assert closed == [TOO_SLOW]


async def hub_take(hub: Hub, seq: int) -> None:
    event = {"seq": seq, "type": "STOCK_UPDATED", "ts": AT.timestamp(), "data": {}}
    await hub._take({"drop_id": SOME_ID, "seq": seq, "events": [event]})


def test_frames_that_a_snapshot_already_holds_are_left_out():
    async def scenario() -> None:
        consumer = DropConsumer()
        consumer.frames, consumer.held_back = asyncio.Queue(), []
        consumer.seqs = {}
        for seq in (4, 5, 6):
            consumer.offer(SOME_ID, seq, f"frame {seq}")
        assert consumer.frames.empty()
        consumer.seqs[SOME_ID], held_back, consumer.held_back = 5, consumer.held_back, None
        for held in held_back:
            consumer.offer(*held)
        assert consumer.frames.get_nowait() == "frame 6"
        assert consumer.frames.empty()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('{"action": "ping"}', True),
        ('{"action": "ping", "extra": 1}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}"}}', True),
        (f'{{"action": "unsubscribe", "dropId": "{SOME_ID.upper()}"}}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": 3}}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}\\u0000"}}', False),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID.replace("-", "")}"}}', False),
        ('{"action": "subscribe"}', False),
        ('{"action": {}}', False),
        ('["ping"]', False),
        ("", False),
        (None, False),
    ],
)
def test_reads_a_message(text, known):
    assert (parse_message(text) is not None) is known


def test_no_text_at_all_breaks_the_reading_of_messages():
    choose = random.Random(7)
    for _ in range(5000):
        length = choose.randint(0, 30)
        noise = "".join(chr(choose.choice((34, 58, 91, 123, 125, 0x2028))) for _ in range(length))
        assert parse_message(noise) is None
        parse_message(f'{{"action": "subscribe", "dropId": {noise}}}')


def opened_with(*user_ids: bytes) -> dict[str, Any]:
    headers = [(b"x-user-id", value) for value in user_ids]
    return {"path": "/ws/drops", "query_string": b"", "headers": headers}


@pytest.mark.parametrize("values", [[], [SOME_ID], [SOME_ID.upper()]])
def test_accepts_no_identity_and_a_valid_one(values):
    identify_socket(opened_with(*[value.encode() for value in values]))


@pytest.mark.parametrize("values", [[b""], [b"me"], [b"\xff"], [SOME_ID.encode()] * 2])
def test_refuses_an_invalid_identity(values):
    with pytest.raises(InvalidIdentity):
        identify_socket(opened_with(*values))


# --- The frames -------------------------------------------------------------------------


def test_an_event_frame_is_what_the_contract_says():
    assert event_frame(SOME_ID, 3, 2, "STOCK_UPDATED", AT, {"availableStock": 1}) == (
        f'{{"type":"STOCK_UPDATED","dropId":"{SOME_ID}","seq":3,"prev":2,'
        '"ts":"2026-11-22T18:00:00.120000Z","data":{"availableStock":1}}'
    )


def test_snapshots_and_heartbeats_have_no_drop_of_their_own():
    assert json.loads(snapshot_frame([{"id": SOME_ID}], AT)) == {
        "type": "SNAPSHOT",
        "ts": "2026-11-22T18:00:00.120000Z",
        "data": {"drops": [{"id": SOME_ID}]},
    }
    assert json.loads(heartbeat_frame({SOME_ID: 1}, AT)) == {
        "type": "HEARTBEAT",
        "ts": "2026-11-22T18:00:00.120000Z",
        "data": {"seqs": {SOME_ID: 1}},
    }


@pytest.mark.parametrize(
    "value", [None, 7, "", "me", SOME_ID.replace("-", ""), f"{{{SOME_ID}}}", f"urn:uuid:{SOME_ID}"]
)
def test_only_the_usual_form_is_a_uuid(value):
    assert not is_uuid(value)
    assert is_uuid(SOME_ID)


# --- The publisher ----------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_a_large_message_carries_no_events(monkeypatch):
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(publisher.Publisher, "put", lambda self, message: sent.append(message))
    drop = drop_with_events(publisher.MAX_EVENTS_PER_MESSAGE + 1)
    events = list(Event.objects.filter(drop_id=drop.pk).order_by("seq"))

    publisher.publish(drop.pk, events[:-1], AT)
    publisher.publish(drop.pk, events, AT)

    assert [message["seq"] for message in sent] == [100, 101]
    assert [len(message["events"]) for message in sent] == [100, 0]
    assert sent[0]["events"][0] == {
        "seq": 1,
        "type": "STOCK_UPDATED",
        "ts": AT.timestamp(),
        "data": {"n": 1},
    }
