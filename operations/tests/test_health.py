import json
import signal
import threading
import time
from datetime import timedelta

import pytest
from django.db import OperationalError, connection
from django.utils import timezone

from operations import health, heartbeats
from operations.health import Probe
from operations.models import Heartbeat
from realtime.hub import Hub


@pytest.fixture(autouse=True)
def fresh_probes(monkeypatch):
    """Remember nothing of the tests before."""
    for name in ("database_probe", "redis_probe"):
        probe = getattr(health, name)
        monkeypatch.setattr(health, name, Probe(probe._ask, probe._if_silent))


def states(client, address="/readyz"):
    response = client.get(address)
    return response.status_code, response.json()


@pytest.mark.django_db(transaction=True)
def test_is_ready_when_all_is_there(client):
    heartbeats.write(health.EXPIRY)

    status, answer = states(client)

    assert (status, answer["status"], answer["failed"]) == (200, "ok", [])
    names = ["database", "migrations", "expiry", "redis", "events"]
    assert answer["checks"] == dict.fromkeys(names, "ok")


@pytest.mark.django_db(transaction=True)
def test_names_a_silent_expiry_loop_but_keeps_the_traffic(client):
    heartbeats.write(health.EXPIRY)
    Heartbeat.objects.update(beaten_at=timezone.now() - timedelta(seconds=16))

    assert states(client)[1]["failed"] == ["expiry"]
    assert states(client)[0] == 503
    status, answer = states(client, "/readyz?for=traffic")
    assert (status, answer["status"], answer["failed"]) == (200, "degraded", ["expiry"])


@pytest.mark.django_db(transaction=True)
def test_names_redis_but_keeps_the_traffic(client, monkeypatch):
    heartbeats.write(health.EXPIRY)

    def away():
        raise ConnectionError("redis.internal:6379 refused")

    monkeypatch.setattr(health, "redis_probe", Probe(away, {"redis": "failing"}))

    status, answer = states(client)
    assert (status, answer["failed"]) == (503, ["redis"])
    assert "internal" not in json.dumps(answer)
    assert states(client, "/readyz?for=traffic")[0] == 200


@pytest.mark.parametrize("address", ["/readyz", "/readyz?for=traffic"])
def test_names_the_database_and_tells_nothing_more(client, monkeypatch, address):
    def away():
        raise OperationalError("password for drops at db.internal refused")

    silent = health.database_probe._if_silent
    monkeypatch.setattr(health, "database_probe", Probe(away, silent))

    status, answer = states(client, address)

    assert (status, answer["failed"]) == (503, ["database"])
    assert answer["checks"]["migrations"] == "unknown"
    assert "internal" not in json.dumps(answer)
    assert "password" not in json.dumps(answer)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("address", ["/readyz", "/readyz?for=traffic"])
def test_names_migrations_that_are_missing(client, monkeypatch, address):
    heartbeats.write(health.EXPIRY)
    known = health.known_migrations() | {("drops", "9999_from_tomorrow")}
    monkeypatch.setattr(health, "known_migrations", lambda: known)

    status, answer = states(client, address)

    assert status == 503
    assert "migrations" in answer["failed"]


@pytest.mark.django_db(transaction=True)
def test_names_events_that_lag(client, monkeypatch):
    heartbeats.write(health.EXPIRY)
    monkeypatch.setattr(health, "seconds_behind", lambda: 6.0)

    assert states(client)[1]["failed"] == ["events"]


def test_a_hub_is_behind_from_the_moment_it_knew_all(monkeypatch):
    import asyncio

    from realtime import hub

    loop = asyncio.new_event_loop()
    one = Hub()
    monkeypatch.setattr(hub, "_hubs", {loop: one})

    assert hub.seconds_behind() == 0.0
    one.level_at = time.monotonic() - 7
    assert 7 <= hub.seconds_behind() < 8
    loop.close()
    assert hub.seconds_behind() == 0.0


def test_answers_in_time_when_something_hangs_and_asks_only_once(client, monkeypatch):
    gone_on = threading.Event()
    asked = []

    def hang():
        asked.append(1)
        gone_on.wait(20)
        return {}

    monkeypatch.setattr(health, "ANSWER_SECONDS", 0.2)
    silent = health.database_probe._if_silent
    monkeypatch.setattr(health, "database_probe", Probe(hang, silent))
    began = time.monotonic()

    answers = [states(client) for _ in range(3)]

    gone_on.set()
    assert time.monotonic() - began < 2
    assert [status for status, _ in answers] == [503] * 3
    assert all("database" in answer["failed"] for _, answer in answers)
    assert len(asked) == 1


def test_what_hangs_takes_no_time_from_the_others(client, monkeypatch):
    gone_on = threading.Event()

    def hang():
        gone_on.wait(20)
        return {}

    monkeypatch.setattr(health, "ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(health, "database_probe", Probe(hang, {"database": "failing"}))

    status, answer = states(client)

    gone_on.set()
    assert (status, answer["failed"]) == (503, ["database"])
    assert answer["checks"]["redis"] == "ok"


@pytest.mark.django_db(transaction=True)
def test_the_database_is_asked_once_a_second_however_many_ask(client, monkeypatch):
    asked = []

    def ask():
        asked.append(1)
        return health.ask_database()

    monkeypatch.setattr(health, "database_probe", Probe(ask, {"database": "failing"}))

    for _ in range(5):
        states(client)

    assert len(asked) == 1


@pytest.mark.parametrize("address", ["/healthz", "/readyz?for=traffic"])
@pytest.mark.django_db(transaction=True)
def test_probes_come_by_address_whatever_the_host_header_says(client, address):
    assert client.get(address, HTTP_HOST="10.1.2.3:4000").status_code == 200


# --- Heartbeats -------------------------------------------------------------------------


def test_beats_at_most_every_two_seconds(db, django_assert_num_queries):
    pulse = heartbeats.Pulse("loop")

    with django_assert_num_queries(2):  # the heartbeat, and once the old ones
        pulse.beat()
        pulse.beat()
    pulse._beaten_at -= heartbeats.BEAT_SECONDS
    with django_assert_num_queries(1):
        pulse.beat()

    assert Heartbeat.objects.filter(name="loop").count() == 1


def test_forgets_processes_that_are_gone_but_never_the_newest(db):
    old = timezone.now() - timedelta(hours=25)
    Heartbeat.objects.create(name="loop", process="a:1", beaten_at=old)
    Heartbeat.objects.create(name="loop", process="a:2", beaten_at=old + timedelta(minutes=1))
    Heartbeat.objects.create(name="audit_stock", process="a:3", beaten_at=old, differences=2)

    heartbeats.prune()

    left = Heartbeat.objects.order_by("process").values_list("process", flat=True)
    assert list(left) == ["a:2", "a:3"]
    signs = heartbeats.read(15)
    assert (signs["loop"].alive, signs["audit_stock"].differences) == (0, 2)


def test_counts_all_loops_that_live(db):
    now = timezone.now()
    for number, seconds in enumerate([1, 5, 100]):
        Heartbeat.objects.create(
            name="loop", process=f"a:{number}", beaten_at=now - timedelta(seconds=seconds)
        )

    signs = heartbeats.read(15)["loop"]

    assert signs.alive == 2
    assert 1 <= signs.age_seconds < 3


@pytest.mark.slow
@pytest.mark.servers
def test_the_expiry_loop_beats(start_expiry):
    loop = start_expiry()
    loop.wait_for_line("stop with Ctrl-C")

    deadline = time.monotonic() + 10
    while health.EXPIRY not in heartbeats.read(15) and time.monotonic() < deadline:
        connection.close()
        time.sleep(0.1)

    assert heartbeats.read(15)[health.EXPIRY].alive == 1
    loop.send_signal(signal.SIGTERM)
    loop.wait()
