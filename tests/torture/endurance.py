"""A long sale with many sockets that come and go: whatever is taken must be given back."""

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import resident_mb
from tests.servers import WebServer, running_web_servers
from tests.torture.faults import finish
from tests.torture.run import Run
from tests.torture.screens import Screens

ORDERS_PER_SECOND = 50
CUSTOMERS = 50
REQUESTS_PER_VISIT = 1.75
SETTLE_SECONDS = 20
# What allocators and caches may keep.
MEMORY_MB = 40
# Beyond that, growth per 10 minutes counts as a leak.
SLOPE_MB = 10
# Of the web process, and this process's own.
MOST_BACKENDS = 12 + 4


@dataclass(frozen=True)
class Held:
    """What the web process holds."""

    memory_mb: float
    files: int
    backends: int
    redis_clients: int


def soak(run: Run) -> None:
    seconds = run.size(8, 0) or round(run.minutes * 60 / 2)
    sockets = run.size(100, 500)
    # As many sockets must have been open once before anything is measured.
    warm_up_seconds = run.size(6, 25)
    what = f"{sockets} sockets that come and go, {ORDERS_PER_SECOND} orders/s, {seconds} s."
    with run.scenario("Soak", what) as result, running_web_servers(WebServer("uvicorn")) as servers:
        (server,) = servers
        pause = CUSTOMERS * REQUESTS_PER_VISIT / ORDERS_PER_SECOND
        for_how_long = {"warming up": warm_up_seconds, "soaking": seconds}
        before = None
        samples: list[tuple[float, float]] = []
        for phase, length in for_how_long.items():
            crowd = Screens(lambda _: f"{server.ws_url}/ws/drops", sockets, come_and_go=True)
            sale = run.sale(lambda: [server.port], CUSTOMERS, pause_seconds=pause)
            with crowd.lit(), sale.open():
                ends_at = time.monotonic() + length
                while (left := ends_at - time.monotonic()) > 0:
                    run.say(f"Soak: {phase}, {left:.0f} s left")
                    time.sleep(min(5, left))
                    samples.append((time.monotonic(), resident_mb(server.pid)))
            if before is None:
                before = settled(run, server, None)
                samples.clear()
        after = settled(run, server, before)
        finish(result, sale)
        result.expect(crowd.gaps == 0, f"{crowd.gaps} frames were missed without a sign")
        result.expect(crowd.frames > 0, "no socket got a frame")
        result.facts += [
            f"{len(crowd.opened):,} sockets opened, {crowd.frames:,} frames",
            f"memory {before.memory_mb:.0f} → {after.memory_mb:.0f} MB, open files "
            f"{before.files} → {after.files}, PostgreSQL backends {before.backends} → "
            f"{after.backends}, Redis clients {before.redis_clients} → {after.redis_clients}",
        ]
        grown = after.memory_mb - before.memory_mb
        result.expect(grown <= MEMORY_MB, f"memory grew by {grown:.0f} MB")
        if seconds >= 600:
            slope = slope_mb_per_10_minutes(samples[len(samples) // 2 :])
            result.facts.append(f"memory in the second half: {slope:+.1f} MB per 10 minutes")
            result.expect(slope <= SLOPE_MB, f"memory grows by {slope:.1f} MB per 10 minutes")
        result.expect(is_back(before, after), f"not given back: {before} → {after}")


def settled(run: Run, server: WebServer, before: Held | None) -> Held:
    """Return what the process holds once its sockets are gone."""
    give_up_at = time.monotonic() + SETTLE_SECONDS
    held = what_is_held(run, server)
    while time.monotonic() < give_up_at:
        time.sleep(1)
        last, held = held, what_is_held(run, server)
        is_quiet = (last.files, last.backends) == (held.files, held.backends)
        if is_quiet and (before is None or is_back(before, held)):
            break
    return held


def is_back(before: Held, after: Held) -> bool:
    # The pool keeps idle connections for ten minutes, each of them a file, up to its size.
    pooled = max(0, after.backends - before.backends)
    return (
        after.files <= before.files + pooled + 2
        and after.backends <= max(before.backends, MOST_BACKENDS)
        and after.redis_clients <= before.redis_clients + 2
    )


def what_is_held(run: Run, server: WebServer) -> Held:
    backends = run.stack.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    )[0][0]
    return Held(
        resident_mb(server.pid),
        len(list(Path(f"/proc/{server.pid}/fd").iterdir())),
        backends,
        run.stack.redis_clients(),
    )


def slope_mb_per_10_minutes(samples: list[tuple[float, float]]) -> float:
    """Return the slope of the least-squares line through (seconds, MB)."""
    count = len(samples)
    mean_x = sum(x for x, _ in samples) / count
    mean_y = sum(y for _, y in samples) / count
    spread = sum((x - mean_x) ** 2 for x, _ in samples) or 1.0
    return 600 * sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread
