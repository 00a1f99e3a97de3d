"""How busy the rehearsing process and this machine were, so that neither is taken for the shop."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_SECONDS = 0.1
STAT = Path("/proc/stat")


@dataclass(frozen=True, slots=True)
class Sample:
    """Running totals at one moment (monotonic), in seconds or kernel ticks."""

    at: float
    own_cpu: float
    busy: int
    total: int


@dataclass
class Strain:
    samples: list[Sample] = field(default_factory=list)

    async def measure(self) -> None:
        """Take samples until cancelled."""
        while True:
            self.samples.append(Sample(time.monotonic(), time.process_time(), *machine_ticks()))
            await asyncio.sleep(SAMPLE_SECONDS)

    def between(self, since: float, until: float) -> tuple[float, float | None]:
        """Return the parts of time that this process used of one core, and all of all cores.

        The second is None where the system doesn't tell.
        """
        before = [sample for sample in self.samples if sample.at <= since] or self.samples[:1]
        after = [sample for sample in self.samples if sample.at >= until] or self.samples[-1:]
        if not before or not after or after[0].at <= before[-1].at:
            return 0.0, None
        first, last = before[-1], after[0]
        own = (last.own_cpu - first.own_cpu) / (last.at - first.at)
        ticks = last.total - first.total
        return own, (last.busy - first.busy) / ticks if ticks else None


def machine_ticks() -> tuple[int, int]:
    """Return how long all cores were busy, and how long they were there; zeros where unknown."""
    try:
        fields = [int(value) for value in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)
