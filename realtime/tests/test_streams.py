"""The event log over HTTP: pages, and server-sent events of real servers."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import StringIO
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.core.management import CommandError, call_command
from django.db import DatabaseError

from config.database import read_clock
from drops.services import update_drop
from drops.tests.factories import DropFactory
from realtime import asgi as streams
from realtime import hub as hub_module
from realtime import log
from realtime.asgi import EventStreams
from realtime.hub import get_hub
from realtime.limits import open_connections
from realtime.models import Event
from realtime.tests.sockets import Socket, in_loop
from realtime.tests.test_hub import drop_with_events, message
from tests.hot import Lane, hot_lane
from tests.identities import bearer, identity_mode
from tests.servers import WebServer, running_web_servers
from users.models import User
from users.tests.factories import UserFactory
from users.tokens import LEEWAY_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)


# --- Pages ------------------------------------------------------------------------------


def test_pages_lead_through_all_events_in_order(client_of):
    drop = drop_with_events(5)
    address, seqs = f"/api/drops/{drop.pk}/events?limit=2", []

    while address:
        page = client_of().get(address).json()
        assert page.keys() == {"next", "results"}
        seqs.append([event["seq"] for event in page["results"]])
        address = page["next"]

    assert seqs == [[1, 2], [3, 4], [5]]
    assert page["results"][0] == {
        "type": "STOCK_UPDATED",
        "dropId": str(drop.pk),
        "seq": 5,
        "prev": 4,
        "ts": "2026-11-22T18:00:00.120000Z",
        "data": {"n": 5},
    }


def test_a_page_begins_after_what_one_has(client_of):
    drop = drop_with_events(5)

    def seqs(query: str) -> list[int]:
        page = client_of().get(f"/api/drops/{drop.pk}/events/{query}").json()
        return [event["seq"] for event in page["results"]]

    assert (seqs("?after=3"), seqs("?after=5"), seqs("?after=0")) == ([4, 5], [], [1, 2, 3, 4, 5])
    Event.objects.filter(drop=drop, seq__lt=3).delete()
    assert (seqs(""), seqs("?after=2")) == ([3, 4, 5], [3, 4, 5])


@pytest.mark.parametrize("after", [1, 6])
def test_says_that_the_log_does_not_reach_back(client_of, after):
    drop = drop_with_events(5)
    Event.objects.filter(drop=drop, seq__lt=3).delete()

    answer = client_of().get(f"/api/drops/{drop.pk}/events?after={after}")

    assert (answer.status_code, answer.json()["code"]) == (410, "events_gone")


@pytest.mark.parametrize("after", [8, 20])
def test_an_event_of_this_moment_hides_no_gap_and_is_none(client_of, monkeypatch, after):
    drop = drop_with_events(20)
    Event.objects.filter(drop=drop).delete()
    read, looks = log.events_after, []

    def read_before_a_commit(*arguments: Any) -> list[log.LoggedEvent]:
        events = read(*arguments)
        if not looks:
            update_drop(drop.pk, name="Ember")
        looks.append(events)
        return events

    monkeypatch.setattr(log, "events_after", read_before_a_commit)
    answer = client_of().get(f"/api/drops/{drop.pk}/events?after={after}")

    assert len(looks) == 2
    if after == 20:
        assert [event["seq"] for event in answer.json()["results"]] == [21]
    else:
        assert (answer.status_code, answer.json()["code"]) == (410, "events_gone")


@pytest.mark.parametrize(
    "query", ["after=x", "after=-1", f"after={2**63}", "limit=0", "limit=1001"]
)
def test_refuses_a_query_that_is_out_of_bounds(client_of, query):
    drop = drop_with_events(1)

    answer = client_of().get(f"/api/drops/{drop.pk}/events?{query}")

    assert (answer.status_code, answer.json()["code"]) == (400, "validation_error")


def test_drafts_and_unknown_drops_have_no_events(client_of):
    draft = DropFactory(draft=True)

    for drop_id in (draft.pk, uuid.uuid4(), "x"):
        answer = client_of().get(f"/api/drops/{drop_id}/events")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


# --- Streams ----------------------------------------------------------------------------


class Stream:
    """Server-sent events as they come."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self._lines = answer.iter_lines()

    def next(self) -> dict[str, Any]:
        """Return the next event: its id, its name and its frame."""
        event: dict[str, Any] = {}
        for line in self._lines:
            name, _, value = line.partition(": ")
            if not line and "data" in event:
                return event
            event[name] = json.loads(value) if name in ("data", "id") else value
        raise EOFError


@contextmanager
def streaming(server: WebServer, drop_id: Any, query: str = "", **headers: str) -> Iterator[Stream]:
    headers = {"Accept": "text/event-stream"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    address = f"{server.url}/api/drops/{drop_id}/events{query}"
    with (
        httpx.Client(trust_env=False) as client,
        client.stream("GET", address, headers=headers, timeout=10) as answer,
    ):
        yield Stream(answer)


@pytest.mark.servers
def test_a_stream_begins_with_the_state_and_goes_on_with_every_event(web_server):
    drop = drop_with_events(2)

    with streaming(web_server, drop.pk) as stream:
        assert stream.answer.headers["content-type"] == "text/event-stream"
        first = stream.next()
        assert (first["event"], first["id"]) == ("SNAPSHOT", 2)
        assert first["data"]["data"]["drops"][0]["id"] == str(drop.pk)
        for number in range(20):
            update_drop(drop.pk, name=f"Edition {number}")
        events = [stream.next() for _ in range(20)]

    # In a rush, of which a socket gets the newest only.
    assert [event["id"] for event in events] == list(range(3, 23))
    assert [event["data"]["prev"] for event in events] == list(range(2, 22))
    assert {event["event"] for event in events} == {"DROP_UPDATED"}


@pytest.mark.servers
@pytest.mark.parametrize(
    ("query", "headers"),
    [("?after=2", {}), ("", {"Last_Event_ID": "2"}), ("?after=9", {"Last_Event_ID": "2"})],
)
def test_a_stream_goes_on_where_the_one_before_ended(web_server, query, headers):
    drop = drop_with_events(600)

    with streaming(web_server, drop.pk, query, **headers) as stream:
        assert [stream.next()["id"] for _ in range(598)] == list(range(3, 601))
        update_drop(drop.pk, name="Ember")
        assert stream.next()["id"] == 601


@pytest.mark.servers
def test_a_stream_refuses_as_the_pages_do(web_server):
    drop, draft = drop_with_events(1), DropFactory(draft=True)
    switched_off = str(UserFactory(is_active=False).pk)

    for drop_id, query, headers, expected in [
        (draft.pk, "", {}, (404, "not_found")),
        (uuid.uuid4(), "", {}, (404, "not_found")),
        ("x", "", {}, (404, "not_found")),
        (drop.pk, "?after=x", {}, (400, "validation_error")),
        (drop.pk, "?after=", {}, (400, "validation_error")),
        (drop.pk, "", {"Last_Event_ID": "9" * 5000}, (400, "validation_error")),
        (drop.pk, "", {"X_User_Id": "me"}, (401, "invalid_identity")),
        (drop.pk, "", {"X_User_Id": switched_off}, (401, "unknown_user")),
    ]:
        with streaming(web_server, drop_id, query, **headers) as stream:
            stream.answer.read()
            assert (stream.answer.status_code, stream.answer.json()["code"]) == expected


@pytest.mark.servers
def test_a_stream_has_the_headers_of_the_pages_and_says_how_many_are_left():
    drop = drop_with_events(1)
    wanted = {
        "content-security-policy",
        "cross-origin-opener-policy",
        "referrer-policy",
        "x-content-type-options",
        "x-frame-options",
    }
    limit, origin = {"RATE_LIMIT_SOCKET_PER_ADDRESS": "40/minute"}, "https://shop.example.com"

    with running_web_servers(WebServer("uvicorn", CORS_ORIGINS=origin, **limit)) as (server,):
        page = httpx.get(f"{server.url}/api/drops/{drop.pk}/events", trust_env=False)
        for number, (drop_id, status) in enumerate([(drop.pk, 200), (uuid.uuid4(), 404)]):
            with streaming(server, drop_id, Origin=origin) as stream:
                headers = stream.answer.headers
            assert stream.answer.status_code == status
            assert {name: headers[name] for name in wanted} == {
                name: page.headers[name] for name in wanted
            }
            assert {"origin", "accept"} <= set(headers["vary"].lower().split(", "))
            assert headers["ratelimit-policy"] == '"address";q=40;w=60'
            assert headers["ratelimit"].startswith(f'"address";r={39 - number};')
            assert headers["access-control-allow-origin"] == origin


@pytest.mark.servers
def test_streams_are_counted_and_end_with_their_server():
    drop = drop_with_events(1)
    with running_web_servers(WebServer("uvicorn", SOCKETS_PER_ADDRESS="2")) as (server,):
        with streaming(server, drop.pk) as one, streaming(server, drop.pk) as two:
            assert [stream.next()["event"] for stream in (one, two)] == ["SNAPSHOT"] * 2
            with streaming(server, drop.pk) as third:
                assert (third.answer.status_code, third.answer.headers["retry-after"]) == (429, "5")
            server.send_signal(signal.SIGTERM)
            for stream in (one, two):
                with pytest.raises(EOFError):
                    stream.next()
        assert server.wait(10) in (0, -signal.SIGTERM)
        assert "Traceback" not in server.log


def test_a_stream_that_begins_while_the_server_stops_ends_at_once(monkeypatch):
    drop, messages = drop_with_events(1), []
    monkeypatch.setattr(streams, "_is_stopping", False)

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    async def scenario() -> None:
        streams.end_all()
        scope = stream_scope(drop.pk)
        await asyncio.wait_for(EventStreams(never)(scope, asyncio.Event().wait, send), 5)

    in_loop(scenario)
    assert b"event: SNAPSHOT" in messages[2]["body"]
    assert messages[-1]["more_body"] is False


def test_streams_that_come_together_pass_no_limit(settings):
    settings.SOCKETS_PER_ADDRESS, settings.SOCKETS_PER_PROCESS = 2, 3
    drop, application = drop_with_events(1), EventStreams(never)
    answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answers.put_nowait(message)

    def ask(address: str, drop_id: Any = drop.pk) -> asyncio.Future[None]:
        scope = stream_scope(drop_id, address=address)
        return asyncio.ensure_future(application(scope, asyncio.Event().wait, send))

    async def scenario() -> None:
        assert open_connections.total == 0
        streams = [ask(address) for address in ["10.0.0.1", "10.0.0.2"] for _ in range(9)]
        statuses = [(await asyncio.wait_for(answers.get(), 5))["status"] for _ in streams]
        assert sorted(statuses) == [200] * 3 + [429] * 7 + [503] * 8
        assert open_connections.total == 3
        for stream in streams:
            stream.cancel()
        await asyncio.wait(streams)
        # Also what is refused later counts no more.
        await ask("10.0.0.1", uuid.uuid4())
        assert (await answers.get())["status"] == 404
        # And who is cut off before the stream begins.
        early = ask("10.0.0.1")
        await asyncio.sleep(0)
        early.cancel()
        await asyncio.wait([early])
        assert (open_connections.total, open_connections._by_address) == (0, {})

    in_loop(scenario)


def stream_scope(
    drop_id: Any, query: bytes = b"", address: str = "127.0.0.1", **headers: str
) -> dict[str, Any]:
    path = f"/api/drops/{drop_id}/events"
    given = {"Host": "testserver", "Accept": "text/event-stream"} | headers
    return {
        "type": "http",
        "method": "GET",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "scheme": "http",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
        "client": [address, 50000],
    }


@pytest.mark.parametrize("why", ["the token ends", "switched off"])
def test_a_stream_ends_with_the_identity_that_opened_it(why):
    drop, user = drop_with_events(1), UserFactory()
    is_off = why == "switched off"
    ends_at = time.time() + (60 if is_off else 2)
    chunks: asyncio.Queue[bytes] = asyncio.Queue()

    async def send(message: dict[str, Any]) -> None:
        chunks.put_nowait(message.get("body", b""))

    async def scenario() -> None:
        headers = bearer(user, exp=ends_at - LEEWAY_SECONDS)
        scope = stream_scope(drop.pk, **headers)
        running = asyncio.ensure_future(EventStreams(never)(scope, asyncio.Event().wait, send))
        while b"SNAPSHOT" not in await asyncio.wait_for(chunks.get(), 5):
            pass
        if is_off:
            await User.objects.filter(pk=user.pk).aupdate(is_active=False)
        await asyncio.wait_for(running, 5)
        assert is_off or ends_at <= time.time() < ends_at + 1
        assert not get_hub().private._sockets
        assert open_connections.total == 0

    with identity_mode("jwt"):
        in_loop(scenario)


@pytest.mark.parametrize(
    ("headers", "is_visitors"),
    [
        ({"Origin": "http://testserver"}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "https://evil.example.com"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_a_stream_of_a_foreign_page_is_not_its_visitors(settings, headers, is_visitors):
    settings.DEBUG, settings.IDENTITY_MODE = False, "header"
    drop, user = drop_with_events(1), UserFactory()
    opened: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def send(message: dict[str, Any]) -> None:
        opened.put_nowait(message)

    async def scenario() -> None:
        scope = stream_scope(drop.pk, **{"X-User-Id": str(user.pk)} | headers)
        running = asyncio.ensure_future(EventStreams(never)(scope, asyncio.Event().wait, send))
        assert (await asyncio.wait_for(opened.get(), 5))["status"] == 200
        assert (user.pk in get_hub().private._sockets) == is_visitors
        running.cancel()
        await asyncio.wait([running])

    in_loop(scenario)


def test_a_long_accept_header_counts_as_the_others_do():
    address = f"/api/drops/{drop_with_events(1).pk}/events"
    headers = {"Accept": "text/event-stream".ljust(20_000, ","), "X-Filler": "x" * 15_000}

    async def scenario() -> None:
        with hot_lane() as lane:
            streams = Lane(EventStreams(lane.application))
            answer = await asyncio.wait_for(streams.get(address, **headers), 5)
        assert (answer.status, answer.json()["code"]) == (431, "headers_too_large")

    in_loop(scenario)


async def never(*_: Any) -> None:
    raise AssertionError("a stream was asked for")


@pytest.mark.parametrize(("query", "last"), [(b"after=0", 391), (b"", 390)])
def test_what_is_committed_while_the_past_is_told_comes_once_and_in_order(monkeypatch, query, last):
    drop, told, part_came = drop_with_events(350), [], asyncio.Event()

    def change(up_to: int = 390) -> None:
        if drop.seq < up_to:
            update_drop(drop.pk, name=f"Edition {drop.seq}")
            drop.seq += 1

    def among_changes(read: Any, *arguments: Any) -> Any:
        change()
        result = read(*arguments)
        # What comes after the last look into the log is in no page.
        change(390 if result else 391)
        return result

    monkeypatch.setattr(log, "missed_events", partial(among_changes, log.missed_events))
    monkeypatch.setattr(log, "snapshot", partial(among_changes, log.snapshot))

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            assert message["more_body"], "the stream has ended"
            told.extend(re.findall(r"id: (\d+)\nevent: (\w+)", message["body"].decode()))
            part_came.set()
            await sync_to_async(change)()

    async def scenario() -> None:
        scope = stream_scope(drop.pk, query)
        stream = asyncio.ensure_future(EventStreams(never)(scope, asyncio.Event().wait, send))
        while not told or int(told[-1][0]) < last:
            await asyncio.wait_for(part_came.wait(), 5)
            part_came.clear()
        stream.cancel()

    in_loop(scenario)
    seqs = [int(seq) for seq, _ in told]
    assert seqs == list(range(seqs[0], last + 1))
    assert told[0] == ("1", "STOCK_UPDATED") if query else (str(seqs[0]), "SNAPSHOT")


def test_a_state_has_what_was_heard_before_its_stream_came(monkeypatch):
    monkeypatch.setattr(hub_module, "TURN_SECONDS", 60)
    monkeypatch.setattr(hub_module, "SNAPSHOT_SECONDS", 60)
    drop, chunks = drop_with_events(0), asyncio.Queue[bytes]()

    async def send(message: dict[str, Any]) -> None:
        chunks.put_nowait(message.get("body", b""))

    async def scenario() -> None:
        first = Socket(f"/ws/drops/{drop.pk}")
        await first.next()
        await sync_to_async(update_drop)(drop.pk, name="Ember")
        await first.next()
        # Now there is a state of the first event, and the second waits for its turn.
        await Socket(f"/ws/drops/{drop.pk}").next()
        await sync_to_async(update_drop)(drop.pk, name="Ash")
        await get_hub()._take(message(drop, 2, carries_events=False))
        scope = stream_scope(drop.pk)
        stream = asyncio.ensure_future(EventStreams(never)(scope, asyncio.Event().wait, send))
        while b"SNAPSHOT" not in (chunk := await asyncio.wait_for(chunks.get(), 5)):
            pass
        assert chunk.startswith(b"id: 2\n")
        stream.cancel()

    in_loop(scenario)


def test_a_stream_ends_where_the_database_is_away(monkeypatch):
    drop, messages = drop_with_events(1), []

    def fail(*_: Any) -> Any:
        raise DatabaseError("gone")

    async def start_nothing(_: Any) -> None:
        """A hub that is stopped while it connects to Redis takes long."""

    monkeypatch.setattr(log, "missed_events", fail)
    monkeypatch.setattr(hub_module.Hub, "start", start_nothing)

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    async def scenario() -> None:
        scope = stream_scope(drop.pk, b"after=0")
        await asyncio.wait_for(EventStreams(never)(scope, asyncio.Event().wait, send), 5)

    in_loop(scenario)
    # Else daphne keeps the connection, on which nothing more is said.
    assert (messages[0]["status"], messages[-1]["more_body"]) == (200, False)


# --- Who does not read ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.servers
def test_who_never_reads_is_cut_off_and_costs_little_memory(session_web_servers, session_uvicorn):
    """Ten megabytes wait for each of ten clients per server, on sockets and streams."""
    drop = DropFactory(seq=2500)
    Event.objects.bulk_create(
        Event(drop_id=drop.pk, seq=n, type="STOCK_UPDATED", data={"n": "x" * 4000}, created_at=now)
        for now in [read_clock()]
        for n in range(1, 2501)
    )
    servers = [session_web_servers[0], session_uvicorn]
    for server in servers:  # What a first request needs stays for good.
        with streaming(server, drop.pk, "?after=0") as stream:
            assert [stream.next()["id"] for _ in range(2500)][-1] == 2500
    memory, files = [memory_mb(s) for s in servers], [open_files(s) for s in servers]

    with contextlib.ExitStack() as stack:
        for server in servers:
            for request in [HANDSHAKE.format(drop.pk)] * 6 + [STREAM.format(drop.pk)] * 4:
                client = stack.enter_context(socket.socket())
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", server.port))
                client.sendall(request.encode())
        time.sleep(2)
        grown = [memory_mb(s) - was for s, was in zip(servers, memory, strict=True)]
        # A few connections to the database may have come.
        give_up_at = time.monotonic() + 30
        while any(open_files(s) > was + 4 for s, was in zip(servers, files, strict=True)):
            assert time.monotonic() < give_up_at
            time.sleep(0.1)

    # Unbounded it would be a hundred; the rest is what else a process does in the meantime.
    assert max(grown) < 60


HANDSHAKE = (
    "GET /ws/drops/{}?since=0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
STREAM = (
    "GET /api/drops/{}/events?after=0 HTTP/1.1\r\nHost: localhost\r\n"
    "Accept: text/event-stream\r\n\r\n"
)


def open_files(server: WebServer) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def memory_mb(server: WebServer) -> float:
    with open(f"/proc/{server.pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


# --- Pruning ----------------------------------------------------------------------------


def prune(*arguments: str) -> str:
    output = StringIO()
    call_command("prune_events", *arguments, stdout=output)
    return output.getvalue()


def test_prunes_what_is_older_than_a_day_in_batches():
    old, new = drop_with_events(7), DropFactory(seq=1)
    Event.objects.create(drop=new, seq=1, type="STOCK_UPDATED", data={}, created_at=read_clock())
    Event.objects.filter(drop=old).update(created_at="2020-01-01T00:00:00Z")

    assert prune("--batch", "3", "-v", "2").splitlines() == [
        "3 events deleted ...",
        "6 events deleted ...",
        "7 events deleted ...",
        "7 events deleted.",
    ]
    assert list(Event.objects.values_list("drop", flat=True)) == [new.pk]
    assert prune() == "0 events deleted.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--hours", odd) for odd in ("0.9", "x", "nan", "inf", "1e9")),
        ("--batch", "0"),
    ],
)
def test_refuses_to_prune_what_clients_still_need(arguments):
    event = drop_with_events(1)

    with pytest.raises(CommandError):
        prune(*arguments)

    assert event.events.count() == 1
