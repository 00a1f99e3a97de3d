"""Rolling restarts: each web process ends in its turn and is replaced, in mid-sale."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.servers import Served, free_port
from tests.torture.faults import LATE_SECONDS, finish
from tests.torture.run import Run
from tests.torture.sale import Sale
from tests.torture.screens import Screens

CUSTOMERS = 100
SCREENS = 20
PAUSE_SECONDS = 0.5
# What is in flight takes moments here.
STOP_SECONDS = 10


class Fleet:
    """Web processes that keep their ports when they are replaced, as behind a proxy."""

    def __init__(self, server: str, size: int = 2, **environment: str) -> None:
        self.server = server
        self.environment = environment
        self.ports = [free_port() for _ in range(size)]
        self.processes = [self._start(port) for port in self.ports]
        self.restarts = 0

    def restart_next(self) -> str:
        """Stop one process, wait for its end and start another; return what was wrong with it."""
        place = self.restarts % len(self.ports)
        process = self.processes[place]
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        self.processes[place] = self._start(self.ports[place]).wait_until_ready()
        self.restarts += 1
        if code == 0 and "Traceback" not in process.log:
            return ""
        return f"a web process ended with {code}:\n{process.log[-2000:]}"

    def _start(self, port: int) -> Served:
        return Served(self.server, port=port, **self.environment)


@contextmanager
def running_fleet(server: str, **environment: str) -> Iterator[Fleet]:
    fleet = Fleet(server, **environment)
    try:
        for process in fleet.processes:
            process.wait_until_ready()
        yield fleet
    finally:
        for process in fleet.processes:
            process.stop()


def rolling_restarts(run: Run) -> None:
    times = run.size(4, 20)
    for server in ("daphne", "uvicorn"):
        what = f"Two processes, SIGTERM to each in turn, {times} times, {CUSTOMERS} customers."
        with (
            run.scenario(f"Rolling restarts, {server}", what) as result,
            running_fleet(server) as fleet,
        ):
            sale = run.sale(lambda fleet=fleet: fleet.ports, CUSTOMERS)
            screens = Screens(
                lambda n, fleet=fleet: f"ws://127.0.0.1:{fleet.ports[n % 2]}/ws/drops", SCREENS
            )
            with screens.lit():
                with sale.open():
                    sale.run_for(PAUSE_SECONDS)
                    for _ in range(times):
                        problem = fleet.restart_next()
                        result.expect(not problem, problem)
                        result.faults += 1
                        sale.run_for(PAUSE_SECONDS)
                        run.say(f"Rolling restarts, {server}: {result.faults} of {times}")
                late = screens.seconds_until_true(run.stack)
            result.expect(screens.gaps == 0, f"{screens.gaps} frames were missed")
            result.expect(late <= LATE_SECONDS, f"a screen was right only after {late:.1f} s")
            result.recovered(sale.longest_silence())
            finish(result, sale)
            result.facts.append(told_of(sale))


def told_of(sale: Sale) -> str:
    """Return in one line how requests fared."""
    failed = sale.broken + len(sale.failures)
    requests = sum(sale.outcomes.values()) + sale.broken
    cut_off = sale.broken - sale.refused
    return (
        f"{requests:,} requests, of which {failed:,} failed and were sent again: "
        f"{sale.refused:,} refused a connection, {cut_off:,} cut off, "
        f"{len(sale.failures):,} told to wait; longest time without any success "
        f"{sale.longest_silence():.2f} s, slowest answer {sale.slowest_seconds:.2f} s"
    )
