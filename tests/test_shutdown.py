"""A web server that is told to stop: who waits is answered, nobody new comes in."""

import json
import select
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from drops.models import Drop
from drops.tests.factories import DropFactory
from reservations.models import Reservation
from tests.concurrency import another_session
from tests.servers import Served, Up, WebServer, running_web_servers
from tests.test_hot_faults import commits_that_can_be_held

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.django_db(transaction=True)]

CUSTOMERS = 6
WAYS = ["daphne", "uvicorn", "uvicorn --workers 2", "up daphne", "up uvicorn"]


@contextmanager
def server_of(way: str) -> Iterator[WebServer]:
    first, *rest = way.split()
    server = Up(*rest) if first == "up" else Served(first, *rest)
    with running_web_servers(server):
        yield server


def ask_to_reserve(server: WebServer, drop: Drop) -> socket.socket:
    customer = server.connect()
    customer.sendall(
        f"POST /api/drops/{drop.pk}/reserve HTTP/1.1\r\nHost: localhost\r\n"
        f"X-User-Id: {uuid.uuid4()}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    return customer


def wait_until_read(server: WebServer) -> None:
    """Return when the server has read what was sent to it before: it now reads what came later."""
    for _ in range(10):  # so that each of several processes gets one of these
        assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200


def last_answer(customer: socket.socket) -> tuple[int, dict]:
    """Return the status and the document of an answer after which the connection is closed."""
    received = all_of(customer)
    customer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def all_of(client: socket.socket) -> bytes:
    """Return what the server sends until it closes the connection."""
    received = b""
    while chunk := client.recv(65_536):
        received += chunk
    return received


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    give_up_at = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def is_refused(server: WebServer) -> bool:
    try:
        server.connect().close()
    except ConnectionRefusedError:
        return True
    return False


def close_code(client: ClientConnection) -> int | None:
    try:
        while True:
            client.recv(10)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else None


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_stops_answers_what_it_has_begun_and_begins_nothing(way):
    drop = DropFactory(total_stock=100)
    with (
        server_of(way) as server,
        commits_that_can_be_held(),
        another_session() as holder,
        connect(f"{server.ws_url}/ws/drops", proxy=None) as watcher,
        connect(f"{server.ws_url}/ws/drops/{drop.pk}", proxy=None) as other_watcher,
        httpx.Client(trust_env=False, timeout=20) as client,
        client.stream(
            "GET",
            f"{server.url}/api/drops/{drop.pk}/events",
            headers={"Accept": "text/event-stream"},
        ) as stream,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as idle,
    ):
        watcher.recv(10), other_watcher.recv(10)
        lines = stream.iter_lines()
        assert next(lines) == "retry: 2000"
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = idle.recv(4096)
        while not received.endswith(b"}"):
            received += idle.recv(4096)
        holder.execute("SELECT pg_advisory_xact_lock(42)")
        customers = [ask_to_reserve(server, drop) for _ in range(CUSTOMERS)]
        # One batch stands before its commit; the others wait for its end.
        wait_until(lambda: count_blocked(holder) > 0)
        wait_until_read(server)
        server.send_signal(signal.SIGTERM)

        assert close_code(watcher) == close_code(other_watcher) == 1012
        assert "event: SNAPSHOT" in list(lines)  # and a proper end
        assert idle.recv(4096) == b""
        if "--workers" not in way:  # Of several, the parent keeps the port until all are done.
            wait_until(lambda: is_refused(server))
        assert server.is_running
        assert not select.select(customers, [], [], 0)[0]
        holder.execute("ROLLBACK")

        answers = [last_answer(customer) for customer in customers]
        assert [status for status, _ in answers] == [201] * CUSTOMERS
        told = {document["id"] for _, document in answers}
        assert told == {str(pk) for pk in Reservation.objects.values_list("pk", flat=True)}
        assert server.wait(15) == 0, server.log
        assert "Traceback" not in server.log


def count_blocked(session) -> int:
    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    return session.execute(query).fetchone()[0]


@pytest.mark.parametrize("server_name", ["daphne", "uvicorn"])
def test_a_stream_that_is_being_opened_does_not_keep_a_server_alive(server_name):
    drop = DropFactory()
    with (
        running_web_servers(Served(server_name)) as (server,),
        another_session() as session,
        server.connect() as client,
    ):
        session.execute("LOCK TABLE drops_drop")
        client.sendall(
            f"GET /api/drops/{drop.pk}/events HTTP/1.1\r\nHost: localhost\r\n"
            "Accept: text/event-stream\r\n\r\n".encode()
        )
        query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: session.execute(query).fetchone()[0] > 0)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: is_refused(server))
        session.execute("ROLLBACK")

        assert b"event: SNAPSHOT" in all_of(client)
        assert server.wait(10) == 0, server.log
        assert "Traceback" not in server.log


@pytest.mark.parametrize("server_name", ["daphne", "uvicorn"])
def test_an_answer_that_takes_too_long_does_not_keep_a_server_alive(server_name):
    drop = DropFactory()
    with (
        running_web_servers(Served(server_name, SHUTDOWN_SECONDS="1", HOT_ROUTES="false")) as (
            server,
        ),
        another_session() as session,
    ):
        session.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
        with ask_to_reserve(server, drop):
            query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            wait_until(lambda: session.execute(query).fetchone()[0] > 0)
            started = time.monotonic()
            server.send_signal(signal.SIGTERM)
            # Daphne leaves the thread behind, which ends with its statement's own time limit.
            assert server.wait(15) == 0, server.log
            assert 0.9 < time.monotonic() - started < 10
        session.execute("ROLLBACK")
