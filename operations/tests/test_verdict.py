import uuid

import pytest

from drops.models import Drop
from operations.http_client import Server
from operations.rehearsals import Rows
from operations.shoppers import Plan, Seen, Watcher
from operations.strain import Sample, Strain
from operations.verdict import Limits, judge, limited_by, percentile
from purchases.audit import Audit, Difference

USERS = [uuid.uuid4() for _ in range(3)]
PLAN = Plan(
    server=Server("127.0.0.1", 4000, is_tls=False),
    drop_id=uuid.uuid4(),
    users=USERS,
    credentials=lambda method, path, user: {},
    ttl=10,
    conversion=0.5,
    arrive_seconds=1,
    watchers=1,
)


def good():
    """Return what a rehearsal of two units saw and stored, of which one was sold."""
    seen = Seen(
        arrived=3,
        done=3,
        reservations={"a": USERS[0], "b": USERS[1]},
        purchases={"p": USERS[0]},
        began=10.0,
        rush_over=12.0,
        rush_answers=3,
        watchers=[Watcher(seq=5, stock=1, is_open=True)],
        delays=[20.0],
    )
    seen.statuses.update({201: 3, 409: 1})
    seen.latencies["reserve"] = [5.0, 6.0, 7.0]
    drop = Drop(total_stock=2, available_stock=1, sold_stock=1)
    rows = Rows(drop, {"a": "CONSUMED", "b": "EXPIRED"}, {"p": "paid"})
    return seen, rows, Audit(1, [])


def broken(seen, rows, audit, limits=None):
    verdict = judge(PLAN, seen, rows, audit, limits or Limits())
    assert verdict.is_ready == all(check.is_met for check in verdict.checks)
    return [check.name for check in verdict.checks if not check.is_met]


def test_what_is_good_is_ready():
    assert broken(*good()) == []


def oversell(seen, rows, audit):
    rows.reservations.update({"c": "CONSUMED", "d": "CONSUMED"})
    rows.purchases.update({"q": "paid", "r": "paid"})


def confirm_more_than_there_is(seen, rows, audit):
    seen.purchases.update({"q": USERS[1], "r": USERS[2]})


def lose_a_reservation(seen, rows, audit):
    del rows.reservations["b"]


def lose_a_purchase(seen, rows, audit):
    rows.purchases["p"] = "refunded"


def drift(seen, rows, audit):
    audit.differences.append(Difference("a rule", PLAN.drop_id, "what", "1", "2"))


def keep_a_unit_back(seen, rows, audit):
    del seen.reservations["b"]


def leave_a_hold(seen, rows, audit):
    rows.reservations["b"] = "ACTIVE"


def show_a_wrong_stock(seen, rows, audit):
    seen.watchers[0].stock = 2


def cut_a_watcher_off(seen, rows, audit):
    seen.watchers[0].is_open = False


def skip_a_frame(seen, rows, audit):
    seen.watchers[0].gaps = 1


def fail(seen, rows, audit):
    seen.statuses[502] = 1


def answer_nonsense(seen, rows, audit):
    seen.statuses[301] = 1


def give_up(seen, rows, audit):
    seen.unanswered = 1


def end_early(seen, rows, audit):
    seen.done = 2


def slow_down(seen, rows, audit):
    seen.latencies["reserve"][-1] = 1001.0


def delay_events(seen, rows, audit):
    seen.delays.append(1001.0)


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (oversell, ["units sold or held beyond the stock"]),
        (
            confirm_more_than_there_is,
            ["units sold or held beyond the stock", "confirmed, but not in the database"],
        ),
        (lose_a_reservation, ["confirmed, but not in the database"]),
        (lose_a_purchase, ["confirmed, but not in the database"]),
        (drift, ["differences found by the audit"]),
        (keep_a_unit_back, ["units that nobody was given"]),
        (leave_a_hold, ["holds not returned after their time"]),
        (show_a_wrong_stock, ["watchers that end with a wrong stock"]),
        (cut_a_watcher_off, ["watchers that were cut off"]),
        (skip_a_frame, ["frames that did not join on"]),
        (fail, ["errors of the server"]),
        (answer_nonsense, ["answers that make no sense"]),
        (give_up, ["requests given up on"]),
        (end_early, ["shoppers whom the rehearsal's end cut short"]),
        (slow_down, ["reserve, p99"]),
        (delay_events, ["event to watcher, p99"]),
    ],
)
def test_each_thing_that_is_wrong_is_named(spoil, names):
    case = good()
    spoil(*case)

    assert broken(*case) == names


def strained(own_cpu, busy):
    """Return what was seen while this process and the machine were that busy."""
    seen, _, _ = good()
    seen.strain = Strain([Sample(10.0, 0.0, 0, 0), Sample(12.0, 2 * own_cpu, int(400 * busy), 400)])
    return seen


@pytest.mark.parametrize(
    ("own_cpu", "busy", "beginnings"),
    [
        (0.3, 0.5, ["Nothing that is measured here"]),
        (0.9, 0.5, ["This command itself: it used 90% of a core"]),
        (0.3, 0.95, ["This machine: its cores were 95% busy"]),
        (0.9, 0.95, ["This command itself", "This machine"]),
    ],
)
def test_says_who_was_busy_itself_first(own_cpu, busy, beginnings):
    reasons = limited_by(strained(own_cpu, busy))

    assert len(reasons) == len(beginnings)
    assert all(map(str.startswith, reasons, beginnings))


def test_refusals_and_lost_connections_are_reasons():
    seen = strained(0.1, 0.1)
    seen.statuses.update({429: 2, 503: 3})
    seen.lost_connections = 4

    assert [reason.split(":")[0] for reason in limited_by(seen)] == [
        "Rate limits",
        "The queue",
        "Connections",
    ]


def test_percentiles_are_values_that_occurred():
    values = [float(n) for n in range(1, 101)]

    assert [percentile(values, p) for p in (0, 50, 99, 100)] == [1, 50, 99, 100]
