"""What a scenario hands to the report."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Run:
    """One measurement; None where it has no such figure."""

    per_second: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    # Per success, whatever a success is in the scenario.
    web_cpu_ms: float | None = None
    postgres_cpu_ms: float | None = None
    web_mb: float | None = None
    # Of the CPU time that this machine wanted meanwhile, what its neighbours got instead.
    stolen_percent: float | None = None


@dataclass(frozen=True)
class Goal:
    """A figure of the issue's table, and what it came to in each repeat."""

    title: str
    values: Sequence[float]
    rule: Literal["at least", "at most", "exactly"]
    goal: float
    stretch: float | None = None
    unit: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool:
        return self._reaches(self.goal)

    @property
    def is_stretched(self) -> bool:
        return self.stretch is not None and self._reaches(self.stretch)

    def _reaches(self, figure: float) -> bool:
        if self.rule == "exactly":
            return all(value == figure for value in self.values)
        return self.median >= figure if self.rule == "at least" else self.median <= figure


@dataclass
class Result:
    """What one scenario measured: ``rows`` has the repeats of each of its kinds of run."""

    name: str
    title: str
    method: str
    rows: dict[str, list[Run]] = field(default_factory=dict)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # What must not be: an audit's differences, unexpected answers.
    problems: list[str] = field(default_factory=list)
    # When it was measured, and how.
    conditions: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Result":
        """Return what ``dataclasses.asdict`` made ``data`` of."""
        rows = {name: [Run(**run) for run in runs] for name, runs in data["rows"].items()}
        goals = [Goal(**goal) for goal in data["goals"]]
        return cls(**data | {"rows": rows, "goals": goals})


def ratios(rows: dict[str, list[Run]], above: str, below: str, factor: float = 1) -> list[float]:
    """Return ``factor`` times the quotient of two kinds of run, repeat by repeat."""
    return [
        factor * a.per_second / b.per_second
        for a, b in zip(rows[above], rows[below], strict=True)
        if a.per_second is not None and b.per_second
    ]
