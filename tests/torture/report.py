"""docs/RELIABILITY.md, written by the runs that it reports, and beside it the same as JSON."""

import json
from dataclasses import asdict
from typing import Any

from benchmarks.stack import BASE_DIR
from tests.torture.run import Result

REPORT = BASE_DIR / "docs" / "RELIABILITY.md"
DATA = REPORT.with_suffix(".json")

# What a run began with and on which machine, by name.
Conditions = dict[str, str]

HEAD = """# Reliability: what was tried, and what happened

Written by `python -m tests.torture`; every figure is of a run described at the end. What is
promised, and on which conditions, is in [guarantees.md](guarantees.md).

**{verdict}** {operations:,} operations and {faults:,} faults: {lost} confirmed answers lost,
{doubled} doubled, {oversold} units oversold; the longest recovery took {recovery}.

| Scenario | Operations | Faults | Recovery | Lost | Doubled | Oversold | Seconds | |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |
"""

NOTES = """
- *Operations* are answers that were confirmed to a customer and looked up afterwards; for the model
  its steps, for interleavings the orders played, for negative controls the mutants.
- *Faults* are kills, restarts and the like. *Recovery* is the longest time from a fault's end until
  every server confirmed something again, without a restart; where processes are killed, the
  longest time in which nobody was served; for expiry, how late the last unit was back.
- After each scenario all customers have an answer to every request, `audit_stock` has found nothing
  in the books, and PostgreSQL has counted no deadlock.
- During faults servers may answer 503 or 429 with `Retry-After`, or not at all; anything else is a
  failure of the run. While Redis is away, not even those.
"""


def write(results: list[Result], conditions: Conditions) -> None:
    """Write a report of this run alone."""
    _write(results, [conditions])


def write_again(results: list[Result], conditions: Conditions) -> None:
    """Replace these scenarios in the report, which then says of each which run it is of."""
    data: dict[str, Any] = json.loads(DATA.read_text())
    known = {found["name"]: Result(**found) for found in data["results"]}
    for result in results:
        result.run = len(data["runs"])
        known[result.name] = result
    _write(list(known.values()), [*data["runs"], conditions])


def _write(results: list[Result], runs: list[Conditions]) -> None:
    used = sorted({result.run for result in results})
    for result in results:
        result.run = used.index(result.run)
    runs = [runs[number] for number in used]
    data = {"runs": runs, "results": [asdict(result) for result in results]}
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    REPORT.write_text(to_markdown(results, runs))


def to_markdown(results: list[Result], runs: list[Conditions]) -> str:
    problems = [f"{result.name}: {text}" for result in results for text in problems_of(result)]
    recoveries = [r.recovery_seconds for r in results if r.recovery_seconds is not None]
    lines = [
        HEAD.format(
            verdict="Everything held." if not problems else "Something did not hold.",
            operations=sum(result.operations for result in results),
            faults=sum(result.faults for result in results),
            lost=sum(result.lost for result in results),
            doubled=sum(result.doubled for result in results),
            oversold=sum(result.oversold for result in results),
            recovery=f"{max(recoveries, default=0.0):.1f} s",
        ).rstrip("\n")
    ]
    lines += [row(result) for result in results]
    if problems:
        lines += ["", "## What did not hold", "", *(f"- {text}" for text in problems)]
    lines += [NOTES, "## What was done", ""]
    for result in results:
        lines.append(f"- **{result.name}.** {result.what}")
        lines += [f"  - {fact}" for fact in result.facts]
    for number, conditions in enumerate(runs):
        names = [result.name for result in results if result.run == number]
        title = "## The run" if len(runs) == 1 else f"## Run {number + 1}: {of_all(names, results)}"
        lines += ["", title, "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in conditions.items()]
    return "\n".join(lines) + "\n"


def of_all(names: list[str], results: list[Result]) -> str:
    """Say which scenarios a run's are: the few, or the others."""
    return ", ".join(names) if len(names) <= len(results) / 2 else "the others"


def row(result: Result) -> str:
    recovery = "" if result.recovery_seconds is None else f"{result.recovery_seconds:.1f} s"
    cells = [
        result.name,
        f"{result.operations:,}",
        f"{result.faults:,}",
        recovery,
        result.lost,
        result.doubled,
        result.oversold,
        f"{result.seconds:.0f}",
        "held" if result.is_good else "**did not hold**",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def problems_of(result: Result) -> list[str]:
    counts = {"lost": result.lost, "doubled": result.doubled, "oversold": result.oversold}
    return [f"{count} {name}" for name, count in counts.items() if count] + result.problems
