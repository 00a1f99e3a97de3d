"""What the kernel says of running processes (Linux)."""

import os
import time
from pathlib import Path

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
IDLE_SECONDS = 0.3
LONGEST_WAIT_SECONDS = 15


def tree(pid: int) -> list[int]:
    """Return ``pid`` and all processes below it."""
    children: dict[int, list[int]] = {}
    for child in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        if fields := _stat(child):
            children.setdefault(int(fields[1]), []).append(child)
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that ``pid`` and the processes below it have used, ended ones too."""
    ticks = 0
    for process in tree(pid):
        # utime, stime, and those of children that have ended and been waited for.
        ticks += sum(map(int, _stat(process)[11:15]))
    return ticks / TICKS_PER_SECOND


def resident_mb(pid: int) -> float:
    """Return the memory of ``pid`` and the processes below it, shared pages counted in each."""
    pages = 0
    for process in tree(pid):
        if fields := _stat(process):
            pages += int(fields[21])
    return pages * PAGE_BYTES / 2**20


class Stolen:
    """What other machines on the same hardware took of the CPU, from this object's start on."""

    def __init__(self) -> None:
        self._before = self._read()

    @property
    def percent(self) -> float:
        """Of the time in which a process of this machine wanted to run."""
        user, nice, system, _, _, irq, softirq, stolen = (
            now - before for now, before in zip(self._read(), self._before, strict=True)
        )
        wanted = user + nice + system + irq + softirq + stolen
        return 100 * stolen / max(1, wanted)

    @staticmethod
    def _read() -> list[int]:
        """Source: https://man7.org/linux/man-pages/man5/proc_stat.5.html"""
        return [int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:9]]


def wait_until_idle(pid: int) -> None:
    """Return when the processes have had nothing to do for a moment: they have started."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    before = -1.0
    while (now := cpu_seconds(pid)) - before > 0.02 and time.monotonic() < deadline:
        before = now
        time.sleep(IDLE_SECONDS)


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` from the third, the state, on; [] if it ended.

    Source: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()
