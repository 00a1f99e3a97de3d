"""Torture the system: ``python -m tests.torture --help``."""

import argparse
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from benchmarks.__main__ import raise_open_files
from benchmarks.stack import BASE_DIR, StackError
from tests.torture.stack import TortureStack

USERS = 300_000
FOR_EVER = float("inf")


def main() -> int:
    options = read_arguments()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    raise_open_files()
    # SIGTERM takes the same way out as Ctrl-C, so that all servers stop. (Not as SystemExit:
    # Hypothesis would take that for a failure of the history, and look for a shorter one.)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(32)
    started = time.monotonic()
    console.print(f"Seed {seed}; repeat this run with --seed {seed}")
    with console.status("Starting") as status:
        status_line = StatusLine(console, status)
        try:
            with TortureStack(users=USERS, say=status_line) as stack:
                results = play(stack, seed, options, status_line)
                conditions = {
                    "seed": str(seed),
                    "code": commit(),
                    "date": f"{datetime.now(UTC):%Y-%m-%d}",
                    "duration": f"{(time.monotonic() - started) / 60:.0f} min",
                } | stack.describe()
        except StackError as exc:
            console.print(f"[red]{exc}[/]")
            return 2
    from tests.torture.report import REPORT, problems_of, write, write_again

    show(results, console)
    if options.write:
        (write_again if options.only else write)(results, conditions)
        console.print(f"Written: {REPORT.relative_to(BASE_DIR)}")
    else:
        for result in results:
            for fact in result.facts:
                console.print(f"{result.name}: {fact}", markup=False)
    problems = [f"{r.name}: {text}" for r in results for text in problems_of(r)]
    for problem in problems:
        console.print(problem, markup=False, style="red")
    if problems:
        console.print(f"Repeat this run with --seed {seed}")
    return 1 if problems else 0


class StatusLine:
    """Show what is being done, on a terminal in place, else line by line now and then."""

    LINE_EVERY_SECONDS = 5

    def __init__(self, console: Console, status: object) -> None:
        self.console = console
        self.status = status
        self._last = ""
        self._shown_at = 0.0

    def __call__(self, message: str) -> None:
        if self.console.is_terminal:
            self.status.update(message)  # type: ignore[attr-defined]
            return
        title = message.split(":")[0]
        is_due = time.monotonic() - self._shown_at > self.LINE_EVERY_SECONDS
        if title != self._last or is_due:
            self.console.print(f"{datetime.now(UTC):%H:%M:%S} {message}")
            self._last, self._shown_at = title, time.monotonic()


def play(
    stack: TortureStack, seed: int, options: argparse.Namespace, say: Callable[[str], None]
) -> list:
    # Only now may anything of the project be imported: the stack has set Django up.
    from tests.interleaving import world
    from tests.torture import deploy, endurance, faults, promises, proofs, upkeep
    from tests.torture.run import Run

    run = Run(stack, seed, options.short, options.minutes, say)
    if options.interleaving is not None:
        with run.scenario("Interleaving", "One order, by its seed.") as result, world() as stage:
            result.facts.append(str(stage.check_seed(options.interleaving)))
        return run.results
    scenarios: dict[str, Callable[[Run], None]] = {
        "mutants": proofs.mutants,
        "model": proofs.model,
        "pairs": proofs.pairs,
        "triples": proofs.triples,
        "storm": promises.storm,
        "kills": faults.kills,
        "deploy": deploy.rolling_restarts,
        "failpoints": faults.failpoints,
        "expiry": faults.expiry,
        "clocks": promises.clocks,
        "redis": faults.redis,
        "database": faults.database,
        "backup": upkeep.backup,
        "migrations": upkeep.migrations,
        "code": upkeep.code_before,
        "soak": endurance.soak,
    }
    unknown = set(options.only) - set(scenarios)
    if unknown:
        raise StackError(f"There is no {', '.join(unknown)}; there are {', '.join(scenarios)}.")
    started = time.monotonic()
    for name, scenario in scenarios.items():
        if options.only and name not in options.only:
            continue
        if time.monotonic() - started > options.within:
            say(f"LEFT OUT, because time is up: {name}")
            continue
        # Each draws from the seed alone, whatever came before it.
        run.random.seed(f"{seed} {name}")
        scenario(run)
    return run.results


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=BASE_DIR,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"


def show(results: list, console: Console) -> None:
    table = Table()
    for column in ("Scenario", "Operations", "Faults", "Recovery", "Lost", "Doubled", "Oversold"):
        table.add_column(column, justify="left" if column == "Scenario" else "right")
    table.add_column("Seconds", justify="right")
    table.add_column("")
    for r in results:
        recovery = "" if r.recovery_seconds is None else f"{r.recovery_seconds:.1f} s"
        counts = (r.operations, r.faults, recovery, r.lost, r.doubled, r.oversold)
        table.add_row(
            r.name,
            *(f"{count:,}" if isinstance(count, int) else count for count in counts),
            f"{r.seconds:.0f}",
            "[green]held[/]" if r.is_good else "[red]did not hold[/]",
        )
    console.print(table)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Break the system in every way we know, and look for what is wrong after it.",
    )
    parser.add_argument("--short", action="store_true", help="the forms that CI runs")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="half of them for the soak; also decides how much random work is done "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--within",
        type=float,
        default=FOR_EVER,
        metavar="SECONDS",
        help="begin no scenario after that, and say which were left out (default: do all)",
    )
    parser.add_argument("--seed", type=int, help="repeat a run (default: a new seed)")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only these scenarios; no report"
    )
    parser.add_argument(
        "--write", action="store_true", help="with --only: replace these scenarios in the report"
    )
    parser.add_argument(
        "--interleaving", type=int, metavar="SEED", help="play one order of three again"
    )
    options = parser.parse_args()
    is_in_full = not options.short and options.interleaving is None and options.within == FOR_EVER
    if options.write and not (options.only and is_in_full):
        parser.error("--write goes with --only, in full; without that all is written anyway.")
    options.write = options.write or (is_in_full and not options.only)
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
