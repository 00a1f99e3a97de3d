"""How throughput grows with processes, drops and what stands in between.

``python -m benchmarks.scaling`` writes docs/scaling-figures.md and benchmarks/costs.json, which
the capacity model reads. What the figures mean is in docs/scaling.md, by hand.
"""

import argparse
import os
import secrets
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from rich.console import Console

from benchmarks.__main__ import raise_open_files
from benchmarks.capacity import BUSY, EXAMPLES, Costs, table
from benchmarks.load import GeneratorError, require_wrk, run_wrk, watching
from benchmarks.processes import cpu_seconds
from benchmarks.proxies import nginx, pgbouncer
from benchmarks.report import COLUMNS, figure, markdown_table, runs_table
from benchmarks.results import Run
from benchmarks.runs import (
    FIRST_USER,
    SETTLE_SECONDS,
    WARM_UP_SECONDS,
    Bench,
    check_rows,
    figures,
    open_loop_run,
    pairs_run,
    sold_out_run,
    warm_web,
)
from benchmarks.scenarios import USERS_PER_SECOND
from benchmarks.sockets import idle_run, socket_path, watched_reserves
from benchmarks.stack import BASE_DIR, Process, Stack, StackError, Usage
from benchmarks.watchers import Plan as SocketPlan

FIGURES = BASE_DIR / "docs" / "scaling-figures.md"
LIST_DROPS = 15
# Many sockets before few reserves, so that the frames are what costs.
SOCKETS = {False: 2000, True: 500}  # by whether it must be quick
WATCHED_RESERVES_PER_SECOND = 50
SIGNATURES = 10_000
# As a role behind PgBouncer has them.
TIMEOUTS = {
    "lock_timeout": "2s",
    "statement_timeout": "15s",
    "idle_in_transaction_session_timeout": "10s",
}
# Read after each kind of run: the costs of one of each.
SIZES = ("reservations_reservation", "purchases_purchase", "realtime_event")

METHOD = """
Reserves of distinct users over 128 connections in a closed loop (wrk, one thread), as in
`docs/benchmarks.md`: durable commits, empty tables, fresh servers and a warm-up for each run, a
stock audit after it, and the tables hold as many rows as were confirmed. Several drops are asked
for with chances of 1, 1/2, 1/3 ... (zipf). All kinds of run take turns, forwards in one repeat and
backwards in the next; a figure is the median, smallest and largest in brackets. **Load generator,
web processes, PostgreSQL and proxies share the cores of one machine**, so the CPU that each of them
takes per reserve says more than the throughput.
"""


@dataclass(frozen=True)
class Setup:
    """What stands between wrk and the database."""

    processes: int
    drops: int
    # "pgbouncer" behind the processes, "nginx" or "nginx, pinned" before them.
    proxy: str = ""

    @property
    def title(self) -> str:
        processes = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        drops = f"{self.drops} drop" + ("s" if self.drops > 1 else "")
        return ", ".join(filter(None, [processes, drops, self.proxy]))


PLAIN = [Setup(processes, drops) for processes in (1, 2, 4) for drops in (1, 5, 20)]
POOLED = [Setup(2, 20, "pgbouncer"), Setup(4, 20, "pgbouncer")]
PROXIED = [Setup(2, drops, proxy) for drops in (1, 20) for proxy in ("nginx", "nginx, pinned")]
SETUPS = [*PLAIN, *POOLED, *PROXIED]
ONE = SETUPS[0]
# Each drop is sold by one process.
ALONE = [*PLAIN[:3], *(setup for setup in PROXIED if setup.proxy == "nginx, pinned")]
IN_TURN = [setup for setup in SETUPS if setup not in ALONE]


@dataclass(frozen=True)
class ScalingRun(Run):
    """A run, and what the others on the machine took; CPU per reserve."""

    redis_cpu_ms: float = 0.0
    proxy_cpu_ms: float = 0.0
    load_cpu_ms: float = 0.0
    connections: int = 0
    wal_bytes: float = 0.0


def _scaling(read: Callable[[ScalingRun], float]) -> Callable[[Run], float | None]:
    return lambda run: read(cast(ScalingRun, run))


SCALING_COLUMNS = {name: COLUMNS[name] for name in ("per second", "p50 ms", "p99 ms")} | {
    "web CPU ms": COLUMNS["web CPU ms"],
    "PostgreSQL CPU ms": COLUMNS["PostgreSQL CPU ms"],
    "proxy CPU ms": _scaling(lambda run: run.proxy_cpu_ms),
    "load CPU ms": _scaling(lambda run: run.load_cpu_ms),
    "connections": _scaling(lambda run: run.connections),
}


def main() -> int:
    options = read_arguments()
    console = Console(highlight=False, soft_wrap=True)
    raise_open_files()
    # SIGTERM takes the same way out as Ctrl-C, so that all servers stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    conditions = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "repeats": f"{options.repeats}, {options.seconds:g} s each",
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
    }

    def say(message: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.0f} s[/]  {message}")

    try:
        require_wrk()
        users = FIRST_USER + round(options.seconds * USERS_PER_SECOND)
        with Stack(users, say) as stack:
            bench = Bench(stack, options.repeats, options.seconds, options.quick, say)
            conditions = stack.describe() | conditions
            measured = measure(bench)
    except (GeneratorError, StackError) as exc:
        console.print(f"[red]{type(exc).__name__}[/]: ", end="")
        console.print(str(exc), markup=False)
        return 2
    conditions["duration"] = f"{(time.monotonic() - started) / 60:.0f} min"
    problems = bench.take_problems()
    text = to_markdown(measured, conditions, problems)
    if options.quick:
        # Too little for the files in the repository.
        console.print(text, markup=False)
    else:
        FIGURES.write_text(text)
        measured.costs.write()
        console.print(f"Written: {FIGURES.relative_to(BASE_DIR)} and benchmarks/costs.json")
    for problem in problems:
        console.print(f"[red]wrong[/]: {problem}")
    return 1 if problems else 0


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Bring up servers of its own, measure how throughput grows, and write "
        "docs/scaling-figures.md and benchmarks/costs.json; with --quick, print the report "
        "instead. Needs Linux, wrk, pgbouncer and nginx (apt-get install).",
    )
    parser.add_argument("--quick", action="store_true", help="one short repeat, in 4 minutes")
    parser.add_argument("--repeats", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--seconds", type=float, help="of each run; default: 3, with --quick 1")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.seconds = options.seconds or (1 if options.quick else 3)
    return options


@dataclass
class Measured:
    """``grid`` has the runs of each setup, ``others`` those that only give costs."""

    grid: dict[str, list[Run]]
    others: dict[str, list[Run]]
    costs: Costs


def measure(bench: Bench) -> Measured:
    for name, value in TIMEOUTS.items():
        bench.stack.execute(f"ALTER DATABASE drops SET {name} = '{value}'")
    bytes_per_row: dict[str, list[float]] = {name: [] for name in SIZES}
    kib: list[float] = []
    frame_ms: list[float] = []
    rates: list[float] = []

    def one() -> Run:
        run = grid_run(bench, ONE)
        rates.append(run.per_second or 0)
        return run

    steps: dict[str, Callable[[], Run]] = {
        setup.title: lambda setup=setup: grid_run(bench, setup)  # type: ignore[misc]
        for setup in SETUPS
    }
    others: dict[str, Callable[[], Run]] = {
        # In backward repeats the ceiling of the repeat before is the newest.
        OPEN: lambda: open_loop_run(bench, rates[-1] / 2),
        "reserve, then purchase": lambda: sized_pairs(bench, bytes_per_row),
        "refusals of a sold-out drop": lambda: sold_out_run(bench, [], []),
        f"the list of {LIST_DROPS} drops": lambda: list_reads(bench),
        "idle sockets": lambda: idle_run(bench, SOCKETS[bench.is_quick], kib),
        f"{SOCKETS[bench.is_quick]:,} sockets, few reserves": lambda: frames_run(bench, frame_ms),
    }
    rows = bench.take_turns("scaling", steps | {ONE.title: one} | others)
    grid = {setup.title: rows[setup.title] for setup in SETUPS}
    rest = {name: rows[name] for name in others}
    costs = costs_of(grid, rest, bytes_per_row, kib, frame_ms)
    return Measured(grid, rest, costs)


OPEN = "open loop at half of one process"


def grid_run(bench: Bench, setup: Setup) -> ScalingRun:
    stack = bench.stack
    hot = [drop.drop_id for drop in stack.fresh(setup.drops)]
    others = count_connections(stack)
    with serving(stack, setup) as (port, servers, proxies):
        load = run_wrk(port, "reserve", WARM_UP_SECONDS, 1, *hot)
        bench.check(load.unexpected("201"), "warm-up")
        time.sleep(SETTLE_SECONDS)
        before = stack.count_reservations()
        wal = wal_bytes(stack)
        usage, aside = Usage(stack, *servers), Aside(stack, proxies)
        load = run_wrk(port, "reserve", bench.seconds, FIRST_USER, *hot)
        done = max(1, load.count("201"))
        redis_ms, proxy_ms, load_ms = aside.ms_each(done)
        run = ScalingRun(
            **vars(figures(load, load.count("201"), usage)),
            redis_cpu_ms=redis_ms,
            proxy_cpu_ms=proxy_ms,
            load_cpu_ms=load_ms,
            connections=count_connections(stack) - others,
            wal_bytes=(wal_bytes(stack) - wal) / done,
        )
        time.sleep(SETTLE_SECONDS)
    bench.check(load.unexpected("201"), setup.title)
    check_rows(bench, stack.count_reservations() - before, load.count("201"))
    bench.audit()
    return run


@contextmanager
def serving(stack: Stack, setup: Setup) -> Iterator[tuple[int, list[Process], list[Process]]]:
    """Run what ``setup`` says; give the port for wrk, the web servers and the proxies."""
    with ExitStack() as running:
        if setup.proxy.startswith("nginx"):
            # Each on a port of its own, as on machines of their own.
            webs = [running.enter_context(stack.web()) for _ in range(setup.processes)]
            ports = [web.port for web in webs]
            is_pinned = setup.proxy.endswith("pinned")
            proxy, port = running.enter_context(nginx(ports, is_pinned=is_pinned))
            yield port, [*webs], [proxy]
        elif setup.proxy == "pgbouncer":
            proxy, url = running.enter_context(pgbouncer(stack.database))
            pooled = {"DATABASE_URL": url, "DATABASE_POOLER": "pgbouncer"}
            web = running.enter_context(stack.web("uvicorn", setup.processes, **pooled))
            yield web.port, [web], [proxy]
        else:
            web = running.enter_context(stack.web("uvicorn", setup.processes))
            yield web.port, [web], []


class Aside:
    """CPU seconds, from the start of this object on, of who is neither web nor PostgreSQL."""

    def __init__(self, stack: Stack, proxies: Sequence[Process]) -> None:
        self.stack, self.proxies = stack, proxies
        self._before = self._seconds()

    def ms_each(self, count: int) -> list[float]:
        """Return the CPU of Redis, of the proxies and of wrk, in ms, divided by ``count``."""
        pairs = zip(self._seconds(), self._before, strict=True)
        return [(now - before) * 1000 / count for now, before in pairs]

    def _seconds(self) -> list[float]:
        times = os.times()
        return [
            cpu_seconds(self.stack.valkey_pid),
            sum(cpu_seconds(proxy.pid) for proxy in self.proxies),
            # Children that have ended: between the two moments that is wrk alone.
            times.children_user + times.children_system,
        ]


def count_connections(stack: Stack) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'drops'"
    return stack.execute(query)[0][0]


def wal_bytes(stack: Stack) -> float:
    return float(stack.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")[0][0])


def bytes_per_signature() -> float:
    """Return what Redis needs to remember that a signed request was made."""
    from config.redis import client
    from users.replays import use_all

    def used() -> int:
        memory: Any = client().info("memory")
        return memory["used_memory"]

    before = used()
    for _ in range(SIGNATURES // 100):
        use_all([secrets.token_bytes(32) for _ in range(100)])
    return (used() - before) / SIGNATURES


def sized_pairs(bench: Bench, bytes_per_row: dict[str, list[float]]) -> Run:
    run = pairs_run(bench)
    for name, sizes in bytes_per_row.items():
        query = f"SELECT pg_total_relation_size('{name}')::float / count(*) FROM {name}"  # noqa: S608
        sizes.append(bench.stack.execute(query)[0][0])
    return run


def list_reads(bench: Bench) -> Run:
    bench.stack.fresh(LIST_DROPS)
    with bench.stack.web() as web:
        run_wrk(web.port, "list", WARM_UP_SECONDS)
        usage = Usage(bench.stack, web)
        load = run_wrk(web.port, "list", bench.seconds)
        run = figures(load, load.count("200"), usage)
    bench.check(load.unexpected("200"), "list")
    return run


def frames_run(bench: Bench, frame_ms: list[float]) -> Run:
    """Reserve before sockets; add what a frame costs the process, beyond the reserves."""
    rate = WATCHED_RESERVES_PER_SECOND
    count = round(rate * bench.seconds)
    runs = []
    for sockets in (1, SOCKETS[bench.is_quick]):
        hot = bench.stack.fresh()
        with (
            warm_web(bench, hot) as web,
            watching(SocketPlan(web.port, socket_path(hot[0]), sockets)) as clients,
        ):
            runs.append(watched_reserves(bench, web, hot, clients, rate, count))
    (alone, few), (run, many) = runs
    more_ms = ((run.web_cpu_ms or 0) - (alone.web_cpu_ms or 0)) * count
    frame_ms.append(max(0.0, more_ms / max(1, many.frames - few.frames)))
    return run


def costs_of(
    grid: dict[str, list[Run]],
    others: dict[str, list[Run]],
    bytes_per_row: dict[str, list[float]],
    kib: list[float],
    frame_ms: list[float],
) -> Costs:
    """Return the medians; those of reserves from the open loop, where processes are not full."""
    one = cast("list[ScalingRun]", grid[ONE.title])
    reserve, pair, refusal, reading, _, _ = others.values()

    def web(runs: Sequence[Run]) -> float:
        return median(runs, lambda run: run.web_cpu_ms or 0)

    def postgres(runs: Sequence[Run]) -> float:
        return median(runs, lambda run: run.postgres_cpu_ms or 0)

    sizes = {name: statistics.median(values) for name, values in bytes_per_row.items()}
    return Costs(
        reserve_web_ms=round(web(reserve), 4),
        reserve_postgres_ms=round(postgres(reserve), 4),
        reserve_redis_ms=round(statistics.median(run.redis_cpu_ms for run in one), 4),
        # A pair is a reserve and a purchase, both in a closed loop.
        purchase_web_ms=round(web(pair) - web(one), 4),
        purchase_postgres_ms=round(postgres(pair) - postgres(one), 4),
        refusal_web_ms=round(web(refusal), 4),
        refusal_postgres_ms=round(postgres(refusal), 4),
        list_web_ms=round(web(reading), 4),
        list_postgres_ms=round(postgres(reading), 4),
        frame_web_ms=round(statistics.median(frame_ms), 4),
        drop_reserves_per_second=round(median(one, lambda run: run.per_second or 0)),
        reservation_bytes=round(sizes["reservations_reservation"]),
        purchase_bytes=round(sizes["purchases_purchase"]),
        event_bytes=round(sizes["realtime_event"]),
        wal_bytes_per_reserve=round(statistics.median(run.wal_bytes for run in one)),
        redis_bytes_per_signature=round(bytes_per_signature()),
        socket_kib=round(statistics.median(kib), 1),
        process_mb=round(median(one, lambda run: run.web_mb or 0)),
    )


def median(runs: Sequence[Run], read: Callable[[Run], float]) -> float:
    return statistics.median(map(read, runs))


def to_markdown(measured: Measured, conditions: dict[str, str], problems: Sequence[str]) -> str:
    costs = measured.costs
    names = [[f"`{name}`", f"{value:g}"] for name, value in vars(costs).items()]
    if problems:
        verdict = "**Something was wrong:**\n\n" + "\n".join(f"- {it}" for it in problems)
    else:
        verdict = "Every stock audit found nothing, every answer was as expected."
    parts = [
        "# Scaling: the figures",
        "Written by `python -m benchmarks.scaling`; don't edit. What they mean: [scaling.md]"
        "(scaling.md).",
        verdict,
        "## Machine and conditions",
        markdown_table(["", ""], [[name, value] for name, value in conditions.items()]),
        METHOD.strip(),
        "## Processes and drops",
        runs_table(only(measured.grid, PLAIN), SCALING_COLUMNS),
        "## PgBouncer in transaction mode, at most 20 sessions",
        runs_table(only(measured.grid, [*PLAIN[5:6], *PLAIN[8:], *POOLED]), SCALING_COLUMNS),
        "## nginx in front: in turn, and pinned by the drop's id",
        runs_table(only(measured.grid, PROXIED), SCALING_COLUMNS),
        "\n".join(f"- {line}" for line in gains(measured.grid)),
        "## What one of each takes",
        "Of one process each, but not full: CPU per success.",
        runs_table(measured.others),
        "So the capacity model counts with these (`benchmarks/costs.json`):",
        markdown_table(["cost", ""], names),
        "## The model, checked",
        textwrap.fill(CHECK, 100),
        checked(measured),
        "## Examples",
        textwrap.fill(EXAMPLES_ARE, 100),
        table(EXAMPLES, costs),
    ]
    return "\n\n".join(parts) + "\n"


CHECK = (
    "The costs come from one process at half its rate. What they predict for the full machine: a "
    "process gives 1 / `reserve_web_ms`, and all together no more than the cores divided by what a "
    "reserve costs web, PostgreSQL, Redis, proxy and wrk. Above 1 the model asks for more than is "
    "needed: full batches are cheaper. It counts on drops that are sold by one process each; "
    "below the line are those that several processes sell in turn."
)
EXAMPLES_ARE = (
    f"Cores are those that are busy; processes are so many that each is busy for {BUSY:.0%} at "
    "most, and holds 5,000 sockets at most. `python -m benchmarks.capacity --help` for others."
)


def only(grid: dict[str, list[Run]], setups: Sequence[Setup]) -> dict[str, list[Run]]:
    return {setup.title: grid[setup.title] for setup in setups}


def gains(grid: dict[str, list[Run]]) -> list[str]:
    """Compare, repeat by repeat, what pinning and PgBouncer give."""
    pairs = [
        (Setup(2, 1, "nginx, pinned"), Setup(2, 1, "nginx")),
        (Setup(2, 20, "nginx, pinned"), Setup(2, 20, "nginx")),
        (Setup(2, 20, "pgbouncer"), Setup(2, 20)),
        (Setup(4, 20, "pgbouncer"), Setup(4, 20)),
    ]
    lines = []
    for above, below in pairs:
        values = [
            (a.per_second or 0) / (b.per_second or 1)
            for a, b in zip(grid[above.title], grid[below.title], strict=True)
        ]
        spread = f"{figure(min(values))} to {figure(max(values))}"
        lines.append(
            f"{above.title} ÷ {below.title}: **{figure(statistics.median(values))}×** ({spread})."
        )
    return lines


def checked(measured: Measured) -> str:
    costs, cores = measured.costs, os.cpu_count() or 1
    ours = costs.reserve_web_ms + costs.reserve_postgres_ms + costs.reserve_redis_ms
    lines = []
    for setup in (*ALONE, *IN_TURN):
        if setup is IN_TURN[0]:
            lines.append(["**in turn**", "", "", ""])
        runs = cast("list[ScalingRun]", measured.grid[setup.title])
        aside = statistics.median(run.load_cpu_ms + run.proxy_cpu_ms for run in runs)
        predicted = 1000 * min(setup.processes / costs.reserve_web_ms, cores / (ours + aside))
        found = median(runs, lambda run: run.per_second or 0)
        lines.append([setup.title, figure(predicted), figure(found), figure(found / predicted)])
    return markdown_table(["", "predicted per second", "measured", "measured ÷ predicted"], lines)


if __name__ == "__main__":
    sys.exit(main())
