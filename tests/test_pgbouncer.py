"""The application behind PgBouncer in transaction mode, with fewer sessions than connections."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import httpx
import pytest
from django.db import connection
from django.db.models import F

from benchmarks.proxies import find, pgbouncer
from drops.tests.factories import DropFactory
from purchases.models import Purchase
from reservations.models import Reservation, ReservationStatus
from tests.servers import Process, WebServer, running_web_servers
from users.models import User
from users.tests.factories import UserFactory

SESSIONS = 2
TIMEOUTS = {
    "lock_timeout": "2s",
    "statement_timeout": "15s",
    "idle_in_transaction_session_timeout": "10s",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.servers,
    pytest.mark.skipif(find("pgbouncer") is None, reason="pgbouncer is not installed"),
    pytest.mark.skipif(
        not str(connection.settings_dict["HOST"]).startswith("/"),
        reason="the PgBouncer of the tests has no password for a PostgreSQL elsewhere",
    ),
]


@pytest.fixture
def pooled(transactional_db) -> Iterator[dict[str, str]]:
    """What a process needs to reach the test database through PgBouncer."""
    test = connection.settings_dict
    place = f"ROLE {test['USER']} IN DATABASE {test['NAME']}"
    with connection.cursor() as cursor:
        for name, value in TIMEOUTS.items():
            cursor.execute(f"ALTER {place} SET {name} = '{value}'")
    try:
        with pgbouncer(test, SESSIONS) as (_, url):
            yield {"DATABASE_URL": url, "DATABASE_POOLER": "pgbouncer"}
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER {place} RESET ALL")


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    process = Process("manage.py", *arguments, **environment)
    return process.wait(), process.log


def post(server: WebServer, path: str, user: User, **headers: str) -> int:
    headers["X-User-Id"] = str(user.pk)
    return httpx.post(f"{server.url}/api/drops/{path}", headers=headers, timeout=15).status_code


def test_a_sale_through_pgbouncer(pooled):
    stock, users = 40, UserFactory.create_batch(60)
    drop = DropFactory(total_stock=stock)
    servers = [WebServer("uvicorn", **pooled) for _ in range(2)]

    with running_web_servers(*servers), ThreadPoolExecutor(20) as threads:
        # More calls than a statement needs to be prepared, were it allowed to.
        ask = [
            threads.submit(
                post, servers[n % 2], f"{drop.pk}/reserve", user, **{"Idempotency-Key": str(n)}
            )
            for n, user in enumerate(users)
        ]
        assert Counter(answer.result() for answer in ask) == {201: stock, 409: len(users) - stock}
        holders = list(User.objects.filter(reservations__drop=drop))
        buy = [
            threads.submit(post, servers[n % 2], f"{drop.pk}/purchase", user)
            for n, user in enumerate(holders[: stock // 2])
        ]
        assert Counter(answer.result() for answer in buy) == {201: stock // 2}
        assert httpx.get(f"{servers[0].url}/api/drops/").status_code == 200

        hour = timedelta(hours=1)
        Reservation.objects.active().update(
            created_at=F("created_at") - hour, expires_at=F("expires_at") - hour
        )
        code, log = run("expire_reservations", "--once", **pooled)
        assert code == 0, log

        code, log = run("audit_stock", "--json", **pooled)
        assert code == 0, log
        assert json.loads(log)["differences"] == []

    drop.refresh_from_db()
    assert drop.available_stock == stock // 2
    assert Purchase.objects.count() == stock // 2
    assert Reservation.objects.filter(status=ReservationStatus.EXPIRED).count() == stock // 2
    assert "prepared statement" not in servers[0].log + servers[1].log


def test_the_checks_find_no_fault_with_a_prepared_role(pooled):
    code, log = run("check", "--database", "default", **pooled)

    assert (code, "no issues" in log) == (0, True), log


def test_without_the_setting_pgbouncer_refuses_the_timeouts(pooled):
    code, log = run("audit_stock", "--json", **pooled | {"DATABASE_POOLER": "none"})

    assert code != 0
    assert "unsupported startup parameter" in log
