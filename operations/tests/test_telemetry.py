import gzip
import json
import os
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from django.conf import settings as project

pytestmark = pytest.mark.slow

HEADERS = {
    "X-User-Id": "00000000-0000-4000-8000-000000000001",
    "X-Auth-Signature": "t=1,v1=0123456789abcdef0123456789abcdef",
    "Authorization": "Bearer hunter2hunter2",
    "Cookie": "sessionid=hunter2",
    "User-Agent": "curl",
}


@pytest.fixture
def sink():
    """A server that takes whatever is posted: (path, body)."""
    taken: list[tuple[str, bytes]] = []
    arrived = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            elif self.headers.get("Content-Encoding") == "deflate":
                body = zlib.decompress(body)
            taken.append((self.path, body))
            arrived.set()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.taken, server.arrived = taken, arrived
    yield server
    server.shutdown()
    server.server_close()


def run(code: str, **environment: str) -> str:
    """Run Python in a process of its own, as the project's servers do; return what it printed."""
    without = ("SENTRY_DSN", "OTEL_EXPORTER_OTLP_ENDPOINT", "PROMETHEUS_MULTIPROC_DIR")
    inherited = {name: text for name, text in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.BASE_DIR,
        env=inherited
        | {
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "DATABASE_URL": "postgres://nobody@127.0.0.1:1/nothing",
            "REDIS_URL": "redis://127.0.0.1:1/0",
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# redis-py imports OpenTelemetry's metrics where it finds them, whatever we do.
LIST_MODULES = """
import sys
import config.asgi
ours = ("sentry_sdk", "opentelemetry.sdk.trace", "opentelemetry.exporter", "operations.telemetry")
print([name for name in sys.modules if name.startswith(ours)])
"""


def test_nothing_is_imported_where_nothing_is_set():
    assert run(LIST_MODULES) == "[]\n"


ASK = """
import asyncio
import config.asgi

async def ask(method, path, headers):
    headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
        "query_string": b"", "headers": [(b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    answered = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered.set()

    await config.asgi.application(scope, receive, send)
"""
FAIL = f"""
{ASK}
import config.urls
import sentry_sdk
from django.urls import path

def broken(request):
    password = "hunter2"
    raise ValueError("redis://:hunter2@redis/0 is away")

config.urls.api.insert(0, path("broken", broken))
asyncio.run(ask("GET", "/api/broken", {HEADERS!r}))
sentry_sdk.flush(5)
"""


@pytest.mark.parametrize("user_ids", ["false", "true"])
def test_sentry_gets_what_is_unexpected_without_secrets(sink, user_ids):
    dsn = f"http://key@127.0.0.1:{sink.server_port}/1"

    run(FAIL, SENTRY_DSN=dsn, SENTRY_USER_IDS=user_ids)

    assert sink.arrived.wait(10)
    events = [
        json.loads(line)
        for _, body in sink.taken
        for line in body.splitlines()
        if b'"exception"' in line
    ]
    (event,) = events
    assert event["exception"]["values"][-1]["type"] == "ValueError"
    headers = {name.lower(): value for name, value in event["request"]["headers"].items()}
    assert headers["user-agent"] == "curl"
    sent = json.dumps([body.decode() for _, body in sink.taken])
    assert "hunter2" not in sent
    assert "0123456789abcdef0123456789abcdef" not in sent
    assert (HEADERS["X-User-Id"] in sent) == (user_ids == "true")
    assert "server_name" not in event


TRACE = f"""
{ASK}
async def main():
    headers = {{
        "X-Request-Id": "eyJhbGciOi.eyJzdWIi.c2lnbmF0",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }}
    await ask("GET", "/healthz", headers)
    # An identity that can't be read is refused in the hot lane, before any query.
    address = "/api/drops/00000000-0000-4000-8000-00000000d001/reserve"
    await ask("POST", address, headers | {{"X-User-Id": "nobody"}})

asyncio.run(main())
"""


def test_spans_of_both_lanes_are_sent_and_join_the_callers_trace(sink):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
    )

    # The spans that wait are sent when the process ends.
    run(TRACE, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{sink.server_port}")

    assert {path for path, _ in sink.taken} == {"/v1/traces"}
    spans = []
    for _, body in sink.taken:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert names["service.name"] == "drops"
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    found = {span.name: {a.key: a.value for a in span.attributes} for span in spans}
    assert set(found) == {"GET /healthz", "POST /api/drops/{id}/reserve"}
    hot = found["POST /api/drops/{id}/reserve"]
    assert (hot["drops.lane"].string_value, hot["drops.code"].string_value) == (
        "hot",
        "invalid_identity",
    )
    assert hot["http.response.status_code"].int_value == 401
    assert found["GET /healthz"]["drops.lane"].string_value == "viewset"
    assert all(span.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c" for span in spans)
    assert all(span.end_time_unix_nano > span.start_time_unix_nano for span in spans)
    assert not any(b"eyJzdWIi" in body for _, body in sink.taken)
