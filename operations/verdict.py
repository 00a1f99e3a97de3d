"""Compare what shoppers saw with what the database has, and say whether that will do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from operations.rehearsals import Rows
from operations.shoppers import Plan, Seen
from purchases.audit import Audit
from purchases.models import PurchaseStatus

# What a shopper may be told. 429 and 503 count where somebody never got another answer.
EXPECTED = {200, 201, 409, 429, 503}
# From these parts of the time on, something was too busy to tell what lies behind it.
BUSY_CORE = 0.85
BUSY_MACHINE = 0.9


@dataclass(frozen=True)
class Limits:
    """What still counts as ready, in ms."""

    p99_ms: float = 1000.0
    event_p99_ms: float = 1000.0


@dataclass(frozen=True)
class Check:
    """One condition of being ready; ``limit`` is the largest value that meets it."""

    name: str
    found: float
    limit: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        return self.found <= self.limit


@dataclass(frozen=True)
class Verdict:
    checks: list[Check]
    limited_by: list[str]
    figures: dict[str, Any]

    @property
    def is_ready(self) -> bool:
        return all(check.is_met for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "ready": self.is_ready,
            "checks": [
                {
                    "name": check.name,
                    "found": round(check.found, 1),
                    "limit": check.limit,
                    "met": check.is_met,
                }
                for check in self.checks
            ],
            "limited_by": self.limited_by,
            **self.figures,
        }


def judge(plan: Plan, seen: Seen, rows: Rows, audit: Audit, limits: Limits) -> Verdict:
    return Verdict(
        [*truth_checks(plan, seen, rows, audit), *speed_checks(seen, limits)],
        limited_by(seen),
        figures(seen, rows),
    )


def truth_checks(plan: Plan, seen: Seen, rows: Rows, audit: Audit) -> list[Check]:
    """Return what must hold however slow everything is."""
    total, drop = rows.drop.total_stock, rows.drop
    lost = set(seen.reservations) - set(rows.reservations)
    lost |= {pk for pk in seen.purchases if rows.purchases.get(pk) != PurchaseStatus.PAID}
    # Of a drop that says what it is, and of the answers that were given.
    promised = max(rows.sold + rows.held, len(seen.purchases))
    wrong = [w for w in seen.watchers if w.is_open and w.stock != drop.available_stock]
    could_hold = min(total, len(plan.users))
    return [
        Check("units sold or held beyond the stock", max(0, promised - total), 0),
        Check("confirmed, but not in the database", len(lost), 0),
        Check("differences found by the audit", len(audit.differences), 0),
        Check("units that nobody was given", max(0, could_hold - len(seen.reservations)), 0),
        Check("holds not returned after their time", rows.held, 0),
        Check("watchers that end with a wrong stock", len(wrong), 0),
        Check("watchers that were cut off", sum(not w.is_open for w in seen.watchers), 0),
        Check("frames that did not join on", sum(w.gaps for w in seen.watchers), 0),
        Check("errors of the server", count_errors(seen), 0),
        Check("answers that make no sense", count_unexpected(seen), 0),
        Check("requests given up on", seen.unanswered, 0),
        Check("shoppers whom the rehearsal's end cut short", len(plan.users) - seen.done, 0),
    ]


def speed_checks(seen: Seen, limits: Limits) -> list[Check]:
    """Return the limits of time; of what never happened there is none."""
    checks = [
        Check(f"{kind}, p99", percentile(seen.latencies[kind], 99), limits.p99_ms, "ms")
        for kind in ("reserve", "purchase")
        if seen.latencies.get(kind)
    ]
    if seen.delays:
        delay = percentile(seen.delays, 99)
        checks.append(Check("event to watcher, p99", delay, limits.event_p99_ms, "ms"))
    return checks


def count_errors(seen: Seen) -> int:
    return sum(n for status, n in seen.statuses.items() if status >= 500 and status != 503)


def count_unexpected(seen: Seen) -> int:
    return sum(n for status, n in seen.statuses.items() if status < 500 and status not in EXPECTED)


def limited_by(seen: Seen) -> list[str]:
    """Say what was at its limit, as far as that was measured, this command first of all."""
    own, machine = seen.strain.between(seen.began, seen.rush_over)
    found = []
    if own >= BUSY_CORE:
        found.append(
            f"This command itself: it used {own:.0%} of a core in the rush, so part of the "
            "times is its own. Rehearse from a second machine, or with fewer users."
        )
    if seen.statuses[429]:
        found.append(
            f"Rate limits: {seen.statuses[429]} answers were 429. All shoppers come from one "
            "address here; see docs/rehearsal.md for how to let it through."
        )
    if seen.statuses[503]:
        found.append(
            f"The queue: {seen.statuses[503]} answers were 503, more came than the database "
            "settled in time."
        )
    if seen.lost_connections:
        found.append(
            f"Connections: {seen.lost_connections} requests got no answer (limits of open files "
            "or connections, at the proxy or the server, or a process that ended)."
        )
    if machine is not None and machine >= BUSY_MACHINE:
        found.append(
            f"This machine: its cores were {machine:.0%} busy in the rush, this command's part "
            f"being {own:.0%} of one core."
        )
    return found or [
        "Nothing that is measured here: neither this machine, nor refusals, nor connections. "
        "The claims of one drop are settled one transaction after the other."
    ]


def figures(seen: Seen, rows: Rows) -> dict[str, Any]:
    own, machine = seen.strain.between(seen.began, seen.rush_over)
    return {
        "shoppers": seen.arrived,
        "rush_seconds": round(seen.rush_seconds, 2),
        "claims_per_second": round(seen.rush_answers / seen.rush_seconds),
        "confirmed": {
            "reservations": len(seen.reservations),
            "purchases": len(seen.purchases),
        },
        "stored": {"reservations": len(rows.reservations), "purchases": len(rows.purchases)},
        "stock": {
            "total": rows.drop.total_stock,
            "sold": rows.sold,
            "held": rows.held,
            "available": rows.drop.available_stock,
        },
        "requests": {
            kind: {
                "outcomes": dict(seen.outcomes[kind].most_common()),
                **spread(seen.latencies.get(kind, [])),
            }
            for kind in ("open", "reserve", "purchase")
            if seen.outcomes.get(kind)
        },
        "watchers": len(seen.watchers),
        "watcher_problems": sorted({w.problem for w in seen.watchers if w.problem}),
        "events": {"frames": len(seen.delays), **spread(seen.delays)},
        "load_generator_core": round(own, 2),
        "machine_busy": machine if machine is None else round(machine, 2),
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return p50, p99 and the largest value in ms, None where there are none."""
    if not values:
        return {"p50_ms": None, "p99_ms": None, "max_ms": None}
    return {
        "p50_ms": round(percentile(values, 50), 1),
        "p99_ms": round(percentile(values, 99), 1),
        "max_ms": round(max(values), 1),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile of at least one value."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
