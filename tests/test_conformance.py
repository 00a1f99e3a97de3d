"""Every call of the contract, with the hot routes and without them: the same answers.

A case prepares its own rows and sends requests. It is played twice, once on each lane, and
the two transcripts are compared: status, headers and body, with ids, names and times numbered
in the order in which they appear.
"""

import asyncio
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import orjson
import pytest
from django.core.management import call_command
from django.db import connection
from django.test.utils import setup_databases, teardown_databases
from django.utils import timezone

from config.hot_routes import host_is_allowed
from drops.models import Drop, DropStatus
from drops.services import update_drop
from drops.tests.factories import DropFactory
from purchases.models import Purchase
from purchases.services import purchase
from purchases.tests.factories import PurchaseFactory
from reservations.models import Reservation
from reservations.services import Claim, expire_all_due, release, reserve
from reservations.tests.factories import ReservationFactory
from tests import identities
from tests.concurrency import another_session
from tests.hot import Lane, Request, Response, background_work, hot_lane, post, viewset_lane
from tests.test_bad_input import BAD, Bad, everything, world  # noqa: F401
from users.models import IdempotencyKey, User
from users.tests.factories import UserFactory

on_an_empty_database = pytest.mark.django_db(transaction=True)

SOMEBODY = "1b4e28ba-2fa1-4d2e-883f-b9a761bde3fb"
SHOP = "https://shop.example"
SIZES = {"EU 42": 3, "EU 43": 4}

NUMBERED = re.compile(
    r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    r"|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{6})?Z"
    r"|shopper_\d+(?:_[0-9a-f]{6})?|user_[0-9a-f]{12}|Drop \d+"
)
MADE_REQUEST_ID = re.compile(r"[0-9a-f]{32}")
ETAG = re.compile(r'W/"[0-9a-f]{24}"')
# Counted per process, so the second lane goes on where the first one ended.
REQUESTS_LEFT = re.compile(r"r=\d+;t=\d+")
EXPIRES_IN = re.compile(r'"expires_in": 5\d\.\d+')
JSON = ("application/json", "application/problem+json")


class Client:
    """Sends requests one after the other and keeps the answers."""

    def __init__(self, lane: Lane, runner: asyncio.Runner) -> None:
        self.lane = lane
        self.runner = runner
        self.answers: list[Response] = []

    def __call__(self, request: Request) -> Response:
        return self.runner.run(self._send(request))

    async def _send(self, request: Request) -> Response:
        answer = await self.lane.send(request)
        self.answers.append(answer)
        # The next request shall meet the memory of a shortage, where this one makes one.
        await background_work("ShortageMemory._learn")
        return answer

    def send(self, method: str, address: str, *chunks: bytes, **headers: Any) -> Response:
        """Send it as ``user``, if one is given; underscores of a header become hyphens."""
        user = headers.pop("user", None)
        given = [(name.replace("_", "-"), value) for name, value in headers.items()]
        if user is not None:
            given.append(("X-User-Id", str(getattr(user, "pk", user))))
        return self(Request(method, f"/api/{address}", chunks, tuple(given)))

    def get(self, address: str, user: Any = None, **headers: Any) -> Response:
        return self.send("GET", address, user=user, **headers)

    def post(self, address: str, user: Any = None, body: Any = None, **headers: Any) -> Response:
        return self(post(f"/api/{address}", user, body, **headers))

    def reserve(self, drop: Drop, user: Any = None, body: Any = None, **headers: Any) -> Response:
        return self.post(f"drops/{drop.pk}/reserve", user or UserFactory(), body, **headers)

    def purchase(self, drop: Drop, user: Any = None, body: Any = None, **headers: Any) -> Response:
        return self.post(f"drops/{drop.pk}/purchase", user or UserFactory(), body, **headers)


@dataclass(frozen=True)
class Case:
    """What to send, under which settings, and the answers: a status or a refusal's code each."""

    steps: Callable[[Client], Any]
    outcomes: list[int | str]
    settings: dict[str, Any]


CASES: list[Case] = []


def answers(*outcomes: int | str, **settings: Any) -> Callable[..., Any]:
    def register(steps: Callable[[Client], Any]) -> Callable[[Client], Any]:
        CASES.append(Case(steps, list(outcomes), settings))
        return steps

    return register


def play(
    steps: Callable[[Client], Any], lane: Callable[[], AbstractContextManager[Lane]]
) -> list[Response]:
    with asyncio.Runner() as runner, lane() as opened:
        client = Client(opened, runner)
        steps(client)
        return client.answers


def outcome(answer: Response) -> int | str:
    if answer.header("content-type") == "application/problem+json":
        return answer.json()["code"]
    return answer.status


def transcript(answers: list[Response]) -> list[Any]:
    """Return the answers with ids, names and times numbered as they come."""
    numbers: dict[str, str] = {}

    def number(match: re.Match[str]) -> str:
        return numbers.setdefault(match[0].lower(), f"<{len(numbers)}>")

    return [readable(answer, partial(NUMBERED.sub, number)) for answer in answers]


def readable(
    answer: Response, plain: Callable[[str], str] = str, *, with_etag: bool = False
) -> Any:
    headers, body = [], answer.body.decode()
    if answer.header("content-type") in JSON:
        body = json.dumps(orjson.loads(answer.body), ensure_ascii=False, sort_keys=True)
    for name, value in answer.headers:
        text = value.decode("latin-1")
        if name == b"content-length":
            assert int(text) == len(answer.body)
        elif name == b"x-request-id" and MADE_REQUEST_ID.fullmatch(text):
            body = body.replace(text, "<request id>")
        else:
            text = REQUESTS_LEFT.sub("r=<left>;t=<seconds>", text)
            text = plain(text) if with_etag else ETAG.sub("<etag>", plain(text))
            headers.append(f"{name.decode()}: {text}")
    body = EXPIRES_IN.sub('"expires_in": "less than 60"', plain(body))
    return answer.status, sorted(headers), body


# --- Reserve ----------------------------------------------------------------------------


@answers(201, 200, 200, 200, 200, 200)
def a_hold_and_the_same_again(api):
    drop, user = DropFactory(), UserFactory()
    held = api.reserve(drop, user).json()
    api.reserve(drop, user)
    api.get(f"drops/{drop.pk}")
    api.get("reservations", user)
    api.get(f"reservations/{held['id']}", user)
    api.get(f"reservations?status=ACTIVE&drop={drop.pk}", user)


@answers(201, 200, 200, 201, "fully_reserved")
def several_units(api):
    drop, user = DropFactory(total_stock=5, max_per_user=None), UserFactory()
    api.reserve(drop, user, {"quantity": 3})
    api.reserve(drop, user, {"quantity": 3})
    # Whoever asks again for other units has a hold already, and gets that.
    api.reserve(drop, user, {"quantity": 4})
    api.reserve(drop, None, {"quantity": 2})
    api.reserve(drop, None, {"quantity": 1})


@answers(201, 201, 201, 200, "already_reserved")
def a_size_in_every_spelling(api):
    drop, user = DropFactory(sizes=SIZES), UserFactory()
    small, large = (str(variant.pk) for variant in drop.variants.all())
    api.reserve(drop, None, {"variant": small})
    api.reserve(drop, None, {"variant": small.upper()})
    api.reserve(drop, user, {"variant": small.replace("-", ""), "quantity": 1})
    api.reserve(drop, user, {"variant": f"urn:uuid:{small}"})
    api.reserve(drop, user, {"variant": large})


@answers("variant_required", "variant_required", "validation_error", "validation_error")
def no_size_or_another_drops(api):
    drop = DropFactory(sizes=SIZES)
    api.reserve(drop)
    api.reserve(drop, None, {"quantity": 2})
    api.reserve(drop, None, {"variant": str(DropFactory().variants.get().pk)})
    api.reserve(drop, None, {"variant": SOMEBODY})


@answers("limit_exceeded", 201, 200, 201, "limit_exceeded")
def more_than_the_limit(api):
    drop, user = DropFactory(max_per_user=2), UserFactory()
    api.reserve(drop, user, {"quantity": 3})
    api.reserve(drop, user, {"quantity": 2})
    api.reserve(drop, user, {"quantity": 3})
    api.purchase(drop, user)
    api.reserve(drop, user)


@answers("sold_out", "sold_out", "sold_out", "limit_exceeded", "sold_out")
def sold_out(api):
    sold = PurchaseFactory(reservation__drop=DropFactory(total_stock=1))
    for _ in range(3):
        api.reserve(sold.drop)
    api.reserve(sold.drop, sold.user)
    api.reserve(sold.drop, None, {"variant": str(sold.variant.pk)})


@answers(*["sold_out"] * 3, "limit_exceeded", "limit_exceeded", 201)
def too_few_left(api):
    drop = DropFactory(total_stock=2, max_per_user=3)
    for _ in range(3):
        api.reserve(drop, None, {"quantity": 3})
    api.reserve(drop, None, {"quantity": 4})
    api.reserve(drop, None, {"quantity": 4})
    api.reserve(drop, None, {"quantity": 2})


@answers(*["fully_reserved"] * 3, 200)
def fully_reserved(api):
    hold = ReservationFactory(drop=DropFactory(total_stock=1))
    for _ in range(3):
        api.reserve(hold.drop)
    api.reserve(hold.drop, hold.user)


@answers(*["fully_reserved"] * 4, 201, 200)
def one_size_is_held_and_another_is_there(api):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    small, large = drop.variants.all()
    hold = ReservationFactory(drop=drop, variant=small)
    for quantity in (1, 1, 1, 1):
        api.reserve(drop, None, {"variant": str(small.pk), "quantity": quantity})
    api.reserve(drop, None, {"variant": str(large.pk)})
    api.reserve(drop, hold.user, {"variant": str(small.pk)})


@answers(*["cooldown"] * 3, 201, *["fully_reserved"] * 4)
def a_cooldown(api):
    limits = {"max_expired_holds": 2, "hold_cooldown_seconds": 300}
    drop, user = DropFactory(total_stock=1, **limits), UserFactory()
    ReservationFactory(drop=drop, user=user, expired=True)
    # Its time is up, but no loop has come by.
    ReservationFactory(drop=drop, user=user, overdue=True)
    for _ in range(2):
        # A minute of the five is over.
        assert api.reserve(drop, user).header("retry-after") in ("239", "240")
    api.reserve(drop, user, {"quantity": 1}, Idempotency_Key="order-1")
    # Where nothing is left, that is what everybody hears, also from memory.
    for asker in (None, None, user, None, user):
        api.reserve(drop, asker)


@answers(201, *["limit_exceeded"] * 3, 200, 200, 201, 201, MAX_ACTIVE_HOLDS=1)
def more_than_the_limit_over_all_drops(api):
    drop, other, user = DropFactory(), DropFactory(), UserFactory()
    held = api.reserve(drop, user).json()
    for _ in range(2):
        refused = api.reserve(other, user).json()
        assert (refused["limit"], refused["used"]) == (1, 1)
    api.reserve(other, user, {"quantity": 1}, Idempotency_Key="order-1")
    api.reserve(drop, user)
    api.send("DELETE", f"reservations/{held['id']}", user=user)
    api.reserve(other, user, {"quantity": 1}, Idempotency_Key="order-1")
    api.reserve(drop)


@answers(201, *["fully_reserved"] * 4, MAX_ACTIVE_HOLDS=1)
def the_limit_over_all_drops_where_nothing_is_left(api):
    hold, user = ReservationFactory(drop=DropFactory(total_stock=1)), UserFactory()
    api.reserve(DropFactory(), user)
    for asker in (user, None, user, None):
        api.reserve(hold.drop, asker)


@answers(*["drop_not_started"] * 3, "drop_not_started", "validation_error")
def not_started(api):
    drop = DropFactory(upcoming=True)
    for _ in range(3):
        api.reserve(drop)
    # Both are wrong: the drop's state is told before the user's limit.
    api.reserve(drop, None, {"quantity": 2})
    api.reserve(drop, None, {"quantity": 0})


@answers(*["drop_ended"] * 6)
def ended(api):
    for drop in (DropFactory(over=True), DropFactory(status="ended")):
        for _ in range(3):
            api.reserve(drop)


@answers(*["drop_paused", "drop_cancelled", "drop_not_published"] * 3)
def not_live(api):
    drops = [DropFactory(status=status) for status in ("paused", "cancelled", "draft")]
    for _ in range(3):
        for drop in drops:
            api.reserve(drop)


@answers(200, "reservation_required", "drop_paused")
def a_holder_of_a_paused_drop(api):
    hold = ReservationFactory()
    update_drop(hold.drop.pk, status="paused")
    api.reserve(hold.drop, hold.user)
    api.purchase(hold.drop)
    api.purchase(hold.drop, hold.user)


@answers(201, 201, 200)
def time_that_was_up(api):
    own = ReservationFactory(drop=DropFactory(total_stock=1), overdue=True)
    api.reserve(own.drop, own.user)
    others = ReservationFactory(drop=DropFactory(total_stock=1), overdue=True)
    api.reserve(others.drop)
    api.get("reservations", others.user)


@answers(201, "fully_reserved", "fully_reserved", 200, 201, 200)
def a_unit_that_came_back(api):
    drop, user = DropFactory(total_stock=1), UserFactory()
    held = api.reserve(drop, user).json()
    api.reserve(drop)
    api.reserve(drop)
    api.send("DELETE", f"reservations/{held['id']}", user=user)
    api.reserve(drop)
    api.get(f"drops/{drop.pk}")


@answers(201, 201, *["not_found"] * 6)
def addresses_of_a_claim(api):
    drop = DropFactory()
    api.post(f"drops/{drop.pk}/reserve/", UserFactory())
    api.post(f"drops/{str(drop.pk).upper()}/reserve", UserFactory())
    unhyphened = drop.pk.hex
    for wrong in (
        *(SOMEBODY, "42", unhyphened, f"urn:{unhyphened}", f"{unhyphened}----"),
        str(drop.pk).replace("-", "_"),
    ):
        api.post(f"drops/{wrong}/reserve", UserFactory())


# --- Purchase ---------------------------------------------------------------------------


@answers(201, 200, 200, 200, 200, 200, 200)
def a_purchase_and_the_same_again(api):
    hold = ReservationFactory(drop__max_per_user=None, quantity=2)
    bought = api.purchase(hold.drop, hold.user).json()
    api.purchase(hold.drop, hold.user, {})
    api.post(f"drops/{hold.drop.pk}/purchase/", hold.user)
    api.get(f"drops/{hold.drop.pk}")
    api.get("drops")
    api.get("purchases", hold.user)
    api.get(f"purchases/{bought['id']}", hold.user)


@answers(201, 201, 201, 201, 200)
def a_second_purchase_where_the_limit_allows(api):
    drop, user = DropFactory(max_per_user=2), UserFactory()
    for _ in range(2):
        api.reserve(drop, user)
        api.purchase(drop, user)
    api.purchase(drop, user)


@answers("reservation_required", *["reservation_expired"] * 2, *["reservation_not_active"] * 2)
def nothing_to_purchase(api):
    drop = DropFactory()
    api.purchase(drop)
    overdue = ReservationFactory(drop=drop, overdue=True)
    api.purchase(drop, overdue.user)
    expire_all_due()
    api.purchase(drop, overdue.user)
    for trait in ("released", "voided"):
        api.purchase(drop, ReservationFactory(drop=drop, **{trait: True}).user)


@answers("drop_ended", "drop_paused", "drop_cancelled")
def a_purchase_after_the_drop_was_closed(api):
    for status in ("ended", "paused", "cancelled"):
        hold = ReservationFactory()
        update_drop(hold.drop.pk, status=status)
        api.purchase(hold.drop, hold.user)


@answers(200)
def a_purchase_that_was_refunded(api):
    bought = PurchaseFactory(refunded=True)
    api.purchase(bought.drop, bought.user)


@answers(*["validation_error"] * 3, "malformed_body", "not_found", "not_found")
def a_purchase_that_is_wrong(api):
    hold = ReservationFactory()
    api.purchase(hold.drop, hold.user, {"quantity": 1})
    api.purchase(hold.drop, hold.user, [])
    api.purchase(hold.drop, hold.user, 0)
    api.send("POST", f"drops/{hold.drop.pk}/purchase", b"{", user=hold.user, content_type=JSON[0])
    api.post(f"drops/{SOMEBODY}/purchase", hold.user)
    api.post(f"drops/{hold.drop.pk.hex}----/purchase", hold.user)


# --- Identity ---------------------------------------------------------------------------

BUSY = [("GET", ""), ("GET", "/{pk}"), ("POST", "/{pk}/reserve"), ("POST", "/{pk}/purchase")]


def on_each_busy_call(api: Client, drop: Drop, **headers: Any) -> None:
    for method, path in BUSY:
        api.send(method, f"drops{path.format(pk=drop.pk)}", **headers)


def on_a_read_and_a_claim(api: Client, drop: Drop, **headers: Any) -> None:
    """Two calls are enough for what is decided before it is known which call it is."""
    api.send("GET", "drops", **headers)
    api.send("POST", f"drops/{drop.pk}/reserve", **headers)


@answers(200, 200, "identity_required", "identity_required", "identity_required")
def nobody(api):
    drop = DropFactory()
    on_each_busy_call(api, drop)
    api.send("POST", f"drops/{drop.pk}/reserve", X_User_Name="Alice")


@answers(*["invalid_identity"] * 4 * 3)
def an_identity_that_is_none(api):
    drop = DropFactory()
    for wrong in ("", f"{SOMEBODY}, {SOMEBODY}", b"\xff\xfe"):
        on_each_busy_call(api, drop, X_User_Id=wrong)


@answers(*["invalid_identity"] * 4)
def an_identity_twice(api):
    drop = DropFactory()
    twice = (("X-User-Id", SOMEBODY), ("X-User-Id", SOMEBODY))
    for method, path in BUSY:
        api(Request(method, f"/api/drops{path.format(pk=drop.pk)}", headers=twice))


@answers(200, 200, 201, 201, 200)
def a_user_that_nobody_knew(api):
    drop = DropFactory()
    newcomer = str(uuid.uuid4())
    on_each_busy_call(api, drop, user=f" {newcomer.upper()} ")
    api.get("me", newcomer)


@answers(201, 200)
def a_user_who_comes_with_a_claim(api):
    newcomer = uuid.uuid4()
    api.reserve(DropFactory(), newcomer)
    api.get("me", newcomer)


@answers(*[201, 200] * 5, "reservation_required", 200)
def a_user_who_comes_with_a_name(api):
    # A name that is a UUID is free on both lanes, and numbered in the transcript.
    drop, free = DropFactory(), [str(uuid.uuid4()) for _ in range(3)]
    taken = UserFactory().username
    for name in (f" {free[0]} \t", "Al", free[1] + "x" * 50, taken, f"Zoë {free[2]}".encode()):
        newcomer = uuid.uuid4()
        api.reserve(drop, newcomer, X_User_Name=name)
        api.get("me", newcomer)
    newcomer = uuid.uuid4()
    api.purchase(drop, newcomer, X_User_Name="\x00")
    api.get("me", newcomer)


@answers(*["unknown_user"] * 8, CREATE_UNKNOWN_USERS=False)
def a_user_that_nobody_knows(api):
    for drop in (DropFactory(), Drop(pk=uuid.uuid4())):
        on_each_busy_call(api, drop, user=uuid.uuid4())


@answers(200, 200, 201, 201, CREATE_UNKNOWN_USERS=False)
def a_user_that_is_known(api):
    on_each_busy_call(api, DropFactory(), user=UserFactory())


@answers(*["unknown_user"] * 8)
def a_user_who_was_switched_off(api):
    on_each_busy_call(api, DropFactory(), user=UserFactory(is_active=False))
    hold = ReservationFactory(user__is_active=False)
    on_each_busy_call(api, hold.drop, user=hold.user)


@answers(201, "unknown_user", "unknown_user", 201)
def a_user_who_was_switched_off_after_a_claim_with_a_key(api):
    drop, user = DropFactory(), UserFactory()
    api.reserve(drop, user, None, Idempotency_Key="order-1")
    User.objects.filter(pk=user.pk).update(is_active=False)
    api.reserve(drop, user, None, Idempotency_Key="order-1")
    api.reserve(drop, user, {}, Idempotency_Key="order-1")
    User.objects.filter(pk=user.pk).update(is_active=True)
    api.reserve(drop, user, None, Idempotency_Key="order-1")


@answers(201, 201, DEBUG=False)
def a_user_that_nobody_knew_with_a_key(api):
    drop, newcomer = DropFactory(), uuid.uuid4()
    api.reserve(drop, newcomer, None, Idempotency_Key="order-1")
    api.reserve(drop, newcomer, None, Idempotency_Key="order-1")


@answers("unknown_user", "unknown_user", CREATE_UNKNOWN_USERS=False)
def an_unknown_user_with_a_key(api):
    drop = DropFactory()
    api.reserve(drop, uuid.uuid4(), Idempotency_Key="order-1")
    api.reserve(drop, uuid.uuid4(), Idempotency_Key="")


# --- Idempotency ------------------------------------------------------------------------


@answers(201, 201, 201, 200, "idempotency_key_reused", 201)
def a_claim_with_a_key(api):
    drop, user = DropFactory(), UserFactory()
    address, key = f"drops/{drop.pk}/reserve", "order-1 ~"
    api.post(address, user, {"quantity": 1}, Idempotency_Key=key)
    api.post(address, user, {"quantity": 1}, Idempotency_Key=key)
    api.post(f"{address}/", user, {"quantity": 1}, Idempotency_Key=key)
    api.post(address, user, {"quantity": 1}, Idempotency_Key="order-2")
    api.post(address, user, None, Idempotency_Key=key)
    api.post(address, UserFactory(), {"quantity": 1}, Idempotency_Key=key)


@answers(201, 201, 201, 201)
def a_purchase_with_the_key_of_its_claim(api):
    drop, user = DropFactory(), UserFactory()
    for call in (api.reserve, api.purchase, api.reserve, api.purchase):
        call(drop, user, None, Idempotency_Key="order-1")


@answers("fully_reserved", "fully_reserved", 201, 201)
def a_key_of_a_refused_claim(api):
    """A refusal stores nothing, so the key is still free."""
    hold, user = ReservationFactory(drop=DropFactory(total_stock=1)), UserFactory()
    api.reserve(hold.drop, user, None, Idempotency_Key="order-1")
    api.reserve(hold.drop, user, None, Idempotency_Key="order-1")
    release(hold.pk, hold.user)
    api.reserve(hold.drop, user, None, Idempotency_Key="order-1")
    api.reserve(hold.drop, user, None, Idempotency_Key="order-1")


@answers("reservation_required", 201, 201)
def a_key_of_a_refused_purchase(api):
    drop, user = DropFactory(), UserFactory()
    api.purchase(drop, user, None, Idempotency_Key="order-1")
    reserve(drop.pk, Claim(user.pk))
    api.purchase(drop, user, None, Idempotency_Key="order-1")
    api.purchase(drop, user, None, Idempotency_Key="order-1")


@answers(201, "fully_reserved", 201, "idempotency_key_reused", "fully_reserved")
def a_key_whose_hold_is_long_gone(api):
    """The first answer for 24 hours, also while others are refused from memory."""
    drop, user = DropFactory(total_stock=1), UserFactory()
    held = api.reserve(drop, user, None, Idempotency_Key="order-1").json()
    release(held["id"], user)
    reserve(drop.pk, Claim(UserFactory().pk))
    api.reserve(drop)
    api.reserve(drop, user, None, Idempotency_Key="order-1")
    api.reserve(drop, user, {}, Idempotency_Key="order-1")
    api.reserve(drop, user, None, Idempotency_Key="order-2")


@answers(201, 200)
def a_key_older_than_a_day(api):
    drop, user = DropFactory(), UserFactory()
    api.reserve(drop, user, None, Idempotency_Key="order-1")
    IdempotencyKey.objects.update(created_at=timezone.now() - timedelta(hours=24, seconds=1))
    api.reserve(drop, user, None, Idempotency_Key="order-1")


BAD_KEYS = ("", "k" * 256, "a\tb", "\x7f", "é", "é".encode(), b"a\x00b")


@answers(*["validation_error"] * 2 * len(BAD_KEYS))
def a_key_that_is_none(api):
    hold = ReservationFactory()
    for key in BAD_KEYS:
        api.reserve(hold.drop, hold.user, None, Idempotency_Key=key)
        api.purchase(hold.drop, hold.user, None, Idempotency_Key=key)


@answers("fully_reserved", *["validation_error"] * len(BAD_KEYS))
def a_key_that_is_none_for_a_drop_that_has_none(api):
    hold = ReservationFactory(drop=DropFactory(total_stock=1))
    api.reserve(hold.drop)
    for key in BAD_KEYS:
        api.reserve(hold.drop, None, None, Idempotency_Key=key)


@answers(201, 201)
def the_longest_key(api):
    drop, user = DropFactory(), UserFactory()
    for _ in range(2):
        api.reserve(drop, user, None, Idempotency_Key="".join(map(chr, range(32, 127))) * 2)


# --- Headers ----------------------------------------------------------------------------


def from_origins(api: Client, *origins: str) -> None:
    drop = DropFactory()
    for origin in origins:
        user = UserFactory()
        on_each_busy_call(api, drop, user=user, Origin=origin)
        api.post(f"drops/{SOMEBODY}/reserve", user, Origin=origin)


@answers(*[200, 200, 201, 201, "not_found"] * 2)
def any_origin(api):
    from_origins(api, SHOP, "null")


@answers(
    *[200, 200, 201, 201, "not_found"] * 5,
    CORS_ALLOW_ALL_ORIGINS=False,
    CORS_ALLOWED_ORIGINS=[SHOP, "http://localhost:3000"],
)
def an_origin_of_the_list_and_others(api):
    from_origins(api, SHOP, "http://localhost:3000", "https://evil.example", "null", f"{SHOP}:444")


TRUSTED_HEADERS = {
    "DEBUG": False,
    "IDENTITY_MODE": "header",
    "CORS_ALLOW_ALL_ORIGINS": False,
    "CORS_ALLOWED_ORIGINS": [SHOP],
}


def ask_as_a_page(api: Client, **headers: str) -> User:
    """Send what changes something, as a page's form or script does; return for whom."""
    drop, user = DropFactory(), UserFactory()
    hold, spare = ReservationFactory(user=user), ReservationFactory(user=user)
    # A form without fields has no body, and so needs none of JSON.
    api.reserve(drop, user, Content_Type="application/x-www-form-urlencoded", **headers)
    api.reserve(drop, user, {"quantity": 1}, **headers)
    api.purchase(hold.drop, user, **headers)
    api.post("drops", user, {"name": "Aurora", "price": 1, "total_stock": 1}, **headers)
    api.send("DELETE", f"reservations/{spare.pk}", user=user, **headers)
    api.get(f"drops/{drop.pk}", user, **headers)
    return user


@answers(*[*["permission_denied"] * 5, 200] * 6, **TRUSTED_HEADERS)
def pages_of_other_sites(api):
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "https://evil.example", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "null"},
        {"Origin": f"{SHOP}.evil.example"},
        {"Origin": "http://testserver:81"},
        {"Sec_Fetch_Site": "cross-site"},
    ):
        user = ask_as_a_page(api, **headers)
        assert [hold.status for hold in Reservation.objects.filter(user=user)] == ["ACTIVE"] * 2
        assert not Purchase.objects.filter(user=user).exists()
        assert not Drop.objects.filter(created_by=user).exists()


@answers("permission_denied", **TRUSTED_HEADERS | {"CORS_ALLOW_ALL_ORIGINS": True})
def a_page_of_any_site(api):
    api.reserve(DropFactory(), Origin=SHOP + ".evil.example")


@answers(*[201, 200, 201, 201, 200, 200] * 5, **TRUSTED_HEADERS)
def pages_of_ours_and_what_is_no_page(api):
    ask_as_a_page(api, Origin=SHOP, Sec_Fetch_Site="cross-site")
    ask_as_a_page(api, Origin="http://testserver", Sec_Fetch_Site="same-origin")
    ask_as_a_page(api, Sec_Fetch_Site="same-origin")
    ask_as_a_page(api, Sec_Fetch_Site="none")
    ask_as_a_page(api)


@answers(201, 201, DEBUG=False, **identities.mode_settings("jwt"))
def pages_of_other_sites_with_a_proof(api):
    for headers in ({"Origin": "https://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
        drop, proof = DropFactory(), identities.bearer(UserFactory())
        api.post(f"drops/{drop.pk}/reserve", None, **proof, **headers)


@answers(*[200] * 8)
def a_preflight(api):
    ask = {"Origin": SHOP, "Access_Control_Request_Method": "POST"}
    asked_headers = "content-type, idempotency-key, x-user-id"
    drop = DropFactory()
    for _, path in BUSY:
        address = f"drops{path.format(pk=drop.pk)}"
        api.send("OPTIONS", address, **ask)
        api.send("OPTIONS", address, **ask, Access_Control_Request_Headers=asked_headers)


@answers(*[200, 200, 201, 201, "not_found"] * 2, *[200, 200, 201, 201] * 3)
def a_request_id(api):
    drop = DropFactory()
    for mine in ("mine-1", "x" * 128):
        user = UserFactory()
        on_each_busy_call(api, drop, user=user, X_Request_Id=mine)
        answer = api.post(f"drops/{SOMEBODY}/reserve", user, X_Request_Id=mine)
        assert {answer.header("x-request-id"), answer.json()["request_id"]} == {mine}
    for unusable in ("", "x" * 129, "a b"):
        on_each_busy_call(api, drop, user=UserFactory(), X_Request_Id=unusable)


ACCEPTED = (
    *("application/json", "*/*", "application/*", "application/json, text/plain, */*"),
    *("application/json;q=0.1", "text/html, application/json;q=0.9", "*/*;q=0.1"),
    *("APPLICATION/JSON", "application/json; indent=4", "application/json;indent=2, */*"),
    *("*/*, APPLICATION/JSON;indent=2", "application/json;charset=utf-8"),
)
NOT_ACCEPTED = ("text/html", "application/jsonp", "application/jsonlines", "text/*", "a", ";", "")


@answers(*[200, 201] * len(ACCEPTED))
def what_is_accepted(api):
    drop = DropFactory(total_stock=50)
    for accept in ACCEPTED:
        on_a_read_and_a_claim(api, drop, user=UserFactory(), Accept=accept)


@answers(*["not_acceptable"] * 2 * len(NOT_ACCEPTED))
def what_is_not_accepted(api):
    drop = DropFactory()
    for accept in NOT_ACCEPTED:
        on_a_read_and_a_claim(api, drop, user=UserFactory(), Accept=accept)


JSON_TYPES = (
    *("application/json", "application/json; charset=utf-8", "Application/JSON"),
    *("application/json;charset=latin-1", "application/json; charset=utf-16"),
    *("application/json;", " application/json"),
)
OTHER_TYPES = ("text/plain", "application/jsonp", "application/json-patch+json", "", "json", ";")


@answers(*[201, 201] * len(JSON_TYPES))
def json_by_its_names(api):
    for content_type in JSON_TYPES:
        drop, user = DropFactory(), UserFactory()
        for call, body in (("reserve", b'{"quantity": 1}'), ("purchase", b"{}")):
            address = f"drops/{drop.pk}/{call}"
            api.send("POST", address, body, user=user, Content_Type=content_type)


@answers(*["unsupported_media_type", "unsupported_media_type"] * len(OTHER_TYPES))
def what_is_no_json(api):
    for content_type in OTHER_TYPES:
        drop, user = DropFactory(), UserFactory()
        for call, body in (("reserve", b'{"quantity": 1}'), ("purchase", b"{}")):
            address = f"drops/{drop.pk}/{call}"
            api.send("POST", address, body, user=user, Content_Type=content_type)


@answers(201, 201, 201, 201, 200, 200)
def no_body_of_any_type(api):
    for content_type in ("text/plain", ""):
        drop, user = DropFactory(), UserFactory()
        for call in ("reserve", "purchase"):
            address = f"drops/{drop.pk}/{call}"
            api.send("POST", address, b"", user=user, Content_Type=content_type)
    for path in ("drops", f"drops/{drop.pk}"):
        api.send("GET", path, b"{", Content_Type="text/plain")


HOSTS = ("evil.example", "", "testserver:80:80", "testserver/", "testserver@evil.example")


@pytest.fixture(autouse=True)
def _forget_hosts():
    host_is_allowed.cache_clear()
    yield
    host_is_allowed.cache_clear()


@answers(*["malformed_body"] * 2 * len(HOSTS), *[200, 201] * 2)
def hosts(api):
    drop = DropFactory()
    for host in HOSTS:
        on_a_read_and_a_claim(api, drop, user=UserFactory(), Host=host)
    for host in ("testserver:8000", "TESTSERVER"):
        on_a_read_and_a_claim(api, drop, user=UserFactory(), Host=host)


@answers(
    *["malformed_body"] * 4,
    *[200, 200, 201, 201],
    DEBUG=False,
    ALLOWED_HOSTS=[".drops.example"],
)
def hosts_in_production(api):
    drop = DropFactory()
    on_each_busy_call(api, drop, user=UserFactory())
    on_each_busy_call(api, drop, user=UserFactory(), Host="www.drops.example")


REPEATABLE = ("Host", "X-User-Name", "X-Request-Id", "Idempotency-Key", "Accept", "Origin")


@answers(*["malformed_body"] * 4, *[200, 200, 201, 201] * 5)
def headers_that_stand_twice(api):
    drop = DropFactory()
    for name in REPEATABLE:
        user = UserFactory()
        value = {"Host": "testserver", "Accept": "application/json"}.get(name, "mine-1")
        headers = ((name, value), (name, value), ("X-User-Id", str(user.pk)))
        for method, path in BUSY:
            api(Request(method, f"/api/drops{path.format(pk=drop.pk)}", headers=headers))


JUST_ENOUGH = 32 * 1024 - len("host" + "testserver" + "x-user-id" + SOMEBODY + "x-filler")


@answers(200, 200, 201, 201, *["headers_too_large"] * 8)
def headers_at_the_limit(api):
    drop = DropFactory()
    user = UserFactory()
    on_each_busy_call(api, drop, user=user, X_Filler="a" * JUST_ENOUGH)
    on_each_busy_call(api, drop, user=user, X_Filler="a" * (JUST_ENOUGH + 1))
    on_each_busy_call(api, drop, user=user, **{f"X_Filler_{n}": "a" * 80 for n in range(1000)})


@answers(200, 200, "not_found", *["address_too_long"] * 5)
def addresses_at_the_limit(api):
    some = "a" * (16 * 1024 - len("/api/drops/"))
    paths = ["drops", f"drops/{DropFactory().pk}"]
    full = [f"{path}?{'a' * (16 * 1024 - len(f'/api/{path}'))}" for path in paths]
    for address in (*full, f"drops/{some}"):
        api.get(address)
    for address in (*full, f"drops/{some}"):
        # Before anybody looks at who asks.
        api.get(f"{address}a", "nobody")
    for call in ("reserve", "purchase"):
        api.post(f"drops/{some}/{call}", "nobody")


# --- Bodies -----------------------------------------------------------------------------

ONE = b'{"quantity": 1}'


@answers(201, 200, 201, 200, 201, "malformed_body", "validation_error")
def bodies_in_pieces(api):
    drop, user, other = DropFactory(max_per_user=None), UserFactory(), UserFactory()

    def send(user: User, *chunks: bytes, call: str = "reserve", **headers: str) -> Response:
        return api.send(
            *("POST", f"drops/{drop.pk}/{call}", *chunks),
            **{"user": user, "Content_Type": "application/json"} | headers,
        )

    assert send(user, b'{"quan', b'tity"', b": 2}").json()["quantity"] == 2
    send(user, b'{"quantity": 2}', b"")
    assert send(other, b'{"quan', b'tity": 3}', Content_Length="15").json()["quantity"] == 3
    send(other, b"", b"")
    send(user, b"{", b"}", call="purchase")
    send(user, b"{", b"")
    send(user, b'{"quantity"', b": 0}")


@answers(*["body_too_large"] * 6, *["not_found"] * 2, "body_too_large", "malformed_body")
def bodies_at_the_limit(api):
    address = f"drops/{SOMEBODY}/reserve"
    headers = {"user": SOMEBODY, "Content_Type": "application/json", "X_Request_Id": "mine-1"}
    just, too_large = ONE + b" " * (16_384 - len(ONE)), ONE + b" " * (16_385 - len(ONE))
    api.send("POST", address, too_large, **headers)
    api.send("POST", address, too_large[:9000], too_large[9000:], **headers)
    api.send("POST", address, b"", **headers, Content_Length="16385")
    api.send("POST", address, ONE, **headers, Content_Length="-1")
    api.send("POST", address, ONE, **headers, Content_Length="many")
    # A digit to Python, and yet no number.
    api.send("POST", address, ONE, **headers, Content_Length=b"\xb2")
    api.send("POST", address, just, **headers)
    api.send("POST", address, just[:9000], just[9000:], **headers)
    api.send("GET", "drops", too_large, **headers)
    api.send("POST", f"drops/{DropFactory().pk}/reserve", b" " * 16_384, **headers)


ODD_CLAIMS = {
    b'{"quantity": 1, "quantity": 2}': 201,
    b' \n{"quantity":\t1}\r ': 201,
    b'{"quantity": 0, "quantity": 1}': 201,
    b'{"quantity": 1e0}': "validation_error",
    b'{"quantity": 18446744073709551616}': "validation_error",
    b'{"quantity": 2147483647}': "fully_reserved",
    b'{"variant": null}': "validation_error",
    b'{"variant": {}}': "validation_error",
    b'{"quantity": 1, "Quantity": 1}': "validation_error",
    b'{"": 1}': "validation_error",
    b'{"quantity": NaN}': "malformed_body",
    b'{"quantity": 1}x': "malformed_body",
    b'\xef\xbb\xbf{"quantity": 1}': "malformed_body",
    b'{"quantity": "\xff"}': "malformed_body",
    b'{"quantity": "\\ud800"}': "validation_error",
    b" ": "malformed_body",
    b"null": "validation_error",
    b"[]": "validation_error",
    b'""': "validation_error",
}


@answers(*ODD_CLAIMS.values())
def odd_claims(api):
    drop = DropFactory(max_per_user=None)
    for body in ODD_CLAIMS:
        headers = {"user": UserFactory(), "Content_Type": "application/json"}
        api.send("POST", f"drops/{drop.pk}/reserve", body, **headers)


@answers(*["not_found"] * 6)
def a_format_in_the_query(api):
    hold = ReservationFactory()
    for query in ("format=xml", "format=api"):
        api.post(f"drops/{hold.drop.pk}/reserve?{query}", hold.user)
        api.post(f"drops/{hold.drop.pk}/purchase?{query}", hold.user)
        api.get(f"drops?{query}")


@answers(200, 201, 200)
def a_query_that_says_nothing(api):
    hold = ReservationFactory()
    api.post(f"drops/{hold.drop.pk}/reserve?a=b", hold.user)
    api.post(f"drops/{hold.drop.pk}/purchase?format=json", hold.user)
    api.get(f"drops/{hold.drop.pk}?a=b", hold.user)


# --- Other methods ----------------------------------------------------------------------


@answers(*[200, 200], *["method_not_allowed"] * 2, *[200] * 4)
def head_and_options(api):
    hold = ReservationFactory()
    for method in ("HEAD", "OPTIONS"):
        for _, path in BUSY:
            api.send(method, f"drops{path.format(pk=hold.drop.pk)}", user=hold.user)


@answers(*["method_not_allowed"] * 16)
def wrong_methods(api):
    hold = ReservationFactory()
    for method in ("PUT", "DELETE", "TRACE", "STEAL"):
        for _, path in BUSY:
            api.send(method, f"drops{path.format(pk=hold.drop.pk)}", user=hold.user)


@answers(201, 200, "idempotency_key_reused", "validation_error", 200, "permission_denied", 200, 200)
def drops_are_made_and_changed(api):
    user = UserFactory()
    new = {"name": "Aurora", "price": "199.00", "total_stock": 5, "status": "live"}
    drop = api.post("drops", user, new, Idempotency_Key="order-1").json()
    api.get(f"drops/{drop['id']}")
    api.post("drops", user, new | {"name": "Ember"}, Idempotency_Key="order-1")
    api.post("drops/", user, new | {"price": "free"})
    change, headers = b'{"status": "paused"}', {"Content_Type": "application/json"}
    api.send("PATCH", f"drops/{drop['id']}", change, user=user, **headers)
    api.send("PATCH", f"drops/{drop['id']}", change, user=UserFactory(), **headers)
    api.get(f"drops/{drop['id']}")
    api.get("drops?status=paused&limit=1")


@answers(200, 200, 200, "identity_required", 200, "not_found", "not_found")
def the_rest_of_the_contract(api):
    overdue = ReservationFactory(overdue=True)
    api.send("POST", "internal/expire-now")
    api.get("reservations/", overdue.user)
    api.get("purchases/", overdue.user)
    api.get("me")
    api.get("me/", overdue.user)
    api.get(f"purchases/{SOMEBODY}", overdue.user)
    api.get("drops/x/y/z")


@pytest.fixture(scope="module")
def shared_database(django_db_setup, django_db_blocker) -> Iterator[None]:
    """Let tests commit, and empty the tables after the last of them: a flush costs as much as
    three cases, and a case looks only at rows of its own."""
    with django_db_blocker.unblock():
        # pytest-django makes a database only where a test is marked for it. Without one, these
        # alone would change, and empty, the very database that DATABASE_URL names.
        is_made = connection.settings_dict["NAME"].startswith("test_")
        made = [] if is_made else setup_databases(verbosity=0, interactive=False)
        yield
        call_command("flush", interactive=False, verbosity=0)
        teardown_databases(made, verbosity=0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.steps.__name__)
def test_the_hot_routes_answer_as_the_viewsets_do(case, shared_database, settings):
    for name, value in case.settings.items():
        setattr(settings, name, value)

    played = []
    for lane in (viewset_lane, hot_lane):
        # Otherwise what was played before would be among what is listed.
        Drop.objects.update(status=DropStatus.CANCELLED)
        played.append(play(case.steps, lane))
    by_viewsets, by_hot_routes = played

    assert [outcome(answer) for answer in by_viewsets] == case.outcomes
    assert_same(transcript(by_hot_routes), transcript(by_viewsets))


def assert_same(by_hot_routes: list[Any], by_viewsets: list[Any]) -> None:
    pairs = enumerate(zip(by_hot_routes, by_viewsets, strict=True))
    different = [(number, *pair) for number, pair in pairs if pair[0] != pair[1]]
    assert not different, "answer {}:\n  hot:     {}\n  viewset: {}".format(*different[0])


# --- Reads ------------------------------------------------------------------------------

QUERIES = (
    *("", "/", "?status=live", "/?status=scheduled", "?status=paused", "?status=ended"),
    *("?status=cancelled", "?status=draft"),
    *("?limit=1", "?limit=1&offset=1", "?limit=100", "?offset=1000000", "?offset=2&limit=2"),
    *("?status=live&limit=1&other=1", "?status=scheduled&status=live", "?a", "?&", "?limit=%31"),
    *("?limit=0", "?limit=101", "?limit=-1", "?limit=x", "?limit=", "?limit=1.0", "?limit=+1"),
    *("?offset=-1", "?offset=1000001", "?offset=", "?limit=0&offset=-1", "?limit=1%00"),
    *("?status=open", "?status=", "?status=LIVE", "?status=%ff", "?STATUS=paused"),
    *("?format=json", "?format=xml", "?format=", "?other=" + "x" * 200),
)


@pytest.fixture
def drops_of_each_kind(transactional_db) -> tuple[User, list[str]]:
    """Return the user who made a draft, and the addresses of some drops."""
    in_an_hour = timezone.now() + timedelta(hours=1)
    drops = [
        DropFactory(upcoming=True),
        DropFactory(upcoming=True, starts_at=in_an_hour - timedelta(minutes=30)),
        DropFactory(status="paused", ends_at=in_an_hour),
        DropFactory(over=True),
        DropFactory(status="cancelled"),
        ReservationFactory(drop__total_stock=1).drop,
        PurchaseFactory(reservation__drop=DropFactory(total_stock=1)).drop,
        DropFactory(sizes=SIZES, description="Zoë's 5 < 6 \u2028", price="25000.50"),
        DropFactory(draft=True),
    ]
    shopper = UserFactory(username="Zoë 👟")
    reserve(drops[-2].pk, Claim(shopper.pk, drops[-2].variants.first().pk, 1))
    purchase(drops[-2].pk, shopper.pk)
    return drops[-1].created_by, [f"drops/{drop.pk}" for drop in drops]


def exact(answer: Response) -> Any:
    """Return all of an answer that was read: also ETags and times have to be the same."""
    return readable(answer, with_etag=True)


@on_an_empty_database
def test_reads_are_the_same(drops_of_each_kind):
    creator, addresses = drops_of_each_kind
    staff = UserFactory(staff=True)

    def steps(api: Client) -> None:
        for query in QUERIES:
            api.get(f"drops{query}")
        for user in (creator, staff):
            for query in ("", "?status=draft", "?status=dr%61ft", "?status=draft&limit=1"):
                api.get(f"drops{query}", user)
        for address in (*addresses, f"drops/{SOMEBODY}", "drops/42"):
            for query in ("", "/", "?a=b", "?format=xml"):
                api.get(f"{address}{query}")
        api.get(addresses[0].upper().replace("DROPS", "drops"))
        api.get(f"drops/{uuid.UUID(addresses[0][6:]).hex}----")

    def twice(api: Client) -> None:
        steps(api)
        steps(api)

    by_viewsets = [exact(answer) for answer in play(steps, viewset_lane)]
    by_hot_routes = [exact(answer) for answer in play(twice, hot_lane)]

    assert_same(by_hot_routes, by_viewsets * 2)


@on_an_empty_database
def test_conditional_reads_are_the_same(drops_of_each_kind):
    _, addresses = drops_of_each_kind

    def steps(api: Client) -> None:
        for address in ("drops", "drops?status=paused", addresses[-2]):
            etag = api.get(address).header("etag")
            strong = etag.removeprefix("W/")
            for known in (
                *(etag, strong, "*", f'"a", {etag}', f"{etag},{etag}", f" {etag} ", f"w/{strong}"),
                *('W/"a"', "", strong.strip('"'), f"{etag[:-1]}", f"* , {etag}"),
            ):
                api.get(address, If_None_Match=known)
                api.get(address, If_None_Match=known, Origin=SHOP)
            api.get(f"{address}&a" if "?" in address else f"{address}?a", If_None_Match=etag)

    by_viewsets = play(steps, viewset_lane)
    by_hot_routes = play(steps, hot_lane)

    assert {answer.status for answer in by_viewsets} == {200, 304}
    assert_same([exact(answer) for answer in by_hot_routes], [exact(a) for a in by_viewsets])


# --- Bad input --------------------------------------------------------------------------


@on_an_empty_database
def test_bad_input_is_refused_the_same_way_and_stores_nothing(request):
    rows = request.getfixturevalue("world")

    def steps(api: Client) -> None:
        for bad in BAD.values():
            api(as_request(bad, rows))

    before = everything()
    by_viewsets = play(steps, viewset_lane)
    by_hot_routes = play(steps, hot_lane)

    assert everything() == before
    assert {answer.status // 100 for answer in by_viewsets} == {4}
    for bad, *pair in zip(BAD, by_hot_routes, by_viewsets, strict=True):
        assert [bad, exact(pair[0])] == [bad, exact(pair[1])]


def as_request(bad: Bad, rows: dict[str, Any]) -> Request:
    path = bad.path
    for name, pk in rows.items():
        path = path.replace(f"{{{name}}}", str(pk))
    named = {"X-User-Id": str(rows["user"]), "Content-Type": bad.content_type}
    for name, value in bad.headers.items():
        named[name.removeprefix("HTTP_").replace("_", "-").title()] = value
    return Request(bad.method, f"/api/{path}", (bad.raw,) if bad.raw else (), tuple(named.items()))


# --- Locks and lost connections ---------------------------------------------------------


@on_an_empty_database
def test_who_waits_in_vain_gets_the_same_answer():
    # Each lane has rows of its own: who waits behind a waiting one waits twice as long.
    holds = ReservationFactory.create_batch(6)
    paths = ["reserve", "purchase", "reserve"] * 2
    keys: list[dict[str, str]] = [{}, {}, {"Idempotency_Key": "order-1"}] * 2
    requests = [
        post(f"/api/drops/{hold.drop.pk}/{path}", hold.user, **key)
        for hold, path, key in zip(holds, paths, keys, strict=True)
    ]

    async def ask() -> list[Response]:
        with viewset_lane() as viewsets, hot_lane() as hot:
            return await asyncio.gather(
                *(hot.send(request) for request in requests[:3]),
                *(viewsets.send(request) for request in requests[3:]),
            )

    with another_session() as session:
        for hold, key in zip(holds, keys, strict=True):
            if key:
                session.execute(
                    "INSERT INTO users_idempotencykey"
                    " (user_id, route, key, fingerprint, body, created_at)"
                    " VALUES (%s, %s, 'order-1', '', '', now())",
                    [hold.user.pk, f"POST /api/drops/{hold.drop.pk}/reserve"],
                )
            else:
                session.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [hold.drop.pk])
        answers = asyncio.run(ask())

    assert [outcome(answer) for answer in answers] == [
        *("busy", "busy", "idempotency_in_progress"),
        *("busy", "busy", "idempotency_in_progress"),
    ]
    assert_same(transcript(answers[:3]), transcript(answers[3:]))


@on_an_empty_database
@pytest.mark.parametrize("call", ["reserve", "purchase"])
def test_a_lost_connection_gets_the_same_answer(call):
    hold = ReservationFactory()
    answers = []

    async def ask(lane: Lane) -> None:
        claim = asyncio.create_task(lane.send(post(f"/api/drops/{hold.drop.pk}/{call}", hold.user)))
        is_over = threading.Event()
        claim.add_done_callback(lambda _: is_over.set())
        await asyncio.gather(claim, asyncio.to_thread(end_sessions_that_wait, is_over))
        answers.append(claim.result())

    for open_lane in (hot_lane, viewset_lane):
        with another_session() as session, open_lane() as lane:
            session.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [hold.drop.pk])
            asyncio.run(ask(lane))

    assert [outcome(answer) for answer in answers] == ["unavailable", "unavailable"]
    assert_same(transcript(answers[:1]), transcript(answers[1:]))
    hold.drop.refresh_from_db()
    assert hold.drop.seq == 0


def end_sessions_that_wait(is_over: threading.Event) -> None:
    ended = 0
    with another_session() as session:
        while not ended and not is_over.is_set():
            # Within a transaction pg_stat_activity stays as it was first seen.
            session.execute("SELECT pg_stat_clear_snapshot()")
            session.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            ended = session.rowcount


# --- The hot routes themselves ----------------------------------------------------------


async def nobody_is_here(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError(f"{scope['method']} {scope['path']} was handed on")


@on_an_empty_database
def test_plain_busy_calls_are_answered_in_front_of_django():
    hold, user = ReservationFactory(drop__total_stock=2, drop__max_per_user=None), UserFactory()
    drop = hold.drop
    browser = {"Accept": "application/json, text/plain, */*", "Origin": SHOP}

    with asyncio.Runner() as runner, hot_lane() as lane:
        lane.application.rest = nobody_is_here
        api = Client(lane, runner)
        api.reserve(drop, user, {"quantity": 1}, **browser)
        api.reserve(drop, user, {"variant": str(drop.variants.get().pk)}, Accept="*/*")
        api.reserve(drop, UserFactory())
        api.reserve(drop, UserFactory(), {"quantity": 2})
        api.purchase(drop, user, None, Idempotency_Key="order-1")
        api.purchase(drop, user, {}, Idempotency_Key="order-1x")
        api.purchase(drop, uuid.uuid4())
        api.reserve(Drop(pk=uuid.uuid4()), user)
        etag = api.get("drops", None, **browser).header("etag")
        api.get("drops?status=live&limit=20&offset=0", user)
        api.get(f"drops/{drop.pk}/", If_None_Match="*")
        api.get("drops", If_None_Match=etag)
        outcomes = [outcome(answer) for answer in api.answers]

    assert outcomes == [
        *(201, 200, "fully_reserved", "fully_reserved", 201, 200, "reservation_required"),
        *("not_found", 200, 200, 304, 304),
    ]
