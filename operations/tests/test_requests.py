import asyncio
import json
import logging
import re
import sys
import uuid
from types import SimpleNamespace

import httpx
import pytest

from config.logs import line_formatter
from drops.tests.factories import DropFactory
from operations import requests
from operations.requests import RequestLog, json_line, route_name
from realtime.asgi import EventStreams
from tests.hot import Request, hot_lane, post, viewset_lane
from tests.servers import WebServer, running_web_servers
from users.tests.factories import UserFactory

LANES = pytest.mark.parametrize(
    ("lane", "name"), [(hot_lane, "hot"), (viewset_lane, "viewset")], ids=["hot", "viewset"]
)


@pytest.fixture
def written(monkeypatch):
    """The lines of requests, as they are written."""
    chunks = []
    monkeypatch.setattr(requests.lines, "_write", chunks.append)

    def parsed():
        requests.lines.flush()
        return [json.loads(line) for line in b"".join(chunks).splitlines()]

    return parsed


def observe(lane):
    """Put the log in front of a lane."""
    lane.application = RequestLog(EventStreams(lane.application), None)
    lane.application.render = json_line
    return lane


@LANES
@pytest.mark.django_db(transaction=True)
def test_one_line_says_who_asked_for_what_and_how_it_ended(lane, name, written):
    drop, user = DropFactory(total_stock=1), UserFactory()

    async def ask(application):
        answer = await application.post(f"/api/drops/{drop.pk}/reserve", user, X_Request_Id="req-1")
        bought = await application.post(f"/api/drops/{drop.pk}/purchase", user)
        refused = await application.post(f"/api/drops/{drop.pk}/reserve", UserFactory.build())
        return answer.json(), bought.json(), refused.json()

    with lane() as application:
        hold, bought, refused = asyncio.run(ask(observe(application)))

    first, second, third = written()
    assert first["duration_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", first["timestamp"])
    assert {key: first[key] for key in first if key not in ("duration_ms", "timestamp")} == {
        "level": "info",
        "logger": "requests",
        "event": "request",
        "lane": name,
        "method": "POST",
        "path": f"/api/drops/{drop.pk}/reserve",
        "route": "/api/drops/{id}/reserve",
        "status": 201,
        "code": "created",
        "request_id": "req-1",
        "user_id": str(user.pk),
        "drop_id": str(drop.pk),
        "reservation_id": hold["id"],
    }
    assert (second["code"], second["reservation_id"]) == ("created", bought["reservation_id"])
    assert (third["status"], third["code"]) == (409, refused["code"])
    assert third["request_id"] == refused["request_id"]


@LANES
@pytest.mark.parametrize(
    ("request_", "status", "code", "route"),
    [
        (Request("GET", "/api/drops"), 200, "ok", "/api/drops"),
        (post("/api/drops", None, {"name": "x"}), 401, "identity_required", "/api/drops"),
        (Request("GET", "/api/nowhere"), 404, "not_found", "/api/"),
        (Request("GET", "/healthz"), 200, "ok", "/healthz"),
        (Request("GET", "/static/nothing.js"), 404, "refused", "/static/"),
        (Request("POST", "/api/drops", (b"x" * 17_000,)), 413, "body_too_large", "other"),
        (Request("BREW", "/api/drops"), 401, "identity_required", "/api/drops"),
    ],
    ids=lambda value: getattr(value, "address", None),
)
@pytest.mark.django_db(transaction=True)
def test_every_request_has_exactly_one_line(lane, name, request_, status, code, route, written):
    with lane() as application:
        asyncio.run(observe(application).send(request_))

    (line,) = written()
    assert (line["status"], line["code"], line["route"]) == (status, code, route)


@pytest.mark.django_db(transaction=True)
def test_a_refused_stream_has_its_line(written):
    with hot_lane() as application:
        asyncio.run(
            observe(application).get(
                f"/api/drops/{uuid.uuid4()}/events", Accept="text/event-stream"
            )
        )

    (line,) = written()
    assert (line["lane"], line["status"], line["code"]) == ("stream", 404, "not_found")


def test_a_client_that_went_away_has_its_line(written):
    async def never_answer(scope, receive, send):
        pass

    async def ask():
        log = RequestLog(never_answer, None)
        log.render = json_line
        await log({"type": "http", "method": "GET", "path": "/x"}, None, None)

    asyncio.run(ask())

    assert [(line["status"], line["code"]) for line in written()] == [(499, "client_gone")]


def test_a_client_of_uvicorn_that_went_away_just_now_is_no_error(written):
    # Its cycle, as far as it matters, and what uvloop says then.
    class Cycle:
        transport = SimpleNamespace(is_closing=lambda: True)
        disconnected = False

        async def send(self, message):
            raise RuntimeError("unable to perform operation; the handler is closed")

    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask():
        log = RequestLog(answers, None)
        log.render = json_line
        await log({"type": "http", "method": "GET", "path": "/x"}, None, cycle.send)

    cycle = Cycle()
    asyncio.run(ask())

    assert cycle.disconnected
    assert [(line["status"], line["code"]) for line in written()] == [(499, "client_gone")]


def test_an_application_that_breaks_has_its_line(written):
    async def breaks(scope, receive, send):
        raise ZeroDivisionError

    async def ask():
        log = RequestLog(breaks, None)
        log.render = json_line
        await log({"type": "http", "method": "GET", "path": "/x"}, None, None)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask())

    assert [(line["status"], line["level"]) for line in written()] == [(500, "error")]


@LANES
@pytest.mark.django_db(transaction=True)
def test_lines_hold_no_secret(lane, name, written):
    token = "eyJhbGciOi.eyJzdWIi.c2lnbmF0"
    drop = DropFactory()

    async def ask(application):
        by_token, by_word = {"X-Request-Id": token}, {"X-Request-Id": "token:hunter2"}
        await application.get(f"/api/drops/{drop.pk}?ticket=3f9a77c2b1", **by_token)
        await application.get("/password=hunter2", **by_word)
        await application.get("/api/nowhere\n", Authorization=f"Bearer {token}")

    with lane() as application:
        asyncio.run(ask(observe(application)))

    found = written()
    assert len(found) == 3
    text = json.dumps(found)
    assert "hunter2" not in text
    assert "3f9a77c2b1" not in text
    assert token not in text


def test_no_request_is_logged_where_that_is_off(settings, written):
    settings.REQUEST_LOG = False

    assert RequestLog(None, None).render is None
    settings.REQUEST_LOG = True
    assert RequestLog(None, None).render is requests.readable_line
    settings.DEBUG = False
    assert RequestLog(None, None).render is json_line


def test_lines_go_out_together_and_none_waits_long(monkeypatch):
    chunks = []
    monkeypatch.setattr(requests, "WRITE_SECONDS", 0.01)
    lines = requests.Lines()
    lines._write = chunks.append

    async def put():
        for number in range(requests.MOST_WAITING_LINES + 2):
            lines.put(f"{number}\n".encode())
        await asyncio.sleep(0.1)

    asyncio.run(put())

    assert [chunk.count(b"\n") for chunk in chunks] == [requests.MOST_WAITING_LINES, 2]


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("api/^drops/(?P<drop_id>[^/]+)/reserve/?$", "/api/drops/{id}/reserve"),
        ("api/^drops/(?P<pk>[^/.]+)/?$", "/api/drops/{id}"),
        ("drops/<str:drop_id>/holds", "/drops/{id}/holds"),
        ("admin/drops/drop/<path:object_id>/change/", "/admin/"),
        ("api/^asyncapi\\.json/?$", "/api/asyncapi.json"),
        ("", "/"),
    ],
)
def test_names_routes_as_people_write_them(pattern, name):
    assert route_name(pattern) == name


# --- Whole processes ------------------------------------------------------------------------

PRODUCTION = {
    "DEBUG": "false",
    "SECRET_KEY": "x" * 60,
    "ALLOWED_HOSTS": "127.0.0.1",
    "IDENTITY_MODE": "header",
    "TRUST_IDENTITY_HEADERS": "true",
    "DJANGO_SETTINGS_MODULE": "config.settings",
}


@pytest.mark.slow
@pytest.mark.servers
@pytest.mark.parametrize("server", ["daphne", "uvicorn"])
@pytest.mark.django_db(transaction=True)
def test_in_production_all_is_json_and_each_request_one_line(server):
    drop = DropFactory()
    user = {"X-User-Id": str(uuid.uuid4())}

    with (
        running_web_servers(WebServer(server, **PRODUCTION)) as (web,),
        httpx.Client(trust_env=False, base_url=web.url) as client,
    ):
        client.post(f"/api/drops/{drop.pk}/reserve", headers=user | {"X-Request-Id": "a"})
        client.get("/api/me", headers=user | {"X-Request-Id": "b"})
        client.get("/api/drops?limit=x", headers={"X-Request-Id": "c"})
        assert client.get("/metrics").status_code == 404
    assert [line for line in web.lines if not line.startswith("{")] == []
    lines = [json.loads(line) for line in web.lines]

    of_requests = [line for line in lines if line["event"] == "request"]
    assert [line["request_id"] for line in of_requests][:3] == ["a", "b", "c"]
    assert [line["lane"] for line in of_requests] == ["hot", "viewset", "viewset", "viewset"]
    assert [line["user_id"] for line in of_requests][:2] == [user["X-User-Id"]] * 2


@pytest.mark.slow
@pytest.mark.servers
def test_the_expiry_loop_logs_json_in_production(start_expiry):
    loop = start_expiry(**PRODUCTION)
    loop.wait_for_line("stop with Ctrl-C")
    loop.stop()

    events = [json.loads(line) for line in loop.lines]
    assert events[0]["event"] == "expiring reservations; stop with Ctrl-C"
    assert events[0]["level"] == "info"


def record_of_failure():
    try:
        raise ValueError('{"secret": "hunter2"} redis://:hunter2@redis/0')
    except ValueError:
        return logging.LogRecord("x", 40, "x.py", 1, "%s", ("Bearer abcdefgh",), sys.exc_info())


@pytest.mark.parametrize("is_json", [True, False])
def test_what_is_logged_is_masked_before_it_is_quoted(is_json):
    text = line_formatter(is_json=is_json).format(record_of_failure())

    assert "hunter2" not in text
    assert "abcdefgh" not in text
    assert "ValueError" in text
    if is_json:
        line = json.loads(text)
        assert (line["event"], line["level"], line["logger"]) == ("Bearer ***", "error", "x")


def test_an_error_that_was_answered_is_no_second_line():
    logger = logging.getLogger("django.request")
    answered = logger.makeRecord("django.request", 40, "x.py", 1, "Unavailable: /x", (), None)

    assert not logger.filter(answered)
    failed = record_of_failure()
    assert logger.filter(failed)
    # What Django brings along would write a line of each record too.
    assert logging.getLogger("django").handlers == []
