"""A process that has the application loaded and forks one web server or loop after the other.

A fresh one takes seconds of processor time to start; a crash every other moment would
leave the machine no time for anything but starts. Reads one JSON order per line: the ``port`` of
a web server (or none: an expiry loop), a ``failpoint`` and the ``number`` of times it may be
passed. Prints the pid of each child.

``NURSERY_CLOCK_SECONDS`` sets the clock of the whole family wrong.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import time_machine
import uvicorn
from django.core.management import call_command

# Loads the application, once for all.
from config.asgi import application
from config.stopping import end_with_parent
from tests.torture.failpoints import FAILPOINTS, Failpoint

WRONG_SECONDS = float(os.environ.get("NURSERY_CLOCK_SECONDS", "0"))


def main() -> None:
    # Children are reaped by the kernel.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            live(order)
            os._exit(0)
        print(pid, flush=True)


def live(order: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if WRONG_SECONDS:
        time_machine.travel(time.time() + WRONG_SECONDS, tick=True).start()
    end_with_parent()
    # What the child prints is no answer to an order.
    os.dup2(2, 1)
    served = application
    if order["failpoint"]:
        served = FAILPOINTS[order["failpoint"]](Failpoint(order["number"]), application)
    if order["port"] is None:
        call_command("expire_reservations", batch=20)
    else:
        uvicorn.run(
            served,
            host="127.0.0.1",
            port=order["port"],
            lifespan="off",
            access_log=False,
            log_level="warning",
        )


if __name__ == "__main__":
    main()
