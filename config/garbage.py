"""When Python looks for objects that only refer to each other, in processes that must not pause.

Source: https://docs.python.org/3/library/gc.html
"""

import gc

# The short-lived rest is collected less often. The oldest are collected with every second round of
# the middle ones: sockets that lived for minutes are in cycles of the servers' objects, and were
# never freed while that came rarely.
THRESHOLDS = (10_000, 10, 1)


def collect_seldom() -> None:
    """Leave out of all collections what exists by now; called once the process is set up.

    To walk through it takes a tenth of a second: in a web process nobody is answered meanwhile,
    in the expiry loop a drop is locked.
    """
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
