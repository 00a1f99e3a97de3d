"""Who may do what: everybody × every route and socket, in every identity mode, cell by cell."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from channels.db import database_sync_to_async
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.db import connection
from django.urls import get_resolver

from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.tests.factories import PurchaseFactory
from realtime.routing import websocket_urlpatterns
from reservations.tests.factories import ReservationFactory
from tests import identities
from tests.hot import Lane, Request, hot_lane, viewset_lane
from tests.identities import bearer, identity_mode, signed
from users.models import User
from users.tests.factories import UserFactory

pytestmark = pytest.mark.django_db(transaction=True)

STRANGER = "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11"


@dataclass(frozen=True)
class Route:
    """A call; ``{...}`` in the address names a row of ``World``.

    ``allowed`` is what each kind of asker gets: nobody, the user whose rows they are,
    another user, the drop's creator, staff. Whoever is not who they say gets 401.
    """

    method: str
    address: str
    allowed: tuple[int, int, int, int, int]
    body: bytes = b""
    # Read without an identity, but not with a wrong one.
    is_api: bool = True


NEW_DROP = b'{"name": "Aurora", "price": "1.00", "total_stock": 1}'
PUBLIC = (200,) * 5
IDENTIFIED = (401, 200, 200, 200, 200)
OWN = (401, 200, 404, 404, 404)
CHANGE = (401, 403, 403, 200, 200)

ROUTES = [
    Route("GET", "/api/drops", PUBLIC),
    Route("GET", "/api/drops?status=draft", PUBLIC),
    Route("POST", "/api/drops", (401, 201, 201, 201, 201), NEW_DROP),
    Route("GET", "/api/drops/{drop}", PUBLIC),
    Route("PATCH", "/api/drops/{drop}", CHANGE, b'{"max_per_user": 2}'),
    # The user holds a pair already and gets the same again.
    Route("POST", "/api/drops/{drop}/reserve", (401, 200, 201, 201, 201)),
    Route("POST", "/api/drops/{held}/purchase", (401, 201, 409, 409, 409)),
    Route("GET", "/api/reservations", IDENTIFIED),
    Route("GET", "/api/reservations/{hold}", OWN),
    Route("DELETE", "/api/reservations/{spare}", OWN),
    Route("GET", "/api/purchases", IDENTIFIED),
    Route("GET", "/api/purchases/{purchase}", OWN),
    Route("GET", "/api/me", IDENTIFIED),
    Route("GET", "/api/drops/{drop}/events", PUBLIC),
    Route("POST", "/api/ws-ticket", (401, 201, 201, 201, 201)),
    # In DEBUG only; see config/tests/test_hardening.py.
    Route("POST", "/api/internal/expire-now", PUBLIC),
    Route("GET", "/api/schema", PUBLIC),
    Route("GET", "/api/docs", PUBLIC),
    Route("GET", "/api/redoc", PUBLIC),
    Route("GET", "/api/asyncapi", PUBLIC, is_api=False),
    Route("GET", "/api/asyncapi.json", PUBLIC, is_api=False),
    # What knows no API identity: staff sign in here with a password.
    Route("GET", "/admin/", (302,) * 5, is_api=False),
    Route("GET", "/admin/audit/", (302,) * 5, is_api=False),
    Route("GET", "/healthz", PUBLIC, is_api=False),
    Route("GET", "/readyz?for=traffic", PUBLIC, is_api=False),
    # In DEBUG, without a token; see operations/tests/test_metrics.py.
    Route("GET", "/metrics", PUBLIC, is_api=False),
    Route("GET", "/", PUBLIC, is_api=False),
    Route("GET", "/drops/{drop}", PUBLIC, is_api=False),
    Route("GET", "/drops/{drop}/", (301,) * 5, is_api=False),
    Route("GET", "/drops/{drop}/holds", PUBLIC, is_api=False),
]
SOCKETS = ["/ws/drops", "/ws/drops/{drop}"]
SOCKET_IS_OPEN, SOCKET_IS_REFUSED = "open", 4401


class World:
    """The rows that the routes name, and everybody who asks."""

    def __init__(self) -> None:
        self.user, self.other, self.creator = UserFactory(), UserFactory(), UserFactory()
        self.staff = UserFactory(is_staff=True)
        self.drop = DropFactory(created_by=self.creator)
        self.hold = ReservationFactory(drop=self.drop, user=self.user)
        self.spare = ReservationFactory(user=self.user)
        self.held = ReservationFactory(user=self.user).drop
        self.purchase = PurchaseFactory(user=self.user)

    def address(self, route: str) -> str:
        names = ("drop", "hold", "spare", "held", "purchase")
        return route.format(**{name: getattr(self, name).pk for name in names})


# Headers of an asker, for a request (method, target, body).
Asker = Callable[[World, str, str, bytes], dict[str, str]]
WHO = ("nobody", "user", "other", "creator", "staff")


def honest(mode: str, who: str) -> Asker:
    def headers(world: World, method: str, target: str, body: bytes) -> dict[str, str]:
        if who == "nobody":
            return {}
        user = getattr(world, who)
        if mode == "header":
            return {"X-User-Id": str(user.pk)}
        return signed(method, target, user, body) if mode == "gateway" else bearer(user)

    return headers


# Nobody of these is the user they say they are.
LIARS: dict[str, dict[str, Asker]] = {
    "header": {
        "no UUID": lambda world, *_: {"X-User-Id": "alice"},
        "nil": lambda world, *_: {"X-User-Id": "00000000-0000-0000-0000-000000000000"},
        "two users": lambda world, *_: {"X-User-Id": f"{world.user.pk},{world.staff.pk}"},
        "switched off": lambda world, *_: {"X-User-Id": str(UserFactory(is_active=False).pk)},
    },
    "gateway": {
        "unsigned": lambda world, *_: {"X-User-Id": str(world.user.pk)},
        "an unsigned stranger": lambda world, *_: {"X-User-Id": STRANGER},
        "forged": lambda world, method, target, body: signed(
            method, target, world.user, body, secret="not-the-secret-of-the-gateway-000000"
        ),
        "expired": lambda world, method, target, body: signed(
            method, target, world.user, body, at=time.time() - 61
        ),
        "from the future": lambda world, method, target, body: signed(
            method, target, world.user, body, at=time.time() + 61
        ),
        "signed for another method": lambda world, method, target, body: signed(
            "OPTIONS", target, world.user, body
        ),
        "signed for another address": lambda world, method, target, body: signed(
            method, f"{target}/", world.user, body
        ),
        "signed for another body": lambda world, method, target, body: signed(
            method, target, world.user, body + b" "
        ),
        "signed for another user": lambda world, method, target, body: (
            signed(method, target, world.other, body) | {"X-User-Id": str(world.user.pk)}
        ),
        "a token": lambda world, *_: {"X-User-Id": str(world.user.pk)} | bearer(world.user),
    },
    "jwt": {
        "forged": lambda world, *_: bearer(world.user, key=identities.private_key(1)),
        "expired": lambda world, *_: bearer(world.user, exp=int(time.time()) - 60),
        "alg=none": lambda world, *_: identities.without_algorithm(world.user),
        "a swapped algorithm": lambda world, *_: identities.swapped_algorithm(world.user),
        "a wrong audience": lambda world, *_: bearer(world.user, aud="another shop"),
        "a wrong issuer": lambda world, *_: bearer(world.user, iss="https://evil.example/"),
        "without an end": lambda world, *_: bearer(world.user, exp=None),
        "a password": lambda world, *_: {"Authorization": "Basic YWRtaW46YWRtaW4="},
    },
}
# In jwt mode the headers of the other modes are nothing, so these are nobody.
NOBODIES: dict[str, Asker] = {
    "plain headers": lambda world, *_: {"X-User-Id": str(world.staff.pk)},
    "a signature": lambda world, method, target, body: signed(method, target, world.staff, body),
}


def table(lane: Callable[[], Any], askers: dict[str, Asker]) -> dict[tuple[str, str], int]:
    """Return the status of each cell, by asker and route; each asker has rows of their own."""
    cells = {}
    with lane() as application, asyncio.Runner() as runner:
        for name, asker in askers.items():
            world = World()
            for route in ROUTES:
                target = world.address(route.address)
                headers = asker(world, route.method, target, route.body)
                answer = runner.run(send(application, route, target, headers))
                cells[name, f"{route.method} {route.address}"] = answer
    return cells


async def send(lane: Lane, route: Route, target: str, headers: dict[str, str]) -> int:
    chunks = (route.body,) if route.body else ()
    typed = headers | ({"Content-Type": "application/json"} if route.body else {})
    return (await lane.send(Request(route.method, target, chunks, tuple(typed.items())))).status


LANES = pytest.mark.parametrize("lane", [hot_lane, viewset_lane])


@LANES
@pytest.mark.parametrize("mode", LIARS)
def test_everybody_gets_their_rights_and_no_more(lane, mode):
    expected = {
        (who, f"{route.method} {route.address}"): status
        for route in ROUTES
        for who, status in zip(WHO, route.allowed, strict=True)
    }

    with identity_mode(mode):
        assert table(lane, {who: honest(mode, who) for who in WHO}) == expected


@LANES
@pytest.mark.parametrize("mode", LIARS)
def test_who_lies_gets_nothing_anywhere(lane, mode):
    expected = {
        (lie, f"{r.method} {r.address}"): 401 if r.is_api else r.allowed[0]
        for lie in LIARS[mode]
        for r in ROUTES
    }

    with identity_mode(mode):
        assert table(lane, LIARS[mode]) == expected
    assert not User.objects.filter(pk=STRANGER).exists()


def test_headers_of_another_mode_say_nothing_in_jwt_mode():
    expected = {(lie, f"{r.method} {r.address}"): r.allowed[0] for lie in NOBODIES for r in ROUTES}

    with identity_mode("jwt"):
        assert table(hot_lane, NOBODIES) == expected


@LANES
def test_a_replay_gets_nothing_that_changes_anything(lane):
    """Reads answer again for their sixty seconds; docs/adr/0010 says why."""
    world = World()
    with identity_mode("gateway"), lane() as application, asyncio.Runner() as runner:
        for route in ROUTES:
            target = world.address(route.address)
            headers = signed(route.method, target, world.creator, route.body)
            first, second = (
                runner.run(send(application, route, target, headers)) for _ in range(2)
            )
            assert first == route.allowed[3], route
            assert second == (401 if route.method != "GET" and route.is_api else first), route
    assert Drop.objects.filter(name="Aurora").count() == 1


async def open_socket(address: str, headers: dict[str, str]) -> Any:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    socket = WebsocketCommunicator(URLRouter(websocket_urlpatterns), address, raw)
    await socket.connect(timeout=10)
    message = await socket.receive_output(timeout=10)
    await socket.disconnect(timeout=10)
    return message["code"] if message["type"] == "websocket.close" else SOCKET_IS_OPEN


@pytest.mark.parametrize("mode", LIARS)
def test_sockets_open_for_everybody_but_liars(mode, servers):
    world = World()
    honest_ones = {who: honest(mode, who) for who in WHO}
    liars = LIARS[mode]
    asked = {
        (name, socket): asker(world, "GET", world.address(socket), b"")
        for name, asker in (honest_ones | liars).items()
        for socket in SOCKETS
    }

    async def fill() -> dict[tuple[str, str], Any]:
        cells = {
            (name, socket): await open_socket(world.address(socket), headers)
            for (name, socket), headers in asked.items()
        }
        # The thread's own, which would outlive the test.
        await database_sync_to_async(lambda: connection.close())()
        return cells

    with identity_mode(mode):
        cells = asyncio.run(fill())
    assert cells == {
        cell: SOCKET_IS_REFUSED if cell[0] in liars else SOCKET_IS_OPEN for cell in asked
    }


def test_a_replayed_handshake_opens_no_socket(servers):
    """It would get the news that are for the user alone, long after the handshake."""
    world = World()

    async def fill() -> dict[str, list[Any]]:
        cells = {}
        for socket in SOCKETS:
            target = world.address(socket)
            captured, fresh = (signed("GET", target, world.user) for _ in range(2))
            cells[socket] = [await open_socket(target, h) for h in (captured, captured, fresh)]
        await database_sync_to_async(lambda: connection.close())()
        return cells

    with identity_mode("gateway"):
        cells = asyncio.run(fill())
    opens_once = [SOCKET_IS_OPEN, SOCKET_IS_REFUSED, SOCKET_IS_OPEN]
    assert cells == dict.fromkeys(SOCKETS, opens_once)


@LANES
def test_only_staff_create_drops_where_the_setting_says_so(lane, settings):
    settings.DROP_CREATORS = "staff"
    route = next(r for r in ROUTES if (r.method, r.address) == ("POST", "/api/drops"))
    world = World()
    with lane() as application, asyncio.Runner() as runner:
        answers = {
            who: runner.run(
                send(
                    application,
                    route,
                    route.address,
                    honest("header", who)(world, "POST", route.address, route.body),
                )
            )
            for who in WHO
        }
    assert answers == {"nobody": 401, "user": 403, "other": 403, "creator": 403, "staff": 201}


def test_the_feed_is_no_password(client_of):
    """In both production modes, a user id that everybody reads opens nothing."""
    world = World()
    PurchaseFactory(user=world.user, drop=world.drop)
    for mode in ("gateway", "jwt"):
        with identity_mode(mode):
            answer = client_of(world.user).post(f"/api/drops/{world.held.pk}/purchase")
        assert answer.status_code == 401


def test_the_table_names_every_route():
    """A new route must say here who may use it."""

    def addresses(patterns: Any, before: str = "") -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            text = before + str(pattern.pattern)
            inner = getattr(pattern, "url_patterns", None)
            found |= addresses(inner, text) if inner and "admin" not in text else {text}
        return found

    known = {
        *("api/^drops/?$", "api/^drops/(?P<pk>[^/.]+)/?$"),
        *("api/^drops/(?P<drop_id>[^/]+)/reserve/?$", "api/^drops/(?P<drop_id>[^/]+)/purchase/?$"),
        *("api/^reservations/?$", "api/^reservations/(?P<pk>[^/.]+)/?$"),
        *("api/^purchases/?$", "api/^purchases/(?P<pk>[^/.]+)/?$"),
        *("api/^me/?$", "api/^internal/expire-now/?$"),
        *("api/^drops/(?P<drop_id>[^/]+)/events/?$", "api/^ws-ticket/?$"),
        *("api/^asyncapi/?$", "api/^asyncapi\\.json/?$"),
        *("api/^schema/?$", "api/^docs/?$", "api/^redoc/?$", "api/", "api"),
        *("admin", "admin/", "admin/audit/", ""),
        *("healthz", "readyz", "metrics"),
        *("drops/<str:drop_id>", "drops/<str:drop_id>/", "drops/<str:drop_id>/holds"),
    }
    assert settings.DEBUG is True
    assert addresses(get_resolver().url_patterns) == known
