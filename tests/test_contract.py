"""What clients depend on: each code, each shape, and the document that describes them."""

import asyncio
import re
import uuid
from datetime import timedelta

import httpx
import pytest
from django.core.management import call_command
from django.db import connection
from django.utils import timezone
from drf_spectacular.generators import SchemaGenerator

from drops.tests.factories import DropFactory
from purchases.tests.factories import PurchaseFactory
from reservations.tests.factories import ReservationFactory
from tests.concurrency import another_session, lock_timeout
from users.tests.factories import UserFactory

CODES = {
    "malformed_body": 400,
    "validation_error": 400,
    "identity_required": 401,
    "invalid_identity": 401,
    "unknown_user": 401,
    "permission_denied": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "events_gone": 410,
    "body_too_large": 413,
    "address_too_long": 414,
    "headers_too_large": 431,
    "unsupported_media_type": 415,
    "sold_out": 409,
    "fully_reserved": 409,
    "drop_not_started": 409,
    "drop_ended": 409,
    "drop_paused": 409,
    "drop_cancelled": 409,
    "drop_not_published": 409,
    "variant_required": 409,
    "limit_exceeded": 409,
    "cooldown": 409,
    "already_reserved": 409,
    "reservation_required": 409,
    "reservation_expired": 409,
    "reservation_not_active": 409,
    "idempotency_in_progress": 409,
    "idempotency_key_reused": 422,
    "rate_limited": 429,
    "busy": 503,
    "unavailable": 503,
}
MEMBERS = {"type", "title", "status", "detail", "code", "request_id"}
MORE_MEMBERS = {
    "validation_error": {"errors"},
    "fully_reserved": {"next_release_at", "available_stock"},
    "sold_out": {"available_stock"},
    "drop_not_started": {"starts_at"},
    "limit_exceeded": {"limit", "used"},
    "already_reserved": {"reservation_id"},
}
DROP = {
    *("id", "name", "description", "image_url", "price", "currency", "total_stock"),
    *("available_stock", "availability", "starts_at", "ends_at", "status", "max_per_user"),
    *("hold_cooldown_seconds", "max_expired_holds"),
    *("variants", "seq", "created_at", "activity_feed"),
}
VARIANT = {"id", "label", "total_stock", "available_stock"}
PURCHASER = {"user_id", "username", "qty", "created_at"}
RESERVATION = {
    *("id", "drop_id", "variant_id", "user_id", "quantity", "unit_price", "currency"),
    *("status", "created_at", "expires_at", "expires_in", "drop"),
}
PURCHASE = {
    *("id", "drop_id", "variant_id", "reservation_id", "user_id", "quantity", "amount"),
    *("currency", "status", "created_at"),
}
PAGE = {"count", "next", "previous", "results"}
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z")
NEW_DROP = {"name": "Aurora", "price": "199.00", "total_stock": 5}


# --- Refusals ---------------------------------------------------------------------------
# Each function makes a request that is refused with the code it is named for.


def malformed_body(api):
    return api(UserFactory()).generic("POST", "/api/drops", "{", content_type="application/json")


def validation_error(api):
    return api(UserFactory()).post("/api/drops", {"name": "Aurora"})


def identity_required(api):
    return api().post("/api/drops", NEW_DROP)


def invalid_identity(api):
    return api("alice").get("/api/drops")


def unknown_user(api):
    return api(UserFactory(is_active=False)).get("/api/me")


def permission_denied(api):
    return api(UserFactory()).patch(f"/api/drops/{DropFactory().pk}", {"name": "Mine"})


def not_found(api):
    return api().get(f"/api/drops/{uuid.uuid4()}")


def method_not_allowed(api):
    drop = DropFactory()
    return api(drop.created_by).put(f"/api/drops/{drop.pk}", NEW_DROP)


def not_acceptable(api):
    return api(HTTP_ACCEPT="text/html").get("/api/drops")


def unsupported_media_type(api):
    return api(UserFactory()).generic("POST", "/api/drops", "name=Aurora", "text/plain")


def reserve(api, drop, user=None, **body):
    return api(user or UserFactory()).post(f"/api/drops/{drop.pk}/reserve", body)


def sold_out(api):
    sold = ReservationFactory(drop=DropFactory(total_stock=1), consumed=True)
    return reserve(api, sold.drop)


def fully_reserved(api):
    hold = ReservationFactory(drop=DropFactory(total_stock=1))
    response = reserve(api, hold.drop)
    assert response.json()["next_release_at"] == as_instant(hold.expires_at)
    return response


def drop_not_started(api):
    drop = DropFactory(upcoming=True)
    response = reserve(api, drop)
    assert response.json()["starts_at"] == as_instant(drop.starts_at)
    return response


def drop_ended(api):
    return reserve(api, DropFactory(over=True))


def drop_paused(api):
    return reserve(api, DropFactory(status="paused"))


def drop_cancelled(api):
    return reserve(api, DropFactory(status="cancelled"))


def drop_not_published(api):
    return reserve(api, DropFactory(draft=True))


def variant_required(api):
    return reserve(api, DropFactory(sizes={"EU 42": 1, "EU 43": 1}))


def limit_exceeded(api):
    bought = PurchaseFactory()
    response = reserve(api, bought.drop, bought.user)
    assert (response.json()["limit"], response.json()["used"]) == (1, 1)
    return response


def already_reserved(api):
    hold = ReservationFactory(drop=DropFactory(sizes={"EU 42": 1, "EU 43": 1}))
    response = reserve(api, hold.drop, hold.user, variant=str(hold.drop.variants.last().pk))
    assert response.json()["reservation_id"] == str(hold.pk)
    return response


def purchase(api, reservation):
    return api(reservation.user).post(f"/api/drops/{reservation.drop.pk}/purchase")


def reservation_required(api):
    return purchase(api, ReservationFactory.build(drop=DropFactory(), user=UserFactory()))


def reservation_expired(api):
    return purchase(api, ReservationFactory(overdue=True))


def reservation_not_active(api):
    return purchase(api, ReservationFactory(released=True))


def idempotency_key_reused(api):
    client = api(UserFactory(), HTTP_IDEMPOTENCY_KEY="order-1")
    client.post("/api/drops", NEW_DROP)
    return client.post("/api/drops", NEW_DROP | {"name": "Borealis"})


def idempotency_in_progress(api):
    user = UserFactory()
    with another_session() as session, lock_timeout(50):
        session.execute(
            "INSERT INTO users_idempotencykey (user_id, route, key, fingerprint, body, created_at)"
            " VALUES (%s, 'POST /api/drops', 'order-1', '', '', now())",
            [user.pk],
        )
        return api(user, HTTP_IDEMPOTENCY_KEY="order-1").post("/api/drops", NEW_DROP)


def events_gone(api):
    # Five events, of which the log remembers none.
    return api().get(f"/api/drops/{DropFactory(seq=5).pk}/events?after=1")


def cooldown(api):
    drop = DropFactory(max_expired_holds=1, hold_cooldown_seconds=300)
    return reserve(api, drop, ReservationFactory(drop=drop, expired=True).user)


def busy(api):
    drop = DropFactory()
    with another_session() as session, lock_timeout(50):
        session.execute("SELECT FROM drops_drop WHERE id = %s FOR UPDATE", [drop.pk])
        return reserve(api, drop)


def unavailable(api):
    connection.ensure_connection()
    with another_session() as session:
        session.execute("SELECT pg_terminate_backend(%s)", [connection.connection.info.backend_pid])
    try:
        return api().get("/api/drops")
    finally:
        connection.close()


REFUSALS = [
    *(malformed_body, validation_error, identity_required, invalid_identity, unknown_user),
    events_gone,
    *(permission_denied, not_found, method_not_allowed, not_acceptable, unsupported_media_type),
    *(sold_out, fully_reserved, drop_not_started, drop_ended, drop_paused, drop_cancelled),
    *(drop_not_published, variant_required, limit_exceeded, already_reserved),
    *(reservation_required, reservation_expired, reservation_not_active, idempotency_key_reused),
    cooldown,
]
REFUSALS_BETWEEN_SESSIONS = [idempotency_in_progress, busy, unavailable]


def as_instant(value):
    return value.isoformat().replace("+00:00", "Z")


def check_problem(status, headers, document, code):
    assert (status, document["code"]) == (CODES[code], code)
    assert headers["Content-Type"] == "application/problem+json"
    assert document.keys() == MEMBERS | MORE_MEMBERS.get(code, set())
    assert document["status"] == CODES[code]
    assert document["type"] == f"urn:sneaker-drops:problem:{code}"
    assert document["title"]
    assert document["detail"]
    assert headers["X-Request-Id"] == document["request_id"]
    assert "Traceback" not in document["detail"]
    for error in document.get("errors", []):
        assert error.keys() == {"field", "code", "detail"}
    if CODES[code] in (429, 503):
        assert int(headers["Retry-After"]) >= 1


@pytest.mark.parametrize("refused", REFUSALS, ids=lambda refused: refused.__name__)
def test_answers_a_refusal_as_a_problem(client_of, db, schema, refused):
    response = refused(client_of)

    check_problem(response.status_code, response, response.json(), refused.__name__)
    check_documented(schema, response)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("refused", REFUSALS_BETWEEN_SESSIONS, ids=lambda refused: refused.__name__)
def test_answers_a_refusal_that_others_cause_as_a_problem(client_of, schema, refused):
    response = refused(client_of)

    check_problem(response.status_code, response, response.json(), refused.__name__)
    check_documented(schema, response)


@pytest.mark.parametrize("given", ["mine-1", None])
def test_answers_a_large_body_as_a_problem(given):
    from config.asgi import application

    async def send():
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            headers = {"X-Request-Id": given} if given else {}
            return await client.post("/api/drops", content=b" " * 16_385, headers=headers)

    response = asyncio.run(send())

    check_problem(response.status_code, response.headers, response.json(), "body_too_large")
    assert given in (None, response.headers["X-Request-Id"])


def test_every_code_of_the_contract_is_tried():
    tried = {refused.__name__ for refused in REFUSALS + REFUSALS_BETWEEN_SESSIONS}

    # What is refused before a view is asked: config/tests/test_hardening.py, tests/test_wire.py.
    before = {"body_too_large", "address_too_long", "headers_too_large", "rate_limited"}
    assert CODES.keys() - tried == before


UNKNOWN = ["/api", "/api/", "/api/nothing", "/api/drops/x/y/z", "/api//drops", "/api/v1/drops"]
UNKNOWN_ROWS = ["/api/drops/42", "/api/drops/%00", "/api/reservations/42", "/api/purchases/42"]


@pytest.mark.parametrize(
    ("method", "path"),
    [(method, path) for method in ("get", "post", "patch", "delete") for path in UNKNOWN]
    + [("get", path) for path in UNKNOWN_ROWS],
)
def test_an_unknown_address_is_a_problem_too(client_of, db, method, path):
    client = client_of(UserFactory())
    client.raise_request_exception = False

    response = getattr(client, method)(path)

    check_problem(response.status_code, response, response.json(), "not_found")


def test_other_peoples_reservations_and_purchases_are_not_found(client_of, db):
    bought = PurchaseFactory()
    client = client_of(UserFactory())

    for path in (f"/api/reservations/{bought.reservation.pk}", f"/api/purchases/{bought.pk}"):
        response = client.get(path)
        check_problem(response.status_code, response, response.json(), "not_found")


def test_an_address_for_another_host_gets_no_traceback(client_of, db):
    client = client_of(HTTP_HOST="evil.example")
    client.raise_request_exception = False

    response = client.get("/api/drops")

    check_problem(response.status_code, response, response.json(), "malformed_body")


@pytest.mark.parametrize("given", ["a", "7f1c-1f5b_E0.F1:4", "x" * 128])
def test_echoes_a_usable_request_id(client_of, db, given):
    client = client_of(HTTP_X_REQUEST_ID=given)

    assert client.get("/api/drops")["X-Request-Id"] == given
    assert client.get("/api/me").json()["request_id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\nb", "<b>", "\u00e9", "\x00"])
def test_makes_a_request_id_where_none_is_usable(client_of, db, given):
    client = client_of(HTTP_X_REQUEST_ID=given)

    made = [client.get("/api/drops")["X-Request-Id"] for _ in "12"]

    assert made[0] != made[1]
    assert all(re.fullmatch(r"[0-9a-f]{32}", identifier) for identifier in made)


# --- Shapes -----------------------------------------------------------------------------


def check_drop(body):
    assert body.keys() == DROP
    assert all(variant.keys() == VARIANT for variant in body["variants"])
    assert body["variants"]
    assert body["activity_feed"].keys() == {"latest_purchasers"}
    assert all(p.keys() == PURCHASER for p in body["activity_feed"]["latest_purchasers"])
    assert isinstance(body["price"], str)
    assert INSTANT.fullmatch(body["created_at"])
    for moment in ("starts_at", "ends_at"):
        assert body[moment] is None or INSTANT.fullmatch(body[moment])


def check_reservation(body):
    assert body.keys() == RESERVATION
    assert body["drop"].keys() == {"id", "name", "available_stock"}
    assert isinstance(body["unit_price"], str)
    assert isinstance(body["expires_in"], float)
    assert INSTANT.fullmatch(body["created_at"])
    assert INSTANT.fullmatch(body["expires_at"])


def check_purchase(body):
    assert body.keys() == PURCHASE
    assert isinstance(body["amount"], str)
    assert INSTANT.fullmatch(body["created_at"])


def check_page(body, check):
    assert body.keys() == PAGE
    assert body["count"] == len(body["results"]) > 0
    for item in body["results"]:
        check(item)


@pytest.mark.parametrize("slash", ["", "/"])
def test_every_call_answers_in_its_shape(client_of, db, slash):
    user = UserFactory()
    client = client_of(user)

    def call(method, path, *body, status=200):
        response = getattr(client, method)(f"/api/{path}{slash}", *body)
        assert response.status_code == status, response.content
        assert response["Content-Type"] == "application/json"
        assert re.fullmatch(r"[0-9a-f]{32}", response["X-Request-Id"])
        return response.json()

    created = call("post", "drops", NEW_DROP | {"starts_at": "2026-01-01T00:00:00Z"}, status=201)
    check_drop(created)
    drop = f"drops/{created['id']}"
    check_drop(call("patch", drop, {"ends_at": as_instant(timezone.now() + timedelta(hours=1))}))

    held = call("post", f"{drop}/reserve", {"quantity": 1}, status=201)
    check_reservation(held)
    check_reservation(call("post", f"{drop}/reserve"))
    check_reservation(call("get", f"reservations/{held['id']}"))
    check_page(call("get", "reservations"), check_reservation)

    bought = call("post", f"{drop}/purchase", status=201)
    check_purchase(bought)
    assert call("post", f"{drop}/purchase") == bought
    check_purchase(call("get", f"purchases/{bought['id']}"))
    check_page(call("get", "purchases"), check_purchase)

    shown = call("get", drop)
    check_drop(shown)
    assert len(shown["activity_feed"]["latest_purchasers"]) == 1
    check_page(call("get", "drops"), check_drop)

    released = ReservationFactory(user=user)
    check_reservation(call("delete", f"reservations/{released.pk}"))

    assert call("get", "me") == {"id": str(user.pk), "username": user.username}

    ReservationFactory(overdue=True)
    expired = call("post", "internal/expire-now")
    assert expired.keys() == {"expired_count", "drops", "reservations"}
    assert expired["drops"][0].keys() == {"drop_id", "available_stock"}
    assert expired["reservations"][0].keys() == {"reservation_id", "drop_id"}


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("path", ["schema", "docs", "redoc"])
def test_the_document_and_its_viewers_are_there(client_of, db, path, slash):
    response = client_of().get(f"/api/{path}{slash}")

    assert response.status_code == 200
    assert response["X-Request-Id"]


def test_the_process_says_that_it_is_up(client_of):
    response = client_of().get("/healthz")

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "path", ["drops", "reservations", "purchases", "me", "internal/expire-now"]
)
def test_describes_a_route_to_who_asks_for_its_options(client_of, db, path):
    response = client_of(UserFactory()).options(f"/api/{path}")

    assert response.status_code == 200
    assert response["Content-Type"] == "application/json"


def test_other_origins_may_use_every_header_of_the_contract(client_of, db):
    asked = "content-type, idempotency-key, x-request-id, x-user-id, x-user-name"

    allowed = client_of().options(
        "/api/drops",
        HTTP_ORIGIN="https://shop.example",
        HTTP_ACCESS_CONTROL_REQUEST_METHOD="POST",
        HTTP_ACCESS_CONTROL_REQUEST_HEADERS=asked,
    )
    answered = client_of().get("/api/drops", HTTP_ORIGIN="https://shop.example")

    assert allowed["Access-Control-Allow-Origin"] == "*"
    assert set(asked.split(", ")) <= set(allowed["Access-Control-Allow-Headers"].split(", "))
    assert set(answered["Access-Control-Expose-Headers"].split(", ")) >= {
        "idempotent-replayed",
        "retry-after",
        "x-request-id",
    }


# --- The OpenAPI document ---------------------------------------------------------------

METHODS = ("get", "post", "put", "patch", "delete")
CALLS = {
    ("get", "/api/drops"),
    ("post", "/api/drops"),
    ("get", "/api/drops/{id}"),
    ("patch", "/api/drops/{id}"),
    ("post", "/api/drops/{drop_id}/reserve"),
    ("post", "/api/drops/{drop_id}/purchase"),
    ("get", "/api/reservations"),
    ("get", "/api/reservations/{id}"),
    ("delete", "/api/reservations/{id}"),
    ("get", "/api/purchases"),
    ("get", "/api/purchases/{id}"),
    ("get", "/api/me"),
    ("post", "/api/internal/expire-now"),
    ("get", "/api/drops/{drop_id}/events"),
    ("post", "/api/ws-ticket"),
}


@pytest.fixture(scope="module")
def schema():
    return SchemaGenerator().get_schema(request=None, public=True)


def operations(schema):
    return {
        (method, path.rstrip("/")): operation
        for path, item in schema["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    }


def check_documented(schema, response):
    """Check that the document knows this answer, where it knows the call."""
    method, path = response.request["REQUEST_METHOD"].lower(), response.request["PATH_INFO"]
    for (known_method, known_path), operation in operations(schema).items():
        if known_method == method and re.fullmatch(re.sub(r"{\w+}", "[^/]+", known_path), path):
            answer = operation["responses"][str(response.status_code)]
            examples = answer["content"]["application/problem+json"]["examples"].values()
            assert response.json()["code"] in {example["value"]["code"] for example in examples}


def test_the_document_is_valid_without_a_warning(tmp_path):
    call_command("spectacular", validate=True, fail_on_warn=True, file=str(tmp_path / "api.yaml"))

    assert (tmp_path / "api.yaml").read_text().startswith("openapi: 3.")


@pytest.mark.parametrize("query", ["", "?version=%0a", "?version=2&lang=de", "?format=json"])
def test_the_document_is_made_once_whatever_is_asked_for(client_of, db, query, monkeypatch):
    first = client_of().get(f"/api/schema{query}")
    monkeypatch.setattr(SchemaGenerator, "get_schema", None)

    again = client_of().get(f"/api/schema{query}")

    assert (again.status_code, again.content) == (200, first.content)
    assert again["Content-Type"].startswith("application/vnd.oai.openapi")
    suffix = "json" if "json" in query else "yaml"
    assert again["Content-Disposition"] == f'inline; filename="Sneaker drops.{suffix}"'


def test_the_document_has_every_call(schema):
    assert operations(schema).keys() == CALLS


def test_the_document_has_the_identity_headers(schema):
    schemes = schema["components"]["securitySchemes"].values()

    assert {(s["type"], s["in"], s["name"]) for s in schemes} == {
        ("apiKey", "header", "X-User-Id"),
        ("apiKey", "header", "X-User-Name"),
    }
    assert all(operation["security"] for operation in operations(schema).values())


def test_the_document_has_every_code(schema):
    components = schema["components"]["schemas"]
    (reference,) = components["Problem"]["properties"]["code"]["allOf"]

    assert set(components[reference["$ref"].rsplit("/", 1)[1]]["enum"]) == CODES.keys()


def test_the_document_has_an_example_of_each_answer_and_each_body(schema):
    for call, operation in operations(schema).items():
        bodies = [
            (status, content)
            for status, answer in operation["responses"].items()
            for content in answer["content"].values()
        ]
        if operation.get("requestBody", {}).get("required"):
            bodies.append(("request", operation["requestBody"]["content"]["application/json"]))
        for where, content in bodies:
            assert content.get("examples"), f"{call} has no example of {where}"
        for status, content in bodies:
            for example in content["examples"].values():
                if status not in ("request", "200", "201"):
                    assert CODES[example["value"]["code"]] == int(status)


def test_the_document_has_the_idempotency_key_of_each_post(schema):
    with_key = {
        call
        for call, operation in operations(schema).items()
        for parameter in operation.get("parameters", [])
        if (parameter["name"], parameter["in"]) == ("Idempotency-Key", "header")
    }

    assert with_key == {call for call in CALLS if call[0] == "post"}


@pytest.mark.parametrize("path", ["/api/docs", "/api/redoc"])
def test_the_viewers_need_no_other_site(client_of, db, path):
    client = client_of()
    page = client.get(path).content.decode()

    assert not re.search(r"https?://", page)
    files = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(files) >= 1
    for file in files:
        response = client.get(file)
        assert response.status_code == 200, file
        response.close()
