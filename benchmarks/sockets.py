"""The scenarios with WebSocket clients; as those of ``scenarios``, which lists them too.

Their limit is W0, a bare broadcast server (``broadcast``) with the same clients in the same run.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from benchmarks.client import Plan, percentile
from benchmarks.data import hold
from benchmarks.load import Watching, run_client, run_watchers, run_wrk, watching
from benchmarks.processes import cpu_seconds, resident_mb
from benchmarks.results import Goal, Result, Run, ratios
from benchmarks.runs import (
    FIRST_USER,
    Bench,
    check_report,
    client_figures,
    figures,
    warm_web,
)
from benchmarks.stack import Hot, Usage, WebServer
from benchmarks.watchers import Plan as SocketPlan
from benchmarks.watchers import Report

CHANGES = {False: 30, True: 10}  # by whether it must be quick
# Until all that new sockets cost at once is freed, and the hub has looked around.
SETTLE_SECONDS = 2
# As often as the hub gives a drop its turn.
FRAME_SECONDS = 0.05


def fanout(bench: Bench) -> Result:
    rows, answers = changes(bench, "fanout", "uvicorn", 3000)
    return Result(
        name="fanout",
        title="A stock change for 3,000 sockets",
        method=(
            "3,000 sockets watch one drop on one uvicorn process. One reserve at a time, each "
            "when all have seen the one before; the latency counts from the request until the "
            "last client has the frame. W0 sends the same frame to as many sockets when it gets "
            "the same request. The reserve's own answer is compared with the same run of one "
            "socket."
        ),
        rows=rows,
        goals=[
            Goal("last client ÷ W0", last_ratios(rows, "uvicorn"), "at most", 1.3, 1.1, "×"),
            Goal(
                "answer with 3,000 sockets ÷ with 1",
                [a / b for a, b in zip(answers["uvicorn"], answers["one socket"], strict=True)],
                "at most",
                1.5,
                1.2,
                "×",
            ),
        ],
        notes=[f"The answer, median in ms: {show(answers)}."],
        problems=bench.take_problems(),
    )


def fanout_daphne(bench: Bench) -> Result:
    rows, answers = changes(bench, "fanout-daphne", "daphne", 1000)
    return Result(
        name="fanout-daphne",
        title="A stock change for 1,000 sockets on daphne",
        method="The same on daphne with 1,000 sockets.",
        rows=rows,
        goals=[Goal("last client ÷ W0", last_ratios(rows, "daphne"), "at most", 2, 1.5, "×")],
        notes=[f"The answer, median in ms: {show(answers)}."],
        problems=bench.take_problems(),
    )


def changes(
    bench: Bench, name: str, server: str, sockets: int
) -> tuple[dict[str, list[Run]], dict[str, list[float]]]:
    """Return the runs, and the medians of the answers."""
    answers: dict[str, list[float]] = {server: [], "one socket": []}
    rows = bench.take_turns(
        name,
        {
            server: lambda: change_run(bench, server, sockets, answers[server]),
            "one socket": lambda: change_run(bench, server, 1, answers["one socket"]),
            "W0: bare broadcast": lambda: bare_change_run(bench, sockets),
        },
    )
    return rows, answers


def change_run(bench: Bench, server: str, sockets: int, answers: list[float]) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot, server) as web:
        report = run_watchers(
            SocketPlan(
                web.port,
                socket_path(hot[0]),
                sockets,
                changes=CHANGES[bench.is_quick],
                post_path=reserve_path(hot[0]),
                first_user=FIRST_USER,
            )
        )
        web_mb = resident_mb(web.pid)
    answers.append(percentile(report.answers_ms, 50))
    check_sockets(bench, report, f"{sockets} sockets on {server}")
    return change_figures(report, web_mb)


def bare_change_run(bench: Bench, sockets: int) -> Run:
    with bench.stack.broadcast() as (server, control_port):
        report = run_watchers(
            SocketPlan(
                server.port,
                "/",
                sockets,
                changes=CHANGES[bench.is_quick],
                post_port=control_port,
                post_path="/1",
            )
        )
        web_mb = resident_mb(server.pid)
    check_sockets(bench, report, "bare broadcast")
    return change_figures(report, web_mb)


def change_figures(report: Report, web_mb: float) -> Run:
    return Run(
        p50_ms=percentile(report.last_ms, 50), p99_ms=percentile(report.last_ms, 99), web_mb=web_mb
    )


def last_ratios(rows: dict[str, list[Run]], server: str) -> list[float]:
    pairs = zip(rows[server], rows["W0: bare broadcast"], strict=True)
    return [(a.p50_ms or 0) / (b.p50_ms or 1) for a, b in pairs]


def show(values: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {statistics.median(v):.1f}" for name, v in values.items())


def socket_load(bench: Bench) -> Result:
    """The stock's age under load, and the reserve rate beside the sockets."""
    sockets, rate = 3000, 1000
    ages: list[float] = []
    ages_of_two: list[float] = []
    bare_ages: list[float] = []
    rows = bench.take_turns(
        "sockets-load",
        {
            f"{rate:,} reserves/s": lambda: age_run(bench, sockets, rate, ages),
            "the same, two processes": lambda: age_run(bench, sockets, rate, ages_of_two, 2),
            "W0: 20 frames/s, no sale": lambda: bare_age_run(bench, sockets, bare_ages),
            "closed loop": lambda: beside_run(bench, sockets),
            "closed loop without sockets": lambda: beside_run(bench, 0),
        },
    )
    return Result(
        name="sockets-load",
        title="3,000 sockets during a sale",
        method=(
            f"3,000 sockets watch one drop on one uvicorn process. In the first run {rate:,} "
            "reserves/s arrive in an open loop; the age of the stock that a client shows is the "
            "time since its commit, over all clients and moments. In the others reserves come in "
            "a closed loop over 128 connections, with the sockets and without."
        ),
        rows=rows,
        goals=[
            Goal("age of the stock shown, p99", ages, "at most", 150, 100, " ms"),
            Goal(
                "reserves beside 3,000 sockets ÷ without",
                ratios(rows, "closed loop", "closed loop without sockets"),
                "at least",
                0.6,
                0.8,
                "×",
            ),
        ],
        notes=[
            "The age of the stock shown, median in ms: with two processes "
            f"{show({'p99': ages_of_two})}; of W0's frames, one each 50 ms while nothing else "
            f"runs, {show({'p99': bare_ages})}."
        ],
        problems=bench.take_problems(),
    )


def age_run(bench: Bench, sockets: int, rate: int, ages: list[float], workers: int = 1) -> Run:
    hot = bench.stack.fresh()
    with (
        warm_web(bench, hot, workers=workers) as web,
        watching(SocketPlan(web.port, socket_path(hot[0]), sockets)) as clients,
    ):
        run, seen = watched_reserves(bench, web, hot, clients, rate, round(rate * bench.seconds))
    ages.append(seen.age_p99_ms)
    check_stock(bench, seen, hot[0])
    return run


def bare_age_run(bench: Bench, sockets: int, ages: list[float]) -> Run:
    with (
        bench.stack.broadcast() as (server, control_port),
        watching(SocketPlan(server.port, "/", sockets)) as clients,
    ):
        clients.begin()
        frames = round(bench.seconds / FRAME_SECONDS)
        run_client(Plan(control_port, "/1", 1, frames, FRAME_SECONDS, connections=1))
        wait_until_quiet(server)
        seen = clients.end()
    check_sockets(bench, seen, "bare broadcast")
    ages.append(seen.age_p99_ms)
    return Run(p50_ms=seen.delay_p50_ms, p99_ms=seen.delay_p99_ms)


def beside_run(bench: Bench, sockets: int) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot) as web:
        plan = SocketPlan(web.port, socket_path(hot[0]), sockets)
        with watching(plan) if sockets else nullcontext() as clients:
            if clients:
                clients.begin()
            usage = Usage(bench.stack, web)
            load = run_wrk(web.port, "reserve", bench.seconds, FIRST_USER, hot[0].drop_id)
            run = figures(load, load.count("201"), usage)
            if clients:
                check_stock(bench, clients.end(), hot[0])
    bench.check(load.unexpected("201"), "reserve beside sockets")
    return run


def deliveries(bench: Bench) -> Result:
    sockets, drops, frames = 1000, 4, 200
    rows = bench.take_turns(
        "deliveries",
        {
            "uvicorn": lambda: deliveries_run(bench, sockets, drops),
            "W0: bare broadcast": lambda: bare_deliveries_run(bench, sockets, frames),
        },
    )
    return Result(
        name="deliveries",
        title="Frames per second of one process",
        method=(
            f"{sockets:,} sockets watch {drops} drops on one uvicorn process, and each drop "
            "changes more often than it is shown: more than the process can send. W0 sends "
            f"{frames} frames to as many sockets in a loop. Per second: frames that arrived."
        ),
        rows=rows,
        goals=[
            Goal(
                "frames ÷ W0",
                ratios(rows, "uvicorn", "W0: bare broadcast"),
                "at least",
                0.4,
                0.7,
                "×",
            )
        ],
        problems=bench.take_problems(),
    )


def deliveries_run(bench: Bench, sockets: int, drops: int) -> Run:
    hot, rate = bench.stack.fresh(drops), 25 * drops
    with (
        warm_web(bench, hot) as web,
        watching(SocketPlan(web.port, "/ws/drops", sockets)) as clients,
    ):
        usage = Usage(bench.stack, web)
        count = round(rate * bench.seconds)
        _, seen = watched_reserves(bench, web, hot, clients, rate, count)
        return delivery_figures(seen, usage)


def bare_deliveries_run(bench: Bench, sockets: int, frames: int) -> Run:
    with (
        bench.stack.broadcast() as (server, control_port),
        watching(SocketPlan(server.port, "/", sockets)) as clients,
    ):
        usage = Usage(bench.stack, server)
        clients.begin()
        run_client(Plan(control_port, f"/{frames}", 1, 1, 0, connections=1))
        wait_until_quiet(server)
        seen = clients.end()
        check_sockets(bench, seen, "bare broadcast")
        return delivery_figures(seen, usage)


def wait_until_quiet(server: WebServer) -> None:
    """Return when the server has sent what it has to send."""
    before, now = -1.0, cpu_seconds(server.pid)
    while now > before:
        time.sleep(0.5)
        before, now = now, cpu_seconds(server.pid)


def delivery_figures(seen: Report, usage: Usage) -> Run:
    return Run(
        per_second=seen.frames / max(0.001, seen.seconds),
        p50_ms=seen.delay_p50_ms,
        p99_ms=seen.delay_p99_ms,
        web_cpu_ms=usage.web_seconds * 1000 / max(1, seen.frames),
        web_mb=usage.web_mb,
    )


def idle_sockets(bench: Bench) -> Result:
    sockets = 3000
    kib: list[float] = []
    rows = bench.take_turns("idle-sockets", {"uvicorn": lambda: idle_run(bench, sockets, kib)})
    return Result(
        name="idle-sockets",
        title="Memory of idle sockets",
        method=(
            f"What the resident memory of one uvicorn process grows by when {sockets:,} sockets "
            "connect to one drop, by their number."
        ),
        rows=rows,
        goals=[Goal("memory per idle socket", kib, "at most", 40, 25, " KiB")],
        problems=bench.take_problems(),
    )


def idle_run(bench: Bench, sockets: int, kib: list[float]) -> Run:
    hot = bench.stack.fresh()
    with warm_web(bench, hot) as web:
        plan = SocketPlan(web.port, socket_path(hot[0]), sockets)
        # What the first sockets need once is not what each costs.
        with watching(replace(plan, sockets=10)):
            time.sleep(SETTLE_SECONDS)
        before = resident_mb(web.pid)
        with watching(plan):
            time.sleep(SETTLE_SECONDS)
            after = resident_mb(web.pid)
    kib.append((after - before) * 1024 / sockets)
    return Run(web_mb=after)


def reconnects(bench: Bench) -> Result:
    sockets, changes, rate = 500, 400 if bench.is_quick else 2000, 200
    gaps: list[float] = []
    repeats: list[float] = []
    catch_ups: list[float] = []

    def run() -> Run:
        hot = bench.stack.fresh()
        with warm_web(bench, hot) as web:
            plan = SocketPlan(web.port, socket_path(hot[0]), sockets, cut_each_second=0.2)
            with watching(plan) as clients:
                run, seen = watched_reserves(bench, web, hot, clients, rate, changes)
        gaps.append(seen.gaps)
        repeats.append(seen.repeats)
        catch_ups.append(percentile(seen.catch_ups_ms, 95))
        check_stock(bench, seen, hot[0])
        return run

    rows = bench.take_turns("reconnects", {"uvicorn": run})
    return Result(
        name="reconnects",
        title="Clients that are cut off",
        method=(
            f"{sockets} sockets watch one drop on one uvicorn process. A fifth of them is cut off "
            "each second, without a closing frame, and resumes with `?since=` a quarter to three "
            f"quarters of a second later, during {changes:,} reserves at {rate}/s. Missed is a "
            "frame that does not join on to the one before, twice is one that a client had. "
            "Catching up counts from the new connection until the client has the event that was "
            "the newest then."
        ),
        rows=rows,
        goals=[
            Goal("missed", gaps, "exactly", 0),
            Goal("sent twice", repeats, "exactly", 0),
            Goal("catching up, p95", catch_ups, "at most", 1000, None, " ms"),
        ],
        problems=bench.take_problems(),
    )


def unread(bench: Bench) -> Result:
    sockets, events, rate, drops = 100, 2000 if bench.is_quick else 10_000, 1000, 10
    with_them = "five that never read"

    def run(never_read: int) -> Run:
        hot = bench.stack.fresh(drops)
        with warm_web(bench, hot) as web:
            plan = SocketPlan(web.port, "/ws/drops", sockets, unread=never_read)
            with watching(plan) as clients:
                usage = Usage(bench.stack, web)
                _, seen = watched_reserves(bench, web, hot, clients, rate, events)
                return delivery_figures(seen, usage)

    rows = bench.take_turns("unread", {"all read": lambda: run(0), with_them: lambda: run(5)})
    pairs = list(zip(rows[with_them], rows["all read"], strict=True))
    return Result(
        name="unread",
        title="Clients that never read",
        method=(
            f"{sockets} sockets watch {drops} drops on one uvicorn process during {events:,} "
            f"reserves at {rate:,}/s, with five more that never read a byte, and without. "
            "Latency counts from the commit to the clients that read."
        ),
        rows=rows,
        goals=[
            Goal(
                "memory, with − without",
                [(a.web_mb or 0) - (b.web_mb or 0) for a, b in pairs],
                "at most",
                20,
                unit=" MB",
            ),
            Goal(
                "p99 of the others ÷ without",
                [(a.p99_ms or 0) / (b.p99_ms or 1) for a, b in pairs],
                "at most",
                1.2,
                unit="×",
            ),
        ],
        problems=bench.take_problems(),
    )


def expiry_sockets(bench: Bench) -> Result:
    sockets, holds = 1000, 10_000
    seconds: list[float] = []

    def run() -> Run:
        (hot,) = bench.stack.fresh()
        with (
            warm_web(bench, [hot]) as web,
            bench.stack.expiry_loop(),
            watching(SocketPlan(web.port, socket_path(hot), sockets)) as clients,
        ):
            clients.begin()
            due = time.time() + 3
            hold(bench.stack, hot, FIRST_USER, holds, due)
            time.sleep(max(0.0, due - time.time()) + 4)
            seen = clients.end()
            seconds.append(seen.settled - due)
            check_stock(bench, seen, hot)
            return Run(p50_ms=seen.delay_p50_ms, p99_ms=seen.delay_p99_ms)

    rows = bench.take_turns("expiry-sockets", {"uvicorn": run})
    return Result(
        name="expiry-sockets",
        title="10,000 holds that end at once, before 1,000 sockets",
        method=(
            f"{holds:,} holds of one drop with the same deadline, one expiry loop, one uvicorn "
            f"process, {sockets:,} sockets. The time counts from the deadline until the last "
            "client's stock has its final value."
        ),
        rows=rows,
        goals=[Goal("everybody's stock is right", seconds, "at most", 2, None, " s")],
        problems=bench.take_problems(),
    )


def watched_reserves(
    bench: Bench, web: WebServer, hot: Sequence[Hot], clients: Watching, rate: float, count: int
) -> tuple[Run, Report]:
    """Let ``count`` users reserve, on each drop in turn, while the clients take figures."""
    first, *others = map(reserve_path, hot)
    plan = Plan(
        web.port,
        first,
        first_user=FIRST_USER,
        count=count,
        interval_seconds=1 / rate,
        other_paths=tuple(others),
    )
    usage = Usage(bench.stack, web)
    clients.begin()
    report = run_client(plan)
    run = client_figures(report, usage)
    seen = clients.end()
    check_report(bench, report, "201")
    check_sockets(bench, seen, "sockets")
    return run, seen


def check_sockets(bench: Bench, report: Report, what: str) -> None:
    bench.problems += [f"{what}: {problem}" for problem in report.problems]


def check_stock(bench: Bench, report: Report, hot: Hot) -> None:
    """Compare what the clients show in the end with the drop's row."""
    query = "SELECT available_stock, seq FROM drops_drop WHERE id = %(id)s"
    ((stock, seq),) = bench.stack.execute(query, id=hot.drop_id)
    if set(report.stocks) != {stock} or set(report.seqs) != {seq}:
        bench.problems.append(
            f"the clients show {report.stocks} at {report.seqs}, the drop has {stock} at {seq}"
        )


def socket_path(hot: Hot) -> str:
    return f"/ws/drops/{hot.drop_id}"


def reserve_path(hot: Hot) -> str:
    return f"/api/drops/{hot.drop_id}/reserve"


SOCKET_SCENARIOS: dict[str, Callable[[Bench], Result]] = {
    "fanout": fanout,
    "fanout-daphne": fanout_daphne,
    "sockets-load": socket_load,
    "deliveries": deliveries,
    "idle-sockets": idle_sockets,
    "reconnects": reconnects,
    "unread": unread,
    "expiry-sockets": expiry_sockets,
}
