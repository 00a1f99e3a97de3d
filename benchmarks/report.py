"""Write the results as Markdown."""

import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.results import Goal, Result, Run

# Written by hand: why a figure can't be reached here, and what the limit is.
LIMITS = Path(__file__).with_name("limits.md")
METHOD = """
One command, `python -m benchmarks`, starts a PostgreSQL and a Valkey of its own, creates the
users, runs each scenario and throws everything away. The application runs as in production
(`DEBUG=false`, durable commits, `HOT_ROUTES` on), with the command lines of `manage.py up`, except
that holds last an hour, so that none ends in the middle of a run. PostgreSQL reuses the WAL files
that the users' insertion left (`min_wal_size`), like one that has run for a while. **The load
generator runs on the same cores as the servers.**

Machines differ, so the figures to look at are the **ratios**. The runs of a ratio take turns, in
alternating order; each has empty tables, a fresh server and a second of warm-up. A ratio is taken
repeat by repeat; what counts is the median, and the smallest and largest stand beside it.

- **H0** is an ASGI callable that does nothing but answer, with as many bytes of body, on the same
  server, with the same requests and connections: the most that the server can give.
- **L1** is pgbench with one reservation per transaction, each a single statement that updates the
  drop's and the variant's counters and inserts the reservation and its event into the same tables
  with the same indexes: prepared, over the unix socket, the best of 1, 4, 16 and 64 clients. It
  checks less than the application: neither the drop's window nor what the user has already.
- **W0** is a bare broadcast server of the library `websockets`: it sends a frame of the same size
  to the same clients, and does nothing else. All sockets are in one client process with one epoll
  loop, which also sends the requests, so that both ends of a time are of one clock.
- Closed loops are wrk with one thread; their latency is what wrk saw. Open loops are a client of
  ours that counts from the moment at which a request was due, so a stall of the server shows.
- CPU is user and system time by `/proc`, of the web server with all its workers, and of PostgreSQL
  with all its backends, per success. Memory is the web server's resident memory after the run.
- Stolen is what the hypervisor gave to other machines of the CPU time that was wanted during a run,
  start and warm-up included. With a third of it stolen, times are no property of the software.
- After each run the stock audit (`manage.py audit_stock`) must find nothing, all answers must have
  the expected status, and the tables must hold as many rows as were confirmed.
"""


def to_markdown(results: Sequence[Result], machine: dict[str, str]) -> str:
    """Return the whole report."""
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks`; don't edit. See `benchmarks/`.",
        "## Goals",
        _goals([(result.title, goal) for result in results for goal in result.goals]),
        _problems([problem for result in results for problem in result.problems]),
        "## Machine",
        markdown_table(["", ""], [[name, value] for name, value in machine.items()]),
        "## Method",
        METHOD.strip(),
        *(_scenario(result) for result in results),
    ]
    if LIMITS.exists():
        parts.append(LIMITS.read_text().strip())
    return "\n\n".join(parts) + "\n"


def to_json(results: Sequence[Result], machine: dict[str, str]) -> str:
    data = {"machine": machine, "results": [asdict(result) for result in results]}
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str) -> list[Result]:
    return [Result.from_json(result) for result in json.loads(text)["results"]]


def verdict(goal: Goal) -> str:
    if not goal.is_met:
        return "**not met**"
    if goal.stretch is None:
        return "met"
    return "met, and the stretch" if goal.is_stretched else "met"


def figure(value: float | None, unit: str = "") -> str:
    """Return ``value`` with three significant digits; whole from a hundred on."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}{unit}"
    if math.isnan(value):
        return "none"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 3)}f}{unit}"


def _goals(goals: Sequence[tuple[str, Goal]]) -> str:
    sign = {"at least": "≥ ", "at most": "≤ ", "exactly": ""}
    return markdown_table(
        ["scenario", "figure", "median", "min to max", "goal", "stretch", ""],
        [
            [
                title,
                goal.title,
                f"**{figure(goal.median, goal.unit)}**",
                f"{figure(min(goal.values))} to {figure(max(goal.values))}",
                f"{sign[goal.rule]}{goal.goal:g}{goal.unit}",
                "–" if goal.stretch is None else f"{sign[goal.rule]}{goal.stretch:g}{goal.unit}",
                verdict(goal),
            ]
            for title, goal in goals
        ],
    )


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return "Every stock audit found nothing, every answer was as expected."
    return "**Something was wrong:**\n\n" + "\n".join(f"- {problem}" for problem in problems)


def _scenario(result: Result) -> str:
    parts = [
        f"## {result.title}",
        textwrap.fill(result.method, 100),
        runs_table(result.rows),
        "\n".join(
            f"- {goal.title}: **{figure(goal.median, goal.unit)}** "
            f"({figure(min(goal.values))} to {figure(max(goal.values))}), {verdict(goal)}."
            for goal in result.goals
        ),
        *(textwrap.fill(note, 100) for note in result.notes),
        *([f"Measured: {result.conditions}."] if result.conditions else []),
    ]
    return "\n\n".join(parts)


COLUMNS: dict[str, Callable[[Run], float | None]] = {
    "per second": lambda run: run.per_second,
    "p50 ms": lambda run: run.p50_ms,
    "p99 ms": lambda run: run.p99_ms,
    "p99.9 ms": lambda run: run.p999_ms,
    "web CPU ms": lambda run: run.web_cpu_ms,
    "PostgreSQL CPU ms": lambda run: run.postgres_cpu_ms,
    "web MB": lambda run: run.web_mb,
    "stolen %": lambda run: run.stolen_percent,
}


def runs_table(
    rows: dict[str, list[Run]],
    columns: dict[str, Callable[[Run], float | None]] = COLUMNS,
) -> str:
    """Return the medians of each kind of run; of the throughput also the smallest and largest."""
    lines = []
    for name, runs in rows.items():
        line = [name]
        for column, read in columns.items():
            values = [value for value in map(read, runs) if value is not None]
            text = figure(statistics.median(values)) if values else "–"
            if column == "per second" and len(values) > 1:
                text += f" ({figure(min(values))} to {figure(max(values))})"
            line.append(text)
        lines.append(line)
    return markdown_table(["run", *columns], lines)


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
