#!/usr/bin/env python
"""Run a management command, with the embedded servers when this checkout uses them."""

import contextlib
import os
import signal
import sys
from pathlib import Path

# Commands that never look at the database; starting servers for them would only cost time.
# (``up`` starts them itself and says so.)
WITHOUT_SERVERS = {"up", "help", "version", "--version", "check", "spectacular", "collectstatic"}


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    use_development_defaults()
    # SIGTERM takes the same way out as Ctrl-C, so that the servers stop with the command.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    from django.core.management import execute_from_command_line

    with embedded_servers(sys.argv):
        execute_from_command_line(sys.argv)


def use_development_defaults() -> None:
    """Turn DEBUG on where nothing at all is configured: a fresh clone on a laptop.

    Servers started directly (daphne, uvicorn) never come through here, so a machine
    without configuration can't serve the internet in debug mode by accident.
    """
    configured = {"DEBUG", "DATABASE_URL", "SECRET_KEY"} & os.environ.keys()
    if not configured and not (Path(__file__).parent / ".env").exists():
        os.environ["DEBUG"] = "true"


def embedded_servers(argv: list[str]) -> contextlib.AbstractContextManager:
    """Return the checkout's embedded servers, or nothing where the command needs none."""
    from django.conf import settings

    command = argv[1] if len(argv) > 1 else "help"
    if command in WITHOUT_SERVERS or "--help" in argv or settings.EMBEDDED is None:
        return contextlib.nullcontext()
    return settings.EMBEDDED


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
