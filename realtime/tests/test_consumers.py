"""The consumer: resuming, limits, slow clients, origin and identity, without a network."""

import asyncio
import json
import random
import time
import uuid
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import partial
from itertools import chain
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import transaction
from django.db.models import F

from config.database import read_clock
from drops.models import Drop
from drops.services import update_drop
from drops.tests.factories import DropFactory
from purchases.services import purchase
from realtime import consumers, log
from realtime import hub as hub_module
from realtime import private as private_news
from realtime.frames import pong_frame
from realtime.hub import get_hub
from realtime.limits import open_connections
from realtime.models import Event, SocketTicket
from realtime.tests.sockets import Socket, in_loop
from realtime.tests.test_hub import AT, SOME_ID, STOCK, drop_with_events, message
from realtime.tickets import issue_ticket, use_ticket
from reservations.models import Reservation
from reservations.services import Claim, expire_all_due, release, reserve, void_reservation
from reservations.tests.test_expire_command import create_overdue_holds
from tests.concurrency import at_once
from tests.identities import bearer, identity_mode
from users.models import User
from users.tests.factories import UserFactory
from users.tokens import LEEWAY_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def nothing_is_caught_up(monkeypatch):
    """Many of these events are in no log: the hub would take their drops for gone."""
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 60)


async def following(path: str, **options: Any) -> Socket:
    """Return a socket that has its snapshot."""
    socket = Socket(path, **options)
    assert (await socket.next())["type"] == "SNAPSHOT"
    return socket


# --- Resuming ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["address", "message"])
@pytest.mark.parametrize("count", [3, 1203])
def test_gets_exactly_what_it_missed(how, count):
    drop = drop_with_events(count)

    async def scenario() -> None:
        if how == "address":
            socket = Socket(f"/ws/drops/{drop.pk}?since=1")
        else:
            socket = await following(f"/ws/drops/{await other_drop()}")
            await socket.say({"action": "subscribe", "dropId": str(drop.pk), "since": 1})
        frames = await socket.up_to(count)
        assert joins(frames) == [(n - 1, n) for n in range(2, count + 1)]
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        frame = await socket.next()
        assert (frame["type"], frame["prev"], frame["seq"]) == ("DROP_UPDATED", count, count + 1)

    in_loop(scenario)


def test_a_page_of_what_was_missed_is_one_write():
    drop = drop_with_events(250)

    async def scenario() -> None:
        socket = Socket(f"/ws/drops/{drop.pk}?since=0", is_direct=True)
        assert joins(await socket.up_to(250)) == [(n - 1, n) for n in range(1, 251)]
        assert socket.direct_writes == 3
        for seq in range(251, 301):
            await hub_module.get_hub()._take(message(drop, seq))
        await socket.up_to(300)
        # Most of these were never sent, and the newest joined on to an older one.
        back = Socket(f"/ws/drops/{drop.pk}?since=250", is_direct=True)
        assert joins(await back.up_to(300)) == [(n - 1, n) for n in range(251, 301)]
        assert back.direct_writes == 1

    in_loop(scenario)


def joins(frames: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(frame["prev"], frame["seq"]) for frame in frames]


async def other_drop() -> uuid.UUID:
    return (await sync_to_async(DropFactory)()).pk


def test_what_the_process_remembers_needs_no_query(monkeypatch):
    drop = drop_with_events(0)

    async def scenario() -> None:
        watcher = await following(f"/ws/drops/{drop.pk}")
        for seq in range(1, 6):
            await hub_module.get_hub()._take(message(drop, seq))
        await watcher.up_to(5)
        # The events of these messages were never logged, so nobody can have read them there.
        socket = Socket(f"/ws/drops/{drop.pk}?since=2")
        assert [frame["seq"] for frame in await socket.up_to(5)] == [3, 4, 5]

    in_loop(scenario)


def test_nothing_missed_is_nothing_sent():
    drop = drop_with_events(2)

    async def scenario() -> None:
        socket = Socket(f"/ws/drops/{drop.pk}?since=2")
        await socket.say({"action": "ping"})
        assert (await socket.next())["type"] == "PONG"
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        assert (await socket.next())["prev"] == 2

    in_loop(scenario)


@pytest.mark.parametrize("since", [0, 2, 9])
def test_gets_the_state_where_the_log_does_not_reach_back(since):
    drop = drop_with_events(5)
    Event.objects.filter(drop=drop, seq__lte=3).delete()

    async def scenario() -> None:
        frame = await Socket(f"/ws/drops/{drop.pk}?since={since}").next()
        assert (frame["type"], frame["data"]["drops"][0]["seq"]) == ("SNAPSHOT", 5)

    in_loop(scenario)


def test_gets_the_state_where_too_much_was_missed(monkeypatch):
    monkeypatch.setattr(consumers, "MAX_REPLAY", 3)
    drop = drop_with_events(5)

    async def scenario() -> None:
        assert (await Socket(f"/ws/drops/{drop.pk}?since=1").next())["type"] == "SNAPSHOT"
        assert (await Socket(f"/ws/drops/{drop.pk}?since=2").next())["seq"] == 3

    in_loop(scenario)


@pytest.mark.parametrize("since", [3, 5])
def test_gets_the_state_where_the_numbers_went_back(monkeypatch, since):
    # The hub does not know of it yet, and keeps no state of before.
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 60)
    monkeypatch.setattr(hub_module, "SNAPSHOT_SECONDS", 0)
    drop = drop_with_events(10)

    async def scenario() -> None:
        await following(f"/ws/drops/{drop.pk}")
        await sync_to_async(restore)(drop)
        socket = Socket(f"/ws/drops/{drop.pk}?since={since}")
        frames = [await socket.next() for _ in range(since, 6)]
        assert [frame.get("seq") for frame in frames] == [*range(since + 1, 6), None]
        assert frames[-1]["data"]["drops"][0]["seq"] == 5

    in_loop(scenario)


def restore(drop: Any) -> None:
    """Bring back the time when the fifth event was the newest."""
    Event.objects.filter(drop=drop, seq__gt=5).delete()
    Drop.objects.filter(pk=drop.pk).update(seq=5)


def test_a_past_that_is_replaced_while_it_is_told_ends_the_socket(monkeypatch):
    monkeypatch.setattr(hub_module, "CATCH_UP_SECONDS", 60)
    drop = drop_with_events(10)

    async def scenario() -> None:
        await following(f"/ws/drops/{drop.pk}")
        await sync_to_async(restore)(drop)
        loop, hub, read = asyncio.get_running_loop(), hub_module.get_hub(), log.missed_events

        def read_and_start_over(drop_id: str, seq: int, limit: int) -> Any:
            if seq == 5:
                loop.call_soon_threadsafe(hub._start_over, drop_id, 5)
            return read(drop_id, seq, limit)

        monkeypatch.setattr(log, "missed_events", read_and_start_over)
        socket = Socket(f"/ws/drops/{drop.pk}?since=3")
        assert await socket.close_code() == consumers.SERVICE_RESTART

    in_loop(scenario)


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"/ws/drops/{SOME_ID}?since={bad}"
            for bad in ("", "-1", "x", "1.0", "²", 2**63, "1&since=1", "%00", "0x1", "9" * 5000)
        ),
        "/ws/drops?since=1",
    ],
)
def test_refuses_to_resume_from_what_is_no_number_of_one_drop(path):
    async def scenario() -> None:
        assert await Socket(path).close_code() == consumers.BAD_MESSAGE

    in_loop(scenario)


def test_a_client_that_is_cut_off_again_and_again_misses_nothing(monkeypatch):
    drop = drop_with_events(0)
    choose = random.Random(5)

    async def scenario() -> None:
        async def change() -> None:
            for number in range(120):
                await sync_to_async(update_drop)(drop.pk, name=f"Edition {number}")

        async def follow(seen: list[int]) -> None:
            while not seen or seen[-1] < 120:
                socket = Socket(f"/ws/drops/{drop.pk}?since={seen[-1] if seen else 0}")
                for _ in range(choose.randint(1, 5)):
                    frame = await socket.next()
                    assert frame["prev"] == (seen[-1] if seen else 0)
                    seen.append(frame["seq"])
                    if frame["seq"] == 120:
                        break
                await socket.leave()

        clients: list[list[int]] = [[] for _ in range(20)]
        await asyncio.gather(change(), *(follow(seen) for seen in clients))
        assert [seen[-1] for seen in clients] == [120] * 20

    in_loop(scenario)


@pytest.mark.parametrize("carries_events", [False, True])
def test_a_state_of_all_drops_has_what_happened_while_nobody_watched(monkeypatch, carries_events):
    monkeypatch.setattr(hub_module, "SNAPSHOT_SECONDS", 60)
    drop = drop_with_events(0)

    async def scenario() -> None:
        await (await following("/ws/drops")).leave()
        await Drop.objects.filter(pk=drop.pk).aupdate(seq=1)
        await hub_module.get_hub()._take(message(drop, 1, carries_events=carries_events))
        frame = await Socket("/ws/drops").next()
        assert frame["data"]["drops"][0]["seq"] == 1

    in_loop(scenario)


def test_what_a_state_of_all_drops_holds_is_not_sent_again(monkeypatch):
    # So a turn lasts longer than the reading of a state.
    monkeypatch.setattr(hub_module, "FRAMES_PER_SECOND", 4)
    monkeypatch.setattr(hub_module, "FRAMES_BURST", 0)
    drop, read = drop_with_events(0), log.snapshot

    async def scenario() -> None:
        hub = hub_module.get_hub()

        def read_in_a_turn(drop_id: str | None) -> Any:
            update_drop(drop.pk, name="Ember")
            while hub.sent(str(drop.pk)) < 1:
                time.sleep(0.001)
            return read(drop_id)

        monkeypatch.setattr(log, "snapshot", read_in_a_turn)
        socket = await following("/ws/drops")
        await hub._take(message(drop, 2))
        assert (await socket.next())["prev"] == 1

    in_loop(scenario)


# --- A crowd that is served in slices ---------------------------------------------------


@pytest.mark.parametrize("is_direct", [False, True])
def test_all_frames_of_a_turn_are_one_write(is_direct):
    drop = drop_with_events(0)

    async def scenario() -> None:
        socket = await following(f"/ws/drops/{drop.pk}", is_direct=is_direct)
        hub, before = hub_module.get_hub(), socket.direct_writes
        news = message(drop, *range(1, 31), kind="PURCHASE_COMPLETED")
        news["events"][-1]["type"] = STOCK
        await hub._take(news)
        assert joins(await socket.up_to(30)) == [(n - 1, n) for n in range(1, 31)]
        # The first after a state is compared with it, and goes the usual way with its turn.
        await hub._take(message(drop, *range(31, 61), kind="PURCHASE_COMPLETED"))
        assert joins(await socket.up_to(60)) == [(n - 1, n) for n in range(31, 61)]
        assert socket.direct_writes - before == ([0, 30 + 1][is_direct])

    in_loop(scenario)


@pytest.mark.parametrize("is_direct", [False, True])
def test_who_is_served_last_gets_the_newest_state_and_it_only_once(monkeypatch, is_direct):
    monkeypatch.setattr(hub_module, "SOCKETS_PER_SLICE", 1)
    drop = drop_with_events(0)

    async def scenario() -> None:
        sockets = [await following(f"/ws/drops/{drop.pk}", is_direct=is_direct) for _ in range(4)]
        hub = hub_module.get_hub()
        await hub._take(message(drop, 1))
        # The turn has the loop's next step, and so between two sockets has the next event.
        for seq in (2, 3):
            await asyncio.sleep(0)
            await hub._take(message(drop, seq))
        streams = [await socket.up_to(3) for socket in sockets]
        seqs = [[frame["seq"] for frame in stream] for stream in streams]
        assert sorted(seqs, key=len)[0] == [3], "nobody was served with what had come meanwhile"
        assert [1, 3] in seqs
        await hub._take(message(drop, 4))
        # Each joins on to what that client had before, and nobody gets the third again.
        assert [(await socket.next())["prev"] for socket in sockets] == [3] * 4
        # The snapshot, and the first frame, which had to be compared with it, went another way.
        assert all(bool(socket.direct_writes) == is_direct for socket in sockets)

    in_loop(scenario)


@pytest.mark.parametrize("seed", range(5))
def test_slices_leave_no_gap_and_repeat_nothing_whoever_comes_and_goes(monkeypatch, seed):
    monkeypatch.setattr(hub_module, "SOCKETS_PER_SLICE", 2)
    monkeypatch.setattr(hub_module, "TURN_SECONDS", 0.001)
    last, drop, choose = 400, drop_with_events(0), random.Random(seed)
    purchases = {seq for seq in range(1, last) if choose.random() < 0.02}

    async def scenario() -> None:
        async def change() -> None:
            for seq in range(1, last + 1):
                kind = "PURCHASE_COMPLETED" if seq in purchases else STOCK
                await hub_module.get_hub()._take(message(drop, seq, kind=kind))
                for _ in range(choose.choice([0, 1, 1, 2, 20])):
                    await asyncio.sleep(0)

        async def stay(socket: Socket) -> None:
            frames = await socket.up_to(last)
            assert [frame["prev"] for frame in frames] == [0] + [f["seq"] for f in frames[:-1]]
            assert purchases <= {frame["seq"] for frame in frames}

        async def come_and_go() -> None:
            seen = 0
            while seen < last:
                path, is_direct = f"/ws/drops/{drop.pk}?since={seen}", choose.random() < 0.5
                socket = Socket(path, is_direct=is_direct)
                for _ in range(choose.randint(1, 4)):
                    if choose.random() < 0.3:
                        socket.reads.clear()
                        await asyncio.sleep(0.002)
                        socket.reads.set()
                    frame = await socket.next()
                    assert frame["prev"] == seen
                    seen = frame["seq"]
                    if seen == last:
                        break
                await socket.leave()

        path = f"/ws/drops/{drop.pk}"
        stayers = [await following(path, is_direct=number % 2 == 0) for number in range(7)]
        await asyncio.gather(change(), *map(stay, stayers), *(come_and_go() for _ in range(5)))
        assert all(bool(stayer.direct_writes) == stayer.is_direct for stayer in stayers)

    in_loop(scenario)


# --- How many frames --------------------------------------------------------------------


# Where a turn begins late and the next one does not, one more falls into a second.
TWENTY = 20 + 1


class TimedSocket(Socket):
    """Keeps when each frame came, and of which type it was, by drop."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.came: dict[tuple[str, str], list[float]] = defaultdict(list)

    async def _send(self, message: dict[str, Any]) -> None:
        await super()._send(message)
        if message["type"] == "websocket.send":
            frame = json.loads(message["text"])
            self.came[frame.get("dropId"), frame["type"]].append(time.monotonic())


def most_in_a_second(times: Iterable[float]) -> int:
    times = sorted(times)
    return max(bisect_left(times, at + 1) - number for number, at in enumerate(times))


def test_three_thousand_holds_that_end_at_once_are_few_frames_to_a_socket():
    drop = create_overdue_holds(3000)

    async def scenario() -> None:
        socket = TimedSocket(f"/ws/drops/{drop.pk}")
        assert (await socket.next())["type"] == "SNAPSHOT"
        await sync_to_async(expire_all_due)()
        last = await sync_to_async(lambda: Drop.objects.get(pk=drop.pk).seq)()
        frames = await socket.up_to(last)
        assert last > 3000
        assert [frame["prev"] for frame in frames] == [0, *(f["seq"] for f in frames)][:-1]
        assert (frames[-1]["type"], frames[-1]["data"]["availableStock"]) == (STOCK, 3000)
        ended = socket.came[str(drop.pk), "RESERVATION_EXPIRED"]
        # A hundred at once, and fifty a second.
        assert most_in_a_second(ended) <= 150
        assert len(ended) <= 100 + 50 * (ended[-1] - ended[0]) + 1

    in_loop(scenario)


def test_a_drop_whose_stock_changes_all_the_time_is_twenty_frames_a_second():
    drop = drop_with_events(0)

    async def scenario() -> None:
        socket = TimedSocket(f"/ws/drops/{drop.pk}")
        assert (await socket.next())["type"] == "SNAPSHOT"
        for seq in range(1, 401):
            await hub_module.get_hub()._take(message(drop, seq))
            await asyncio.sleep(0.005)
        await socket.up_to(400)
        assert most_in_a_second(socket.came[str(drop.pk), STOCK]) <= TWENTY

    in_loop(scenario)


def test_who_watches_many_busy_drops_gets_no_more_frames_than_the_guide_says():
    """Fifty drops, of which each changes a hundred times a second."""
    drops, last = [drop_with_events(0) for _ in range(50)], 250
    kinds = [STOCK, "PURCHASE_COMPLETED", "ACTIVITY_UPDATED"]

    async def scenario() -> None:
        socket = TimedSocket("/ws/drops")
        assert (await socket.next())["type"] == "SNAPSHOT"
        socket.came.clear()
        hub, newest = hub_module.get_hub(), dict.fromkeys((str(drop.pk) for drop in drops), 0)
        for seq in range(1, last + 1):
            for drop in drops:
                await hub._take(message(drop, seq, kind=kinds[seq % 3]))
            await asyncio.sleep(0.01)
        while set(newest.values()) != {last}:
            frame = await socket.next()
            assert frame["prev"] == newest[frame["dropId"]]
            newest[frame["dropId"]] = frame["seq"]
        # 250 at once, and a thousand a second; a frame may take the place of one just before.
        assert most_in_a_second(chain.from_iterable(socket.came.values())) <= 1250 + 1
        for (_, kind), times in socket.came.items():
            assert most_in_a_second(times) <= (150 if kind == kinds[1] else TWENTY)

    in_loop(scenario)


# --- Limits -----------------------------------------------------------------------------


def test_a_message_may_be_as_long_as_the_limit_and_no_longer(settings):
    async def scenario() -> None:
        socket = await following("/ws/drops")
        await socket.say(json.dumps({"action": "ping"}).ljust(settings.SOCKET_MESSAGE_BYTES))
        assert (await socket.next())["type"] == "PONG"
        await socket.say(json.dumps({"action": "ping", "x": "€" * 6000}, ensure_ascii=False))
        assert await socket.close_code() == consumers.MESSAGE_TOO_LARGE
        socket = await following("/ws/drops")
        await socket.say_bytes(bytes(settings.SOCKET_MESSAGE_BYTES + 1))
        assert await socket.close_code() == consumers.MESSAGE_TOO_LARGE

    in_loop(scenario)


def test_too_many_messages_close_the_socket(settings):
    settings.SOCKET_MESSAGES_PER_SECOND = 2

    async def scenario() -> None:
        socket = await following("/ws/drops")
        for _ in range(4):
            await socket.say({"action": "ping"})
            assert (await socket.next())["type"] == "PONG"
        for _ in range(50):
            await socket.say({"action": "ping"})
        assert await socket.close_code() == consumers.TOO_MANY_MESSAGES

    in_loop(scenario)


def test_too_many_subscriptions_close_the_socket(settings):
    settings.SOCKET_SUBSCRIPTIONS = 2
    first, second, third = (str(drop.pk) for drop in DropFactory.create_batch(3))

    async def scenario() -> None:
        socket = await following(f"/ws/drops/{first}")
        for drop_id in (second, second, first):
            await socket.say({"action": "subscribe", "dropId": drop_id})
            assert (await socket.next())["type"] == "SNAPSHOT"
        await socket.say({"action": "unsubscribe", "dropId": second})
        await socket.say({"action": "subscribe", "dropId": third})
        assert (await socket.next())["data"]["drops"][0]["id"] == third
        await socket.say({"action": "subscribe", "dropId": second})
        assert await socket.close_code() == consumers.TOO_MANY_SUBSCRIPTIONS

    in_loop(scenario)


def test_an_address_and_a_process_have_room_for_so_many_sockets(settings):
    settings.SOCKETS_PER_ADDRESS, settings.SOCKETS_PER_PROCESS = 2, 3

    async def scenario() -> None:
        assert open_connections._total == 0
        sockets = [await following("/ws/drops") for _ in range(2)]
        assert await Socket().close_code() == consumers.TOO_MANY_SOCKETS
        sockets.append(await following("/ws/drops", address="127.0.0.2"))
        assert await Socket(address="127.0.0.3").close_code() == consumers.PROCESS_IS_FULL
        await sockets[0].leave()
        sockets[0] = await following("/ws/drops")
        for socket in sockets:
            await socket.leave()
        # Also those who never came further count no more.
        assert await Socket("/ws/drops/x").close_code() == consumers.NOT_FOUND
        assert (open_connections._total, open_connections._by_address) == (0, {})

    in_loop(scenario)


def test_what_is_not_watched_any_more_is_not_remembered():
    first, second = drop_with_events(0), drop_with_events(0)

    async def scenario() -> None:
        socket = await following(f"/ws/drops/{first.pk}", is_direct=True)
        for action in ("subscribe", "unsubscribe"):
            await socket.say({"action": action, "dropId": str(second.pk)})
        assert (await socket.next())["type"] == "SNAPSHOT"
        await socket.say({"action": "ping"})
        assert (await socket.next())["type"] == "PONG"
        (consumer,) = hub_module.get_hub()._watching[str(first.pk)]
        assert consumer.ahead.keys() == {str(first.pk)}

    in_loop(scenario)


# --- Clients that don't read ------------------------------------------------------------


def test_who_reads_again_gets_the_newest_states_and_every_purchase(monkeypatch):
    drop = drop_with_events(0)

    async def scenario() -> None:
        slow, quick = [await following(f"/ws/drops/{drop.pk}") for _ in range(2)]
        slow.reads.clear()
        kinds = {5: "PURCHASE_COMPLETED", 9: "RESERVATION_EXPIRED"}
        for seq in range(1, 13):
            await hub_module.get_hub()._take(message(drop, seq, kind=kinds.get(seq, STOCK)))
            await quick.up_to(seq)
        slow.reads.set()
        frames = await slow.up_to(12)
        # The first was already on its way.
        assert [(frame["prev"], frame["seq"]) for frame in frames] == [
            (0, 1),
            (1, 5),
            (5, 9),
            (9, 12),
        ]
        await hub_module.get_hub()._take(message(drop, 13))
        assert (await slow.next())["prev"] == 12

    in_loop(scenario)


def test_who_reads_again_learns_of_a_new_drop_before_its_newest_stock():
    known, new = drop_with_events(0), drop_with_events(0)

    async def scenario() -> None:
        slow, quick = [await following("/ws/drops") for _ in range(2)]
        hub = hub_module.get_hub()
        slow.reads.clear()
        # On its way already, so that what comes now waits.
        await hub._take(message(known, 1))
        await quick.next()
        kinds = {1: "DROP_CREATED", 30: STOCK}
        for seq in range(1, 31):
            kind = kinds.get(seq, "PURCHASE_COMPLETED")
            await hub._take(message(new, seq, kind=kind))
            await quick.up_to(seq)
        slow.reads.set()
        assert (await slow.next())["dropId"] == str(known.pk)
        frames = await slow.up_to(30)
        assert [(frame["type"], frame["prev"], frame["seq"]) for frame in frames] == [
            ("DROP_CREATED", 0, 1),
            ("PURCHASE_COMPLETED", 1, 10),
            *(("PURCHASE_COMPLETED", seq - 1, seq) for seq in range(11, 30)),
            (STOCK, 29, 30),
        ]

    in_loop(scenario)


def test_who_watches_all_drops_loses_nothing_by_unsubscribing_from_one(monkeypatch):
    drop, is_handled = drop_with_events(0), asyncio.Event()

    def answer_ping() -> str:
        is_handled.set()
        return pong_frame()

    monkeypatch.setattr(consumers, "pong_frame", answer_ping)

    async def scenario() -> None:
        slow, quick = [await following("/ws/drops") for _ in range(2)]
        slow.reads.clear()
        for seq in (1, 2):
            await hub_module.get_hub()._take(message(drop, seq))
            await quick.up_to(seq)
        await slow.say({"action": "unsubscribe", "dropId": str(drop.pk)})
        await slow.say({"action": "ping"})
        await is_handled.wait()
        slow.reads.set()
        # The first was already on its way.
        assert [(await slow.next()).get("seq") for _ in range(3)] == [1, None, 2]

    in_loop(scenario)


def test_who_does_not_read_is_closed_and_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(consumers, "SLOWEST_READ_SECONDS", 0.3)
    monkeypatch.setattr(consumers, "CLOSE_SECONDS", 0.3)
    drop = drop_with_events(0)
    cut: asyncio.Queue[Any] = asyncio.Queue()
    monkeypatch.setattr(consumers.backpressure, "abort", cut.put_nowait)

    async def scenario() -> None:
        slow, gone, quick = [await following(f"/ws/drops/{drop.pk}") for _ in range(3)]
        slow.reads.clear()
        gone.reads.clear()
        for seq in range(1, 4):
            await hub_module.get_hub()._take(message(drop, seq))
            assert (await quick.next())["seq"] == seq
        # Told to both; the connection of who does not even read that is cut.
        await asyncio.sleep(0.45)
        assert len(hub_module.get_hub()._watching[str(drop.pk)]) == 1
        slow.reads.set()
        assert await slow.close_code() == consumers.TOO_SLOW
        await asyncio.wait_for(cut.get(), 5)

    in_loop(scenario)


def test_a_heartbeat_never_overtakes_what_it_counts(monkeypatch):
    monkeypatch.setattr(hub_module, "HEARTBEAT_SECONDS", 0.005)
    drop = drop_with_events(0)

    async def scenario() -> None:
        socket = await following(f"/ws/drops/{drop.pk}")
        hub, last = hub_module.get_hub(), 0
        for seq in range(1, 60):
            await hub._take(message(drop, seq))
            if seq % 20 == 0:
                socket.reads.clear()
                await asyncio.sleep(0.02)
                socket.reads.set()
            await asyncio.sleep(0.003)
        while last < 59:
            frame = await asyncio.wait_for(socket._frames.get(), 5)
            if frame["type"] == "HEARTBEAT":
                assert frame["data"]["seqs"][str(drop.pk)] <= last
            else:
                assert frame["prev"] == last
                last = frame["seq"]

    in_loop(scenario)


# --- Any message ------------------------------------------------------------------------


def test_five_thousand_fuzzed_frames_are_refused_without_an_error(caplog):
    choose = random.Random(23)
    expected = {consumers.BAD_MESSAGE, consumers.MESSAGE_TOO_LARGE}
    pruned = drop_with_events(20)
    Event.objects.filter(drop=pruned, seq__lt=10).delete()
    known = [str(drop.pk) for drop in (drop_with_events(20), pruned)]
    answers: Counter[str] = Counter()

    async def scenario() -> None:
        for _ in range(100):
            sockets = [await following("/ws/drops") for _ in range(50)]
            for socket in sockets:
                for _ in range(choose.choice([0, 0, 0, 5])):
                    await socket.say(sensible(choose, known))
                await say_noise(socket, choose)
            codes = {await socket.close_code() for socket in sockets}
            assert codes <= expected
            for socket in sockets:
                answers.update(socket.types())
        assert open_connections._total == 0
        assert await following("/ws/drops")

    in_loop(scenario)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    # States, what was missed, and answers to pings.
    assert min(answers[kind] for kind in ("SNAPSHOT", STOCK, "PONG")) > 100


def sensible(choose: random.Random, drop_ids: list[str]) -> dict[str, Any]:
    """Return a message that is answered, or at least taken."""
    drop_id = choose.choice(drop_ids)
    message = {"action": choose.choice(["subscribe", "subscribe", "unsubscribe", "ping"])}
    message["dropId"] = choose.choice([drop_id, drop_id.upper()])
    since = choose.choice([None, 0, 1, 9, 10, 15, 19, 20, 21, log.LARGEST_SEQ])
    return message if choose.random() < 0.2 else message | {"since": since}


async def say_noise(socket: Socket, choose: random.Random) -> None:
    nasty = ["\x00", "\ud7ff", "\u202e", '"', "{", "[", "\\", "é", "𝄞", " ", "9" * 30, "NaN"]
    text = "".join(choose.choice(nasty) for _ in range(choose.randint(0, 40)))
    values: list[Any] = [None, True, -1, 1e308, 2**70, text, [text], {text: text}, "subscribe"]
    drop_ids = [*values, str(uuid.uuid4())]
    message = {"action": choose.choice(values), "dropId": choose.choice(drop_ids)}
    message["since"] = choose.choice(["bad", "1", -1, 0.5, True, 2**70, [1]])
    kinds = [
        text,
        json.dumps(message),
        json.dumps([message]),
        json.dumps(message)[: choose.randint(0, 60)],
        "[" * choose.choice([10, 5000]),
        text * 600 + "x" * 16_000,
    ]
    if choose.random() < 0.2:
        await socket.say_bytes(choose.randbytes(choose.randint(0, 50)))
    else:
        await socket.say(choose.choice(kinds))


# --- Origin -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("https://shop.example.com", True),
        ("http://testserver", True),
        ("https://evil.example.com", False),
        ("https://shop.example.com.evil.example.com", False),
        ("http://testserver:81", False),
        ("http://[", False),
        ("http://[x]", False),
        ("http://evil]", False),
        ("null", False),
        ("", False),
    ],
)
def test_only_known_origins_may_connect(settings, origin, allowed):
    settings.CORS_ALLOW_ALL_ORIGINS = False
    settings.CORS_ALLOWED_ORIGINS = ["https://shop.example.com"]
    headers = {"Host": "testserver"} | ({} if origin is None else {"Origin": origin})

    async def scenario() -> None:
        if allowed:
            assert await following("/ws/drops", headers=headers)
        else:
            socket = Socket(headers=headers)
            await socket.close_code()
            assert socket.accepted is None

    in_loop(scenario)


def test_where_all_may_connect_a_foreign_page_is_not_its_visitor(settings):
    settings.DEBUG, settings.IDENTITY_MODE, settings.CORS_ALLOW_ALL_ORIGINS = False, "header", True
    visitor = {"Host": "testserver", "X-User-Id": str(UserFactory().pk)}
    own, foreign = {"Origin": "http://testserver"}, {"Origin": "https://evil.example.com"}

    async def scenario() -> None:
        socket = Socket(headers=visitor | foreign)
        assert await socket.close_code() == consumers.INVALID_IDENTITY
        socket = await following("/ws/drops", headers=visitor | own)
        assert (await socket.next())["type"] == "HOLDS"
        await following("/ws/drops", headers={"Host": "testserver"} | foreign)

    in_loop(scenario)


# --- Identity ---------------------------------------------------------------------------


def test_a_ticket_serves_one_socket(client_of):
    user = UserFactory()
    answer = client_of(user).post("/api/ws-ticket")
    assert (answer.status_code, answer["Cache-Control"]) == (201, "no-store")
    offer = ("drops.v1", f"ticket.{answer.json()['ticket']}")

    async def scenario() -> None:
        socket = await following("/ws/drops", subprotocols=offer)
        assert socket.accepted["subprotocol"] == "drops.v1"
        assert (await socket.next())["type"] == "HOLDS"
        assert await Socket(subprotocols=offer).close_code() == consumers.INVALID_IDENTITY

    in_loop(scenario)
    assert SocketTicket.objects.count() == 0


def test_a_ticket_is_for_somebody_and_soon_over(client_of):
    assert client_of().post("/api/ws-ticket").json()["code"] == "identity_required"
    user = UserFactory()
    ticket = issue_ticket(user)
    assert ticket.expires_at - read_clock() < timedelta(seconds=30)
    SocketTicket.objects.update(expires_at=F("expires_at") - timedelta(seconds=30))
    assert use_ticket(ticket.value) is None
    issue_ticket(user)
    assert SocketTicket.objects.count() == 1


def test_a_ticket_of_a_user_who_was_switched_off_is_void():
    user = UserFactory()
    ticket = issue_ticket(user)
    user.is_active = False
    user.save()

    assert use_ticket(ticket.value) is None


def test_of_many_who_come_with_one_ticket_one_gets_in():
    user = UserFactory()
    ticket = issue_ticket(user)

    outcomes = at_once(*[lambda: use_ticket(ticket.value)] * 8)

    assert [identity.user_id for identity in outcomes if identity] == [user.pk]


@pytest.mark.parametrize("ticket", ["", "x", "ticket", "\x00", "é" * 100])
def test_what_is_no_ticket_lets_nobody_in(ticket):
    async def scenario() -> None:
        socket = Socket(subprotocols=("drops.v1", f"ticket.{ticket}"))
        assert await socket.close_code() == consumers.INVALID_IDENTITY

    in_loop(scenario)


def test_outside_development_an_unknown_user_is_refused(settings):
    settings.CREATE_UNKNOWN_USERS = False

    async def scenario() -> None:
        socket = Socket(headers={"X-User-Id": str(uuid.uuid4())})
        assert await socket.close_code() == consumers.INVALID_IDENTITY

    in_loop(scenario)


@pytest.mark.parametrize("with_ticket", [False, True])
def test_a_socket_ends_with_the_token_that_opened_it(client_of, with_ticket):
    user = UserFactory()

    async def scenario(**options: Any) -> None:
        socket = await following("/ws/drops", **options)
        assert (await socket.next())["type"] == "HOLDS"
        assert await socket.close_code() == consumers.INVALID_IDENTITY
        assert ends_at <= time.time() < ends_at + 1

    with identity_mode("jwt"):
        ends_at = time.time() + 2
        headers = bearer(user, exp=ends_at - LEEWAY_SECONDS)
        if with_ticket:
            ticket = client_of().post("/api/ws-ticket", headers=headers).json()["ticket"]
            options = {"subprotocols": ("drops.v1", f"ticket.{ticket}")}
        else:
            options = {"headers": headers}
        in_loop(partial(scenario, **options))


def test_who_leaves_before_the_token_ends_leaves_no_timer(monkeypatch):
    timers = []

    def remember(*arguments: Any) -> asyncio.TimerHandle | None:
        timers.append(end_with(*arguments))
        return timers[-1]

    end_with = private_news.end_with
    monkeypatch.setattr(consumers, "end_with", remember)

    async def scenario() -> None:
        socket = await following("/ws/drops", headers=bearer(UserFactory.build()))
        assert not timers[0].cancelled()
        await socket.leave()
        assert timers[0].cancelled()

    with identity_mode("jwt"):
        in_loop(scenario)


def test_a_token_may_end_after_the_last_date_there_is(client_of):
    with identity_mode("jwt"):
        answer = client_of().post("/api/ws-ticket", headers=bearer(UserFactory(), exp=1e300))
    assert answer.status_code == 201

    async def scenario() -> None:
        offer = ("drops.v1", f"ticket.{answer.json()['ticket']}")
        await following("/ws/drops", subprotocols=offer)

    in_loop(scenario)


def test_who_is_switched_off_is_told_nothing_more():
    drop = DropFactory()
    user, other = UserFactory.create_batch(2)
    hold = reserve(drop.pk, Claim(user.pk))

    def switch_off_and_release() -> None:
        with transaction.atomic():
            User.objects.filter(pk=user.pk).update(is_active=False)
            release(hold.pk, user)

    async def scenario() -> None:
        sockets = [
            await following(f"/ws/drops/{await other_drop()}", headers={"X-User-Id": str(one.pk)})
            for one in (user, other)
        ]
        assert [(await socket.next())["type"] for socket in sockets] == ["HOLDS"] * 2
        await sync_to_async(switch_off_and_release)()
        assert await sockets[0].close_code() == consumers.INVALID_IDENTITY
        assert sockets[0]._frames.empty()
        assert not sockets[1].is_closed.is_set()

    in_loop(scenario)


# --- Private events ---------------------------------------------------------------------


def test_a_user_is_told_what_becomes_of_the_own_holds_and_nobody_else():
    user, other = UserFactory.create_batch(2)
    first, second, third, fourth = DropFactory.create_batch(4)
    released = reserve(first.pk, Claim(user.pk))
    expired = reserve(second.pk, Claim(user.pk))
    bought = reserve(third.pk, Claim(user.pk))
    voided = reserve(fourth.pk, Claim(user.pk))
    # Changed below, where no drop is locked; about to end.
    Reservation.objects.filter(pk=bought.pk).update(expires_at=read_clock() + timedelta(seconds=9))

    async def scenario() -> None:
        mine = await following(f"/ws/drops/{first.pk}", headers={"X-User-Id": str(user.pk)})
        theirs = await following("/ws/drops", headers={"X-User-Id": str(other.pk)})
        nobodys = await following("/ws/drops")
        assert (await theirs.next())["data"] == {"holds": []}
        holds = await mine.next()
        assert (holds["type"], holds.keys()) == ("HOLDS", {"type", "ts", "data"})
        assert {hold["reservationId"] for hold in holds["data"]["holds"]} == {
            str(hold.pk) for hold in (released, expired, bought, voided)
        }
        expiring = await private(mine)
        assert (expiring["type"], expiring["data"]["reservationId"]) == (
            "HOLD_EXPIRING",
            str(bought.pk),
        )
        assert expiring["data"].keys() == {
            "dropId",
            "reservationId",
            "variantId",
            "quantity",
            "expiresAt",
        }
        for happen, kind, hold in [
            (lambda: release(released.pk, user), "HOLD_RELEASED", released),
            (lambda: expire(expired), "HOLD_EXPIRED", expired),
            (lambda: purchase(third.pk, user.pk), "PURCHASE_CONFIRMED", bought),
            (lambda: void_reservation(voided.pk), "HOLD_RELEASED", voided),
        ]:
            await sync_to_async(happen)()
            frame = await private(mine)
            assert (frame["type"], frame["data"]["reservationId"]) == (kind, str(hold.pk))
            assert frame["data"]["dropId"] == str(hold.drop_id)
        for socket in (theirs, nobodys):
            while not socket._frames.empty():
                assert "seq" in await socket.next()

    in_loop(scenario)


async def private(socket: Socket) -> dict[str, Any]:
    while "seq" in (frame := await socket.next()):
        continue
    return frame


def test_that_a_hold_expires_is_told_in_time_also_where_looks_are_rare(monkeypatch):
    monkeypatch.setattr(private_news, "REST_PER_LOOK", 200)
    drop, user, read = DropFactory(), UserFactory(), private_news.read_rows
    hold = reserve(drop.pk, Claim(user.pk))
    ends = read_clock() + timedelta(seconds=12.5)
    Reservation.objects.filter(pk=hold.pk).update(expires_at=ends)

    def read_slowly(*arguments: Any) -> Any:
        # So the next look is 4 s away.
        time.sleep(0.02)
        return read(*arguments)

    monkeypatch.setattr(private_news, "read_rows", read_slowly)

    async def scenario() -> None:
        socket = await following("/ws/drops", headers={"X-User-Id": str(user.pk)})
        assert (await private(socket))["type"] == "HOLDS"
        frame = await private(socket)
        assert frame["type"] == "HOLD_EXPIRING"
        late = datetime.fromisoformat(frame["ts"]) - (ends - timedelta(seconds=10))
        assert abs(late) < timedelta(seconds=0.5)

    in_loop(scenario)


def test_a_purchase_is_told_also_where_looks_are_rare(monkeypatch):
    monkeypatch.setattr(private_news, "DATE_MARGIN", timedelta(seconds=1))
    monkeypatch.setattr(private_news, "pause_after", lambda _: 2.5)
    drop, user = DropFactory(), UserFactory()
    reserve(drop.pk, Claim(user.pk))

    async def scenario() -> None:
        socket = await following("/ws/drops", headers={"X-User-Id": str(user.pk)})
        assert (await private(socket))["type"] == "HOLDS"
        # The next look is further away than what a purchase's date may be behind its commit.
        bought = await sync_to_async(purchase)(drop.pk, user.pk)
        frame = await private(socket)
        assert frame["type"] == "PURCHASE_CONFIRMED"
        assert frame["data"]["purchaseId"] == str(bought.pk)
        # And once.
        await get_hub().private._look()
        assert "PURCHASE_CONFIRMED" not in socket.types()

    in_loop(scenario)


@pytest.mark.parametrize("end", [release, void_reservation])
def test_the_end_of_a_hold_is_told_also_where_no_look_saw_it(monkeypatch, end):
    monkeypatch.setattr(private_news, "pause_after", lambda _: 1.0)
    drop, user = DropFactory(), UserFactory()
    earlier = reserve(DropFactory().pk, Claim(user.pk))
    release(earlier.pk, user)

    async def scenario() -> None:
        socket = await following("/ws/drops", headers={"X-User-Id": str(user.pk)})
        assert (await private(socket))["data"] == {"holds": []}
        held = await sync_to_async(reserve)(drop.pk, Claim(user.pk))
        await sync_to_async(end)(held.pk, *[user] * (end is release))
        frame = await private(socket)
        assert frame["type"] == "HOLD_RELEASED"
        assert frame["data"]["reservationId"] == str(held.pk)
        # Once, and nothing of what was over before its user came.
        await get_hub().private._look()
        assert "HOLD_RELEASED" not in socket.types()

    in_loop(scenario)


def test_a_look_may_be_for_more_users_than_a_statement_has_parameters(settings):
    # Else each statement is written down once more, with all of them.
    settings.DEBUG = False
    user, others = UserFactory(), [uuid.uuid4() for _ in range(66_000)]
    held, gone = [reserve(drop.pk, Claim(user.pk)) for drop in DropFactory.create_batch(2)]
    release(gone.pk, user)

    rows = private_news.read_rows([*others, user.pk], [*others, gone.pk])

    assert rows.holds.keys() == {held.pk}
    assert rows.ended == {gone.pk: "RELEASED"}


def test_who_has_left_before_anybody_looked_is_forgotten():
    has_looked = asyncio.Event()

    class News(private_news.PrivateNews):
        async def _look(self) -> None:
            await super()._look()
            has_looked.set()

    async def scenario() -> None:
        news, user_id, gone = News(), uuid.uuid4(), object()
        looking = asyncio.ensure_future(news.tell_forever())
        # It has nothing to look for yet, and waits.
        await asyncio.sleep(0)
        news.add(user_id, gone)
        news.remove(user_id, gone)
        await asyncio.wait_for(has_looked.wait(), 5)
        assert not news._new
        looking.cancel()

    in_loop(scenario)


def test_who_comes_back_is_told_of_what_is_held_and_not_of_what_ended_meanwhile():
    user = UserFactory()
    drop, other = DropFactory.create_batch(2)
    hold = reserve(drop.pk, Claim(user.pk))

    def buy() -> None:
        reserve(other.pk, Claim(user.pk))
        purchase(other.pk, user.pk)

    async def scenario() -> None:
        headers = {"X-User-Id": str(user.pk)}
        socket = await following("/ws/drops", headers=headers)
        assert len((await private(socket))["data"]["holds"]) == 1
        await socket.leave()
        await sync_to_async(release)(hold.pk, user)
        socket = await following("/ws/drops", headers=headers)
        assert (await private(socket))["data"] == {"holds": []}
        await sync_to_async(buy)()
        assert (await private(socket))["type"] == "PURCHASE_CONFIRMED"

    in_loop(scenario)


def expire(hold: Reservation) -> None:
    Reservation.objects.filter(pk=hold.pk).update(
        created_at=AT - timedelta(days=3000), expires_at=AT - timedelta(days=2999)
    )
    expire_all_due()


def test_a_purchase_is_told_even_if_its_hold_was_never_seen():
    drop, user = DropFactory(), UserFactory()

    async def scenario() -> None:
        socket = await following("/ws/drops", headers={"X-User-Id": str(user.pk)})
        assert (await socket.next())["type"] == "HOLDS"

        def buy() -> Any:
            reserve(drop.pk, Claim(user.pk))
            return purchase(drop.pk, user.pk)

        bought = await sync_to_async(buy)()
        frame = await private(socket)
        assert (frame["type"], frame["data"]["purchaseId"]) == (
            "PURCHASE_CONFIRMED",
            str(bought.pk),
        )

    in_loop(scenario)
