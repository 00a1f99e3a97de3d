"""Measure the project: ``python -m benchmarks --help``."""

import argparse
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.load import GeneratorError, require_wrk
from benchmarks.profiling import find_py_spy, profile_reserve
from benchmarks.report import figure, from_json, to_json, to_markdown, verdict
from benchmarks.results import Result
from benchmarks.runs import Bench
from benchmarks.scenarios import SCENARIOS, users_needed
from benchmarks.stack import BASE_DIR, Stack, StackError

REPORT = BASE_DIR / "docs" / "benchmarks.md"
FIGURES = BASE_DIR / "docs" / "benchmarks.json"
OPEN_FILES = 16_384  # the herd alone has 5,000 connections, at both ends


def main() -> int:
    options = read_arguments()
    console = Console(highlight=False, soft_wrap=True)
    raise_open_files()
    # SIGTERM takes the same way out as Ctrl-C, so that all servers stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        require_wrk()
        if options.profile:
            find_py_spy()
        results, machine = run(options, console)
    except (GeneratorError, StackError) as exc:
        console.print(f"[red]{type(exc).__name__}[/]: ", end="")
        console.print(str(exc), markup=False)
        return 2
    if options.json:
        options.json.write_text(to_json(results, machine))
    if options.write:
        # A few scenarios measured again take the place of what stands there of them.
        written = from_json(FIGURES.read_text()) if options.only else []
        by_name = {result.name: result for result in [*written, *results]}
        everything = [by_name[name] for name in SCENARIOS if name in by_name]
        FIGURES.write_text(to_json(everything, machine))
        REPORT.write_text(to_markdown(everything, machine))
        console.print(f"Written: {REPORT.relative_to(BASE_DIR)}")
    else:
        console.print(to_markdown(results, machine), markup=False)
    show_goals(results, console)
    problems = [problem for result in results for problem in result.problems]
    for problem in problems:
        console.print(f"[red]wrong[/]: {problem}")
    return 1 if problems else 0


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Bring up servers of its own, run every scenario and write "
        "docs/benchmarks.md and .json; with --quick or --only, print the report instead. "
        "Needs Linux and wrk (apt-get install wrk).",
    )
    parser.add_argument("--quick", action="store_true", help="one short repeat, in 3 minutes")
    parser.add_argument(
        "--only", nargs="+", choices=list(SCENARIOS), metavar="NAME", help=", ".join(SCENARIOS)
    )
    parser.add_argument("--repeats", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--seconds", type=float, help="of each run; default: 5, with --quick 2")
    parser.add_argument(
        "--write",
        action="store_true",
        help="with --only: replace these scenarios in docs/benchmarks.md and .json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also write docs/profile-reserve.txt, with py-spy (not a dependency)",
    )
    options = parser.parse_args(arguments)
    if options.write and (options.quick or not options.only):
        parser.error("--write goes with --only; without that all is written anyway.")
    options.write = options.write or not (options.quick or options.only)
    options.repeats = options.repeats or (1 if options.quick else 5)
    options.seconds = options.seconds or (2 if options.quick else 5)
    return options


def run(options: argparse.Namespace, console: Console) -> tuple[list[Result], dict[str, str]]:
    names = options.only or list(SCENARIOS)
    started = time.monotonic()

    def say(message: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.0f} s[/]  {message}")

    users = users_needed(names, options.seconds, options.quick)
    with Stack(users, say) as stack:
        bench = Bench(stack, options.repeats, options.seconds, options.quick, say)
        machine = stack.describe()
        results = []
        for name in SCENARIOS:
            if name in names:
                console.rule(name) if console.is_terminal else say(f"Scenario {name}")
                conditions = (
                    f"{datetime.now(UTC):%Y-%m-%d}, {options.repeats} × {options.seconds:g} s, "
                    # Others' work on the machine shows here, as does that of the run before.
                    f"load average at the start {os.getloadavg()[0]:.2f}"
                )
                try:
                    results.append(SCENARIOS[name](bench))
                except (GeneratorError, StackError) as exc:
                    # The others are worth their figures all the same.
                    say(f"{name} failed: {exc}")
                    problems = [*bench.take_problems(), f"{name} failed: {type(exc).__name__}"]
                    results.append(Result(name, name, "It failed.", problems=problems))
                results[-1].conditions = conditions
        if options.profile:
            say("Profiling a reserve run")
            profile_reserve(stack, max(10, options.seconds))
    return results, machine


def show_goals(results: Sequence[Result], console: Console) -> None:
    if not console.is_terminal:
        for result in results:
            for goal in result.goals:
                found = figure(goal.median, goal.unit)
                wanted = f"{goal.goal:g}{goal.unit}"
                say = verdict(goal).replace("*", "")
                console.print(f"{result.name}: {goal.title} {found} ({goal.rule} {wanted}): {say}")
        return
    table = Table("scenario", "figure", "median", "goal", "stretch", "")
    for result in results:
        for goal in result.goals:
            table.add_row(
                result.name,
                goal.title,
                figure(goal.median, goal.unit),
                f"{goal.rule} {goal.goal:g}{goal.unit}",
                "–" if goal.stretch is None else f"{goal.stretch:g}{goal.unit}",
                verdict(goal).replace("*", ""),
                style="green" if goal.is_met else "red",
            )
    console.print(table)


def raise_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))


if __name__ == "__main__":
    sys.exit(main())
