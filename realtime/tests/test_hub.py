"""The hub, the publisher and the frames, without sockets: units on the real event log."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from channels_redis.pubsub import RedisPubSubLoopLayer
from django.db import DatabaseError, InterfaceError

from config.ids import is_rehearsal_id, new_rehearsal_id
from drops.models import Drop, DropStatus
from drops.services import update_drop
from drops.tests.factories import DropFactory
from operations.rehearsals import discard_rehearsal
from realtime import hub as hub_module
from realtime import log, publisher
from realtime.consumers import parse_message
from realtime.frames import EventFrame, Message, heartbeat_frame, is_uuid, snapshot_frame
from realtime.hub import Feed, Hub, get_hub
from realtime.models import Event, EventType
from realtime.services import NewEvent

SOME_ID = "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11"
STOCK = "STOCK_UPDATED"
AT = datetime(2026, 11, 22, 18, 0, 0, 120_000, tzinfo=UTC)


@pytest.fixture(autouse=True)
def nothing_is_caught_up(monkeypatch):
    """Many of these events are in no log: the hub would take their drops for gone."""
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 60)


class Socket:
    """Keeps what the hub offers, and lets a test wait for it."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.is_told_to_reconnect = asyncio.Event()

    def hear(self, frames: list[EventFrame]) -> None:
        """Be a listener, too."""

    def offer(self, frame: EventFrame, prev: int, message: Message) -> None:
        decoded = json.loads(message["text"])
        assert (decoded["dropId"], decoded["seq"]) == (frame.drop_id, frame.seq)
        assert decoded["prev"] == prev
        self.frames.put_nowait(decoded)

    def offer_heartbeat(self, key: str, message: Message) -> None:
        self.frames.put_nowait(json.loads(message["text"]))

    def reconnect(self) -> None:
        self.is_told_to_reconnect.set()

    async def next(self) -> dict[str, Any]:
        return await asyncio.wait_for(self.frames.get(), timeout=5)

    async def up_to(self, seq: int) -> list[dict[str, Any]]:
        frames = [await self.next()]
        while frames[-1]["seq"] < seq:
            frames.append(await self.next())
        return frames

    def waiting(self) -> list[tuple[int, int]]:
        """Take what is there, as (prev, seq)."""
        frames = [self.frames.get_nowait() for _ in range(self.frames.qsize())]
        return [(frame["prev"], frame["seq"]) for frame in frames]


class Listener:
    """Keeps every event as it comes."""

    def __init__(self) -> None:
        self.seqs: list[int] = []

    def hear(self, frames: list[EventFrame]) -> None:
        self.seqs += [frame.seq for frame in frames]

    def reconnect(self) -> None:
        raise AssertionError("the past was not replaced")


def run_with_hub(scenario: Callable[[Hub], Awaitable[None]]) -> None:
    """Run ``scenario`` with a hub that listens; its tasks end with the loop."""

    async def run() -> None:
        hub = Hub()
        await hub.start()
        await scenario(hub)

    asyncio.run(run())


def message(
    drop: Any, *seqs: int, carries_events: bool = True, kind: str = STOCK
) -> dict[str, Any]:
    """Return what the publisher sends about a drop's events ``seqs``."""
    events = [{"seq": n, "type": kind, "ts": AT.timestamp(), "data": {}} for n in seqs]
    return {
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


def remove(drop: Any) -> None:
    """Discard a rehearsal; of a real drop only a backup can take the past."""
    if is_rehearsal_id(drop.pk):
        discard_rehearsal(drop.pk)
    else:
        Drop.objects.filter(pk=drop.pk).update(seq=0)


# --- The hub ----------------------------------------------------------------------------


def test_takes_events_once_and_in_order():
    drop, hub, listener = DropFactory.build(), Hub(), Listener()
    hub.listen(listener, str(drop.pk))

    async def scenario() -> None:
        for seqs in [(1, 2), (2,), (1, 2), (3,), (2, 3, 4)]:
            await hub._take(message(drop, *seqs))

    asyncio.run(scenario())
    assert listener.seqs == [1, 2, 3, 4]


@pytest.mark.django_db(transaction=True)
def test_reads_from_the_log_what_a_message_leaves_out():
    drop, hub, listener = drop_with_events(5), Hub(), Listener()
    hub.listen(listener, str(drop.pk))

    async def scenario() -> None:
        await hub._take(message(drop, 1))
        assert listener.seqs == [1]
        await hub._take(message(drop, 3))
        # The log held even more by then, which its own messages then repeat.
        assert listener.seqs == [1, 2, 3, 4, 5]
        await hub._take(message(drop, 4, 5))
        assert listener.seqs == [1, 2, 3, 4, 5]

    asyncio.run(scenario())


@pytest.mark.django_db(transaction=True)
def test_reads_from_the_log_what_a_message_has_no_room_for():
    drop, hub, listener = drop_with_events(5), Hub(), Listener()
    hub.listen(listener, str(drop.pk))

    asyncio.run(hub._take(message(drop, 5, carries_events=False)))

    assert listener.seqs == [1, 2, 3, 4, 5]


@pytest.mark.django_db(transaction=True)
def test_two_who_read_what_was_missed_pass_it_on_once(monkeypatch):
    monkeypatch.setattr(log, "EVENTS_PER_READ", 3)
    drop, hub, listener = drop_with_events(10), Hub(), Listener()
    hub.listen(listener, str(drop.pk))

    async def scenario() -> None:
        await asyncio.gather(
            hub._take(message(drop, 10, carries_events=False)),
            hub._read_missed(str(drop.pk), 10),
            hub._take(message(drop, 4)),
        )

    asyncio.run(scenario())
    assert listener.seqs == list(range(1, 11))


@pytest.mark.django_db(transaction=True)
def test_a_past_that_is_gone_from_the_log_is_left_behind():
    drop, hub, socket = drop_with_events(9), Hub(), Socket()
    hub.watch(socket, str(drop.pk))

    async def scenario() -> None:
        await hub._take(message(drop, 1, 2))
        await sync_to_async(Event.objects.filter(drop=drop, seq__lt=8).delete)()
        await hub._take(message(drop, 9, carries_events=False))

    asyncio.run(scenario())
    assert socket.is_told_to_reconnect.is_set()
    assert hub.sent(str(drop.pk)) == 9


@pytest.mark.django_db(transaction=True)
def test_a_socket_gets_what_it_watches_and_nothing_twice():
    mine, other = drop_with_events(0), drop_with_events(0)
    of_one, of_all, of_both = Socket(), Socket(), Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch(of_one, str(mine.pk))
        hub.watch_all(of_all)
        hub.watch_all(of_both)
        hub.watch(of_both, str(mine.pk))
        for drop in (other, mine):
            await hub._take(message(drop, 1))
            await of_all.next()
        assert [len(s.waiting()) for s in (of_one, of_both)] == [1, 2]
        hub.unwatch(of_one, str(mine.pk))
        hub.unwatch(of_one, str(mine.pk))
        hub.forget(of_both, [str(mine.pk)])
        await hub._take(message(mine, 2))
        assert (await of_all.next())["seq"] == 2

    run_with_hub(scenario)
    assert [s.waiting() for s in (of_one, of_both)] == [[], []]


# --- Conflation -------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
def test_the_first_change_goes_out_at_once_and_of_a_rush_the_newest(monkeypatch):
    monkeypatch.setattr(hub_module, "TURN_SECONDS", 0.3)
    drop, socket = drop_with_events(0), Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch(socket, str(drop.pk))
        await hub._take(message(drop, 1))
        first = await socket.next()
        assert (first["prev"], first["seq"]) == (0, 1)
        for seq in range(2, 200):
            await hub._take(message(drop, seq))
        last = await socket.next()
        assert (last["prev"], last["seq"]) == (1, 199)
        assert socket.waiting() == []

    run_with_hub(scenario)


def test_who_starts_over_is_not_taken_for_one_with_a_newer_frame(monkeypatch):
    monkeypatch.setattr(hub_module, "SOCKETS_PER_SLICE", 1)
    drop = DropFactory.build()

    async def scenario() -> None:
        hub, sockets = Hub(), [Socket(), Socket()]
        for socket in sockets:
            hub.watch(socket, str(drop.pk))
        await hub._take(message(drop, 1))
        turn = asyncio.ensure_future(hub._take_turn(str(drop.pk)))
        await asyncio.sleep(0)
        await hub._take(message(drop, 2))
        await turn
        had = [socket.waiting() for socket in sockets]
        assert sorted(had) == [[(0, 1)], [(0, 2)]]
        early = sockets[had.index([(0, 2)])]
        hub.watch(early, str(drop.pk))
        await hub._take_turn(str(drop.pk))
        assert [socket.waiting() for socket in sockets] == [[(1, 2)]] * 2

    asyncio.run(scenario())


@pytest.mark.django_db(transaction=True)
def test_a_burst_of_thousands_of_events_is_a_few_frames_and_no_gap():
    drop = DropFactory(seq=5001)
    Event.objects.bulk_create(
        Event(drop_id=drop.pk, seq=n, type=kind, data={"n": n}, created_at=AT)
        for n, kind in [*((n, "RESERVATION_EXPIRED") for n in range(1, 5001)), (5001, STOCK)]
    )
    socket, listener = Socket(), Listener()

    async def scenario(hub: Hub) -> None:
        hub.watch(socket, str(drop.pk))
        hub.listen(listener, str(drop.pk))
        hub._feeds[str(drop.pk)] = Feed(0)
        await hub._take(message(drop, 5001, carries_events=False))
        frames = await socket.up_to(5001)
        assert frames[-1]["type"] == STOCK
        assert [frame["prev"] for frame in frames] == [0, *(f["seq"] for f in frames)][:-1]
        assert len(frames) <= 2 * hub_module.SINGLES_BURST

    run_with_hub(scenario)
    assert listener.seqs == list(range(1, 5002))


@pytest.mark.django_db(transaction=True)
def test_purchases_in_a_rush_keep_their_own_frames(monkeypatch):
    monkeypatch.setattr(hub_module, "TURN_SECONDS", 0.2)
    drop, socket = drop_with_events(0), Socket()
    kinds = ["PURCHASE_COMPLETED", "ACTIVITY_UPDATED"] * 30

    async def scenario(hub: Hub) -> None:
        hub.watch(socket, str(drop.pk))
        for seq, kind in enumerate(kinds, start=1):
            await hub._take(message(drop, seq, kind=kind))
        frames = await socket.up_to(60)
        assert [f["seq"] for f in frames if f["type"] == kinds[0]] == list(range(1, 60, 2))

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_a_crowd_learns_of_a_new_drop_however_much_follows_and_ends_with_its_newest_stock(
    monkeypatch,
):
    # As with so many sockets that a turn has the fewest of the events that carry no state.
    monkeypatch.setattr(hub_module, "SENDS_OF_SINGLES_PER_TURN", 1)
    drop, sockets = drop_with_events(0), [Socket() for _ in range(20)]
    kinds = [
        *("DROP_CREATED", STOCK, "DROP_UPDATED"),
        *["PURCHASE_COMPLETED", "RESERVATION_EXPIRED"] * 60,
        STOCK,
    ]
    news = message(drop, *range(1, len(kinds) + 1))
    for event, kind in zip(news["events"], kinds, strict=True):
        event["type"] = kind

    async def scenario(hub: Hub) -> None:
        for socket in sockets:
            hub.watch_all(socket)
        await hub._take(news)
        for socket in sockets:
            frames = await socket.up_to(124)
            assert [(frame["type"], frame["prev"], frame["seq"]) for frame in frames] == [
                ("DROP_CREATED", 0, 1),
                ("DROP_UPDATED", 1, 3),
                *((kinds[seq - 1], 3 if seq == 119 else seq - 1, seq) for seq in range(119, 124)),
                (STOCK, 123, 124),
            ]

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_those_who_come_together_share_one_reading(monkeypatch):
    drop = drop_with_events(3)
    readings: list[str | None] = []
    read = log.snapshot

    def count(drop_id: str | None) -> Any:
        readings.append(drop_id)
        return read(drop_id)

    monkeypatch.setattr(log, "snapshot", count)

    async def scenario(hub: Hub) -> None:
        snapshots = await asyncio.gather(*(hub.snapshot(str(drop.pk)) for _ in range(50)))
        assert {snapshot.seqs[str(drop.pk)] for snapshot in snapshots} == {3}
        assert readings == [str(drop.pk)]
        # A frame that somebody got may not be missing in what the next one starts from.
        socket = Socket()
        hub.watch(socket, str(drop.pk))
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        await socket.next()
        assert (await hub.snapshot(str(drop.pk))).seqs == {str(drop.pk): 4}

    run_with_hub(scenario)


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
        assert (await socket.up_to(3))[-1]["data"] == {"n": 3}

    run_with_hub(scenario)


@pytest.mark.parametrize("make_id", [new_rehearsal_id, uuid.uuid4])
@pytest.mark.django_db(transaction=True)
def test_who_watches_a_drop_that_is_gone_is_told_to_connect_again(monkeypatch, make_id):
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 0.01)
    other = drop_with_events(1)
    gone = DropFactory(id=make_id())
    watching, listening, elsewhere, everywhere = Socket(), Socket(), Socket(), Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch(watching, str(gone.pk))
        hub.listen(listening, str(gone.pk))
        hub.watch(elsewhere, str(other.pk))
        hub.watch_all(everywhere)
        await sync_to_async(update_drop)(gone.pk, name="Ember")
        await watching.next()
        await sync_to_async(remove)(gone)
        for client in (watching, listening):
            await asyncio.wait_for(client.is_told_to_reconnect.wait(), 5)
        assert not elsewhere.is_told_to_reconnect.is_set()
        assert not everywhere.is_told_to_reconnect.is_set()
        assert str(gone.pk) not in hub._feeds

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_hears_its_own_process_without_redis_but_only_what_joins_on(monkeypatch):
    monkeypatch.setattr(publisher.Publisher, "put", lambda self, news: None)
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 60)
    drop = drop_with_events(0)
    events = [NewEvent(n, EventType.STOCK_UPDATED, {}) for n in range(1, 5)]

    async def scenario(hub: Hub) -> None:
        socket, listener = Socket(), Listener()
        hub.watch(socket, str(drop.pk))
        hub.listen(listener, str(drop.pk))
        publish = sync_to_async(publisher.publish, thread_sensitive=False)
        await publish({drop.pk: events[:1]}, AT)
        assert (await socket.next())["seq"] == 1
        # The second is another process's, and on its way through Redis.
        await publish({drop.pk: events[2:3]}, AT)
        assert listener.seqs == [1]
        await hub._take(message(drop, 2))
        await hub._take(message(drop, 3))
        await publish({drop.pk: events[3:]}, AT)
        await socket.up_to(4)
        await hub._take(message(drop, 4))
        assert listener.seqs == [1, 2, 3, 4]

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
        # Over by now, and with it out of the heartbeat of who watches the current ones.
        await sync_to_async(Drop.objects.filter(pk=second).update)(status=DropStatus.ENDED)
        while heartbeat(await of_all.next()) != {first: 3}:
            continue
        assert heartbeat(await of_one.next()) == {first: 3}

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_who_watches_all_drops_has_heartbeats_of_one_that_is_over_too(monkeypatch):
    monkeypatch.setattr(hub_module, "HEARTBEAT_SECONDS", 0.01)
    current, over = str(drop_with_events(3).pk), str(DropFactory(over=True, seq=4).pk)
    of_all, of_all_and_both = Socket(), Socket()

    async def scenario(hub: Hub) -> None:
        hub.watch_all(of_all)
        hub.watch_all(of_all_and_both)
        hub.watch(of_all_and_both, current)
        hub.watch(of_all_and_both, over)
        beats = [heartbeat(await of_all_and_both.next()) for _ in range(4)]
        assert beats == [{current: 3}, {over: 4}] * 2
        assert [heartbeat(await of_all.next()) for _ in range(2)] == [{current: 3}] * 2

    run_with_hub(scenario)


@pytest.mark.django_db(transaction=True)
def test_heartbeats_go_on_after_any_error(monkeypatch, caplog):
    monkeypatch.setattr(hub_module, "HEARTBEAT_SECONDS", 0.01)
    drop, socket, read = drop_with_events(3), Socket(), log.current_drop_ids
    failures = iter([InterfaceError("connection already closed"), RuntimeError("anything")])

    def fail_at_first() -> list[str]:
        if failure := next(failures, None):
            raise failure
        return read()

    monkeypatch.setattr(log, "current_drop_ids", fail_at_first)

    async def scenario(hub: Hub) -> None:
        hub.watch_all(socket)
        assert heartbeat(await socket.next()) == {str(drop.pk): 3}

    run_with_hub(scenario)
    assert caplog.text.count("a heartbeat failed") == 2


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
def test_failed_attempts_to_listen_leave_no_channels_behind(monkeypatch):
    monkeypatch.setattr(hub_module, "RETRY_SECONDS", 0.01)
    drop, socket = drop_with_events(1), Socket()
    group_add, failures = RedisPubSubLoopLayer.group_add, iter(range(3))
    has_joined = asyncio.Event()

    async def fail_at_first(self: Any, group: str, channel: str) -> None:
        if next(failures, None) is not None:
            raise ConnectionError("gone")
        await group_add(self, group, channel)
        has_joined.set()

    monkeypatch.setattr(RedisPubSubLoopLayer, "group_add", fail_at_first)

    async def scenario(hub: Hub) -> None:
        await has_joined.wait()
        hub.watch(socket, str(drop.pk))
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        assert (await socket.next())["seq"] == 2
        assert len(get_channel_layer().channels) == 1

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
        assert len(hub._tasks) == 6

    asyncio.run(scenario())


def test_who_hears_late_of_a_start_that_failed_does_not_undo_the_next():
    starts = []

    class StartingHub(Hub):
        async def _start(self) -> None:
            starts.append(self)
            if len(starts) == 1:
                raise DatabaseError("gone")

    async def scenario() -> None:
        hub = StartingHub()

        async def start_in_two_attempts() -> None:
            with pytest.raises(DatabaseError):
                await hub.start()
            await hub.start()

        # The second hears of the failure when the first has begun anew.
        await asyncio.gather(start_in_two_attempts(), start_in_two_attempts())

    asyncio.run(scenario())
    assert len(starts) == 2


def test_each_event_loop_has_one_hub():
    async def scenario() -> Hub:
        assert get_hub() is get_hub()
        return get_hub()

    assert asyncio.run(scenario()) is not asyncio.run(scenario())


# --- Messages of clients ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ('{"action": "ping"}', True),
        ('{"action": "ping", "extra": 1}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}"}}', True),
        (f'{{"action": "unsubscribe", "dropId": "{SOME_ID.upper()}"}}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": 3}}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": null}}', True),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": -1}}', False),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": "3"}}', False),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": 1.0}}', False),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": true}}', False),
        (f'{{"action": "subscribe", "dropId": "{SOME_ID}", "since": {2**63}}}', False),
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


# --- The frames -------------------------------------------------------------------------


def test_an_event_frame_is_what_the_contract_says():
    frame = EventFrame(SOME_ID, 3, "STOCK_UPDATED", AT, {"availableStock": 1})
    assert frame.text_after(2) == (
        f'{{"type":"STOCK_UPDATED","dropId":"{SOME_ID}","seq":3,"prev":2,'
        '"ts":"2026-11-22T18:00:00.120000Z","data":{"availableStock":1}}'
    )
    assert json.loads(frame.text_after(1)) == json.loads(frame.text_after(2)) | {"prev": 1}
    assert frame.message_after(2) is frame.message_after(2)


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
    monkeypatch.setattr(publisher.Publisher, "put", lambda self, news: sent.extend(news))
    drop = drop_with_events(publisher.MAX_EVENTS_PER_MESSAGE + 1)
    events = list(Event.objects.filter(drop_id=drop.pk).order_by("seq"))

    publisher.publish({drop.pk: events[:-1]}, AT)
    publisher.publish({drop.pk: events}, AT)

    assert [message["seq"] for message in sent] == [100, 101]
    assert [len(message["events"]) for message in sent] == [100, 0]
    assert sent[0]["events"][0] == {
        "seq": 1,
        "type": "STOCK_UPDATED",
        "ts": AT.timestamp(),
        "data": {"n": 1},
    }


def news_of(seq: int) -> list[dict[str, Any]]:
    return [{"drop_id": SOME_ID, "seq": seq, "events": []}]


def test_the_first_news_goes_out_at_once_and_what_follows_in_one_message(monkeypatch):
    monkeypatch.setattr(publisher, "PAUSE_SECONDS", 0.5)
    messages: list[tuple[float, list[int]]] = []

    class Layer:
        async def group_send(self, group: str, message: dict[str, Any]) -> None:
            seqs = [of_drop["seq"] for of_drop in message["news"]]
            messages.append((time.monotonic(), seqs))

    monkeypatch.setattr(publisher, "get_channel_layer", Layer)
    sender = publisher.Publisher()
    sender.start()
    for first in (1, 11):
        # The second time it has gone to sleep, and is woken.
        time.sleep(0.6)
        put_at = time.monotonic()
        sender.put(news_of(first))
        sender.flush()
        assert messages[-1][1] == [first]
        assert messages[-1][0] - put_at < 0.4
        for seq in range(first + 1, first + 10):
            sender.put(news_of(seq))
        sender.flush()
        assert messages[-1][1] == list(range(first + 1, first + 10))

    assert len(messages) == 4
