"""Run the load generators, each a process of its own, and read what they print."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO, cast

from benchmarks import watchers
from benchmarks.client import Plan, Report

HERE = Path(__file__).resolve().parent
CONNECTIONS = 128
ANSWER_SECONDS = 10
# What a generator may take on top of the time it was asked to run for.
GRACE_SECONDS = 60


class GeneratorError(Exception):
    """A load generator is missing, failed, or printed what can't be read."""


@dataclass(frozen=True)
class Load:
    """What wrk saw; ``answers`` counts by status, or by a name that the script gave."""

    seconds: float
    answers: dict[str, int]
    socket_errors: int
    body_bytes: int
    p50_ms: float
    p99_ms: float
    p999_ms: float

    def count(self, name: str) -> int:
        return self.answers.get(name, 0)

    def unexpected(self, *expected: str) -> dict[str, int]:
        """Return the answers of other kinds than ``expected``, and connections that failed."""
        others = {name: n for name, n in self.answers.items() if name not in expected}
        return others | ({"socket errors": self.socket_errors} if self.socket_errors else {})


def require_wrk() -> None:
    """Raise ``GeneratorError`` where wrk is not installed."""
    if shutil.which("wrk") is None:
        raise GeneratorError("wrk is missing: apt-get install wrk (Debian, Ubuntu), or brew.")


def start_wrk(
    port: int, script: str, seconds: float, *arguments: object, connections: int = CONNECTIONS
) -> subprocess.Popen[str]:
    """Start wrk with one of the scripts of ``lua/``; SIGINT ends it early, with its figures."""
    command = ["wrk", "--threads", "1", "--connections", str(connections)]
    # Whole seconds is all that wrk takes.
    command += ["--duration", f"{max(1, round(seconds))}s", "--timeout", f"{ANSWER_SECONDS}s"]
    command += ["--script", str(HERE / "lua" / f"{script}.lua"), f"http://127.0.0.1:{port}/"]
    command += ["--", *map(str, arguments)]
    return subprocess.Popen(  # noqa: S603 - our own arguments
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish_wrk(process: subprocess.Popen[str], seconds: float) -> Load:
    try:
        output, _ = process.communicate(timeout=seconds + GRACE_SECONDS)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode not in (0, -signal.SIGINT):
        raise GeneratorError(f"wrk ended with code {process.returncode}:\n{output}")
    return parse_wrk(output)


def run_wrk(
    port: int, script: str, seconds: float, *arguments: object, connections: int = CONNECTIONS
) -> Load:
    process = start_wrk(port, script, seconds, *arguments, connections=connections)
    return finish_wrk(process, seconds)


def parse_wrk(output: str) -> Load:
    """Read the line of JSON that ``lua/common.lua`` prints."""
    line = next((line for line in output.splitlines() if line.startswith("{")), None)
    if line is None:
        raise GeneratorError(f"wrk printed no figures:\n{output}")
    figures = json.loads(line)
    return Load(
        seconds=figures["seconds"],
        answers=figures["answers"],
        socket_errors=figures["socket_errors"],
        body_bytes=figures["body_bytes"],
        p50_ms=figures["p50_us"] / 1000,
        p99_ms=figures["p99_us"] / 1000,
        p999_ms=figures["p999_us"] / 1000,
    )


@contextmanager
def background_client(plan: Plan) -> Iterator[Callable[..., Report]]:
    """Run a client during the block; call what it gives for its report, ``early`` or at the end."""
    command = [sys.executable, "-m", "benchmarks.client", json.dumps(asdict(plan))]
    process = subprocess.Popen(  # noqa: S603 - our own program
        command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True
    )

    def finish(*, early: bool = True) -> Report:
        if early:
            process.terminate()
        output, _ = process.communicate(timeout=plan.count * plan.interval_seconds + GRACE_SECONDS)
        if process.returncode:
            raise GeneratorError(f"benchmarks.client ended with code {process.returncode}.")
        return Report(**json.loads(output))

    try:
        yield finish
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def run_client(plan: Plan) -> Report:
    with background_client(plan) as finish:
        return finish(early=False)


class Watching:
    """Thousands of sockets in a process of their own, all connected; see ``watchers``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def begin(self) -> None:
        """Take figures from now on."""
        self._say("begin")

    def end(self) -> watchers.Report:
        self._say("end")
        output, _ = self._process.communicate(timeout=GRACE_SECONDS)
        if self._process.returncode:
            raise GeneratorError(f"benchmarks.watchers ended with {self._process.returncode}.")
        return read_watchers(output)

    def _say(self, word: str) -> None:
        told = cast(TextIO, self._process.stdin)
        told.write(f"{word}\n")
        told.flush()


@contextmanager
def watching(plan: watchers.Plan) -> Iterator[Watching]:
    """Connect the sockets of ``plan``, for the time of the block at most."""
    process = _start_watchers(plan, stdin=subprocess.PIPE)
    try:
        if cast(TextIO, process.stdout).readline() != "ready\n":
            raise GeneratorError("benchmarks.watchers could not connect all sockets.")
        yield Watching(process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def run_watchers(plan: watchers.Plan) -> watchers.Report:
    """Let the sockets of ``plan`` see its changes, one after the other."""
    process = _start_watchers(plan)
    try:
        output, _ = process.communicate(timeout=GRACE_SECONDS * 3)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise GeneratorError(f"benchmarks.watchers ended with {process.returncode}.")
    return read_watchers(output)


def read_watchers(output: str) -> watchers.Report:
    report = watchers.Report(**json.loads(output))
    if report.closed:
        report.problems.append(f"{report.closed} sockets were closed")
    return report


def _start_watchers(plan: watchers.Plan, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.watchers", json.dumps(asdict(plan))]
    return subprocess.Popen(  # noqa: S603 - our own program
        command, cwd=HERE.parent, stdin=stdin, stdout=subprocess.PIPE, text=True
    )


@dataclass(frozen=True)
class Transactions:
    """What pgbench saw."""

    count: int
    per_second: float


def run_pgbench(
    program: Path, connection: dict[str, str], clients: int, seconds: float, **variables: object
) -> Transactions:
    """Run ``sql/reserve.sql`` with prepared statements; ``variables`` are the script's."""
    command: list[str | Path] = [program, "--no-vacuum", "--protocol=prepared"]
    command += [f"--client={clients}", f"--jobs={min(clients, 2)}"]
    command += [f"--time={max(1, round(seconds))}", f"--file={HERE / 'sql' / 'reserve.sql'}"]
    for name, value in (variables | {"clients": clients, "i": 0}).items():
        command += ["--define", f"{name}={value}"]
    command += ["--host", connection["HOST"], "--port", connection["PORT"]]
    command += ["--username", connection["USER"], connection["NAME"]]
    result = subprocess.run(  # noqa: S603 - our own arguments
        command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False
    )
    if result.returncode:
        raise GeneratorError(f"pgbench ended with code {result.returncode}:\n{result.stderr}")
    return parse_pgbench(result.stdout)


def parse_pgbench(output: str) -> Transactions:
    rate = re.search(r"^tps = ([\d.]+)", output, re.MULTILINE)
    count = re.search(r"^number of transactions actually processed: (\d+)", output, re.MULTILINE)
    failed = re.search(r"^number of failed transactions: (\d+)", output, re.MULTILINE)
    if not rate or not count or (failed and failed[1] != "0"):
        raise GeneratorError(f"pgbench printed no clean figures:\n{output}")
    return Transactions(int(count[1]), float(rate[1]))


def find_pgbench(postgres_bin: Path) -> Path:
    """Return pgbench of the server's own wheel, or else the system's."""
    bundled = postgres_bin / "pgbench"
    if bundled.exists():
        return bundled
    system = shutil.which("pgbench")
    if system is None:
        raise GeneratorError("pgbench is missing: apt-get install postgresql-contrib.")
    return Path(system)
