import asyncio
import json
import socket
import time
from contextlib import ExitStack

import pytest
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import Permission
from django.contrib.sessions.models import Session
from django.db import OperationalError
from django.test import Client
from redis import Redis
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from config.asgi import application
from control import consumers
from realtime import presence
from realtime.presence import count_sockets
from reservations.tests.factories import ReservationFactory
from users.models import User
from users.tests.factories import UserFactory


@pytest.fixture
def follow_pulse(web_servers):
    """Return a function that opens ``/ws/control`` as ``user``, from a page of the site."""
    server = web_servers[0]

    def open_socket(user=None, origin=server.url):
        headers = {}
        if user is not None:
            client = Client()
            client.force_login(user)
            headers["Cookie"] = f"sessionid={client.cookies['sessionid'].value}"
        return connect(f"{server.ws_url}/ws/control", origin=origin, additional_headers=headers)

    return open_socket


def test_the_pulse_tells_staff_what_no_event_does(follow_pulse):
    ReservationFactory(overdue=True)

    with follow_pulse(UserFactory(is_staff=True, is_superuser=True)) as socket:
        frame = json.loads(socket.recv(timeout=20))

    assert frame["type"] == "PULSE"
    assert frame["data"].keys() == {"oldestOverdueSeconds", "sockets"}
    assert 59 < frame["data"]["oldestOverdueSeconds"] < 600


def test_the_sockets_of_all_processes_are_counted_together(web_servers, follow_pulse):
    with ExitStack() as stack:
        for server in web_servers:
            for _ in range(2):
                watcher = stack.enter_context(connect(f"{server.ws_url}/ws/drops"))
                assert json.loads(watcher.recv(timeout=20))["type"] == "SNAPSHOT"
        pulse = stack.enter_context(follow_pulse(UserFactory(is_staff=True, is_superuser=True)))
        while json.loads(pulse.recv(timeout=20))["data"]["sockets"] != 4:
            pass


def test_another_installation_on_the_same_redis_counts_its_own_sockets(settings):
    async def count() -> list[int | None]:
        counts = []
        async with presence.connect() as redis:
            for number, settings.CHANNEL_PREFIX in enumerate(["one", "another"], 1):
                await presence.report(redis, number)
                counts.append(await count_sockets())
            await redis.delete(*map(presence.number_key, await names()))
            return [*counts, await count_sockets()]

    async def names() -> set[str]:
        async with presence.connect() as redis:
            return await redis.smembers(presence.names_key())

    # And none of a process that is gone.
    assert asyncio.run(count()) == [1, 2, 0]
    assert asyncio.run(names()) == set()


def test_the_pulse_looks_at_no_keys_but_its_own(settings):
    """In a sale there are hundreds of thousands of them, of rate limits and signatures."""
    settings.CHANNEL_PREFIX = "quiet"
    with Redis.from_url(settings.REDIS_URL, decode_responses=True) as redis:
        redis.config_resetstat()
        assert asyncio.run(count_sockets()) == 0
        assert "cmdstat_scan" not in redis.info("commandstats")


def test_the_pulse_does_not_wait_for_a_redis_that_hangs(settings):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings.REDIS_URL = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()

        assert asyncio.run(count_sockets()) is None

    assert time.monotonic() - began < 4


def test_the_pulse_is_for_staff_who_may_view_drops(follow_pulse):
    for user in (None, UserFactory(), UserFactory(is_staff=True)):
        with follow_pulse(user) as socket, pytest.raises(ConnectionClosedError) as closed:
            socket.recv(timeout=20)
        assert closed.value.rcvd.code == 4403


@pytest.mark.parametrize("how", ["signed out", "switched off", "no longer staff", "without role"])
def test_the_pulse_ends_with_the_right_to_it(follow_pulse, how):
    user = UserFactory(is_staff=True)
    right = Permission.objects.get(codename="view_drop")
    user.user_permissions.add(right)

    with follow_pulse(user) as socket:
        assert json.loads(socket.recv(timeout=20))["type"] == "PULSE"
        if how == "signed out":
            Session.objects.all().delete()
        elif how == "without role":
            user.user_permissions.remove(right)
        else:
            lost = "is_active" if how == "switched off" else "is_staff"
            User.objects.filter(pk=user.pk).update(**{lost: False})
        with pytest.raises(ConnectionClosedError) as closed:
            [socket.recv(timeout=20) for _ in range(3)]
    assert closed.value.rcvd.code == 4401


def test_the_pulse_is_not_for_pages_of_other_sites(follow_pulse):
    boss = UserFactory(is_staff=True, is_superuser=True)
    for origin in ("https://elsewhere.example", None):
        with pytest.raises(InvalidStatus, match="403"):
            follow_pulse(boss, origin=origin)


@pytest.mark.django_db(transaction=True)
def test_without_the_database_nobody_is_let_in_and_all_are_asked_to_try_again(monkeypatch):
    def refuse(user):
        raise OperationalError("the server closed the connection unexpectedly")

    monkeypatch.setattr(consumers, "may_view_drops", refuse)

    async def closed():
        headers = [(b"host", b"localhost"), (b"origin", b"http://localhost")]
        socket = WebsocketCommunicator(application, "/ws/control", headers)
        await socket.connect(timeout=20)
        answer = await socket.receive_output(timeout=20)
        await socket.disconnect(timeout=20)
        return answer

    assert asyncio.run(closed()) == {
        "type": "websocket.close",
        "code": 1013,
        "reason": "try again later",
    }
