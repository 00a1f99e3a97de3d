"""Profile the web server during a reserve run, where py-spy is installed (it need not be)."""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.load import CONNECTIONS, GeneratorError, run_wrk
from benchmarks.stack import BASE_DIR, Stack

OUTPUT = BASE_DIR / "docs" / "profile-reserve.txt"
LINES = 25
SAMPLES_PER_SECOND = 200


def find_py_spy() -> str:
    """Return the program, from this interpreter's environment or the PATH."""
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if found is None:
        raise GeneratorError(
            "--profile needs py-spy, which is no dependency: pip install py-spy (as root on "
            "most systems, to read another process)."
        )
    return found


def profile_reserve(stack: Stack, seconds: float) -> None:
    """Write the busiest functions of a reserve run, measured apart from the others."""
    py_spy = find_py_spy()
    (hot,) = stack.fresh()
    with stack.web() as web, tempfile.TemporaryDirectory() as folder:
        run_wrk(web.port, "reserve", 1, 1, hot.drop_id)
        stacks = Path(folder, "stacks")
        command = [py_spy, "record", "--pid", str(web.pid), "--format", "raw", "--function"]
        command += ["--rate", str(SAMPLES_PER_SECOND), "--duration", str(round(seconds))]
        command += ["--output", str(stacks)]
        recorder = subprocess.Popen(  # noqa: S603 - our own arguments
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        load = run_wrk(web.port, "reserve", seconds, 50_001, hot.drop_id)
        try:
            _, errors = recorder.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            recorder.send_signal(signal.SIGINT)
            _, errors = recorder.communicate()
        if recorder.returncode or not stacks.exists():
            raise GeneratorError(f"py-spy ended with code {recorder.returncode}:\n{errors}")
        text = busiest(stacks.read_text())
    OUTPUT.write_text(
        f"The web process while it serves {load.count('201') / load.seconds:,.0f} reserves/s "
        f"(uvicorn, {CONNECTIONS} connections,\nslowed by py-spy), all threads, waiting ones left "
        f"out. Written by python -m benchmarks --profile.\n\n{text}"
    )


def busiest(stacks: str) -> str:
    """Return a table of the functions in py-spy's raw output: ``a;b;c 12``, one stack a line.

    ``self`` is the share of samples in the function itself, ``total`` also in what it calls.
    """
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    samples = 0
    for line in stacks.splitlines():
        frames, _, number = line.rpartition(" ")
        if not frames:
            continue
        count = int(number)
        names = frames.split(";")
        samples += count
        own[names[-1]] += count
        for name in set(names):
            total[name] += count
    lines = [f"{samples} samples", "", "  self   total  function"]
    for name, count in own.most_common(LINES):
        lines.append(f"{count / samples:6.1%}  {total[name] / samples:6.1%}  {name}")
    return "\n".join(lines) + "\n"
