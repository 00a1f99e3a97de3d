"""drops-client.js, run by Node: alone, and against a real server."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from drops.tests.factories import DropFactory
from purchases.services import purchase
from reservations.services import Claim, reserve
from users.tests.factories import UserFactory

HERE = Path(__file__).resolve().parent
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node 20 or later")


def test_keeps_its_rules_with_a_server_that_is_played():
    done = subprocess.run(
        [NODE, "--test", "drops_client.test.mjs"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


class Line:
    """The way to a server, which can be cut; it keeps what clients asked for first."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._is_cut = False
        self.requests: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._is_cut:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if data.startswith(b"GET "):
                    self.requests.append(data.split(b" ", 2)[1].decode())
                target.sendall(data)
        self._close(source, target)

    def _close(self, *ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def cut(self) -> None:
        self._is_cut = True
        self._close(*self._ends)

    def mend(self) -> None:
        self._is_cut = False

    def stop(self) -> None:
        self._close(self._listener, *self._ends)


class Watcher:
    """A Node process that watches drops; ``said`` is what it has printed so far."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.said: list[dict[str, Any]] = []
        self._lines: Queue[str] = Queue()
        command = [NODE, "--experimental-websocket", "drops_client_live.mjs", json.dumps(options)]
        self._process = subprocess.Popen(
            command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)

    def wait_for(self, is_it: Callable[[dict[str, Any]], bool], timeout: float = 30) -> Any:
        """Return what is said next that ``is_it``."""
        deadline = time.monotonic() + timeout
        while True:
            self.said.append(json.loads(self._lines.get(timeout=deadline - time.monotonic())))
            if is_it(self.said[-1]):
                return self.said[-1]

    @property
    def drops(self) -> list[dict[str, Any]]:
        return [said["drop"] for said in self.said if "drop" in said]

    @property
    def statuses(self) -> list[str]:
        return [said["status"] for said in self.said if "status" in said]

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Watcher:
            watcher = Watcher(options)
            stack.callback(watcher.stop)
            return watcher

        yield start


def status(value: str) -> Callable[[dict[str, Any]], bool]:
    return lambda said: said.get("status") == value


@pytest.mark.servers
def test_sees_every_event_through_a_cut_and_ends_equal_to_the_database(
    web_servers, watch, client_of
):
    server, line = web_servers[0], Line(web_servers[0].port)
    drop, users = DropFactory(), UserFactory.create_batch(4)

    def state() -> dict[str, Any]:
        return client_of().get(f"/api/drops/{drop.pk}").json()

    def sell(to: Any) -> None:
        reserve(drop.pk, Claim(to.pk))
        purchase(drop.pk, to.pk)

    watcher = watch(
        url=f"http://127.0.0.1:{line.port}/ws/drops",
        drops=[str(drop.pk)],
        ticketFrom=f"{server.url}/api/ws-ticket",
        user=str(users[0].pk),
    )
    try:
        watcher.wait_for(status("live"))
        assert watcher.drops == [state()]

        sell(users[1])
        after_sale = state()
        watcher.wait_for(lambda said: said.get("drop") == after_sale)
        line.cut()
        watcher.wait_for(status("reconnecting"))
        sell(users[2])
        sell(users[3])
        line.mend()
        watcher.wait_for(status("live"))
        assert watcher.drops[-1] == state()

        sell(users[0])
        private = watcher.wait_for(lambda said: "private" in said and said["private"] != "HOLDS")
        assert private == {"private": "PURCHASE_CONFIRMED"}
        seqs = [drop["seq"] for drop in watcher.drops]
    finally:
        line.stop()

    assert watcher.statuses == ["reconnecting", "live", "reconnecting", "live"]
    # Three events for each sale, none missing and none twice.
    assert seqs == list(range(len(seqs)))
    assert seqs[-1] >= 9
    assert line.requests[-1] == f"/ws/drops/{drop.pk}?since=3"


@pytest.mark.servers
def test_is_refused_for_good_where_there_is_no_such_drop(web_servers, watch):
    watcher = watch(
        url=f"{web_servers[0].url}/ws/drops", drops=["00000000-0000-4000-8000-000000000000"]
    )

    said = watcher.wait_for(lambda said: "refused" in said)

    assert said["refused"]["code"] == 4404
    assert watcher.statuses == ["reconnecting", "offline"]
