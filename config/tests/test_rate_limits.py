"""Limits per user and per address: here, in all processes, and while Redis is away."""

import asyncio
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis as redis_client
from channels.db import database_sync_to_async
from channels.testing import WebsocketCommunicator
from django.contrib.auth.hashers import make_password
from django.db import connection
from limits.storage import RedisStorage

from config import rate_limits, redis
from config.problems import RateLimited
from config.rate_limits import Limit, RateLimits
from drops.models import Drop
from drops.tests.factories import DropFactory
from realtime.asgi import EventStreams
from realtime.consumers import TOO_MANY_SOCKETS
from realtime.limits import open_connections
from realtime.models import SocketTicket
from realtime.tests.test_streams import never, stream_scope
from tests.hot import Request, hot_lane, viewset_lane
from tests.identities import bearer, identity_mode, private_key, signed
from tests.test_conformance import readable
from users.tests.factories import UserFactory

NEW_DROP = {"name": "Aurora", "price": 1, "total_stock": 1}


@pytest.fixture
def limits(settings, servers):
    """Return a function that makes the limits of a process; the first one's serve this process."""

    def make(user: str = "", address: str = "") -> RateLimits:
        settings.RATE_LIMITS = dict.fromkeys(settings.RATE_LIMITS, (user, address))
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


def test_who_is_refused_when_the_clock_is_set_back_waits_for_a_window_and_no_longer(
    limits, monkeypatch
):
    process, somebody = limits(user="2/minute"), uuid.uuid4()
    let_pass(process, somebody, 3)
    hour_ago, began = time.time() - 3600, time.monotonic()
    now = lambda: hour_ago + time.monotonic() - began  # noqa: E731
    monkeypatch.setattr(rate_limits.time, "time", now)

    with pytest.raises(RateLimited) as refused:
        process.check("reserve", somebody, lambda: "a")
    # Redis counts by its own clock when to forget.
    rate_limits.shared_windows().storage.reset()

    assert refused.value.retry_after_seconds <= 60
    assert let_pass(process, somebody, 3) == 2


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


def test_changing_drops_is_limited(limits, client_of, db):
    """Each change goes to all who watch."""
    limits(user="2/minute")
    drop, user = DropFactory(), UserFactory(is_staff=True)
    client = client_of(user)

    answers = [
        client.patch(f"/api/drops/{drop.pk}", {"name": f"Ember {number}"}) for number in range(3)
    ]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[1]["RateLimit"] == '"user";r=0;t=60'
    drop.refresh_from_db()
    assert drop.name == "Ember 1"


async def close_code(path: str, subprotocols: tuple[str, ...] = (), **headers: str) -> int:
    """Return how a socket from one and the same address is closed."""
    from config.asgi import application

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    socket = WebsocketCommunicator(application, path, given, [*subprotocols])
    socket.scope["client"] = ("203.0.113.7", 1)
    await socket.connect(timeout=10)
    code = (await socket.receive_output(timeout=10))["code"]
    await socket.disconnect(timeout=10)
    # The thread's own, which would outlive the test.
    await database_sync_to_async(lambda: connection.close())()
    return code


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (f"/ws/drops/{uuid.UUID(int=7)}", 4404),
        ("/ws/drops/7", 4404),
        ("/ws/drops?since=7", 4400),
        ("/ws/control", 4403),
        ("/ws/elsewhere", 4404),
    ],
)
def test_sockets_are_limited(limits, db, path, code):
    limits(address="2/minute")

    async def code_of_each():
        return [await close_code(path, host="localhost", origin="http://localhost") for _ in "123"]

    # There is no such drop, or no such right; who comes too often doesn't even learn that.
    assert asyncio.run(code_of_each()) == [code, code, TOO_MANY_SOCKETS]


@pytest.mark.django_db(transaction=True)
def test_sockets_of_who_is_switched_off_count_with_the_others(limits):
    limits(address="2/minute")
    user = UserFactory(is_active=False)

    async def code_of_each():
        return [await close_code("/ws/drops", x_user_id=str(user.pk)) for _ in "123"]

    assert asyncio.run(code_of_each()) == [4401, 4401, TOO_MANY_SOCKETS]


@pytest.mark.parametrize("path", ["/ws/control", "/ws/elsewhere"])
def test_an_address_can_have_all_its_sockets_open_and_no_more(settings, limits, db, path):
    limits()
    settings.SOCKETS_PER_ADDRESS = 1
    headers = {"host": "localhost", "origin": "http://localhost"}

    open_connections.enter("203.0.113.7")
    try:
        assert asyncio.run(close_code(path, **headers)) == TOO_MANY_SOCKETS
    finally:
        open_connections.leave("203.0.113.7")
    assert asyncio.run(close_code(path, **headers)) != TOO_MANY_SOCKETS
    assert open_connections.total == 0


def test_tickets_are_limited(limits, client_of, db):
    limits(user="2/minute")
    client = client_of(UserFactory())

    answers = [client.post("/api/ws-ticket") for _ in range(3)]

    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert answers[0]["RateLimit-Policy"] == '"user";q=2;w=60'
    assert SocketTicket.objects.count() == 2


# --- Signing in -------------------------------------------------------------------------


@pytest.fixture
def sign_in(client, db):
    """Return a function that tries a name and a password at the admin."""
    UserFactory(username="Ada", password=make_password("right"), is_staff=True)

    def attempt(username: str, password: str, address: str = "203.0.113.7"):
        form = {"username": username, "password": password}
        return client.post("/admin/login/", form, REMOTE_ADDR=address)

    return attempt


def test_nobody_guesses_the_password_of_a_name_for_ever(limits, sign_in, client):
    limits(user="4/minute")

    # The form takes these for the same name.
    names = ["Ada", " Ada ", "\uff21da", "Ada"]
    guessed = [sign_in(name, "wrong").status_code for name in names]
    refused = sign_in("Ada", "right")

    assert (guessed, refused.status_code) == ([200] * 4, 429)
    assert 0 < int(refused["Retry-After"]) <= 60
    assert refused["RateLimit-Policy"] == '"user";q=4;w=60'
    assert "sessionid" not in client.cookies
    assert client.get("/admin/login/").status_code == 200
    assert [sign_in("Grace", "wrong").status_code for _ in range(5)] == [200] * 4 + [429]


def test_an_address_tries_so_many_names_and_no_more(limits, sign_in):
    limits(address="2/minute")

    tried = [sign_in(name, "wrong").status_code for name in ("Grace", "Alan", "Ada")]

    assert tried == [200, 200, 429]
    assert sign_in("Ada", "right", address="203.0.113.8").status_code == 302


# --- Failed identities ------------------------------------------------------------------


BELIEVED = {
    "header": lambda path, user: {"X-User-Id": str(user.pk)},
    "gateway": lambda path, user: signed("POST", path, user),
    "jwt": lambda path, user: bearer(user),
}
FAILED = {
    "header": lambda path: {"X-User-Id": "me"},
    "gateway": lambda path: signed(
        "POST", path, uuid.uuid4(), secret="the-secret-of-another-gateway"
    ),
    "jwt": lambda path: bearer(uuid.uuid4(), key=private_key(1)),
}


@pytest.mark.parametrize("mode", FAILED)
@pytest.mark.django_db(transaction=True)
def test_an_address_may_fail_so_often_and_who_is_believed_is_served_all_the_same(mode, limits):
    drop, users = DropFactory(), UserFactory.create_batch(2)
    reserve = f"/api/drops/{drop.pk}/reserve"
    # Hot routes, and one that is the viewset's in both lanes.
    paths = [reserve, f"/api/drops/{drop.pk}/purchase", "/api/drops"]

    async def ask(application, user):
        failed = [await application.send(request(path, FAILED[mode](path))) for path in 2 * paths]
        return failed, await application.send(request(reserve, BELIEVED[mode](reserve, user)))

    transcripts = []
    for lane, user in zip((hot_lane, viewset_lane), users, strict=True):
        with identity_mode(mode, CHANNEL_PREFIX=f"test-{uuid.uuid4()}"), lane() as application:
            rate_limits.shared_windows.cache_clear()
            limits(address="4/minute")
            failed, served = asyncio.run(ask(application, user))
        assert [answer.status for answer in failed] == [401] * 4 + [429] * 2
        problem = failed[-1].json()
        assert problem["code"] == "rate_limited"
        assert problem["detail"] == "More than 4 failed identities in 60 s from this address."
        assert 0 < int(failed[-1].header("retry-after")) <= 60
        assert served.status == 201
        transcripts.append(
            [re.sub(r"retry-after: \d+", "", str(readable(answer))) for answer in failed]
        )

    assert transcripts[0] == transcripts[1]
    drop.refresh_from_db()
    assert drop.available_stock == 8


def request(path: str, headers: dict[str, str]) -> Request:
    return Request("POST", path, headers=tuple(headers.items()))


@pytest.mark.django_db(transaction=True)
def test_failed_identities_of_sockets_and_streams_count_with_the_others(limits, client_of):
    limits(address="3/minute")
    drop = DropFactory()

    async def fail():
        codes = [
            await close_code("/ws/drops", x_user_id="me"),
            await close_code("/ws/drops", ("drops.v1", "ticket.unknown")),
        ]
        statuses = []
        scope = stream_scope(drop.pk, address="203.0.113.7", **{"X-User-Id": "me"})

        async def send(message):
            statuses.append(message.get("status"))

        for _ in range(2):
            await EventStreams(never)(scope, asyncio.Event().wait, send)
        return codes, statuses[::2], await close_code("/ws/drops", x_user_id="me")

    codes, statuses, last = asyncio.run(fail())

    assert (codes, statuses, last) == ([4401, 4401], [401, 429], TOO_MANY_SOCKETS)
