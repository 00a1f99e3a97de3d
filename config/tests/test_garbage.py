"""When the garbage collector looks at what lived for long, in an interpreter of its own."""

import subprocess
import sys

PROGRAM = """
import gc
import weakref

from config.garbage import collect_seldom


class Link:
    pass


def ring():
    one, two = Link(), Link()
    one.next, two.next = two, one
    return one


def churn(rings):
    for _ in range(rings):
        ring()


paused = []
gc.callbacks.append(lambda phase, info: paused.append(info["generation"]))
loaded = [ring() for _ in range(50_000)]
collect_seldom()
assert gc.get_freeze_count() > 100_000, "what was loaded is walked through again"
crowd = [ring() for _ in range(20_000)]
churn(200_000)  # the crowd is among the oldest by now
left = [weakref.ref(link) for link in crowd]
del crowd
paused.clear()
churn(200_000)
print(sum(link() is not None for link in left), len(paused) // 2)
"""


def test_those_who_stayed_long_and_left_are_freed_and_few_collections_are_made():
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    ).stdout
    left, collections = map(int, printed.split())
    assert left == 0, "what sockets leave behind is freed only after millions of allocations"
    # At Python's own thresholds there are 570.
    assert collections < 100
