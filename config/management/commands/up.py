import contextlib
import errno
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import CommandError, CommandParser
from django.db import connection

from config.commands import DatabaseCommand
from config.seeding import DEMO_DROP_ID, DEMO_USER_ID
from config.serving import (
    add_server_options,
    allow_open_files,
    check_server_options,
    server_command,
)
from config.stopping import StopRequest, end_with_parent
from drops.models import Drop

START_TIMEOUT_SECONDS = 30
STOP_TIMEOUT_SECONDS = settings.SHUTDOWN_SECONDS + 5
RESTART_PAUSE_SECONDS = 1


class Command(DatabaseCommand):
    help = (
        "Run everything on one machine: embedded servers if needed, migrations, demo data for "
        "an empty database, the web server and the expiry loop. Ctrl-C stops all of it."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        add_server_options(parser, server="daphne")

    def handle(
        self, *, host: str, port: int, server: str, workers: int, verbosity: int, **options: Any
    ) -> None:
        check_server_options(server, workers)
        refuse_address(host, port)
        if warning := allow_open_files():
            self.say(warning)
        with contextlib.ExitStack() as stack:
            self.start_servers(stack)
            self.prepare_database()
            share_metrics(stack)
            self.say(f"Starting {server}")
            web = stack.enter_context(running(server_command(server, host, port, workers)))
            expiry = stack.enter_context(running(expiry_command()))
            stop = stack.enter_context(StopRequest())
            name = f"[{host}]" if ":" in host else host
            address = f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else name}:{port}"  # noqa: S104
            self.wait_until_ready(web, f"http://{name}:{port}/healthz", stop)
            if not stop.is_set:
                self.print_addresses(address)
            self.watch(web, expiry, stop)
            self.stdout.write("\nStopping ...")
        self.stdout.write("Stopped.")

    def start_servers(self, stack: contextlib.ExitStack) -> None:
        if settings.EMBEDDED is None:
            self.say("Using the servers of DATABASE_URL and REDIS_URL")
            return
        self.say("Starting PostgreSQL and Valkey of this checkout")
        stack.callback(settings.EMBEDDED.stop)
        settings.EMBEDDED.start(progress=lambda message: self.say(f"  {message}"))

    def prepare_database(self) -> None:
        self.say("Applying migrations")
        call_command("migrate", verbosity=0, interactive=False)
        if settings.DEBUG and not Drop.objects.exists():
            self.say("Filling the empty database with demo data")
            # A database without drops may have users: whoever made themselves an account first.
            call_command("seed", reset=False, stdout=self.stdout)
        connection.close()
        connection.close_pool()  # type: ignore[attr-defined]

    def wait_until_ready(self, web: subprocess.Popen, url: str, stop: StopRequest) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if web.poll() is not None:
                raise CommandError(f"The web server ended with code {web.returncode}; see above.")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(url, timeout=2)  # noqa: S310 - our own address
                return
            if stop.wait(0.1):
                return
        raise CommandError(f"The web server did not answer within {START_TIMEOUT_SECONDS} s.")

    def watch(self, web: subprocess.Popen, expiry: subprocess.Popen, stop: StopRequest) -> None:
        """Wait for the stop; the web server ends everything, the expiry loop is replaced."""
        with contextlib.ExitStack() as stack:
            while not stop.wait(RESTART_PAUSE_SECONDS):
                if web.poll() is not None:
                    raise CommandError(f"The web server ended with code {web.returncode}.")
                if expiry.poll() is not None:
                    self.say("The expiry loop ended; starting it again")
                    expiry = stack.enter_context(running(expiry_command()))

    def say(self, message: str) -> None:
        self.stdout.write(message)
        self.stdout.flush()

    def print_addresses(self, address: str) -> None:
        websocket = address.replace("http", "ws", 1) + "/ws/drops"
        rows = [
            ("Site", address + "/"),
            ("API docs", f"{address}/api/docs"),
            ("WebSocket", websocket),
            ("Admin", f"{address}/admin/" + ("   (admin / admin)" if settings.DEBUG else "")),
        ]
        self.stdout.write(self.style.SUCCESS("\nSneaker drops is up."))
        for name, value in rows:
            self.stdout.write(f"  {name:10} {value}")
        if settings.DEBUG:
            self.stdout.write(
                "\nTry it: reserve a pair, and watch it come back after "
                f"{settings.RESERVATION_TTL_SECONDS} s:\n"
                f"  curl -X POST {address}/api/drops/{DEMO_DROP_ID}/reserve "
                f"-H 'X-User-Id: {DEMO_USER_ID}'"
            )
        self.stdout.write("\nCtrl-C stops everything.")
        self.stdout.flush()


def share_metrics(stack: contextlib.ExitStack) -> None:
    """Give the processes a folder for what they count, empty at the start, gone at the end."""
    if not settings.METRICS_DIR:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="drops-metrics-"))
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        stack.callback(os.environ.pop, "PROMETHEUS_MULTIPROC_DIR")


def expiry_command() -> list[str]:
    return [sys.argv[0], "expire_reservations"]


@contextlib.contextmanager
def running(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """Run Python with ``arguments`` for the time of the block.

    In a session of its own, so that a terminal's Ctrl-C reaches only this command, which
    then stops its children one after the other.
    """
    process = subprocess.Popen(  # noqa: S603 - our own commands
        [sys.executable, *arguments],
        cwd=settings.BASE_DIR,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def refuse_address(host: str, port: int) -> None:
    """Try whether a server could listen there.

    Raises:
        CommandError: it could not; says why.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise CommandError(
                f"Port {port} is taken. Choose another one with --port or PORT."
            ) from None
        reason = str(exc.strerror).lower()
        raise CommandError(f"Nobody can listen on {host}, port {port}: {reason}.") from None
