"""Servers and databases that die under load: whatever a client was told stays true."""

import asyncio
import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from django.db import connection

from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from purchases.models import Purchase
from reservations.models import Reservation
from reservations.tests.factories import ReservationFactory
from tests.concurrency import another_session, blocked
from tests.servers import WebServer, running_web_servers
from users.tests.factories import UserFactory

pytestmark = [pytest.mark.servers, pytest.mark.django_db(transaction=True)]

CONNECTIONS = 16
# A constraint trigger, deferred: it runs when all else of the transaction is done.
HOLD_COMMITS = """
    CREATE FUNCTION hold_commit() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END';
    CREATE CONSTRAINT TRIGGER hold_commit AFTER INSERT ON reservations_reservation
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hold_commit()
"""


@contextmanager
def commits_that_can_be_held() -> Iterator[Callable[[], Any]]:
    """Make each commit of a reservation wait for whoever holds the advisory lock 42."""
    with connection.cursor() as cursor:
        cursor.execute(HOLD_COMMITS)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP FUNCTION hold_commit CASCADE")


@dataclass(frozen=True)
class Answered:
    """What a client was told, and when."""

    user: uuid.UUID
    call: str
    status: int
    document: dict[str, Any]
    retry_after: str | None
    at: float


class Crowd:
    """New users, one after the other, on some connections to each server, until stopped.

    Each looks at the list and reserves, and every second one purchases.
    """

    def __init__(self, drop: Drop, servers: tuple[WebServer, ...]) -> None:
        self.drop = drop
        self.servers = servers
        self.answers: dict[WebServer, list[Answered]] = {server: [] for server in servers}
        self.unanswered: list[uuid.UUID] = []
        self._is_over = False
        self._changed = threading.Condition()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let them come while the block runs; whoever waits then still gets an answer."""
        with ThreadPoolExecutor(1) as pool:
            working = pool.submit(asyncio.run, self._work())
            try:
                yield
            finally:
                self._is_over = True
                working.result(30)

    def wait_until(self, is_reached: Callable[[], bool], seconds: float = 20) -> None:
        with self._changed:
            assert self._changed.wait_for(is_reached, seconds), self.statuses()

    def confirmed(self, *calls: str) -> list[Answered]:
        return [answer for server in self.servers for answer in self.won(server, *calls)]

    def won(self, server: WebServer, *calls: str, since: float = 0) -> list[Answered]:
        return [
            answer
            for answer in self.answers[server]
            if answer.status == 201 and answer.at >= since and answer.call in (calls or CALLS)
        ]

    def statuses(self) -> set[tuple[int, str | None]]:
        return {
            (answer.status, answer.document.get("code"))
            for answers in self.answers.values()
            for answer in answers
        }

    async def _work(self) -> None:
        await asyncio.gather(
            *(self._shop(server) for server in self.servers for _ in range(CONNECTIONS))
        )

    async def _shop(self, server: WebServer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        while not self._is_over:
            user = uuid.uuid4()
            try:
                await self._send(server, reader, writer, user, "list")
                answer = await self._send(server, reader, writer, user, "reserve")
                if answer.status == 201 and user.int % 2:
                    await self._send(server, reader, writer, user, "purchase")
            except (ConnectionError, asyncio.IncompleteReadError):
                self.unanswered.append(user)
                break
        writer.close()

    async def _send(
        self,
        server: WebServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        user: uuid.UUID,
        call: str,
    ) -> Answered:
        address = "GET /api/drops" if call == "list" else f"POST /api/drops/{self.drop.pk}/{call}"
        writer.write(
            f"{address} HTTP/1.1\r\nHost: localhost\r\n"
            f"X-User-Id: {user}\r\nContent-Length: 0\r\n\r\n".encode()
        )
        async with asyncio.timeout(15):
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines if line)
            body = await reader.readexactly(int(headers["content-length"]))
        answer = Answered(
            user,
            call,
            int(first.split()[1]),
            json.loads(body),
            headers.get("retry-after"),
            time.monotonic(),
        )
        with self._changed:
            self.answers[server].append(answer)
            self._changed.notify_all()
        return answer


CALLS = ("reserve", "purchase")


def assert_nothing_confirmed_is_missing(crowd: Crowd) -> None:
    holds = {answer.document["id"] for answer in crowd.confirmed("reserve")}
    bought = {answer.document["id"] for answer in crowd.confirmed("purchase")}
    stored = {str(pk) for pk in Reservation.objects.values_list("pk", flat=True)}
    assert holds - stored == set()
    stored = {str(pk) for pk in Purchase.objects.values_list("pk", flat=True)}
    assert bought - stored == set()
    assert audit_stock().differences == []


# --- Before the commit ------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_there_is_no_answer_while_the_drop_is_locked_by_others(session_uvicorn, call):
    hold, other = ReservationFactory(), DropFactory()
    user = UserFactory() if call == "reserve" else hold.user
    answers: list[httpx.Response] = []

    with another_session() as session:
        session.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [hold.drop.pk])
        with blocked(lambda: answers.append(post(session_uvicorn, hold.drop, call, user))):
            # The server is alive and well meanwhile, so an answer would be here by now.
            assert post(session_uvicorn, other, "reserve", user).status_code == 201
            assert answers == []
            session.execute("ROLLBACK")

    assert [answer.status_code for answer in answers] == [201]


def test_there_is_no_answer_before_the_commit(session_uvicorn):
    drop, user = DropFactory(), UserFactory()
    answers: list[httpx.Response] = []

    with commits_that_can_be_held(), another_session() as session:
        session.execute("SELECT pg_advisory_xact_lock(42)")
        with blocked(lambda: answers.append(post(session_uvicorn, drop, "reserve", user))):
            wait_for_a_commit_that_is_held(session)
            # The server is alive and well meanwhile, so an answer would be here by now.
            assert httpx.get(f"{session_uvicorn.url}/healthz", trust_env=False).status_code == 200
            assert (answers, Reservation.objects.count()) == ([], 0)
            session.execute("ROLLBACK")

        assert [answer.status_code for answer in answers] == [201]
        assert str(Reservation.objects.get().pk) == answers[0].json()["id"]


def post(server: WebServer, drop: Drop, call: str, user: Any) -> httpx.Response:
    headers = {"X-User-Id": str(getattr(user, "pk", user))}
    return httpx.post(f"{server.url}/api/drops/{drop.pk}/{call}", headers=headers, trust_env=False)


# --- A server that is killed ------------------------------------------------------------


@pytest.mark.slow
def test_servers_that_are_killed_inside_a_batch_have_confirmed_nothing_that_is_missing(
    session_uvicorn,
):
    drop = DropFactory(total_stock=100_000)
    servers = WebServer("uvicorn"), WebServer("daphne")
    with commits_that_can_be_held(), running_web_servers(*servers):
        crowd = Crowd(drop, servers)
        with crowd.at_work():
            crowd.wait_until(lambda: all(len(crowd.won(server)) >= 200 for server in servers))
            with another_session() as session:
                session.execute("SELECT pg_advisory_xact_lock(42)")
                wait_for_a_commit_that_is_held(session)
                for server in servers:
                    server.send_signal(signal.SIGKILL)
                    server.wait()
                session.execute("ROLLBACK")

    assert crowd.statuses() == {(200, None), (201, None)}
    assert len(crowd.unanswered) == 2 * CONNECTIONS
    assert_nothing_confirmed_is_missing(crowd)

    # To ask again is safe: whoever was not answered has bought, gets the hold, or a new one.
    for user in crowd.unanswered:
        again = post(session_uvicorn, drop, "reserve", user)
        assert again.status_code in (200, 201) or again.json()["code"] == "limit_exceeded"
        assert Reservation.objects.filter(user=user).count() == 1
    assert audit_stock().differences == []


def wait_for_a_commit_that_is_held(session: Any) -> None:
    while session.rowcount < 1 or not session.fetchone()[0]:
        session.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")


# --- A database that is restarted -------------------------------------------------------


@pytest.fixture
def commits_that_survive(transactional_db) -> Iterator[None]:
    """Have the database write each commit out before it is confirmed, as in production."""
    name = connection.ops.quote_name(connection.settings_dict["NAME"])
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {name} SET synchronous_commit = on")
    yield
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER DATABASE {name} RESET synchronous_commit")


@pytest.mark.restarts_database
def test_a_restart_of_the_database_is_survived_by_the_servers(servers, commits_that_survive):
    if servers is None:
        pytest.skip("an outside PostgreSQL can't be restarted")
    drop = DropFactory(total_stock=100_000)
    with running_web_servers(WebServer("uvicorn"), WebServer("daphne")) as web_servers:
        crowd = Crowd(drop, web_servers)
        with crowd.at_work():
            crowd.wait_until(lambda: all(len(crowd.won(server)) > 100 for server in web_servers))
            servers.restart_postgres("immediate")
            restarted_at = time.monotonic()
            crowd.wait_until(
                lambda: all(
                    len(crowd.won(server, since=restarted_at)) > 100 for server in web_servers
                )
            )
        assert all(server.is_running for server in web_servers)
        printed = "".join(server.log for server in web_servers)

    # The test's own connections died as well.
    connection.close()
    connection.close_pool()
    seconds = [crowd.won(server, since=restarted_at)[0].at - restarted_at for server in web_servers]
    assert max(seconds) < 5
    assert (503, "unavailable") in crowd.statuses()
    assert crowd.statuses() <= {(200, None), (201, None), (503, "unavailable"), (503, "busy")}
    for answer in (a for answers in crowd.answers.values() for a in answers if a.status == 503):
        assert answer.retry_after == "1"
    assert crowd.unanswered == []
    assert_nothing_confirmed_is_missing(crowd)
    assert "Traceback" not in printed
