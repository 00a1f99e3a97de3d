"""Crowds on real server processes: not one unit is sold twice, however many ask at once."""

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from django.db.models import Sum

from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.models import Purchase
from reservations.models import Reservation
from tests.servers import WebServer, running_web_servers, without_tracebacks
from tests.unguarded import STOCK_CONSTRAINTS, without_constraints
from users.models import User

pytestmark = [pytest.mark.servers, pytest.mark.django_db(transaction=True)]

# httpcore's pool searches all its connections for each request, so no client gets many.
CONNECTIONS_PER_CLIENT = 10


@pytest.fixture(autouse=True)
def _no_line_per_request(caplog):
    caplog.set_level(logging.WARNING, logger="httpx")


@pytest.fixture
def viewset_servers(transactional_db) -> Iterator[tuple[WebServer, ...]]:
    """Two servers that settle each request in a transaction of its own."""
    servers = [WebServer(HOT_ROUTES="false") for _ in range(2)]
    with running_web_servers(*servers), without_tracebacks(*servers):
        yield tuple(servers)


@pytest.fixture
def unguarded_servers(transactional_db) -> Iterator[tuple[WebServer, ...]]:
    """The same without row locks, on a database that accepts any stock."""
    application = "tests.unguarded_asgi:application"
    servers = [WebServer(application=application, HOT_ROUTES="false") for _ in range(2)]
    with without_constraints(*STOCK_CONSTRAINTS), running_web_servers(*servers):
        yield tuple(servers)


class Crowd:
    """Users with connections of their own, every second one to the other server."""

    def __init__(self, clients: list[httpx.AsyncClient], users: list[uuid.UUID], urls: list[str]):
        self.clients = clients
        self.users = users
        self.urls = urls

    async def reserve(self, drop: Drop, *, every_second_purchases: bool = False) -> Counter[int]:
        """Let all users reserve at the same moment; return how many got which status."""
        barrier = asyncio.Barrier(len(self.users))

        async def act(number: int, user: uuid.UUID) -> int:
            client = self.clients[number // CONNECTIONS_PER_CLIENT]
            address = f"{self.urls[number % len(self.urls)]}/api/drops/{drop.pk}"
            headers = {"X-User-Id": str(user)}
            await barrier.wait()
            response = await client.post(f"{address}/reserve", headers=headers)
            if every_second_purchases and response.status_code == 201 and number % 2:
                bought = await client.post(f"{address}/purchase", headers=headers)
                assert bought.status_code == 201
            return response.status_code

        return Counter(
            await asyncio.gather(*(act(number, user) for number, user in enumerate(self.users)))
        )


@asynccontextmanager
async def crowd(users: list[uuid.UUID], servers: tuple[WebServer, ...]) -> AsyncIterator[Crowd]:
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(timeout=60, verify=False, trust_env=False)
            )
            for _ in range(0, len(users), CONNECTIONS_PER_CLIENT)
        ]
        yield Crowd(clients, users, [server.url for server in servers])


def create_users(count: int) -> list[uuid.UUID]:
    rows = [User(username=f"crowd_{number}", password="") for number in range(count)]
    return [user.pk for user in User.objects.bulk_create(rows)]


def held_and_sold(drop: Drop) -> tuple[int, int]:
    """Count the units from the rows, whatever the counters say."""
    held = Reservation.objects.active().filter(drop=drop)
    sold = Purchase.objects.filter(drop=drop)
    return tuple(rows.aggregate(units=Sum("quantity", default=0))["units"] for rows in (held, sold))


def test_one_unit_has_one_winner_in_each_of_twenty_rounds(web_servers):
    users = create_users(200)
    drops = [DropFactory(total_stock=1) for _ in range(20)]

    async def play() -> list[Counter[int]]:
        async with crowd(users, web_servers) as shoppers:
            return [await shoppers.reserve(drop) for drop in drops]

    assert asyncio.run(play()) == [{201: 1, 409: 199}] * 20
    assert Reservation.objects.count() == 20
    assert [held_and_sold(drop) for drop in drops] == [(1, 0)] * 20
    assert set(Drop.objects.values_list("available_stock", "sold_stock", "seq")) == {(0, 0, 1)}


def test_one_unit_has_one_winner_without_group_commit(viewset_servers):
    users = create_users(60)
    drops = [DropFactory(total_stock=1) for _ in range(3)]

    async def play() -> list[Counter[int]]:
        async with crowd(users, viewset_servers) as shoppers:
            return [await shoppers.reserve(drop) for drop in drops]

    assert asyncio.run(play()) == [{201: 1, 409: 59}] * 3
    assert [held_and_sold(drop) for drop in drops] == [(1, 0)] * 3


def test_one_unit_without_the_guard_has_several_winners(unguarded_servers):
    users = create_users(60)
    drops = [DropFactory(total_stock=1) for _ in range(3)]

    async def play() -> None:
        async with crowd(users, unguarded_servers) as shoppers:
            for drop in drops:
                await shoppers.reserve(drop)

    asyncio.run(play())
    assert max(held_and_sold(drop)[0] for drop in drops) > 1


def test_a_hundred_units_for_a_thousand_users_are_held_or_sold_once(web_servers):
    users = create_users(1000)
    drop = DropFactory(total_stock=100)

    async def play() -> Counter[int]:
        async with crowd(users, web_servers) as shoppers:
            return await shoppers.reserve(drop, every_second_purchases=True)

    assert asyncio.run(play()) == {201: 100, 409: 900}
    held, sold = held_and_sold(drop)
    assert held + sold == 100
    drop.refresh_from_db()
    assert (drop.available_stock, drop.held_stock, drop.sold_stock) == (0, held, sold)


def test_many_units_without_the_guard_are_oversold(unguarded_servers):
    users = create_users(100)
    drop = DropFactory(total_stock=10)

    async def play() -> None:
        async with crowd(users, unguarded_servers) as shoppers:
            await shoppers.reserve(drop, every_second_purchases=True)

    asyncio.run(play())
    assert sum(held_and_sold(drop)) > 10
