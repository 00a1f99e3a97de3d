"""One function per scenario of the table in docs/benchmarks.md; each returns a ``Result``.

The runs that a ratio compares take turns, forwards in one repeat and backwards in the next,
so that a change of the machine's mood hits all of them.
"""

import math
import statistics
from collections.abc import Callable, Collection, Sequence

from benchmarks.client import Report, percentile
from benchmarks.pages import PURCHASES, admin, shop
from benchmarks.results import Goal, Result, Run, ratios
from benchmarks.runs import (
    FIRST_USER,
    Bench,
    expiry_run,
    herd_run,
    list_run,
    million_run,
    noop_open_loop_run,
    noop_run,
    open_loop_run,
    pairs_run,
    pgbench_run,
    reserve_run,
    sold_out_run,
    summary,
)
from benchmarks.sockets import SOCKET_SCENARIOS

PGBENCH_CLIENTS = (1, 4, 16, 64)
MILLION = {False: 1_000_000, True: 50_000}  # by whether it must be quick
USERS_PER_SECOND = 20_000  # more than any run needs


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


def rate_limits(bench: Bench) -> Result:
    # All of wrk comes from one address, which stands for thousands of customers' addresses: it
    # is counted with each request, as theirs are, but never reaches what has to be shared.
    limited = {"RATE_LIMIT_RESERVE_PER_ADDRESS": "100000000/minute"}
    unlimited = {"RATE_LIMIT_RESERVE": "off", "RATE_LIMIT_RESERVE_PER_ADDRESS": "off"}
    rows = bench.take_turns(
        "rate-limits",
        {
            "limits per user and address": lambda: reserve_run(bench, environment=limited),
            "no limits": lambda: reserve_run(bench, environment=unlimited),
        },
    )
    return Result(
        name="rate-limits",
        title="The cost of rate limits",
        method=(
            "The first scenario with the limits of production for each user and address, and "
            "without any. Nobody is refused."
        ),
        rows=rows,
        goals=[
            Goal(
                "limited ÷ unlimited",
                ratios(rows, "limits per user and address", "no limits"),
                "at least",
                0.95,
                unit="×",
            )
        ],
        problems=bench.take_problems(),
    )


def sold_out(bench: Bench) -> Result:
    queries: list[float] = []
    health_checks: list[float] = []
    rows = bench.take_turns(
        "sold-out",
        {
            "refusals": lambda: sold_out_run(bench, queries, health_checks),
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
        notes=[f"Health checks of the connection pool: {spread(health_checks)} per second."],
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
            "H0: no-op, the same open loop": lambda: noop_open_loop_run(bench, rates[-1] / 2),
        },
    )
    p99 = [run.p99_ms or math.nan for run in rows["open loop at half of it"]]
    return Result(
        name="open-loop",
        title="Latency at half the ceiling",
        method=(
            "Reserves on one drop at half the rate of the closed loop just before, evenly "
            "spaced, over 128 connections; latency counts from the moment a request was due. H0's "
            "says how late the machine itself is: it does nothing."
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
            "to the last answer. In one row the connections are open already, in the other each "
            "is made within the same 100 ms."
        ),
        rows=rows,
        goals=[
            Goal("winners", winners, "exactly", stock),
            Goal("everybody answered", seconds, "at most", 2, 1, " s"),
            Goal("everybody answered, connections new", cold, "at most", 2, 1, " s"),
        ],
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
    steps = ", ".join(f"{count / 1000:g}k: {mb:.0f}" for count, mb in samples)
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
    "rate-limits": rate_limits,
    "sold-out": sold_out,
    "list": drop_list,
    "open-loop": open_loop,
    "herd": herd,
    "zipf": zipf,
    "expiry": expiry,
    "million": million,
    **SOCKET_SCENARIOS,
    "shop": shop,
    "admin": admin,
}


def users_needed(names: Collection[str], seconds: float, is_quick: bool) -> int:
    """Return how many users the longest of the runs of these scenarios needs."""
    needed = FIRST_USER + round(seconds * USERS_PER_SECOND)
    if "expiry" in names and not is_quick:
        needed = max(needed, FIRST_USER + 110_000)
    if "admin" in names:
        needed = max(needed, FIRST_USER + PURCHASES[is_quick])
    if "million" in names:
        needed = max(needed, MILLION[is_quick] + 50_000)
    return needed


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
