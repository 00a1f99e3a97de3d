"""docs/RELIABILITY.md, written by the run that it reports."""

from benchmarks.stack import BASE_DIR
from tests.torture.run import Result

REPORT = BASE_DIR / "docs" / "RELIABILITY.md"

HEAD = """# Reliability: what was tried, and what happened

Written by `python -m tests.torture`; every figure is of the run described at the end. What is
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


def to_markdown(results: list[Result], conditions: dict[str, str]) -> str:
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
    lines += ["", "## The run", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in conditions.items()]
    return "\n".join(lines) + "\n"


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
