"""How the web servers are started."""

import re
import select
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from config.serving import allow_open_files
from tests.servers import Served, running_web_servers

SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
# More than uvicorn lets wait by itself.
CROWD = 2500


@pytest.mark.servers
@pytest.mark.skipif(
    not SOMAXCONN.exists() or int(SOMAXCONN.read_text()) < CROWD,
    reason="the system lets fewer wait",
)
def test_thousands_who_come_in_one_moment_find_a_place(
    session_uvicorn, transactional_db, many_files
):
    """A connection that finds none is tried again a second later, which is late in a drop."""
    crowd = [socket.socket() for _ in range(CROWD)]
    session_uvicorn.send_signal(signal.SIGSTOP)
    try:
        for one in crowd:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", session_uvicorn.port))
        poll = select.poll()
        for one in crowd:
            poll.register(one, select.POLLOUT)
        until = time.monotonic() + 0.7
        connected: set[int] = set()
        while len(connected) < CROWD and time.monotonic() < until:
            for number, event in poll.poll(100):
                assert event == select.POLLOUT
                connected.add(number)
                poll.unregister(number)
        assert len(connected) == CROWD
    finally:
        for one in crowd:
            one.close()
        session_uvicorn.send_signal(signal.SIGCONT)
    assert httpx.get(f"{session_uvicorn.url}/healthz", timeout=30).status_code == 200


@pytest.fixture
def many_files():
    """Let this process have as many open files as the crowd needs."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CROWD + 500:
        pytest.skip("the system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CROWD + 500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.servers
def test_a_server_asks_for_the_open_files_that_its_sockets_need(transactional_db):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 3000:
        pytest.skip("the system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        server = Served("uvicorn", SOCKETS_PER_PROCESS="900")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with running_web_servers(server):
        limits = Path(f"/proc/{server.pid}/limits").read_text()
        assert re.search(r"^Max open files +2900 ", limits, re.MULTILINE)


def test_says_where_the_system_allows_too_few_open_files(monkeypatch, settings):
    settings.SOCKETS_PER_PROCESS = 5000
    asked = []
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr("resource.setrlimit", lambda kind, limits: asked.append(limits))
    assert allow_open_files() == (
        "A process may have 4,096 open files here (ulimit -Hn), and SOCKETS_PER_PROCESS "
        "asks for 7,000."
    )
    assert asked == [(4096, 4096)]
