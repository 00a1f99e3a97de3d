"""The project's settings as a test run needs them.

A test run is a development run on servers of its own, which need no protection from power
cuts. Set in the environment, so that server processes started by tests see the same.
"""

import os

os.environ["DEBUG"] = "true"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Some tests restart their servers, and all hear what is published: nothing is shared.
    os.environ["EMBEDDED_INSTANCE"] = f"test-{os.getpid()}"
    os.environ["CHANNEL_PREFIX"] = f"test-{os.getpid()}"
else:
    os.environ.setdefault("EMBEDDED_INSTANCE", f"test-{os.getpid()}")
os.environ.setdefault("EMBEDDED_DURABLE", "false")

from config.settings import *  # noqa: F403

# Quick to compute; nobody's password is at stake.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
