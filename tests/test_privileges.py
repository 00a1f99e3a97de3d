"""Who may do what: everybody × every route and socket, in every identity mode, cell by cell."""

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from channels.db import database_sync_to_async
from channels.routing import URLRouter
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.contrib.auth.models import Group, Permission
from django.contrib.sessions.models import Session
from django.db import connection
from django.test import Client
from django.urls import URLResolver, get_resolver, resolve
from django.utils import timezone

from config.asgi import application
from control.consumers import NOT_ALLOWED
from control.roles import ROLES
from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.tests.factories import PurchaseFactory
from realtime.asgi import EventStreams
from realtime.consumers import NOT_FOUND
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
    accept: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.method, self.address, self.accept)))


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
    Route("GET", "/api/drops/{drop}/events", PUBLIC, accept="text/event-stream"),
    Route("POST", "/api/ws-ticket", (401, 201, 201, 201, 201)),
    # In DEBUG only; see config/tests/test_hardening.py.
    Route("POST", "/api/internal/expire-now", PUBLIC),
    Route("GET", "/api/schema", PUBLIC),
    Route("GET", "/api/docs", PUBLIC),
    Route("GET", "/api/redoc", PUBLIC),
    Route("GET", "/api/asyncapi", PUBLIC, is_api=False),
    Route("GET", "/api/asyncapi.json", PUBLIC, is_api=False),
    Route("GET", "/api", (404,) * 5, is_api=False),
    Route("GET", "/api/nothing", (404,) * 5, is_api=False),
    # What knows no API identity: staff sign in here with a password.
    Route("GET", "/admin", (302,) * 5, is_api=False),
    Route("GET", "/healthz", PUBLIC, is_api=False),
    Route("GET", "/readyz?for=traffic", PUBLIC, is_api=False),
    # In DEBUG, without a token; see operations/tests/test_metrics.py.
    Route("GET", "/metrics", PUBLIC, is_api=False),
    Route("GET", "/", PUBLIC, is_api=False),
    Route("GET", "/drops/{drop}", PUBLIC, is_api=False),
    Route("GET", "/drops/{drop}/", (301,) * 5, is_api=False),
    Route("GET", "/drops/{drop}/holds", PUBLIC, is_api=False),
]
SOCKET_IS_OPEN, SOCKET_IS_REFUSED, HANDSHAKE_IS_REFUSED = "open", 4401, "refused"
# What who is honest gets, and who lies.
SOCKETS = {
    "/ws/drops": (SOCKET_IS_OPEN, SOCKET_IS_REFUSED),
    "/ws/drops/{drop}": (SOCKET_IS_OPEN, SOCKET_IS_REFUSED),
    # Knows no API identity, not even that of staff: who signs in with a password has a session.
    "/ws/control": (NOT_ALLOWED, NOT_ALLOWED),
    "/ws/nothing": (NOT_FOUND, NOT_FOUND),
}
OPEN_SOCKETS = [name for name, (to_honest, _) in SOCKETS.items() if to_honest == SOCKET_IS_OPEN]
SITE = {"Origin": "http://localhost"}


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
                cells[name, route.name] = answer
    return cells


async def send(lane: Lane, route: Route, target: str, headers: dict[str, str]) -> int:
    chunks = (route.body,) if route.body else ()
    given = headers | ({"Content-Type": "application/json"} if route.body else {})
    if route.accept:
        given["Accept"] = route.accept
    # Beside both lanes, as in config/asgi.py.
    served = Lane(EventStreams(lane.application))
    request = Request(route.method, target, chunks, tuple(given.items()))
    return (await served.send(request)).status


LANES = pytest.mark.parametrize("lane", [hot_lane, viewset_lane])


@LANES
@pytest.mark.parametrize("mode", LIARS)
def test_everybody_gets_their_rights_and_no_more(lane, mode):
    expected = {
        (who, route.name): status
        for route in ROUTES
        for who, status in zip(WHO, route.allowed, strict=True)
    }

    with identity_mode(mode):
        assert table(lane, {who: honest(mode, who) for who in WHO}) == expected


@LANES
@pytest.mark.parametrize("mode", LIARS)
def test_who_lies_gets_nothing_anywhere(lane, mode):
    expected = {
        (lie, r.name): 401 if r.is_api else r.allowed[0] for lie in LIARS[mode] for r in ROUTES
    }

    with identity_mode(mode):
        assert table(lane, LIARS[mode]) == expected
    assert not User.objects.filter(pk=STRANGER).exists()


def test_headers_of_another_mode_say_nothing_in_jwt_mode():
    expected = {(lie, r.name): r.allowed[0] for lie in NOBODIES for r in ROUTES}

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


def websockets() -> URLRouter:
    """Return what the server hands all handshakes to."""
    return application.others.application_mapping["websocket"].application


async def open_socket(address: str, headers: dict[str, str]) -> Any:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    socket = WebsocketCommunicator(websockets(), address, raw)
    is_accepted, _ = await socket.connect(timeout=10)
    if not is_accepted:
        return HANDSHAKE_IS_REFUSED
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

    with identity_mode(mode):
        cells = open_all(
            {cell: (world.address(cell[1]), headers | SITE) for cell, headers in asked.items()}
        )
    assert cells == {(name, socket): SOCKETS[socket][name in liars] for name, socket in asked}


def open_all(asked: dict[Any, tuple[str, dict[str, str]]]) -> dict[Any, Any]:
    """Return what each handshake, an address and its headers, gets."""

    async def fill() -> dict[Any, Any]:
        cells = {cell: await open_socket(*handshake) for cell, handshake in asked.items()}
        # The thread's own, which would outlive the test.
        await database_sync_to_async(lambda: connection.close())()
        return cells

    return asyncio.run(fill())


def test_a_replayed_handshake_opens_no_socket(servers):
    """It would get the news that are for the user alone, long after the handshake."""
    world, handshakes = World(), {}
    for socket in OPEN_SOCKETS:
        target = world.address(socket)
        captured, fresh = (signed("GET", target, world.user) for _ in range(2))
        for number, headers in enumerate([captured, captured, fresh]):
            handshakes[socket, number] = target, headers

    with identity_mode("gateway"):
        cells = open_all(handshakes)
    opens_once = [SOCKET_IS_OPEN, SOCKET_IS_REFUSED, SOCKET_IS_OPEN]
    assert cells == {(s, n): opens_once[n] for s in OPEN_SOCKETS for n in range(3)}


def session_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def expired(client: Client) -> Client:
    Session.objects.update(expire_date=timezone.now() - timedelta(seconds=1))
    return client


def signed_out(client: Client) -> Client:
    """Keep the cookie of a session that has ended."""
    cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
    client.logout()
    client.cookies[settings.SESSION_COOKIE_NAME] = cookie
    return client


def test_the_staff_socket_opens_for_sessions_of_staff_who_may_view_drops(servers):
    in_role = {role: UserFactory(is_staff=True) for role in ROLES}
    for role, user in in_role.items():
        user.groups.add(Group.objects.get(name=role))
    boss, changed, switched_off, dismissed = (
        UserFactory(is_staff=True, is_superuser=True) for _ in range(4)
    )
    may_look = UserFactory()
    may_look.user_permissions.add(Permission.objects.get(codename="view_drop"))
    forged = Client()
    forged.cookies[settings.SESSION_COOKIE_NAME] = "x" * 32
    forged_with_a_nul = Client()
    forged_with_a_nul.cookies[settings.SESSION_COOKIE_NAME] = "aaaaaaaa\0"
    clients = {
        "nobody": Client(),
        "a shopper": session_of(UserFactory()),
        "a shopper with the permission": session_of(may_look),
        "staff without a role": session_of(UserFactory(is_staff=True)),
        **{role: session_of(user) for role, user in in_role.items()},
        "superuser": session_of(boss),
        "forged": forged,
        "a NUL": forged_with_a_nul,
        "signed out": signed_out(session_of(boss)),
        "switched off": session_of(switched_off),
        "no longer staff": session_of(dismissed),
        "with a new password": session_of(changed),
    }
    User.objects.filter(pk=switched_off.pk).update(is_active=False)
    User.objects.filter(pk=dismissed.pk).update(is_staff=False)
    changed.set_password("a new one")
    changed.save(update_fields=["password"])

    def handshake(client: Client, **headers: str) -> tuple[str, dict[str, str]]:
        cookies = client.cookies.output(attrs=[], header="", sep=";").strip()
        return "/ws/control", {"Cookie": cookies} | headers

    asked = {name: handshake(client, **SITE) for name, client in clients.items()}
    asked |= {
        "superuser from another site": handshake(
            clients["superuser"], Origin="https://evil.example"
        ),
        "superuser from a page without an origin": handshake(clients["superuser"], Origin="null"),
        "superuser from nowhere": handshake(clients["superuser"]),
        "superuser from a broken address": handshake(clients["superuser"], Origin="http://["),
    }
    cells = open_all(asked)
    # Last, for it ends all sessions.
    cells |= open_all({"expired": handshake(expired(clients["superuser"]), **SITE)})

    may = dict.fromkeys([*ROLES, "superuser"], SOCKET_IS_OPEN)
    other_pages = dict.fromkeys(asked.keys() - clients.keys(), HANDSHAKE_IS_REFUSED)
    assert cells == dict.fromkeys(cells, NOT_ALLOWED) | may | other_pages


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


def calls(patterns: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the method and address of each call; of what is no API, only that it is read."""
    for pattern in patterns:
        address = before + str(pattern.pattern).removeprefix("^")
        if isinstance(pattern, URLResolver):
            yield from calls(pattern.url_patterns, address)
        else:
            view = pattern.callback
            methods = ("get", "post", "put", "patch", "delete")
            # Viewsets add HEAD to theirs once they are asked.
            known = getattr(view, "actions", None) or dir(getattr(view, "cls", None))
            answered = [method for method in methods if method in known]
            yield from ((method.upper(), address) for method in answered or ["get"])


def test_the_table_names_every_route():
    """A new route must say there who may use it."""
    example: dict[str, str] = defaultdict(lambda: STRANGER)
    addresses = [
        (route.method, route.address.partition("?")[0].format_map(example)) for route in ROUTES
    ]

    assert settings.DEBUG is True
    # Those of the admin have a test of their own below.
    served = {call for call in calls(get_resolver().url_patterns) if "admin/" not in call[1]}
    assert {(method, resolve(address).route) for method, address in addresses} == served
    # What is served in front of Django.
    with hot_lane() as lane:
        for hot in lane.application.routes:
            assert any(
                hot.method == method and hot.pattern.fullmatch(address)
                for method, address in addresses
            ), hot.name


def test_the_table_names_every_socket():
    patterns = [route.pattern for route in websockets().routes]
    addresses = [socket.format(drop=STRANGER).lstrip("/") for socket in SOCKETS]

    def first(address: str) -> int:
        return next(n for n, pattern in enumerate(patterns) if pattern.match(address))

    assert {first(address) for address in addresses} == set(range(len(patterns)))


def test_no_page_of_the_admin_opens_without_signing_in():
    """Who may do what after that: control/tests/test_roles.py."""
    pages = [page for _, page in calls(get_resolver().url_patterns) if page.startswith("admin/")]
    # An app's list, and addresses of nothing, stand for those that are no plain patterns.
    plain = [page for page in pages if "(?P" not in page] + ["admin/drops/", "admin/nothing"]
    staff = UserFactory(is_staff=True, is_superuser=True)
    askers = [
        Client(),
        Client(headers={"X-User-Id": str(staff.pk)}),
        session_of(UserFactory()),
    ]

    shown = set()
    for client in askers:
        for page in plain:
            address = "/" + re.sub("<[^>]+>", STRANGER, page)
            for answer in (client.get(address), client.post(address)):
                if not answer.headers.get("Location", "").startswith("/admin/login/?next="):
                    shown.add(page)

    assert len(plain) > 60
    assert shown == {"admin/login/", "admin/logout/"}
