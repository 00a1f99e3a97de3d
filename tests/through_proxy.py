"""``pytest --through-proxy``: the black-box tests, through nginx to two uvicorn processes.

A pytest plugin (see the root ``conftest.py``). With the option only those tests run that speak to
the application as its clients do, by sockets or by API clients, whose requests then go over HTTP
as well. ``ELSEWHERE`` says which of them make no sense here.
"""

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from django.core.handlers.wsgi import WSGIRequest
from django.http import HttpResponse

from deploy.local import Topology, TopologyError, manage, production_settings

# Tests, by a part of their name, that are not about what a client sees through a proxy.
ELSEWHERE = {
    "nginx refuses it by itself, with a page of its own": (
        *("%00", "a way up", "TRACE", "an unknown method", "unknown version", "unknown coding"),
        *("/api/drops/%]", "is_none_is_not_found", "test_refuses_a_large_body", "CONNECT"),
        *("that_is_not_ascii_is_refused", "a_handshake_that_is_too_long"),
    ),
    "of such bodies the size is refused first": (
        *("nested 100,000 deep", "nested 5,000 deep", "10 kB of emoji"),
    ),
    "no HTTP client sends it": (
        *("a NUL", "a line break", "[DEL]", "a\\nb", "\\x00", "as a content type", "in garbage"),
        "test_names_a_new_user_after_the_header",
    ),
    "exists only in DEBUG": (
        "tests/browser/",
        *("expire-now", "when_asked", "nothing_is_due", "answers_in_its_shape", "an expiry"),
        *("test_the_six_event_types", "test_every_frame_of_a_socket", "test_names_the_methods"),
    ),
    "changes or watches this very process": (
        *("costs_the_same", "in_two_statements", "[unavailable]", "who_never_reads"),
        *("feed_is_no_password", "test_a_replayed_claim", "test_a_stranger_without"),
        *("test_makes_nobody_where", "test_a_verified_stranger", "test_asks_for_a_bearer"),
        *("test_opaque_ids", "is_limited", "are_limited", "no_longer_the_primary"),
        *("no_halves_of_characters", "in_one_moment_find_a_place", "hides_no_gap_and_is_none"),
        *("the_token_that_opened_it", "after_the_last_date_there_is"),
    ),
    "comes from a page of another site, which changes nothing where a proxy is trusted": (
        *("test_a_form_of_the_admin", "test_a_page_of_another_origin", "same_headers_past"),
        "test_a_valid_identity_is_accepted",
    ),
    "nginx writes the head of each answer anew": ("test_hot_answers_go_past_the_layers",),
    "reads in the very moment after a change that another process made": (
        "test_shows_the_stock_of_each_size_and",
    ),
}
BLACK_BOX = {"client_of", "web_server", "web_servers", "session_web_servers", "session_uvicorn"}
# The tests have one address and few users, who ask often; some ask for another site's pages.
UNLIMITED = {
    f"RATE_LIMIT_{action}{whose}": "off"
    for action in ("RESERVE", "PURCHASE", "CREATE", "UPDATE", "SOCKET", "TICKET", "IDENTITY")
    for whose in ("", "_PER_ADDRESS")
} | {"SOCKETS_PER_ADDRESS": "0", "CORS_ORIGINS": "*", "PUBLIC_USER_IDS": "plain"}
# How long a process may answer a list from memory; drops.asgi says the same.
MAX_AGE_SECONDS = 1.0
# Of the connection, not of the request or the answer.
HOP_BY_HOP = {"connection", "content-length", "date", "server", "transfer-encoding"}


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--through-proxy",
        action="store_true",
        help="run the black-box tests, and only them, through nginx to two processes",
    )


def pytest_collection_modifyitems(config, items: list[pytest.Item]) -> None:
    if not config.getoption("through_proxy"):
        return
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        is_black_box = BLACK_BOX & set(getattr(item, "fixturenames", ()))
        # The second kind of server would be the same proxy once more.
        is_repeated = "[daphne" in item.name
        is_chosen = is_black_box and not is_repeated and not is_elsewhere(item)
        (chosen if is_chosen else others).append(item)
    for item in chosen:
        # The processes see only what is committed.
        item.add_marker(pytest.mark.django_db(transaction=True), append=False)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)


def is_elsewhere(item: pytest.Item) -> bool:
    return any(part in item.nodeid for parts in ELSEWHERE.values() for part in parts)


class Proxied:
    """The topology's public port, in the place of a ``WebServer``."""

    name = server = "nginx"

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.port = topology.port
        self.url = topology.url
        self.ws_url = topology.url.replace("http", "ws", 1)

    @property
    def is_running(self) -> bool:
        return all(part.is_running for part in self.topology.parts)

    @property
    def lines(self) -> list[str]:
        """The first lines of all tracebacks: who counts them sees a new one."""
        lines = self.log.splitlines()
        return [line for line in lines if "Traceback" in line]

    @property
    def log(self) -> str:
        return "\n".join(part.log for part in self.topology.parts)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


def settings_of_this_run(port: int) -> dict[str, str]:
    """Return production's settings, on the test database."""
    from django.conf import settings

    from tests.servers import database_url

    return {
        **production_settings(port),
        **UNLIMITED,
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "DATABASE_URL": database_url(),
        "REDIS_URL": settings.REDIS_URL,
        "CHANNEL_PREFIX": settings.CHANNEL_PREFIX,
        # Tests sign in by making a session.
        "SECRET_KEY": settings.SECRET_KEY,
        "ALLOWED_HOSTS": "localhost,127.0.0.1,testserver",
    }


@pytest.fixture(scope="session")
def proxied(django_db_setup, django_db_blocker) -> Iterator[Proxied]:
    from tests.servers import free_port

    port = free_port()
    environment = settings_of_this_run(port)
    manage(environment, "collectstatic", "--no-input")
    try:
        # Many tests are about holds that nobody has expired yet.
        with Topology(environment, port, expiry_loops=0) as topology:
            yield Proxied(topology)
    except TopologyError as exc:
        pytest.exit(str(exc), returncode=1)


class SendOverHttp:
    """A handler of Django's test client that sends each request to a server."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=30, trust_env=False)
        # Which test asked for an address last, and when.
        self._asked: dict[bytes, tuple[str, float]] = {}

    def __call__(self, environ: dict[str, Any]) -> HttpResponse:
        target = environ["PATH_INFO"].encode("latin-1")
        if query := environ.get("QUERY_STRING"):
            target += b"?" + query.encode()
        self._let_go_of_earlier_tests(target)
        answer = self.client.send(
            self.client.build_request(
                environ["REQUEST_METHOD"],
                httpx.URL(self.client.base_url).copy_with(raw_path=quoted(target)),
                headers=headers_of(environ),
                content=environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)),
            )
        )
        response = HttpResponse(answer.content, status=answer.status_code)
        # Django's own handler leaves it there for the client.
        response.wsgi_request = WSGIRequest(environ)  # type: ignore[attr-defined]
        del response["Content-Type"]
        for name, value in answer.headers.multi_items():
            if name not in HOP_BY_HOP and name != "set-cookie":
                response[name] = value
        for cookie in answer.headers.get_list("set-cookie"):
            response.cookies.load(cookie)
        return response

    def _let_go_of_earlier_tests(self, target: bytes) -> None:
        """Wait until no process remembers what an earlier test was answered.

        Factories write no events, so nothing else would tell the processes of new rows.
        """
        test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
        asked_by, at = self._asked.get(target, (test, 0.0))
        if asked_by != test:
            time.sleep(max(0.0, MAX_AGE_SECONDS - (time.monotonic() - at)))
        self._asked[target] = (test, time.monotonic())


def headers_of(environ: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    given = {
        name.removeprefix("HTTP_").replace("_", "-").lower(): value
        for name, value in environ.items()
        if name.startswith("HTTP_") or name == "CONTENT_TYPE"
    }
    headers = {"host": environ["SERVER_NAME"], "user-agent": "tests"} | given
    headers["accept"] = headers.get("accept", "*/*")
    return [(name.encode(), str(value).encode("latin-1")) for name, value in headers.items()]


def quoted(target: bytes) -> bytes:
    """Return the target with what no request line can hold written as %XX."""
    return b"".join(bytes([byte]) if 0x21 <= byte < 0x7F else b"%%%02X" % byte for byte in target)
