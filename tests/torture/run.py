"""What a run consists of, and what its scenarios report."""

import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from tests.torture.sale import Sale, Verdict
from tests.torture.stack import TortureStack

# A full run takes this long; with less, what repeats random work does less of it.
FULL_MINUTES = 60.0
# After a fault has ended, every server must confirm something within this time.
RECOVERY_SECONDS = 5.0


@dataclass
class Result:
    """What one scenario did and found."""

    name: str
    what: str
    operations: int = 0
    faults: int = 0
    # The longest time from the end of a fault to an answer of every server.
    recovery_seconds: float | None = None
    lost: int = 0
    doubled: int = 0
    oversold: int = 0
    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    # Which of the runs that a report is made of.
    run: int = 0

    def expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            self.problems.append(otherwise)

    def add(self, sale: Sale) -> Verdict:
        """Judge a sale that is over."""
        verdict = sale.verdict()
        self.operations += verdict.confirmed
        self.lost += verdict.lost
        self.doubled += verdict.doubled
        self.oversold += verdict.oversold
        self.problems += verdict.problems
        return verdict

    def recovered(self, seconds: float) -> None:
        self.recovery_seconds = max(self.recovery_seconds or 0.0, seconds)

    @property
    def is_good(self) -> bool:
        return not (self.problems or self.lost or self.doubled or self.oversold)


@dataclass
class Run:
    """One run of the command: its stack, its seed and how much of everything."""

    stack: TortureStack
    seed: int
    is_short: bool
    minutes: float
    say: Callable[[str], None]
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def size(self, short: int, full: int) -> int:
        """Return how much of something that is always done in full by the long form."""
        return short if self.is_short else full

    def share(self, short: int, full: int) -> int:
        """Return how much of something that the minutes given decide."""
        if self.is_short:
            return short
        return max(short, round(full * min(1.0, self.minutes / FULL_MINUTES)))

    @contextmanager
    def scenario(self, name: str, what: str) -> Iterator[Result]:
        """Record what happens in the block; a failure ends the scenario, not the run."""
        result = Result(name, what)
        self.results.append(result)
        self.say(name)
        started = time.monotonic()
        deadlocks = self.stack.deadlocks()
        try:
            yield result
        except AssertionError as exc:
            result.problems.append(str(exc) or repr(exc))
        except (Exception, pytest.fail.Exception):
            # The other scenarios may still tell something.
            result.problems.append(traceback.format_exc())
        finally:
            result.seconds = time.monotonic() - started
        found = self.stack.deadlocks() - deadlocks
        # A restarted database begins to count anew.
        result.expect(found <= 0, f"{found} deadlocks")

    def sale(self, ports: Callable[[], list[int]], customers: int, **options: float) -> Sale:
        return Sale(
            self.stack, ports, customers=customers, seed=self.random.getrandbits(32), **options
        )
