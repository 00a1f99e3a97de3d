"""The single measurements that scenarios are made of.

Every run has empty tables, a server of its own that was started and warmed up for it, and an
audit at its end.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from benchmarks.client import Plan, Report, percentile
from benchmarks.data import held, hold, sell, wait_until_expired
from benchmarks.load import (
    CONNECTIONS,
    Load,
    background_client,
    find_pgbench,
    finish_wrk,
    run_client,
    run_pgbench,
    run_wrk,
    start_wrk,
)
from benchmarks.processes import Stolen, resident_mb
from benchmarks.results import Run
from benchmarks.stack import NOOP, Hot, Stack, Usage, WebServer

WARM_UP_SECONDS = 1
# For the requests that wrk had on their way when its time was up.
SETTLE_SECONDS = 0.3
# The first user of a measurement; those before are for the warm-up.
FIRST_USER = 50_001
# What a no-op is asked for.
NO_DROP = "00000000-0000-4000-8000-000000000000"


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
                stolen = Stolen()
                run = replace(steps[step](), stolen_percent=stolen.percent)
                rows[step].append(run)
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


def client_figures(report: Report, usage: Usage) -> Run:
    """Return a run of our own client; the usage must have begun with it."""
    latencies, done = report.latencies_ms(), max(1, len(report.answers))
    return Run(
        per_second=done / max(0.001, report.finished - report.started),
        p50_ms=percentile(latencies, 50),
        p99_ms=percentile(latencies, 99),
        p999_ms=percentile(latencies, 99.9),
        web_cpu_ms=usage.web_seconds * 1000 / done,
        postgres_cpu_ms=usage.postgres_seconds * 1000 / done,
        web_mb=usage.web_mb,
    )


@contextmanager
def warm_web(
    bench: Bench,
    hot: Sequence[Hot],
    server: str = "uvicorn",
    workers: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Iterator[WebServer]:
    """Run a web server that has served reserves for a moment; check and audit afterwards."""
    with bench.stack.web(server, workers, **(environment or {})) as web:
        load = run_wrk(web.port, "reserve", WARM_UP_SECONDS, 1, *(drop.drop_id for drop in hot))
        bench.check(load.unexpected("201"), "warm-up")
        time.sleep(SETTLE_SECONDS)
        yield web
    bench.audit()


def reserve_run(
    bench: Bench,
    server: str = "uvicorn",
    workers: int = 1,
    drops: int = 1,
    environment: Mapping[str, str] | None = None,
) -> Run:
    hot = bench.stack.fresh(drops)
    with warm_web(bench, hot, server, workers, environment) as web:
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
    arguments = [1, NO_DROP] if script == "reserve" else []
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
        usage = Usage(bench.stack)
        done = run_pgbench(
            program,
            bench.stack.database,
            clients,
            1 if bench.is_quick else 2,
            drop=hot.drop_id,
            variant=hot.variant_id,
            first=1,
        )
        cpu_ms = usage.postgres_seconds * 1000 / max(1, done.count)
        check_rows(bench, bench.stack.count_reservations(), done.count)
        bench.audit()
        seen.append(done.per_second)
        runs.append(Run(per_second=done.per_second, postgres_cpu_ms=cpu_ms))
    return max(runs, key=lambda run: run.per_second or 0)


def pairs_run(bench: Bench) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot) as web:
        run_wrk(web.port, "pairs", WARM_UP_SECONDS, FIRST_USER // 2, hot[0].drop_id)
        time.sleep(SETTLE_SECONDS)
        before = bench.stack.execute("SELECT count(*) FROM purchases_purchase")[0][0]
        usage = Usage(bench.stack, web)
        load = run_wrk(web.port, "pairs", bench.seconds, FIRST_USER, hot[0].drop_id)
        run = figures(load, load.count("201"), usage)
    bench.check(load.unexpected("201", "reserved"), "pairs")
    stored = bench.stack.execute("SELECT count(*) FROM purchases_purchase")[0][0]
    check_rows(bench, stored - before, load.count("201"))
    return run


def sold_out_run(bench: Bench, queries: list[float], health_checks: list[float]) -> Run:
    stock = 500
    (hot,) = bench.stack.fresh(stock=stock)
    sell(bench.stack, hot, 1, stock)
    with bench.stack.queries_logged(), bench.stack.web() as web:
        run_wrk(web.port, "reserve", WARM_UP_SECONDS, stock + 1, hot.drop_id)
        usage = Usage(bench.stack, web)
        process = start_wrk(web.port, "reserve", bench.seconds, FIRST_USER, hot.drop_id)
        # What was learned in the warm-up is forgotten by now.
        time.sleep(SETTLE_SECONDS)
        log_size, counting_since = bench.stack.log_size(), time.monotonic()
        load = finish_wrk(process, bench.seconds)
        seconds = time.monotonic() - counting_since
        run = figures(load, load.count("409"), usage)
        logged = bench.stack.queries_since(log_size)
        queries.append(sum(map(bool, logged)) / seconds)
        health_checks.append(sum(not query for query in logged) / seconds)
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
        with background_client(plan) as finish:
            run_wrk(web.port, "list", WARM_UP_SECONDS)
            usage = Usage(bench.stack, web)
            load = run_wrk(web.port, "list", bench.seconds)
            run = figures(load, load.count("200"), usage)
            background.append(report := finish())
    bench.body_bytes["list"] = load.body_bytes
    bench.check(load.unexpected("200"), "list")
    check_report(bench, report, "201")
    bench.audit()
    return run


def open_loop_run(bench: Bench, rate: float) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot) as web:
        return _open_loop(bench, web, hot[0].drop_id, rate)


def noop_open_loop_run(bench: Bench, rate: float) -> Run:
    size = bench.body_bytes["reserve"]
    with bench.stack.web(application=NOOP, BENCH_STATUS=201, BENCH_BYTES=size) as web:
        run_wrk(web.port, "reserve", WARM_UP_SECONDS, 1, NO_DROP)
        time.sleep(SETTLE_SECONDS)
        return _open_loop(bench, web, NO_DROP, rate)


def _open_loop(bench: Bench, web: WebServer, drop_id: str, rate: float) -> Run:
    plan = Plan(
        web.port,
        f"/api/drops/{drop_id}/reserve",
        first_user=FIRST_USER,
        count=round(rate * bench.seconds),
        interval_seconds=1 / rate,
    )
    usage = Usage(bench.stack, web)
    report = run_client(plan)
    check_report(bench, report, "201")
    return client_figures(report, usage)


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
        run = client_figures(report, usage)
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
        with background_client(plan) as finish:
            if time.time() > due - 1:
                bench.problems.append(f"{holds:,} holds were inserted too late")
            others = before + plan.count + holds // 20
            back = wait_until_expired(bench.stack, hot, due, others, until)
            web_mb = resident_mb(web.pid)
            if back is None:
                bench.problems.append(f"{holds:,} holds were not back in {until - due:.0f} s")
                back = until
            shown_until = max(back, due + 1)
            time.sleep(max(0.0, shown_until - time.time()))
            report = finish()
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
