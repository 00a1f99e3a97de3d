"""The topology of compose.yaml on one machine, without containers.

``python -m deploy.local``: nginx on one public port, two web processes behind it, two expiry
loops, one PostgreSQL and one Valkey, with production settings. Ctrl-C stops all of it.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from config.embedded import EmbeddedServers
from config.stopping import StopRequest, end_with_parent

BASE_DIR = Path(__file__).resolve().parent.parent
NGINX_CONF = Path(__file__).resolve().parent / "nginx.conf"
WEB_PROCESSES = 2
EXPIRY_LOOPS = 2
START_SECONDS = 30
# A web process takes up to SHUTDOWN_SECONDS for what is in flight.
STOP_SECONDS = 25


class TopologyError(Exception):
    """A part of it did not start; says which, and what it printed."""


class Part:
    """A running program of the topology; what it prints goes to a file."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: Mapping) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._log.touch(mode=0o600)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own commands
                command,
                cwd=BASE_DIR,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C is for us, who stop them in order.
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, url: str) -> None:
        """Return once ``url`` is answered.

        Raises:
            TopologyError: it isn't, or the program has ended.
        """
        deadline = time.monotonic() + START_SECONDS
        while self.is_running and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - our own address
                return
            time.sleep(0.05)
        raise TopologyError(f"{self.name} did not start:\n{self.log[-2000:]}")

    def ask_to_stop(self) -> None:
        if self.is_running:
            self.process.terminate()

    def stop(self) -> int:
        """End the program and return its exit code."""
        self.ask_to_stop()
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Topology:
    """nginx, web processes and expiry loops on a database and a Redis that are there already.

    A context manager. ``environment`` has the settings of the web processes and the loops.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        port: int | None = None,
        expiry_loops: int = EXPIRY_LOOPS,
        is_pinned: bool = False,
    ) -> None:
        self.environment = dict(environment)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.web_ports = [free_port() for _ in range(WEB_PROCESSES)]
        self.expiry_loops = expiry_loops
        self.is_pinned = is_pinned
        self.web: list[Part] = []
        self.expiry: list[Part] = []
        self.nginx: Part | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="drops-local-")
        self.folder = Path(self._folder.name)

    @property
    def parts(self) -> list[Part]:
        return [*self.web, *self.expiry, *([self.nginx] if self.nginx else [])]

    def __enter__(self) -> "Topology":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        self.web = [self._start_web(place) for place in range(WEB_PROCESSES)]
        loop = [sys.executable, "manage.py", "expire_reservations"]
        self.expiry = [self._start(f"expiry-{n}", loop) for n in range(1, self.expiry_loops + 1)]
        for place in range(WEB_PROCESSES):
            self._wait_for_web(place)
        self.nginx = self._start("nginx", self._nginx_command())
        self.nginx.wait_for(f"{self.url}/healthz")

    def restart_web(self, place: int) -> int:
        """Replace one web process, as a deploy does; return the exit code of the old one."""
        code = self.web[place].stop()
        self.web[place] = self._start_web(place)
        self._wait_for_web(place)
        return code

    def stop(self) -> None:
        """Stop the web processes first, so that sockets are closed by them, with their code."""
        for part in self.parts:
            if part is not self.nginx:
                part.ask_to_stop()
        for part in self.parts:
            part.stop()
        self._folder.cleanup()

    def _start(self, name: str, command: list[str]) -> Part:
        return Part(name, command, self.folder, os.environ | self.environment)

    def _start_web(self, place: int) -> Part:
        serve = [sys.executable, "manage.py", "serve", "--port", str(self.web_ports[place])]
        return self._start(f"web-{place + 1}", serve)

    def _wait_for_web(self, place: int) -> None:
        self.web[place].wait_for(f"http://127.0.0.1:{self.web_ports[place]}/healthz")

    def _nginx_command(self) -> list[str]:
        write_nginx_folder(self.folder, self.web_ports, self.port, is_pinned=self.is_pinned)
        # Everything it writes stays in the folder, whoever runs it; its workers may be nobody.
        self.folder.chmod(0o711)
        main = "daemon off; pid nginx.pid;"
        place = ["-p", str(self.folder), "-c", "nginx.conf"]
        return [nginx_program(), *place, "-e", "stderr", "-g", main]


def write_nginx_folder(
    folder: Path, web_ports: list[int], port: int, *, is_pinned: bool = False
) -> None:
    """Put nginx.conf and what it includes into ``folder``.

    ``is_pinned``: all requests for one drop go to the same web process.

    ``max_fails=0``: no process here is left alone for having refused. To be refused costs
    nothing on the same machine, and of two that restart in turn nginx would avoid the first
    while the second is away.
    """
    shutil.copy(NGINX_CONF, folder / "nginx.conf")
    servers = "".join(f"    server 127.0.0.1:{web} max_fails=0;\n" for web in web_ports)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    choice = "    hash $drop_or_request consistent;\n" if is_pinned else ""
    (folder / "upstream.conf").write_text(
        f"upstream drops {{\n    zone drops 64k;\n{choice}{servers}    keepalive 64;\n}}\n"
        + "".join(f"{kind}_temp_path {kind}_temp;\n" for kind in kinds)
    )
    (folder / "server.d").mkdir(exist_ok=True)
    (folder / "server.d/listen.conf").write_text(
        f"listen 127.0.0.1:{port} backlog=16384;\naccess_log access.log drops;\n"
    )


def nginx_program() -> str:
    program = shutil.which("nginx", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin")
    if program is None:
        raise TopologyError("There is no nginx here. On Debian: apt-get install nginx")
    return program


def production_settings(port: int) -> dict[str, str]:
    """Return production's settings for one machine whose port nobody else can reach.

    Any UUID in X-User-Id is a user: in front of a real installation stands who proves it.
    """
    return {
        "DEBUG": "false",
        "SECRET_KEY": secrets.token_urlsafe(50),
        "ALLOWED_HOSTS": "localhost,127.0.0.1",
        "IDENTITY_MODE": "header",
        "TRUST_IDENTITY_HEADERS": "true",
        "PUBLIC_USER_IDS": "opaque",
        "TRUSTED_PROXIES": "127.0.0.1",
        "WEB_PROCESSES": str(WEB_PROCESSES),
        "CORS_ORIGINS": f"http://localhost:{port}",
    }


@contextlib.contextmanager
def data_servers() -> Iterator[dict[str, str]]:
    """Yield the addresses of PostgreSQL and Redis: those of the environment, or embedded ones."""
    names = ("DATABASE_URL", "REDIS_URL")
    if all(os.environ.get(name) for name in names):
        yield {name: os.environ[name] for name in names}
        return
    servers = EmbeddedServers(BASE_DIR, instance="local")
    servers.start(progress=lambda message: print(f"  {message}", flush=True))
    try:
        database = servers.database
        place = f"{quote(database['HOST'], safe='')}:{database['PORT']}"
        yield {
            "DATABASE_URL": f"postgres://{database['USER']}@{place}/{database['NAME']}",
            "REDIS_URL": servers.redis_url,
        }
    finally:
        servers.stop()


def manage(environment: Mapping[str, str], *command: str) -> None:
    subprocess.run(  # noqa: S603 - our own commands
        [sys.executable, "manage.py", *command, "--verbosity", "0"],
        cwd=BASE_DIR,
        env=os.environ | environment,
        check=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.local",
        description="Run nginx, two web processes, two expiry loops, PostgreSQL and Valkey here, "
        "as compose.yaml does in containers. DATABASE_URL and REDIS_URL name others.",
    )
    parser.add_argument("--port", type=int, default=8080, help="default: %(default)s")
    parser.add_argument(
        "--pin", action="store_true", help="sell each drop by one web process (docs/scaling.md)"
    )
    parser.add_argument("--demo", action="store_true", help="load the demo drops of fixtures/")
    options = parser.parse_args()
    # SIGTERM takes the same way out as Ctrl-C, so that all servers stop.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        nginx_program()
        with data_servers() as addresses:
            # What is set outside wins: the settings can be tried here.
            environment = production_settings(options.port) | addresses | dict(os.environ)
            print("Applying migrations, collecting static files", flush=True)
            manage(environment, "migrate", "--no-input")
            manage(environment, "collectstatic", "--no-input")
            if options.demo:
                manage(environment, "loaddata", "demo")
            running = Topology(environment, options.port, is_pinned=options.pin)
            with StopRequest() as stop, running as topology:
                print(f"Up: {topology.url}, web processes on {topology.web_ports}", flush=True)
                print(f"Logs: {topology.folder}. Ctrl-C stops everything.", flush=True)
                while not stop.wait(1):
                    for part in topology.parts:
                        if not part.is_running:
                            raise TopologyError(f"{part.name} has ended:\n{part.log[-2000:]}")
                print("Stopping ...", flush=True)
    except TopologyError as exc:
        print(exc, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
