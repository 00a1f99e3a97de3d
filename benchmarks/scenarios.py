"""One function per scenario of the table in docs/benchmarks.md; each returns a ``Result``.

The runs that a ratio compares take turns, forwards in one repeat and backwards in the next,
so that a change of the machine's mood hits all of them. Every run has empty tables, a
server of its own that was started and warmed up for it, and an audit at its end.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.client import Plan, Report, percentile
from benchmarks.data import held, hold, sell, wait_until_expired
from benchmarks.load import (
    CONNECTIONS,
    Load,
    find_pgbench,
    finish_client,
    finish_wrk,
    run_client,
    run_pgbench,
    run_wrk,
    start_client,
    start_wrk,
)
from benchmarks.processes import resident_mb
from benchmarks.results import Goal, Result, Run, ratios
from benchmarks.stack import NOOP, Hot, Stack, Usage, WebServer

WARM_UP_SECONDS = 1
# For the requests that wrk had on their way when its time was up.
SETTLE_SECONDS = 0.3
# The first user of a measurement; those before are for the warm-up.
FIRST_USER = 50_001
PGBENCH_CLIENTS = (1, 4, 16, 64)
MILLION = {False: 1_000_000, True: 50_000}  # by whether it must be quick
USERS_PER_SECOND = 20_000  # more than any run needs


@dataclass
class Bench:
    """What all scenarios share."""

    stack: Stack
    repeats: int
    seconds: float
    is_quick: bool
    say: Callable[[str], None]
    # Bytes of the last answer's body, by scenario: as many are in the no-op's answer.
    body_bytes: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take_turns(self, name: str, steps: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
        """Make each kind of run once per repeat, in alternating order."""
        rows: dict[str, list[Run]] = {step: [] for step in steps}
        for repeat in range(self.repeats):
            order = list(steps) if repeat % 2 == 0 else list(reversed(steps))
            for step in order:
                rows[step].append(run := steps[step]())
                self.say(f"{name} {repeat + 1}/{self.repeats}  {step}: {summary(run)}")
        return rows

    def check(self, unexpected: dict[str, int], what: str) -> None:
        for answer, count in unexpected.items():
            self.problems.append(f"{what}: {count} × {answer}")

    def audit(self) -> None:
        self.problems += self.stack.audit()

    def take_problems(self) -> list[str]:
        found, self.problems = self.problems, []
        return found


def summary(run: Run) -> str:
    if run.per_second is not None:
        return f"{run.per_second:,.0f}/s"
    return f"p99 {run.p99_ms:.1f} ms" if run.p99_ms is not None else "done"


def reserve(bench: Bench) -> Result:
    """Reserve on one hot drop, beside the limits of PostgreSQL and of the server."""
    rates: dict[int, list[float]] = {clients: [] for clients in PGBENCH_CLIENTS}
    rows = bench.take_turns(
        "reserve",
        {
            "uvicorn": lambda: reserve_run(bench),
            "uvicorn, 2 workers": lambda: reserve_run(bench, workers=2),
            "H0: no-op on uvicorn": lambda: noop_run(bench, "reserve"),
            "L1: pgbench": lambda: pgbench_run(bench, rates),
        },
    )
    by_clients = ", ".join(f"{n}: {statistics.median(r):,.0f}" for n, r in rates.items())
    return Result(
        name="reserve",
        title="Reserve, one hot drop",
        method="Distinct users, 128 connections, closed loop, one uvicorn process (and two).",
        rows=rows,
        goals=[
            Goal("reserve ÷ L1", ratios(rows, "uvicorn", "L1: pgbench"), "at least", 1.5, 2.5, "×"),
            Goal(
                "reserve ÷ H0",
                ratios(rows, "uvicorn", "H0: no-op on uvicorn"),
                "at least",
                0.15,
                0.25,
                "×",
            ),
        ],
        notes=[f"L1 per second, by clients: {by_clients}."],
        problems=bench.take_problems(),
    )


def reserve_daphne(bench: Bench) -> Result:
    rows = bench.take_turns(
        "reserve-daphne",
        {
            "daphne": lambda: reserve_run(bench, "daphne"),
            "H0: no-op on daphne": lambda: noop_run(bench, "reserve", "daphne"),
        },
    )
    return Result(
        name="reserve-daphne",
        title="Reserve on daphne",
        method="The same on daphne, the default server of `manage.py up`.",
        rows=rows,
        goals=[
            Goal(
                "reserve ÷ H0 of daphne",
                ratios(rows, "daphne", "H0: no-op on daphne"),
                "at least",
                0.7,
                0.85,
                "×",
            )
        ],
        problems=bench.take_problems(),
    )


def pairs(bench: Bench) -> Result:
    rows = bench.take_turns(
        "pairs",
        {
            "pairs": lambda: pairs_run(bench),
            "reserve": lambda: reserve_run(bench),
        },
    )
    return Result(
        name="pairs",
        title="Reserve, then purchase",
        method=(
            "Each user reserves and, answered, purchases: two calls per pair, 128 connections, "
            "one uvicorn process. Throughput and CPU are per pair, latency is per call."
        ),
        rows=rows,
        goals=[
            Goal(
                "2 × pairs ÷ reserve",
                ratios(rows, "pairs", "reserve", 2),
                "at least",
                0.6,
                0.8,
                "×",
            )
        ],
        problems=bench.take_problems(),
    )


def sold_out(bench: Bench) -> Result:
    queries: list[float] = []
    rows = bench.take_turns(
        "sold-out",
        {
            "refusals": lambda: sold_out_run(bench, queries),
            "H0: no-op": lambda: noop_run(bench, "sold-out", status=409),
        },
    )
    return Result(
        name="sold-out",
        title="Refusals of a sold-out drop",
        method=(
            "A drop whose 500 units are purchased; distinct users who have nothing of it, 128 "
            "connections, one uvicorn process. The queries are those of PostgreSQL's own log "
            "during the run (`log_statement=all`), transaction commands and background work "
            "included, the pool's empty health checks not."
        ),
        rows=rows,
        goals=[
            Goal("refusals ÷ H0", ratios(rows, "refusals", "H0: no-op"), "at least", 0.4, 0.6, "×"),
            Goal("queries", queries, "at most", 10, unit="/s"),
        ],
        problems=bench.take_problems(),
    )


def drop_list(bench: Bench) -> Result:
    drops, purchases, rate = 15, 50_000, 500
    background: list[Report] = []
    rows = bench.take_turns(
        "list",
        {
            "list": lambda: list_run(bench, drops, purchases, rate, background),
            "H0: no-op, same bytes": lambda: noop_run(bench, "list", status=200, script="list"),
        },
    )
    p99 = statistics.median(percentile(report.latencies_ms(), 99) for report in background)
    reached = statistics.median(
        len(report.answers) / (report.finished - report.started) for report in background
    )
    return Result(
        name="list",
        title="The list of drops during a sale",
        method=(
            f"`GET /api/drops` with {drops} drops that have {purchases:,} purchases, 128 "
            f"connections, one uvicorn process, while {rate} reserves/s on one of them arrive "
            "in an open loop. H0 runs without them."
        ),
        rows=rows,
        goals=[
            Goal(
                "list ÷ H0",
                ratios(rows, "list", "H0: no-op, same bytes"),
                "at least",
                0.4,
                0.7,
                "×",
            )
        ],
        notes=[
            f"An answer has {bench.body_bytes['list']:,} bytes.",
            f"The reserves meanwhile: {reached:.0f}/s answered, p99 {p99:.0f} ms, beside 128 "
            "connections that leave the server no idle moment.",
        ],
        problems=bench.take_problems(),
    )


def open_loop(bench: Bench) -> Result:
    rates: list[float] = []

    def ceiling() -> Run:
        run = reserve_run(bench)
        rates.append(run.per_second or 0)
        return run

    rows = bench.take_turns(
        "open-loop",
        {
            "closed loop: the ceiling": ceiling,
            # In backward repeats the ceiling of the repeat before is the newest.
            "open loop at half of it": lambda: open_loop_run(bench, rates[-1] / 2),
        },
    )
    p99 = [run.p99_ms or math.nan for run in rows["open loop at half of it"]]
    return Result(
        name="open-loop",
        title="Latency at half the ceiling",
        method=(
            "Reserves on one drop at half the rate of the closed loop just before, evenly "
            "spaced, over 128 connections; latency counts from the moment a request was due."
        ),
        rows=rows,
        goals=[Goal("p99", p99, "at most", 25, 12, " ms")],
        problems=bench.take_problems(),
    )


def herd(bench: Bench) -> Result:
    users, stock = 5000, 500
    seconds: list[float] = []
    winners: list[float] = []
    cold: list[float] = []
    rows = bench.take_turns(
        "herd",
        {
            "connections open": lambda: herd_run(bench, users, stock, seconds, winners),
            "connections new": lambda: herd_run(
                bench, users, stock, cold, winners, connect_first=False
            ),
        },
    )
    return Result(
        name="herd",
        title="The herd",
        method=(
            f"{users:,} users, each with a connection of their own, ask for {stock} units within "
            "100 ms; one uvicorn process, no warm-up. The time counts from the first request due "
            "to the last answer. The goal is judged with connections that are open already; in "
            "the other row each is made within the same 100 ms."
        ),
        rows=rows,
        goals=[
            Goal("winners", winners, "exactly", stock),
            Goal("everybody answered", seconds, "at most", 2, 1, " s"),
        ],
        notes=[f"Everybody answered with new connections: {spread(cold)} s."],
        problems=bench.take_problems(),
    )


def zipf(bench: Bench) -> Result:
    rows = bench.take_turns(
        "zipf",
        {
            "20 drops": lambda: reserve_run(bench, drops=20),
            "one drop": lambda: reserve_run(bench),
        },
    )
    return Result(
        name="zipf",
        title="Twenty drops",
        method="As the first scenario, over 20 drops, the k-th asked for in proportion to 1/k.",
        rows=rows,
        goals=[
            Goal(
                "20 drops ÷ one drop",
                ratios(rows, "20 drops", "one drop"),
                "at least",
                0.8,
                1.0,
                "×",
            )
        ],
        problems=bench.take_problems(),
    )


def expiry(bench: Bench) -> Result:
    waves = {10_000: (1.0, 0.5)} | ({} if bench.is_quick else {100_000: (10.0, 5.0)})
    seconds: dict[int, list[float]] = {holds: [] for holds in waves}
    rows = bench.take_turns(
        "expiry",
        {
            f"reserve during {holds:,}": lambda holds=holds: expiry_run(  # type: ignore[misc]
                bench, holds, seconds[holds]
            )
            for holds in waves
        },
    )
    goals = []
    for holds, (goal, stretch) in waves.items():
        p99 = [run.p99_ms or math.nan for run in rows[f"reserve during {holds:,}"]]
        goals += [
            Goal(f"{holds:,} back in stock", seconds[holds], "at most", goal, stretch, " s"),
            Goal(f"reserve p99 during {holds:,}", p99, "at most", 100, None, " ms"),
        ]
    return Result(
        name="expiry",
        title="Holds that end all at once",
        method=(
            "Holds of one drop with the same deadline; one `manage.py expire_reservations` and "
            "one uvicorn process run already, and 100 reserves/s on the drop arrive in an open "
            "loop. The time counts from the deadline to the moment when none of them is active. "
            "Latencies are of the reserves due in that time, or in the second from the "
            "deadline on where it is shorter."
        ),
        rows=rows,
        goals=goals,
        problems=bench.take_problems(),
    )


def million(bench: Bench) -> Result:
    reserves = MILLION[bench.is_quick]
    step = reserves // 20
    samples: list[tuple[int, float]] = []
    run = million_run(bench, reserves, step, samples)
    bench.say(f"million  {summary(run)}")
    # The first tenth is the warm-up.
    after_warm_up = [mb for count, mb in samples if count >= reserves // 10]
    steps = ", ".join(f"{count / 1000:.0f}k: {mb:.0f}" for count, mb in samples)
    return Result(
        name="million",
        title=f"{reserves:,} reserves",
        method=(
            "One drop, 128 connections, one uvicorn process that is not restarted. Its memory is "
            f"read every {step:,} reserves; the first tenth is the warm-up."
        ),
        rows={"reserve": [run]},
        goals=[
            Goal(
                "memory, highest minus lowest",
                [max(after_warm_up) - min(after_warm_up)],
                "at most",
                20,
                unit=" MB",
            )
        ],
        notes=[f"Memory in MB by reserves: {steps}."],
        problems=bench.take_problems(),
    )


SCENARIOS: dict[str, Callable[[Bench], Result]] = {
    "reserve": reserve,
    "reserve-daphne": reserve_daphne,
    "pairs": pairs,
    "sold-out": sold_out,
    "list": drop_list,
    "open-loop": open_loop,
    "herd": herd,
    "zipf": zipf,
    "expiry": expiry,
    "million": million,
}


def users_needed(names: Collection[str], seconds: float, is_quick: bool) -> int:
    """Return how many users the longest of the runs of these scenarios needs."""
    needed = FIRST_USER + round(seconds * USERS_PER_SECOND)
    if "expiry" in names and not is_quick:
        needed = max(needed, FIRST_USER + 110_000)
    if "million" in names:
        needed = max(needed, MILLION[is_quick] + 50_000)
    return needed


# --- Runs -------------------------------------------------------------------------------


def figures(load: Load, successes: int, usage: Usage) -> Run:
    """Return a run of wrk; the usage must have begun with it."""
    return Run(
        per_second=successes / load.seconds,
        p50_ms=load.p50_ms,
        p99_ms=load.p99_ms,
        p999_ms=load.p999_ms,
        web_cpu_ms=usage.web_seconds * 1000 / max(1, successes),
        postgres_cpu_ms=usage.postgres_seconds * 1000 / max(1, successes),
        web_mb=usage.web_mb,
    )


def client_figures(report: Report, latencies: Sequence[float], usage: Usage | None = None) -> Run:
    done = len(report.answers)
    return Run(
        per_second=done / (report.finished - report.started) if done else None,
        p50_ms=percentile(latencies, 50),
        p99_ms=percentile(latencies, 99),
        p999_ms=percentile(latencies, 99.9),
        web_cpu_ms=usage.web_seconds * 1000 / max(1, done) if usage else None,
        postgres_cpu_ms=usage.postgres_seconds * 1000 / max(1, done) if usage else None,
        web_mb=usage.web_mb if usage else None,
    )


@contextmanager
def warm_web(
    bench: Bench, hot: Sequence[Hot], server: str = "uvicorn", workers: int = 1
) -> Iterator[WebServer]:
    """Run a web server that has served reserves for a moment; check and audit afterwards."""
    with bench.stack.web(server, workers) as web:
        load = run_wrk(web.port, "reserve", WARM_UP_SECONDS, 1, *(drop.drop_id for drop in hot))
        bench.check(load.unexpected("201"), "warm-up")
        time.sleep(SETTLE_SECONDS)
        yield web
    bench.audit()


def reserve_run(bench: Bench, server: str = "uvicorn", workers: int = 1, drops: int = 1) -> Run:
    hot = bench.stack.fresh(drops)
    with warm_web(bench, hot, server, workers) as web:
        before = bench.stack.count_reservations()
        usage = Usage(bench.stack, web)
        load = run_wrk(
            web.port, "reserve", bench.seconds, FIRST_USER, *(drop.drop_id for drop in hot)
        )
        run = figures(load, load.count("201"), usage)
    bench.body_bytes["reserve"] = load.body_bytes
    bench.check(load.unexpected("201"), f"reserve on {server}")
    check_rows(bench, bench.stack.count_reservations() - before, load.count("201"))
    return run


def check_rows(bench: Bench, stored: int, confirmed: int) -> None:
    """Compare with the table: wrk leaves at most one request per connection unanswered."""
    if not confirmed <= stored <= confirmed + CONNECTIONS:
        bench.problems.append(f"{confirmed} reservations were confirmed, {stored} are stored")


def noop_run(
    bench: Bench, of: str, server: str = "uvicorn", status: int = 201, script: str = "reserve"
) -> Run:
    size = bench.body_bytes[of]
    arguments = [1, "00000000-0000-4000-8000-000000000000"] if script == "reserve" else []
    stack = bench.stack
    with stack.web(server, application=NOOP, BENCH_STATUS=status, BENCH_BYTES=size) as web:
        run_wrk(web.port, script, WARM_UP_SECONDS, *arguments)
        usage = Usage(bench.stack, web)
        load = run_wrk(web.port, script, bench.seconds, *arguments)
        bench.check(load.unexpected(str(status)), "no-op")
        return figures(load, load.count(str(status)), usage)


def pgbench_run(bench: Bench, rates: dict[int, list[float]]) -> Run:
    """Return the best of several numbers of clients; add each one's rate to ``rates``."""
    program = find_pgbench(bench.stack.postgres_bin)
    runs = []
    for clients, seen in rates.items():
        (hot,) = bench.stack.fresh()
        usage = Usage(bench.stack, None)
        done = run_pgbench(
            program,
            bench.stack.database,
            clients,
            1 if bench.is_quick else 2,
            drop=hot.drop_id,
            variant=hot.variant_id,
            first=1,
        )
        cpu_ms = usage.postgres_seconds * 1000 / done.count
        bench.audit()
        seen.append(done.per_second)
        runs.append(Run(per_second=done.per_second, postgres_cpu_ms=cpu_ms))
    return max(runs, key=lambda run: run.per_second or 0)


def pairs_run(bench: Bench) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot) as web:
        run_wrk(web.port, "pairs", WARM_UP_SECONDS, FIRST_USER // 2, hot[0].drop_id)
        before = bench.stack.execute("SELECT count(*) FROM purchases_purchase")[0][0]
        usage = Usage(bench.stack, web)
        load = run_wrk(web.port, "pairs", bench.seconds, FIRST_USER, hot[0].drop_id)
        run = figures(load, load.count("201"), usage)
    bench.check(load.unexpected("201", "reserved"), "pairs")
    stored = bench.stack.execute("SELECT count(*) FROM purchases_purchase")[0][0]
    check_rows(bench, stored - before, load.count("201"))
    return run


def sold_out_run(bench: Bench, queries: list[float]) -> Run:
    stock = 500
    (hot,) = bench.stack.fresh(stock=stock)
    sell(bench.stack, hot, 1, stock)
    with bench.stack.queries_logged(), bench.stack.web() as web:
        run_wrk(web.port, "reserve", WARM_UP_SECONDS, stock + 1, hot.drop_id)
        log_size = bench.stack.log_size()
        usage = Usage(bench.stack, web)
        load = run_wrk(web.port, "reserve", bench.seconds, FIRST_USER, hot.drop_id)
        queries.append(len(bench.stack.queries_since(log_size)) / load.seconds)
        run = figures(load, load.count("409"), usage)
    bench.body_bytes["sold-out"] = load.body_bytes
    bench.check(load.unexpected("409"), "sold-out")
    bench.audit()
    return run


def list_run(bench: Bench, drops: int, purchases: int, rate: int, background: list[Report]) -> Run:
    hot = bench.stack.fresh(drops)
    each = math.ceil(purchases / drops)
    for index, drop in enumerate(hot):
        sell(bench.stack, drop, 1, min(each, purchases - index * each))
    bench.stack.execute("ANALYZE")
    seconds = bench.seconds + WARM_UP_SECONDS + 1
    with bench.stack.web() as web:
        plan = Plan(
            web.port,
            f"/api/drops/{hot[0].drop_id}/reserve",
            first_user=FIRST_USER,
            count=round(rate * seconds),
            interval_seconds=1 / rate,
            connections=32,
        )
        client = start_client(plan)
        run_wrk(web.port, "list", WARM_UP_SECONDS)
        usage = Usage(bench.stack, web)
        load = run_wrk(web.port, "list", bench.seconds)
        run = figures(load, load.count("200"), usage)
        client.terminate()
        background.append(report := finish_client(client, plan))
    bench.body_bytes["list"] = load.body_bytes
    bench.check(load.unexpected("200"), "list")
    check_report(bench, report, "201")
    bench.audit()
    return run


def open_loop_run(bench: Bench, rate: float) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot) as web:
        plan = Plan(
            web.port,
            f"/api/drops/{hot[0].drop_id}/reserve",
            first_user=FIRST_USER,
            count=round(rate * bench.seconds),
            interval_seconds=1 / rate,
        )
        usage = Usage(bench.stack, web)
        report = run_client(plan)
        run = client_figures(report, report.latencies_ms(), usage)
    check_report(bench, report, "201")
    return run


def herd_run(
    bench: Bench,
    users: int,
    stock: int,
    seconds: list[float],
    winners: list[float],
    connect_first: bool = True,
) -> Run:
    (hot,) = bench.stack.fresh(stock=stock)
    with bench.stack.web() as web:
        plan = Plan(
            web.port,
            f"/api/drops/{hot.drop_id}/reserve",
            first_user=1,
            count=users,
            interval_seconds=0.1 / users,
            connections=None,
            connect_first=connect_first,
        )
        usage = Usage(bench.stack, web)
        report = run_client(plan)
        run = client_figures(report, report.latencies_ms(), usage)
    check_report(bench, report, "201", "409")
    winners.append(report.statuses.get("201", 0))
    check_rows(bench, bench.stack.count_reservations(), report.statuses.get("201", 0))
    seconds.append(report.finished - report.started)
    bench.audit()
    return run


def expiry_run(bench: Bench, holds: int, seconds: list[float]) -> Run:
    rate = 100
    (hot,) = bench.stack.fresh()
    with warm_web(bench, [hot]) as web, bench.stack.expiry_loop():
        before = held(bench.stack, hot)
        # Time to insert the holds, and to get the reserves going.
        due = time.time() + 3 + holds / 20_000
        until = due + 10 + holds / 2000
        hold(bench.stack, hot, FIRST_USER, holds, due)
        plan = Plan(
            web.port,
            f"/api/drops/{hot.drop_id}/reserve",
            first_user=FIRST_USER + holds,
            count=round(rate * (until - time.time())),
            interval_seconds=1 / rate,
            connections=32,
        )
        client = start_client(plan)
        if time.time() > due - 1:
            bench.problems.append(f"{holds:,} holds were inserted too late")
        others = before + plan.count + holds // 20
        back = wait_until_expired(bench.stack, hot, due, others, until)
        web_mb = resident_mb(web.pid)
        if back is None:
            bench.problems.append(
                f"{holds:,} of the holds were not all back after {until - due:.0f} s"
            )
            back = until
        shown_until = max(back, due + 1)
        time.sleep(max(0.0, shown_until - time.time()))
        client.terminate()
        report = finish_client(client, plan)
    seconds.append(back - due)
    check_report(bench, report, "201")
    latencies = report.latencies_ms(due, shown_until)
    return Run(
        p50_ms=percentile(latencies, 50),
        p99_ms=percentile(latencies, 99),
        p999_ms=percentile(latencies, 99.9),
        web_mb=web_mb,
    )


def million_run(bench: Bench, reserves: int, step: int, samples: list[tuple[int, float]]) -> Run:
    """Reserve until the drop has given ``reserves`` units; sample the memory."""
    (hot,) = bench.stack.fresh()
    with bench.stack.web() as web:
        usage = Usage(bench.stack, web)
        process = start_wrk(web.port, "reserve", reserves / 500, 1, hot.drop_id)
        try:
            while process.poll() is None and (not samples or samples[-1][0] < reserves):
                time.sleep(0.02)
                count = held(bench.stack, hot) // step * step
                if count > (samples[-1][0] if samples else 0):
                    samples.append((count, resident_mb(web.pid)))
                    bench.say(f"million  {count:,}: {samples[-1][1]:.0f} MB")
        finally:
            process.send_signal(signal.SIGINT)
        load = finish_wrk(process, 0)
        run = figures(load, load.count("201"), usage)
    bench.check(load.unexpected("201"), "million")
    check_rows(bench, bench.stack.count_reservations(), load.count("201"))
    bench.audit()
    return run


def check_report(bench: Bench, report: Report, *expected: str) -> None:
    others = {name: n for name, n in report.statuses.items() if name not in expected}
    if report.unanswered:
        others["no answer"] = report.unanswered
    bench.check(others, "client")


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
