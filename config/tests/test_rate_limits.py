"""Limits per user and per address: here, in all processes, and while Redis is away."""

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis as redis_client
from channels.db import database_sync_to_async
from channels.testing import WebsocketCommunicator
from django.db import connection
from limits.storage import RedisStorage

from config import rate_limits, redis
from config.problems import RateLimited
from config.rate_limits import Limit, RateLimits
from drops.models import Drop
from drops.tests.factories import DropFactory
from realtime.consumers import TOO_MANY_SOCKETS
from tests.hot import hot_lane, viewset_lane
from users.tests.factories import UserFactory

NEW_DROP = {"name": "Aurora", "price": 1, "total_stock": 1}


@pytest.fixture
def limits(settings, servers):
    """Return a function that makes the limits of a process; the first one's serve this process."""

    def make(user: str = "", address: str = "") -> RateLimits:
        actions = ("reserve", "purchase", "create", "socket")
        settings.RATE_LIMITS = dict.fromkeys(actions, (user, address))
        rate_limits.rate_limits.cache_clear()
        return RateLimits()

    # Nobody's requests but this test's.
    settings.CHANNEL_PREFIX = f"test-{uuid.uuid4()}"
    rate_limits.shared_windows.cache_clear()
    yield make
    rate_limits.rate_limits.cache_clear()
    rate_limits.shared_windows.cache_clear()
    rate_limits.own_windows.cache_clear()


@pytest.fixture
def redis_away(monkeypatch):
    """Return the number of times that Redis was asked in vain."""
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise redis_client.ConnectionError("no")

    monkeypatch.setattr(RedisStorage, "acquire_entry", refuse)
    monkeypatch.setattr(redis, "_away_until", float("-inf"))
    yield asked
    redis._away_until = float("-inf")


def let_pass(limits: RateLimits, user_id: uuid.UUID, times: int, address: str = "a") -> int:
    """Return how many of ``times`` requests passed."""
    passed = 0
    for _ in range(times):
        try:
            limits.check("reserve", user_id, lambda: address)
            passed += 1
        except RateLimited:
            pass
    return passed


def test_a_user_has_the_limit_and_no_more(limits):
    process, somebody = limits(user="20/minute"), uuid.uuid4()

    assert let_pass(process, somebody, 30) == 20
    assert let_pass(process, uuid.uuid4(), 30) == 20


def test_a_small_limit_is_exact_too(limits):
    assert let_pass(limits(user="1/minute"), uuid.uuid4(), 5) == 1


def test_an_address_has_a_limit_for_all_its_users(limits):
    process = limits(address="20/minute")

    assert sum(let_pass(process, uuid.uuid4(), 1) for _ in range(30)) == 20
    assert let_pass(process, uuid.uuid4(), 5, address="b") == 5


def test_nothing_is_limited_where_limits_are_off(limits):
    process = limits()

    assert let_pass(process, uuid.uuid4(), 1000) == 1000
    assert process.check("reserve", uuid.uuid4(), lambda: "a") == ()


def test_processes_share_what_goes_beyond_the_first_tenth(limits):
    processes, somebody = [limits(user="30/minute") for _ in range(4)], uuid.uuid4()

    passed = [let_pass(process, somebody, 30) for process in processes]

    # At most a tenth more for each further process; here all of them use that up.
    assert passed[0] == 30
    assert sum(passed) <= 30 + 3 * 3


def test_threads_of_one_process_share_a_limit(limits):
    process, somebody = limits(user="40/minute"), uuid.uuid4()

    with ThreadPoolExecutor(8) as pool:
        passed = sum(pool.map(lambda _: let_pass(process, somebody, 20), range(8)))

    assert passed <= 40 + 8  # no lock is worth exactness here


def test_the_window_moves_on(limits):
    process, somebody = limits(user="3/second"), uuid.uuid4()
    assert let_pass(process, somebody, 10) == 3

    deadline = time.monotonic() + 20
    while not let_pass(process, somebody, 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_while_redis_is_away_the_process_counts_alone(limits, redis_away):
    first, second = limits(user="20/minute"), limits(user="20/minute")
    somebody = uuid.uuid4()

    assert let_pass(first, somebody, 40) == 20
    rate_limits.own_windows.cache_clear()  # another process has its own
    assert let_pass(second, somebody, 40) == 20


def test_while_redis_is_away_it_is_left_alone(limits, redis_away, monkeypatch):
    monkeypatch.setattr(redis, "PAUSE_SECONDS", 60)

    let_pass(limits(user="100/minute"), uuid.uuid4(), 60)

    assert len(redis_away) == 1


def test_a_limit_forgets_early_rather_than_grow(monkeypatch):
    monkeypatch.setattr(rate_limits, "MAX_KEYS", 100)
    limit = Limit("reserve", "user", "60/minute")

    for number in range(1000):
        limit.count(str(number), 1000.0)

    assert len(limit._counts) + len(limit._counts_before) <= 203


def test_a_refused_one_is_refused_from_memory(limits, monkeypatch):
    process, somebody = limits(user="2/minute"), uuid.uuid4()
    let_pass(process, somebody, 3)
    monkeypatch.setattr(rate_limits, "ask_redis", lambda ask, instead: 1 / 0)

    assert let_pass(process, somebody, 50) == 0


# --- In answers -------------------------------------------------------------------------


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_answers_say_how_many_are_left_and_when_to_come_back(lane, limits):
    limits(user="20/minute")
    drop, user = DropFactory(), UserFactory()
    path = f"/api/drops/{drop.pk}/reserve"

    async def ask(application):
        return [await application.post(path, user) for _ in range(21)]

    with lane() as application:
        first, second, *_, last = asyncio.run(ask(application))

    assert (first.status, second.status, last.status) == (201, 200, 429)
    assert first.header("ratelimit-policy") == '"user";q=20;w=60'
    assert first.header("ratelimit") == '"user";r=19;t=60'
    assert second.header("ratelimit") == '"user";r=18;t=60'
    assert last.json()["code"] == "rate_limited"
    assert last.header("content-type") == "application/problem+json"
    assert 0 < int(last.header("retry-after")) <= 60
    assert last.header("ratelimit").startswith('"user";r=0;t=')
    assert last.header("ratelimit-policy") == '"user";q=20;w=60'
    drop.refresh_from_db()
    assert drop.available_stock == 9


@pytest.mark.parametrize("lane", [hot_lane, viewset_lane])
@pytest.mark.django_db(transaction=True)
def test_purchases_and_a_request_that_is_passed_on_count_once(lane, limits):
    limits(user="3/minute")
    drop, user = DropFactory(), UserFactory()

    async def ask(application):
        path = f"/api/drops/{drop.pk}"
        answers = [await application.post(f"{path}/purchase", user) for _ in range(4)]
        # The hot route hands this one on to the viewset.
        odd = [await application.post(f"{path}/reserve", user, {"size": 1}) for _ in range(4)]
        return [answer.status for answer in answers], [answer.status for answer in odd]

    with lane() as application:
        assert asyncio.run(ask(application)) == ([409] * 3 + [429], [400] * 3 + [429])


def test_creating_drops_is_limited_and_reading_is_not(limits, client_of, db):
    limits(user="2/minute")
    client = client_of(UserFactory())

    created = [client.post("/api/drops", NEW_DROP).status_code for _ in range(3)]
    read = {client.get("/api/drops").status_code for _ in range(5)}

    assert (created, read) == ([201, 201, 429], {200})
    assert Drop.objects.count() == 2


def test_sockets_are_limited(limits, servers, db):
    limits(address="2/minute")
    from config.asgi import application

    async def code_of_each():
        codes = []
        for _ in range(3):
            socket = WebsocketCommunicator(application, f"/ws/drops/{uuid.uuid4()}")
            socket.scope["client"] = ("203.0.113.7", 1)
            await socket.connect(timeout=10)
            codes.append((await socket.receive_output(timeout=10))["code"])
        # The thread's own, which would outlive the test.
        await database_sync_to_async(lambda: connection.close())()
        return codes

    # There is no such drop; who comes too often doesn't even learn that.
    assert asyncio.run(code_of_each()) == [4404, 4404, TOO_MANY_SOCKETS]
