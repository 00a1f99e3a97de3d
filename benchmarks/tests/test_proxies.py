import threading
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.proxies import NGINX, find, nginx
from benchmarks.stack import BASE_DIR

needs_nginx = pytest.mark.skipif(find("nginx") is None, reason="nginx is not installed")


class SayPort(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = str(self.server.server_address[1]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def two_servers() -> Iterator[list[int]]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), SayPort) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield [server.server_address[1] for server in servers]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def ask(port: int, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return int(answer.read())


@needs_nginx
def test_a_pinned_drop_has_one_server_and_drops_are_spread():
    drops = [str(uuid.uuid4()) for _ in range(40)]

    with two_servers() as ports, nginx(ports, is_pinned=True) as (_, port):
        calls = ("/api/drops/{}/reserve", "/api/drops/{}/purchase", "/api/drops/{}")
        seen = [{ask(port, call.format(drop)) for call in calls} for drop in drops]
        lists = {ask(port, "/api/drops") for _ in range(40)}

    assert [len(servers) for servers in seen] == [1] * len(drops)
    assert set.union(*seen) == set(ports)
    assert lists == set(ports)


@needs_nginx
def test_else_servers_take_turns():
    with two_servers() as ports, nginx(ports, is_pinned=False) as (_, port):
        seen = [ask(port, f"/api/drops/{uuid.UUID(int=1)}/reserve") for _ in range(4)]

    assert sorted(seen) == sorted(ports * 2)


def test_what_is_measured_is_what_is_deployed():
    def map_in(text: str) -> str:
        start = text.index("map $uri $drop_or_request {")
        return " ".join(text[start : text.index("}\n", text.index("$request_id;", start))].split())

    deployed = (BASE_DIR / "deploy/nginx.conf").read_text()
    assert map_in(deployed) == map_in(NGINX.replace("{{", "{").replace("}}", "}"))
