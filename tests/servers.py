"""Real processes on the test database: web servers, and the expiry loop.

A pytest plugin (see the root ``conftest.py``), because tests of several apps use its fixtures.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 30
STOP_SECONDS = 5
APPLICATION = "config.asgi:application"


def database_url() -> str:
    """Return the test database's address; a socket's folder goes where the host stands."""
    from django.db import connection

    from config.settings import database_settings

    test = connection.settings_dict
    login = ":".join(quote(test[key], safe="") for key in ("USER", "PASSWORD") if test.get(key))
    place = ":".join(quote(str(test[key]), safe="") for key in ("HOST", "PORT") if test.get(key))
    options = urlencode(database_settings().get("OPTIONS", {}))
    return f"postgres://{login}@{place}/{quote(test['NAME'])}?{options}"


class Process:
    """A Python process on the test database; what it prints is kept, line by line."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        from django.conf import settings

        self.name = " ".join(arguments)
        self.lines: list[str] = []
        self._printed = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=REPOSITORY,
            env=os.environ
            | {
                "DJANGO_SETTINGS_MODULE": "config.settings",
                "DATABASE_URL": database_url(),
                "REDIS_URL": settings.REDIS_URL,
                "PYTHONUNBUFFERED": "1",
            }
            | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._printed:
                self.lines.append(line)
                self._printed.notify_all()
        with self._printed:
            self._printed.notify_all()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for_line(self, text: str, timeout: float = START_SECONDS) -> None:
        """Return once the process has printed ``text``."""

        def has_printed() -> bool:
            return text in self.log or not self._reader.is_alive()

        with self._printed:
            self._printed.wait_for(has_printed, timeout)
        assert text in self.log, f"{self.name} did not print {text!r}:\n{self.log}"

    def wait(self, timeout: float = START_SECONDS) -> int:
        """Return the exit code, once the process has ended and its last line is read."""
        code = self._process.wait(timeout)
        self._reader.join(STOP_SECONDS)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        try:
            self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.wait()


class WebServer(Process):
    """daphne or uvicorn with the whole application, on a port of its own."""

    def __init__(
        self, server: str = "daphne", application: str = APPLICATION, **environment: str
    ) -> None:
        from config.serving import server_command

        self.server = server
        self.port = free_port()
        command = [
            application if word == APPLICATION else word
            for word in server_command(server, "127.0.0.1", self.port, 1)
        ]
        super().__init__(*command, **environment)
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws_url = f"ws://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> "WebServer":
        """Return once the server takes connections."""
        deadline = time.monotonic() + START_SECONDS
        while self.is_running and time.monotonic() < deadline:
            try:
                self.connect().close()
            except ConnectionRefusedError:
                time.sleep(0.02)  # nothing announces a listening port
            else:
                return self
        self.stop()
        pytest.fail(f"{self.name} did not start:\n{self.log}")

    def connect(self) -> socket.socket:
        """Open a plain connection, for what no HTTP client would send."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


class Served(WebServer):
    """A web server as production starts it, by ``manage.py serve`` with its ``options``."""

    def __init__(
        self, server: str, *options: str, port: int | None = None, **environment: str
    ) -> None:
        self.server = server
        self.port = port or free_port()
        command = ("manage.py", "serve", "--server", server, "--port", str(self.port), *options)
        Process.__init__(self, *command, **environment)
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws_url = f"ws://127.0.0.1:{self.port}"


class Up(WebServer):
    """The web server of ``manage.py up`` with its ``options``, and what else that starts."""

    def __init__(self, server: str, *options: str) -> None:
        self.port = free_port()
        self.url, self.ws_url = f"http://127.0.0.1:{self.port}", f"ws://127.0.0.1:{self.port}"
        command = ("manage.py", "up", "--port", str(self.port), "--server", server, *options)
        Process.__init__(self, *command)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_web_servers(*servers: WebServer) -> Iterator[tuple[WebServer, ...]]:
    """Wait until the started ``servers`` are ready; end them after the block."""
    try:
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        for server in servers:
            server.stop()


def pytest_configure(config) -> None:
    config.addinivalue_line(
        "markers", "restarts_database: comes last, because it takes the connections of all others"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("restarts_database") is not None)


@pytest.fixture(scope="session")
def session_web_servers(
    request, django_db_setup, django_db_blocker
) -> Iterator[tuple[WebServer, ...]]:
    if request.config.getoption("through_proxy"):
        # Two processes are behind it.
        yield (request.getfixturevalue("proxied"),) * 2
        return
    with running_web_servers(WebServer(), WebServer()) as servers:
        yield servers


@pytest.fixture(scope="session")
def session_uvicorn(request, django_db_setup, django_db_blocker) -> Iterator[WebServer]:
    if request.config.getoption("through_proxy"):
        yield request.getfixturevalue("proxied")
        return
    with running_web_servers(WebServer("uvicorn")) as (server,):
        yield server


@pytest.fixture
def web_servers(session_web_servers, transactional_db) -> Iterator[tuple[WebServer, ...]]:
    """Two daphne processes on an empty database."""
    with without_tracebacks(*session_web_servers):
        yield session_web_servers


@pytest.fixture(params=["daphne", "uvicorn"])
def web_server(request) -> Iterator[WebServer]:
    """One server, once of each kind; a test that stores something asks for the database too."""
    if request.param == "daphne":
        server = request.getfixturevalue("session_web_servers")[0]
    else:
        server = request.getfixturevalue("session_uvicorn")
    with without_tracebacks(server):
        yield server


@contextmanager
def without_tracebacks(*servers: WebServer) -> Iterator[None]:
    """Check that the servers live on, and that nothing in the block was an error to them."""
    lines_before = [len(server.lines) for server in servers]
    yield
    for server, before in zip(servers, lines_before, strict=True):
        assert server.is_running, f"{server.name} has died:\n{server.log}"
        printed = "".join(server.lines[before:])
        assert "Traceback" not in printed, f"{server.name} printed:\n{printed}"


@pytest.fixture
def start_expiry(transactional_db) -> Iterator[Callable[..., Process]]:
    """Return a function that starts ``manage.py expire_reservations`` with its options."""
    started: list[Process] = []

    def start(*options: str, **environment: str) -> Process:
        process = Process("manage.py", "expire_reservations", *options, **environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.stop()
