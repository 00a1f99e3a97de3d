"""What a sale needs: ``python -m benchmarks.capacity --users 100000 --drops 5 --seconds 60``.

Plain arithmetic on what ``python -m benchmarks.scaling`` measured; docs/scaling.md has it in words.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Written by ``python -m benchmarks.scaling``.
COSTS = Path(__file__).with_name("costs.json")

# A core that is busier than this makes everybody wait.
BUSY = 0.6
# Two of each, so that one may die.
FEWEST_PROCESSES = 2
EXPIRY_LOOPS = 2
POOL_SIZE = 12
SOCKETS_PER_PROCESS = 5000
# The hub sends a socket up to twenty of one drop; to a crowd it comes round more seldom.
MOST_FRAMES_PER_SECOND = 10
PAYING = 0.6


@dataclass(frozen=True)
class Costs:
    """What one of each takes; CPU in ms of one core, sizes in bytes with indexes."""

    reserve_web_ms: float
    reserve_postgres_ms: float
    reserve_redis_ms: float
    purchase_web_ms: float
    purchase_postgres_ms: float
    refusal_web_ms: float
    refusal_postgres_ms: float
    list_web_ms: float
    list_postgres_ms: float
    frame_web_ms: float
    # What one drop gave at most, on one process.
    drop_reserves_per_second: float
    reservation_bytes: float
    purchase_bytes: float
    event_bytes: float
    wal_bytes_per_reserve: float
    redis_bytes_per_signature: float
    socket_kib: float
    process_mb: float

    @classmethod
    def read(cls, path: Path = COSTS) -> "Costs":
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path = COSTS) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True)
class Sale:
    """``users`` who all come within ``seconds``, evenly over ``drops``.

    Each reads the list once, keeps a socket to one drop and asks once for one unit; those who
    get one purchase with the chance ``paying``. Each drop's requests go to one process.
    """

    users: int
    drops: int
    seconds: float
    stock: int
    paying: float = PAYING


@dataclass(frozen=True)
class Needs:
    web_cores: float
    postgres_cores: float
    processes: int
    connections: int
    web_gb: float
    disk_mb: float
    wal_mb_per_second: float
    redis_mb: float
    # The part of its ceiling that each drop is asked for; above 1 the sale takes that much longer.
    lock_busy: float
    # What the number of processes comes from.
    processes_for: str


def needs_of(sale: Sale, costs: Costs) -> Needs:
    """Return what keeps every core below ``BUSY`` for the time of the sale."""
    reserves = min(sale.stock, sale.users)
    refusals = sale.users - reserves
    purchases = reserves * sale.paying
    events_per_second = (reserves + 2 * purchases) / sale.drops / sale.seconds
    frames = sale.users * min(events_per_second, MOST_FRAMES_PER_SECOND) * sale.seconds
    web_ms = (
        reserves * costs.reserve_web_ms
        + refusals * costs.refusal_web_ms
        + purchases * costs.purchase_web_ms
        + sale.users * costs.list_web_ms
        + frames * costs.frame_web_ms
    )
    postgres_ms = (
        reserves * costs.reserve_postgres_ms
        + refusals * costs.refusal_postgres_ms
        + purchases * costs.purchase_postgres_ms
        + sale.users * costs.list_postgres_ms
    )
    web_cores = web_ms / 1000 / sale.seconds
    postgres_cores = postgres_ms / 1000 / sale.seconds
    for_cpu = math.ceil(web_cores / BUSY)
    for_sockets = math.ceil(sale.users / SOCKETS_PER_PROCESS)
    processes = max(FEWEST_PROCESSES, for_cpu, for_sockets)
    reasons = {
        "the spare": FEWEST_PROCESSES,
        "sockets": for_sockets,
        "CPU": for_cpu,
    }
    return Needs(
        web_cores=web_cores,
        postgres_cores=postgres_cores,
        processes=processes,
        connections=processes * POOL_SIZE + EXPIRY_LOOPS,
        web_gb=(processes * costs.process_mb + sale.users * costs.socket_kib / 1024) / 1024,
        disk_mb=(
            reserves * costs.reservation_bytes
            + purchases * costs.purchase_bytes
            + (reserves + 2 * purchases) * costs.event_bytes
        )
        / 1e6,
        wal_mb_per_second=(reserves + purchases) * costs.wal_bytes_per_reserve / 1e6 / sale.seconds,
        redis_mb=(sale.users + purchases) * costs.redis_bytes_per_signature / 1e6,
        lock_busy=reserves / sale.drops / sale.seconds / costs.drop_reserves_per_second,
        processes_for=max(reasons, key=lambda reason: reasons[reason]),
    )


# What docs/scaling-figures.md shows.
EXAMPLES = {
    "a shop": Sale(5_000, 1, 60, 500),
    "a release": Sale(50_000, 5, 60, 5_000),
    "a minute of fame": Sale(200_000, 1, 60, 10_000),
    "everything in ten seconds": Sale(50_000, 1, 10, 50_000),
    "a department store": Sale(200_000, 20, 300, 100_000),
}


def table(sales: Mapping[str, Sale], costs: Costs) -> str:
    """Return the needs of ``sales`` as a table in Markdown."""
    head = [
        *("sale", "users", "drops", "s", "stock", "web cores", "processes", "because of"),
        *("connections", "PostgreSQL cores", "web GB", "disk MB", "WAL MB/s", "Redis MB"),
        "drop's lock",
    ]
    lines = [head, ["---"] * len(head)]
    for name, sale in sales.items():
        needs = needs_of(sale, costs)
        lines.append(
            [
                name,
                f"{sale.users:,}",
                f"{sale.drops}",
                f"{sale.seconds:g}",
                f"{sale.stock:,}",
                f"{needs.web_cores:.1f}",
                f"{needs.processes}",
                needs.processes_for,
                f"{needs.connections}",
                f"{needs.postgres_cores:.2f}",
                f"{needs.web_gb:.1f}",
                f"{needs.disk_mb:.0f}",
                f"{needs.wal_mb_per_second:.1f}",
                f"{needs.redis_mb:.0f}",
                f"{needs.lock_busy:.0%}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity",
        description="Tell what a sale needs, by what python -m benchmarks.scaling measured.",
    )
    parser.add_argument("--users", type=int, required=True, metavar="N")
    parser.add_argument("--drops", type=int, default=1, metavar="N")
    parser.add_argument(
        "--seconds", type=float, required=True, metavar="N", help="within which all users come"
    )
    parser.add_argument("--stock", type=int, metavar="N", help="of all drops; default: users / 10")
    parser.add_argument("--paying", type=float, default=PAYING, metavar="PART")
    options = parser.parse_args(arguments)
    if min(options.users, options.drops, options.seconds) <= 0:
        parser.error("--users, --drops and --seconds must be more than 0.")
    stock = options.users // 10 if options.stock is None else options.stock
    sale = Sale(options.users, options.drops, options.seconds, stock, options.paying)
    print(table({"this": sale}, Costs.read()))


if __name__ == "__main__":
    main()
