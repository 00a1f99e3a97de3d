"""drops-client.js, by Node: alone, and against a real server."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NODE = shutil.which("node")

pytestmark = pytest.mark.skipif(NODE is None, reason="needs Node 20 or later")


def test_keeps_its_rules_with_a_server_that_is_played():
    done = subprocess.run(
        [NODE, "--test", "drops_client.test.mjs"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
