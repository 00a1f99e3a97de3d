"""Processes that are born to be killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.stack import BASE_DIR, free_port
from config.stopping import end_with_parent
from tests.torture.stack import wait_for


@dataclass
class Child:
    """A web server (with a ``port``) or an expiry loop."""

    pid: int
    port: int | None

    @property
    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait_until_dead(self, seconds: float) -> bool:
        give_up_at = time.monotonic() + seconds
        while self.is_alive and time.monotonic() < give_up_at:
            time.sleep(0.005)
        return not self.is_alive

    def wait_until_ready(self) -> "Child":
        def connect() -> bool:
            assert self.is_alive, "a web server has died while starting"
            socket.create_connection(("127.0.0.1", self.port or 0), 5).close()
            return True

        wait_for(connect, ConnectionRefusedError)
        return self


class Nursery:
    """Gives birth to processes; those that are left die with it. See ``tests.torture.nursery``."""

    def __init__(self, **environment: str) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the processes
        self._mother = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.nursery"],
            cwd=BASE_DIR,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=end_with_parent,
        )
        self.children: list[Child] = []

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for child in self.children:
            child.kill()
        self._mother.kill()
        self._mother.wait()
        self._log.close()

    def web(self, failpoint: str | None = None, number: int = 1) -> Child:
        return self._bear(free_port(), failpoint, number).wait_until_ready()

    def expiry_loop(self, failpoint: str | None = None, number: int = 1) -> Child:
        return self._bear(None, failpoint, number)

    @property
    def log(self) -> str:
        """Return what the children have printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _bear(self, port: int | None, failpoint: str | None, number: int) -> Child:
        assert self._mother.stdin is not None
        assert self._mother.stdout is not None
        order = {"port": port, "failpoint": failpoint, "number": number}
        self._mother.stdin.write(json.dumps(order) + "\n")
        self._mother.stdin.flush()
        answer = self._mother.stdout.readline()
        assert answer, f"the nursery is closed:\n{self.log}"
        child = Child(int(answer), port)
        self.children.append(child)
        return child
