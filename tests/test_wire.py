"""What only a real server process can be asked: odd bytes, large bodies, headers, methods."""

import contextlib
import http.client
import itertools
import json
import re
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest

from drops.models import Drop
from drops.tests.factories import DropFactory
from reservations.tests.factories import ReservationFactory
from tests.servers import WebServer, running_web_servers
from users.models import User
from users.tests.factories import UserFactory

pytestmark = pytest.mark.servers

TWO_MEGABYTES = 2 * 1024 * 1024
SOMEBODY = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
BUYER_CALLS = ("reserve", "purchase")


@pytest.fixture
def client(web_server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=web_server.url, timeout=10, verify=False) as client:
        yield client


def problem_of(response: httpx.Response) -> tuple[int, str]:
    """Return status and code of an error, having checked that it is a problem document."""
    document = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert document["status"] == response.status_code
    assert document["request_id"] == response.headers["x-request-id"]
    return response.status_code, document["code"]


def exchange(server: WebServer, *parts: bytes) -> tuple[int, dict[str, str], bytes] | None:
    """Send bytes as they are; return status, headers and body, or None for a closed line."""
    with server.connect() as line:
        try:
            for part in parts:
                line.sendall(part)
            answer = http.client.HTTPResponse(line)
            answer.begin()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        except (http.client.BadStatusLine, ConnectionError):
            return None


def request_bytes(method: str, path: str, *headers: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", *headers, b"", b""]
    return b"\r\n".join(lines)


def is_alive(server: WebServer) -> bool:
    answer = exchange(server, request_bytes("GET", "/healthz"))
    return answer is not None and answer[0] == 200


def test_says_that_it_is_up(client):
    response = client.get("/healthz")

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


# --- Large bodies -----------------------------------------------------------------------


def test_refuses_a_large_body(web_server, client, transactional_db):
    headers = {
        "X-User-Id": SOMEBODY,
        "X-Request-Id": "large-1",
        "Origin": "https://shop.example",
    }

    response = client.post("/api/drops", content=b" " * TWO_MEGABYTES, headers=headers)

    assert problem_of(response) == (413, "body_too_large")
    assert response.headers["x-request-id"] == "large-1"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert User.objects.count() == 0
    assert is_alive(web_server)


@pytest.mark.parametrize("server", ["daphne", "uvicorn"])
def test_a_refused_body_has_https_remembered_behind_a_proxy(server, django_db_setup):
    environment = {"HTTPS_ONLY": "true", "TRUSTED_PROXIES": "127.0.0.1"}
    head = request_bytes(
        "POST", "/api/drops", b"Content-Length: 99999", b"X-Forwarded-Proto: https"
    )
    with running_web_servers(WebServer(server, **environment)) as (behind_proxy,):
        status, headers, _ = exchange(behind_proxy, head)

    assert status == 413
    assert headers["strict-transport-security"].startswith("max-age=31536000")


def test_a_length_of_thousands_of_digits_is_refused(web_server):
    answer = exchange(
        web_server, request_bytes("POST", "/api/drops", b"Content-Length: " + b"9" * 5000)
    )

    assert answer is None or answer[0] in (400, 413)
    assert is_alive(web_server)


def test_refuses_a_large_chunked_body(web_server, client, transactional_db):
    chunks = (b" " * 65_536 for _ in range(32))

    response = client.post("/api/drops", content=chunks, headers={"X-User-Id": SOMEBODY})

    assert problem_of(response) == (413, "body_too_large")
    assert User.objects.count() == 0
    assert is_alive(web_server)


def test_takes_a_small_chunked_body(client, transactional_db):
    body = json.dumps({"name": "Ember", "price": "199.00", "total_stock": 3}).encode()
    headers = {"X-User-Id": SOMEBODY, "Content-Type": "application/json"}

    response = client.post("/api/drops", content=iter([body[:10], body[10:]]), headers=headers)

    assert response.status_code == 201
    assert Drop.objects.get().name == "Ember"


def test_takes_a_small_chunked_body_of_a_hot_route(client, transactional_db):
    drop = DropFactory(sizes={"EU 42": 1, "EU 43": 1})
    variant = drop.variants.last()
    body = json.dumps({"variant": str(variant.pk)}).encode()
    headers = {"X-User-Id": str(UserFactory().pk), "Content-Type": "application/json"}

    response = client.post(
        f"/api/drops/{drop.pk}/reserve", content=iter([body[:10], body[10:]]), headers=headers
    )

    assert (response.status_code, response.json().get("variant_id")) == (201, str(variant.pk))


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"Content-Length: 2097152", b""),
        (b"Transfer-Encoding: chunked", b"8000\r\n" + b" " * 0x8000 + b"\r\n"),
    ],
    ids=["declared", "chunked"],
)
def test_refuses_a_large_body_without_reading_it_all(web_server, header, body):
    head = request_bytes("POST", "/api/drops", header, b"Content-Type: application/json")

    status, headers, answer = exchange(web_server, head, body)

    assert (status, json.loads(answer)["code"]) == (413, "body_too_large")
    assert headers["connection"] == "close"


LIMITS = {"/": 16_384, "/healthz": 16_384, "/nowhere": 16_384, "/admin/login/": 2_621_440}


@pytest.mark.parametrize("path", LIMITS)
def test_refuses_a_large_body_of_a_page_without_reading_it_all(web_server, path):
    size = LIMITS[path] + 1
    declared = request_bytes("POST", path, b"Content-Length: %d" % size)
    chunked = request_bytes("POST", path, b"Transfer-Encoding: chunked")

    # Neither body is ever complete.
    for parts in [(declared,), (chunked, b"%x\r\n" % size, bytes(size))]:
        status, headers, _ = exchange(web_server, *parts)

        assert (status, headers["connection"]) == (413, "close"), parts[0]
    assert is_alive(web_server)


def test_a_form_of_the_admin_may_be_larger(client, transactional_db):
    page = client.get("/admin/login/")
    form = {"csrfmiddlewaretoken": page.cookies["csrftoken"], "username": "a" * 100_000}
    body, headers = urlencode(form).encode(), {"Content-Type": "application/x-www-form-urlencoded"}

    for content in (body, iter([body[:50_000], body[50_000:]])):
        response = client.post("/admin/login/", content=content, headers=headers)

        # Only who reads the token in the body lets a form in.
        assert response.status_code == 200
        assert "This field is required" in response.text


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b"5, 5", b"9" * 5000, b"", b"\xb2"])
def test_survives_an_absurd_length(web_server, length):
    head = request_bytes("POST", "/api/drops", b"Content-Length: " + length)

    answer = exchange(web_server, head, b"{}")

    assert answer is None or answer[0] in (400, 411, 413, 431)
    assert is_alive(web_server)


# --- Headers ----------------------------------------------------------------------------


def test_refuses_a_repeated_identity(client, transactional_db):
    paths = ["/api/drops", "/api/me", f"/api/drops/{SOMEBODY}", "/api/schema"]
    for path, second in itertools.product(paths, [SOMEBODY, "me", ""]):
        response = client.get(path, headers=[("X-User-Id", SOMEBODY), ("X-User-Id", second)])

        assert problem_of(response) == (401, "invalid_identity"), (path, second)
    assert User.objects.count() == 0


NO_UTF8 = [b"\xff\xfe", b"\xc3\x28" * 18, b"\xed\xa0\x80", b"\xf0\x9f"]


def test_refuses_an_identity_of_a_buyer_that_is_repeated_or_no_utf8(client, transactional_db):
    drop, user = DropFactory(), UserFactory()
    identities = [[(b"X-User-Id", str(user.pk).encode())] * 2]
    identities += [[(b"X-User-Id", value)] for value in NO_UTF8]
    for call, headers in itertools.product(BUYER_CALLS, identities):
        response = client.post(f"/api/drops/{drop.pk}/{call}", headers=headers)

        assert problem_of(response) == (401, "invalid_identity"), (call, headers)
    drop.refresh_from_db()
    assert drop.available_stock == 10


def test_a_name_that_is_no_utf8_is_read_as_latin_1(client, transactional_db):
    headers = {b"X-User-Id": SOMEBODY.encode(), b"X-User-Name": b"Ren\xe9e"}

    response = client.get("/api/me", headers=headers)

    assert (response.status_code, response.json()["username"]) == (200, "Renée")


# The bytes of the last two are among what str.splitlines() takes for the end of a line.
@pytest.mark.parametrize("name", ["Łucja 🥇", "Åsa", "محمد"])
def test_a_name_may_be_utf8(client, transactional_db, name):
    headers = {b"X-User-Id": SOMEBODY.encode(), b"X-User-Name": name.encode()}
    drop = DropFactory()

    assert client.get("/api/me", headers=headers).json()["username"] == name
    reserved = client.post(f"/api/drops/{drop.pk}/reserve", headers=headers, json={"quantity": 1})
    assert reserved.status_code == 201


def test_refuses_an_idempotency_key_that_is_no_printable_ascii(client, transactional_db):
    drop, user = DropFactory(), UserFactory()
    for key in [b"\xff", "schlüssel".encode(), b"a\tb", b""]:
        headers = {b"X-User-Id": str(user.pk).encode(), b"Idempotency-Key": key}

        response = client.post(f"/api/drops/{drop.pk}/reserve", headers=headers)

        assert problem_of(response) == (400, "validation_error"), key
    drop.refresh_from_db()
    assert drop.available_stock == 10


@pytest.mark.parametrize("path", ["/api/drops", "/api/me", "/api/nowhere", "/healthz", "/nowhere"])
def test_a_request_id_is_echoed(client, path):
    response = client.get(path, headers={"X-Request-Id": "trace-7.a:b_C"})

    assert response.headers["x-request-id"] == "trace-7.a:b_C"


@pytest.mark.parametrize("given", [None, b"", b"two words", b"\xff", b"x" * 129, b"<script>"])
def test_a_request_without_a_usable_id_gets_one(client, given):
    headers = {} if given is None else {b"X-Request-Id": given}

    identifiers = {
        client.get("/api/drops", headers=headers).headers["x-request-id"] for _ in range(3)
    }

    assert len(identifiers) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", identifier) for identifier in identifiers)


# --- Addresses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/api/drops/%00",
        f"/api/drops/{SOMEBODY}%00",
        "/api/%00",
        "/api/drops/%ff",
        "/api/drops/%ED%A0%80",
        "/api/drops/%",
        "/api/drops/%2e%2e/%2e%2e/etc",
        "/api/drops/..%2f..%2fetc%2fpasswd",
        "/api//drops",
    ],
)
def test_an_address_that_names_nothing_is_not_found(web_server, path):
    answer = exchange(web_server, request_bytes("GET", path))

    assert answer is not None
    status, headers, body = answer
    assert (status, json.loads(body)["code"]) == (404, "not_found")
    assert headers["content-type"] == "application/problem+json"


def test_a_drop_or_a_reservation_that_is_none_is_not_found(web_server, transactional_db):
    identity = f"X-User-Id: {UserFactory().pk}".encode()
    odd = ["%00", f"{SOMEBODY}%00", "%ff", "7", SOMEBODY]
    calls = [("POST", f"/api/drops/{drop_id}/{call}") for drop_id in odd for call in BUYER_CALLS]
    calls += [(method, f"/api/reservations/{pk}") for pk in odd for method in ("GET", "DELETE")]
    for method, path in calls:
        answer = exchange(web_server, request_bytes(method, path, identity, b"Content-Length: 0"))

        assert answer is not None
        assert (answer[0], json.loads(answer[2])["code"]) == (404, "not_found"), (method, path)


@pytest.mark.parametrize(
    "path",
    ["/%00", "/static/%00", "/admin/%00", "/static/..%2f..%2fmanage.py", "/%ff", "/\xe9", "/%"],
)
def test_an_odd_address_elsewhere_is_no_error_of_the_server(web_server, path):
    answer = exchange(web_server, request_bytes("GET", path).replace("\xe9".encode(), b"\xe9"))

    assert answer is None or answer[0] in (301, 302, 400, 404)
    assert is_alive(web_server)


def test_no_client_says_where_the_application_is_mounted(web_server):
    mounted = b"Daphne-Root-Path: /x"

    elsewhere = exchange(web_server, request_bytes("GET", "/x/healthz", mounted))
    here = exchange(web_server, request_bytes("GET", "/healthz", mounted))

    assert elsewhere is not None
    assert here is not None
    assert (elsewhere[0], here[0]) == (404, 200)


@pytest.mark.parametrize(
    "query",
    ["limit=%00", "limit=%ff", "offset=%ED%A0%80", "status=%00", "%00=%00", "limit=9" * 500],
)
def test_an_odd_query_is_no_error_of_the_server(client, query):
    assert client.get(f"/api/drops?{query}").status_code in (200, 400)


@pytest.mark.parametrize("length", [2_000, 16_000, 17_000, 70_000, 1_000_000])
def test_a_very_long_address_is_refused(web_server, length):
    answer = exchange(web_server, request_bytes("GET", "/api/drops/" + "a" * length))

    if length < 16_384:
        assert answer is not None
        assert answer[0] == 404
    else:
        # What servers stop by themselves, some of them don't answer.
        assert answer is None or answer[0] in (400, 414, 431)
    assert is_alive(web_server)


@pytest.mark.parametrize("kilobytes", [40, 80, 1200])
@pytest.mark.parametrize("call", ["", f"/{SOMEBODY}/reserve"])
def test_many_and_long_headers_are_refused(web_server, call, kilobytes):
    headers = [f"X-Filler-{number}: {'a' * 2000}".encode() for number in range(kilobytes // 2)]
    headers.append(f"X-User-Id: {SOMEBODY}".encode())
    method = "POST" if call else "GET"

    answer = exchange(web_server, request_bytes(method, f"/api/drops{call}", *headers))

    assert answer is None or answer[0] in (400, 431)
    assert is_alive(web_server)


# --- Methods ----------------------------------------------------------------------------


ALLOWED_METHODS = [
    ("DELETE", "/api/drops", {"GET", "POST"}),
    ("PUT", "/api/drops/", {"GET", "POST"}),
    ("POST", "/api/drops/{id}", {"GET", "PATCH"}),
    ("PUT", "/api/drops/{id}", {"GET", "PATCH"}),
    ("DELETE", "/api/drops/{id}", {"GET", "PATCH"}),
    ("GET", "/api/drops/{id}/reserve", {"POST"}),
    ("DELETE", "/api/drops/{id}/reserve/", {"POST"}),
    ("PATCH", "/api/drops/{id}/purchase", {"POST"}),
    ("POST", "/api/reservations", {"GET"}),
    ("PATCH", "/api/reservations/{id}", {"GET", "DELETE"}),
    ("DELETE", "/api/purchases/{id}", {"GET"}),
    ("POST", "/api/me", {"GET"}),
    ("GET", "/api/internal/expire-now", {"POST"}),
]


def test_names_the_methods_that_an_address_takes(client, transactional_db):
    drop, user = DropFactory(), UserFactory()
    headers = {"X-User-Id": str(user.pk)}
    for method, path, allowed in ALLOWED_METHODS:
        response = client.request(method, path.format(id=drop.pk), headers=headers)

        assert problem_of(response) == (405, "method_not_allowed"), (method, path)
        assert allowed <= set(response.headers["allow"].split(", ")), (method, path)


def test_an_unusual_method_is_refused(web_server, transactional_db):
    identity = f"X-User-Id: {UserFactory().pk}".encode()
    for method in ("TRACE", "CONNECT", "BREW", "PROPFIND"):
        answer = exchange(web_server, request_bytes(method, "/api/drops", identity))

        assert answer is None or answer[0] in (400, 405, 501), method
    assert is_alive(web_server)


def test_a_head_request_has_headers_only(client, transactional_db):
    drop = DropFactory()

    response = client.head(f"/api/drops/{drop.pk}")

    assert (response.status_code, response.content) == (200, b"")


# --- Other origins ----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", f"/{SOMEBODY}", f"/{SOMEBODY}/reserve"])
def test_a_browser_may_ask_from_another_origin(client, path):
    names = "idempotency-key, x-request-id, x-user-id, x-user-name, content-type"

    response = client.options(
        f"/api/drops{path}",
        headers={
            "Origin": "https://shop.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": names,
        },
    )

    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert set(names.split(", ")) <= names_in(response, "access-control-allow-headers")
    assert {"post", "patch", "delete"} <= names_in(response, "access-control-allow-methods")


def test_a_page_of_another_origin_may_read_the_answers(client, transactional_db):
    drop, user = DropFactory(), UserFactory()
    headers = {"Origin": "https://shop.example", "X-User-Id": str(user.pk)}
    calls = [
        ("GET", "/api/drops", 200),
        ("GET", f"/api/drops/{drop.pk}", 200),
        ("POST", f"/api/drops/{drop.pk}/purchase", 409),
        ("POST", f"/api/drops/{drop.pk}/reserve", 201),
        ("GET", "/api/me", 200),
        ("GET", "/api/drops/7", 404),
        ("POST", "/api/drops", 400),
    ]
    for method, path, status in calls:
        response = client.request(method, path, headers=headers)

        assert response.status_code == status, (method, path)
        assert response.headers["access-control-allow-origin"] == "*", (method, path)
        assert names_in(response, "access-control-expose-headers") == {
            "idempotent-replayed",
            "ratelimit",
            "ratelimit-policy",
            "retry-after",
            "x-request-id",
        }


def names_in(response: httpx.Response, header: str) -> set[str]:
    return {name.strip().lower() for name in response.headers[header].split(",")}


# --- What is no HTTP --------------------------------------------------------------------

MALFORMED: dict[str, bytes] = {
    "noise": bytes(range(256)) * 4,
    "a greeting": b"HELO there\r\n\r\n",
    "no version": b"GET /api/drops\r\n\r\n",
    "an unknown version": b"GET /api/drops HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no host": b"GET /api/drops HTTP/1.1\r\n\r\n",
    "a host that is none": request_bytes("GET", "/api/drops").replace(b"localhost", b"a b\x00c"),
    "two hosts": request_bytes("GET", "/api/drops", b"Host: evil.example"),
    "a header without a colon": request_bytes("GET", "/api/drops", b"X-User-Id"),
    "a NUL in a header": request_bytes("GET", "/api/drops", b"X-User-Id: \x00"),
    "a folded header": request_bytes("GET", "/api/drops", b"X-User-Id: a\r\n b"),
    "a broken chunk": request_bytes("POST", "/api/drops", b"Transfer-Encoding: chunked")
    + b"zz\r\n{}\r\n0\r\n\r\n",
    "two lengths": request_bytes("POST", "/api/drops", b"Content-Length: 2", b"Content-Length: 3")
    + b"{}",
    "a length and chunks": request_bytes(
        "POST", "/api/drops", b"Content-Length: 2", b"Transfer-Encoding: chunked"
    )
    + b"0\r\n\r\n",
    "an unknown coding": request_bytes("POST", "/api/drops", b"Transfer-Encoding: br") + b"{}",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a broken WebSocket": request_bytes(
        "GET", "/ws/drops", b"Upgrade: websocket", b"Connection: Upgrade"
    ),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_survives_what_is_no_http(web_server, data):
    with web_server.connect() as line:
        line.settimeout(1)
        answer = send_and_read(line, data)

    assert answer == b"" or 200 <= status_of(answer) < 500
    assert is_alive(web_server)


def send_and_read(line: socket.socket, data: bytes) -> bytes:
    """Return the start of the answer; nothing for a closed line or a server that waits for more."""
    try:
        line.sendall(data)
        line.shutdown(socket.SHUT_WR)
        return line.recv(4096)
    except (ConnectionError, TimeoutError):
        return b""


def status_of(answer: bytes) -> int:
    return int(re.match(rb"HTTP/1\.[01] (\d{3})", answer)[1])


def test_survives_clients_that_leave_in_the_middle(web_server, transactional_db):
    drop = DropFactory()
    whole = request_bytes(
        "POST", f"/api/drops/{drop.pk}/reserve", f"X-User-Id: {uuid.uuid4()}".encode()
    )

    for length in range(1, len(whole), 7):
        with web_server.connect() as line:
            line.sendall(whole[:length])

    assert is_alive(web_server)
    drop.refresh_from_db()
    assert drop.available_stock == 10


def test_a_request_that_was_cut_short_changes_nothing(web_server, transactional_db):
    user: Any = UserFactory()
    head = request_bytes(
        "POST",
        "/api/drops",
        f"X-User-Id: {user.pk}".encode(),
        b"Content-Type: application/json",
        b"Content-Length: 500",
    )

    with web_server.connect() as line:
        line.sendall(head + b'{"name": "Ember", "price": "1.00", "total_stock": 1}')

    assert is_alive(web_server)
    assert Drop.objects.count() == 0


# --- Answers of the hot routes ----------------------------------------------------------


HANDSHAKE = (
    *(b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"),
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


@pytest.mark.django_db(transaction=True)
def test_no_socket_says_where_the_application_is_mounted(web_server):
    handshake = request_bytes("GET", "/ws/nowhere", b"Daphne-Root-Path: /x", *HANDSHAKE)
    with web_server.connect() as line:
        line.sendall(handshake)

        assert status_of(line.recv(4096)) == 101


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("path", ["/ws/nowhere", f"/ws/drops/{SOMEBODY}", "/ws/control"])
def test_a_refused_socket_ends_soon_though_its_client_answers_nothing(web_server, path):
    origin = f"Origin: {web_server.url.replace('127.0.0.1', 'localhost')}".encode()
    handshake = request_bytes("GET", path, origin, *HANDSHAKE)
    with web_server.connect() as line:
        line.settimeout(30)
        line.sendall(handshake)
        answer = line.recv(4096)
        began = time.monotonic()
        # daphne cuts the line, uvicorn ends it.
        with contextlib.suppress(ConnectionResetError):
            while line.recv(4096):
                pass

    assert status_of(answer) == 101
    # uvicorn's own patience is ten seconds.
    assert time.monotonic() - began < 7


@pytest.mark.django_db(transaction=True)
def test_hot_answers_go_past_the_layers_of_the_server(web_server):
    """Their head ends with what the server adds, which begins the head where it writes itself."""
    with web_server.connect() as line:
        for _ in range(2):  # on the same connection
            line.sendall(request_bytes("GET", "/api/drops"))
            answer = b""
            while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
                assert (received := line.recv(65_536)), "the connection was closed"
                answer += received
            head, _, body = answer.partition(b"\r\n\r\n")
            first, *headers = head.split(b"\r\n")
            assert first == b"HTTP/1.1 200 OK"
            assert headers[0] == b"content-length: %d" % len(body)
            assert headers[-1] == b"server: %b" % web_server.server.encode()


@pytest.mark.django_db(transaction=True)
def test_a_hot_answer_closes_the_connection_for_who_asks_for_that(web_server):
    with web_server.connect() as line:
        line.sendall(request_bytes("GET", "/api/drops", b"Connection: close"))
        answer = b""
        while received := line.recv(65_536):
            answer += received
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in answer.lower()


OWN_HEADERS = {"connection", "x-request-id", "date"}
# Other drops, times and requests that are left.
CHANGING_HEADERS = {"content-length", "etag", "ratelimit"}


def headers_of(answer: http.client.HTTPResponse) -> list[tuple[str, str]]:
    headers = [(name.lower(), value) for name, value in answer.getheaders()]
    return sorted(
        (name, "" if name in CHANGING_HEADERS else value)
        for name, value in headers
        if name not in OWN_HEADERS
    )


@pytest.mark.django_db(transaction=True)
def test_hot_answers_have_the_same_headers_past_the_layers_and_through_them(web_server):
    drop, held = DropFactory(), ReservationFactory(drop=DropFactory(total_stock=1)).drop
    calls = [
        (201, "POST", f"/api/drops/{drop.pk}/reserve", []),
        (409, "POST", f"/api/drops/{held.pk}/reserve", []),
        (200, "GET", "/api/drops", []),
        (304, "GET", "/api/drops", [b"If-None-Match: *"]),
    ]
    for status, method, path, headers in calls:
        found = []
        # Whoever has the connection closed is answered by the layers of the server.
        for connection in (b"keep-alive", b"close"):
            own = [b"Connection: " + connection, b"Origin: https://shop.example"]
            if method == "POST":
                own.append(f"X-User-Id: {UserFactory().pk}".encode())
            with web_server.connect() as line:
                line.sendall(request_bytes(method, path, *headers, *own))
                answer = http.client.HTTPResponse(line, method=method)
                answer.begin()
                assert (answer.status, answer.will_close) == (status, connection == b"close")
                found.append(headers_of(answer))
        past_the_layers, through_them = found

        assert past_the_layers == through_them, (method, path, status)
        wanted = {
            *("access-control-allow-origin", "allow", "content-length", "content-security-policy"),
            *("referrer-policy", "server", "vary", "x-content-type-options", "x-frame-options"),
            *(("ratelimit", "ratelimit-policy") if method == "POST" else ("etag",)),
        }
        assert wanted <= {name for name, _ in through_them}, (method, path, status)


@pytest.mark.django_db(transaction=True)
def test_requests_with_and_without_a_body_follow_each_other_on_one_connection(web_server):
    reserve = f"/api/drops/{DropFactory().pk}/reserve"
    identity = f"X-User-Id: {UserFactory().pk}".encode()
    requests = [
        request_bytes("GET", "/api/drops"),
        request_bytes("POST", reserve, identity),
        # A body that nobody asked for still has to be read, or it would be the next request.
        request_bytes("GET", "/api/drops", b"Content-Length: 24") + b"DELETE /api/drops HTTP/1",
        request_bytes("POST", reserve, identity, b"Content-Length: 0"),
        request_bytes("GET", "/api/drops", b"Connection: close"),
    ]
    with web_server.connect() as line:
        line.sendall(b"".join(requests))
        answers = b""
        while received := line.recv(65_536):
            answers += received
    statuses = re.findall(rb"HTTP/1.1 (\d+) ", answers)
    assert statuses == [b"200", b"201", b"200", b"200", b"200"]
