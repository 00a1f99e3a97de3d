"""How a rehearsal looks on a terminal: while it goes on, and its verdict."""

from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from operations.shoppers import Plan, Seen
from operations.verdict import Check, Verdict

BAR_WIDTH = 30


class Progress:
    """The rehearsal at this moment, drawn anew at each refresh."""

    def __init__(self, plan: Plan, seen: Seen) -> None:
        self.plan = plan
        self.seen = seen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seen, users = self.seen, len(self.plan.users)
        watching = sum(watcher.is_open for watcher in seen.watchers)
        stock = next((w.stock for w in seen.watchers if w.is_open), None)
        table = Table.grid(padding=(0, 2))
        table.add_row(
            "watching", bar(watching, self.plan.watchers), of(watching, self.plan.watchers)
        )
        table.add_row("arrived", bar(seen.arrived, users), of(seen.arrived, users))
        table.add_row("answered", bar(seen.rush_answers, users), of(seen.rush_answers, users))
        table.add_row("left", bar(seen.done, users), of(seen.done, users))
        yield Text("Rehearsing", style="bold")
        yield Padding(table, (0, 0, 0, 2))
        words = [
            f"{len(seen.reservations):,} holds",
            f"{len(seen.purchases):,} purchases",
            f"{seen.outcomes['reserve']['fully_reserved']:,} refused for now",
            f"{seen.outcomes['reserve']['sold_out']:,} sold out",
        ]
        if stock is not None:
            words.append(f"{stock:,} available")
        yield Text("  " + " · ".join(words), style="dim")
        if seen.done == users:
            yield Text("  Waiting for the last holds to end", style="dim")


def bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=max(total, 1), completed=done, width=BAR_WIDTH)


def of(done: int, total: int) -> str:
    return f"{done:,} of {total:,}"


def report(verdict: Verdict, users: int, stock: int) -> RenderableType:
    figures = verdict.figures
    style = "bold green" if verdict.is_ready else "bold red"
    broken = [check for check in verdict.checks if not check.is_met]
    title = Text("READY" if verdict.is_ready else "NOT READY", style=style)
    if broken:
        title.append(": " + "; ".join(in_words(check) for check in broken), style="not bold")
    confirmed = figures["confirmed"]
    summary = (
        f"{users:,} shoppers and {stock:,} units: {confirmed['reservations']:,} holds, "
        f"{confirmed['purchases']:,} purchases. The rush took {figures['rush_seconds']} s, "
        f"{figures['claims_per_second']:,} claims a second."
    )
    return Group(
        title,
        summary,
        "",
        checks_table(verdict.checks),
        "",
        requests_table(figures),
        *(Text(f"Watchers: {problem}", style="red") for problem in figures["watcher_problems"]),
        "",
        Text("What limited it", style="bold"),
        *(Padding(Text(reason), (0, 0, 0, 2)) for reason in verdict.limited_by),
    )


def in_words(check: Check) -> str:
    found = f"{check.found:,.0f}{check.unit and ' ' + check.unit}"
    return f"{check.name} {found}" if check.unit else f"{found} {check.name}"


def checks_table(checks: list[Check]) -> Table:
    table = Table.grid(padding=(0, 2))
    for column in ("left", "left", "right", "left"):
        table.add_column(justify=column)
    for check in checks:
        mark = Text("ok", style="green") if check.is_met else Text("no", style="bold red")
        # Where nothing at all may be found, the limit goes without saying.
        limit = f"of {check.limit:,.0f} {check.unit} at most" if check.limit else ""
        table.add_row(mark, check.name, f"{check.found:,.0f}", Text(limit, style="dim"))
    return table


def requests_table(figures: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for column in ("p50 ms", "p99 ms", "most ms"):
        table.add_column(column, justify="right")
    table.add_column("answers")
    for kind, told in figures["requests"].items():
        answers = ", ".join(f"{count:,} × {name}" for name, count in told["outcomes"].items())
        table.add_row(kind, *times(told), answers)
    events = figures["events"]
    if events["frames"]:
        watchers = f"{events['frames']:,} frames to {figures['watchers']:,} watchers"
        table.add_row("event", *times(events), watchers)
    return table


def times(told: dict[str, Any]) -> list[str]:
    return [
        "" if told[name] is None else f"{told[name]:,.0f}"
        for name in ("p50_ms", "p99_ms", "max_ms")
    ]
