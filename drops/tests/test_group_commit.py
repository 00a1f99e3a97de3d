"""Requests that wait for one drop, and how they go out together."""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction

from config.problems import Busy
from drops import group_commit
from drops.group_commit import ANSWER_SECONDS, MAX_BATCH, MAX_DROPS_APART, GroupCommit, Settle
from drops.models import Drop
from drops.services import BRIEF_WAIT_MS, LOCK_DROPS, Wait, lock_drop
from drops.tests.factories import DropFactory
from purchases.audit import audit_stock
from reservations.exceptions import FullyReserved
from reservations.models import Reservation
from reservations.services import Claim, reserve_on_drops
from tests.concurrency import is_anybody_waiting
from tests.hot import give_connections_back
from users.models import User
from users.tests.factories import UserFactory

DROP, ANOTHER_DROP = uuid.uuid4(), uuid.uuid4()


@pytest.fixture
def group() -> Iterator[GroupCommit]:
    group = GroupCommit()
    yield group
    for executor in group.executors:
        executor.shutdown()


class Answering:
    """Answers every request with itself and an exclamation mark, once its batch may leave.

    Drops in ``locked`` are left out of a batch that may wait only a moment.
    """

    def __init__(self, *, is_open: bool = True, locked: Collection[uuid.UUID] = ()) -> None:
        self.batches: list[list[Any]] = []
        self.locked = locked
        self.most_at_once = 0
        self._permits = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self._inside = 0
        self._lock = threading.Lock()
        if is_open:
            self.open()

    def __call__(
        self, batch: dict[uuid.UUID, list[Any]], *, wait: Wait
    ) -> dict[uuid.UUID, list[Any]]:
        if wait is not Wait.AS_LONG_AS_IT_TAKES:
            batch = {pk: requests for pk, requests in batch.items() if pk not in self.locked}
            if not batch:
                return {}
        with self._lock:
            self.batches.append([request for requests in batch.values() for request in requests])
            self._inside += 1
            self.most_at_once = max(self.most_at_once, self._inside)
        self._entered.release()
        assert self._permits.acquire(timeout=10)
        with self._lock:
            self._inside -= 1
        return {pk: [f"{request}!" for request in requests] for pk, requests in batch.items()}

    def let_go(self, batches: int = 1) -> None:
        self._permits.release(batches)

    def open(self) -> None:
        self.let_go(10_000)

    async def is_entered(self) -> None:
        """Return once another batch has come in."""
        assert await asyncio.to_thread(self._entered.acquire, timeout=10)


def play(scene: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def within_time() -> Any:
        async with asyncio.timeout(20):
            return await scene()

    return asyncio.run(within_time())


async def submit_all(
    group: GroupCommit, settle: Any, requests: Sequence[Any], drop_id: uuid.UUID = DROP
) -> list[asyncio.Task]:
    """Let the requests arrive in this order; return their tasks, which are all waiting."""
    tasks = [asyncio.create_task(group.submit(drop_id, settle, request)) for request in requests]
    await asyncio.sleep(0)  # each task runs up to the point where it waits for its answer
    return tasks


# --- Batches ----------------------------------------------------------------------------


def test_what_arrives_meanwhile_goes_out_together_in_order_and_at_most_256_at_once(group):
    settle = Answering(is_open=False)
    answered: list[str] = []

    async def scene():
        tasks = await submit_all(group, settle, [0])
        await settle.is_entered()
        tasks += await submit_all(group, settle, range(1, 601))
        for task in tasks:
            task.add_done_callback(lambda task: answered.append(task.result()))
        settle.open()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0)

    play(scene)

    assert MAX_BATCH == 256
    assert [len(batch) for batch in settle.batches] == [1, 256, 256, 88]
    assert [request for batch in settle.batches for request in batch] == list(range(601))
    assert answered == [f"{request}!" for request in range(601)]
    assert settle.most_at_once == 1


def test_a_batch_follows_the_one_before_though_the_loop_is_busy(group):
    settle = Answering(is_open=False)

    async def scene():
        tasks = await submit_all(group, settle, [0])
        await settle.is_entered()
        tasks += await submit_all(group, settle, [1])
        settle.let_go()
        time.sleep(0.3)  # noqa: ASYNC251 - so that nothing else runs in the loop
        assert settle.batches == [[0], [1]]
        settle.open()
        assert await asyncio.gather(*tasks) == ["0!", "1!"]

    play(scene)


def test_different_drops_go_out_together(group):
    settle = Answering(is_open=False)

    async def scene():
        tasks = await submit_all(group, settle, ["first"], DROP)
        await settle.is_entered()
        tasks += await submit_all(group, settle, ["one", "two"], DROP)
        tasks += await submit_all(group, settle, ["other"], ANOTHER_DROP)
        tasks += await submit_all(group, settle, ["three"], DROP)
        settle.open()
        return await asyncio.gather(*tasks)

    assert play(scene) == ["first!", "one!", "two!", "other!", "three!"]
    assert settle.batches == [["first"], ["one", "two", "three", "other"]]
    assert settle.most_at_once == 1


def test_nobody_waits_for_the_lock_of_another_drop(group):
    settle = Answering(is_open=False, locked={DROP})

    async def scene():
        waits = await submit_all(group, settle, ["a", "b"], DROP)
        goes = await submit_all(group, settle, ["c"], ANOTHER_DROP)
        await settle.is_entered()
        await settle.is_entered()
        # One waits for the lock on its own, the other is being settled, at the same time.
        waits += await submit_all(group, settle, ["d"], DROP)
        goes += await submit_all(group, settle, ["e"], ANOTHER_DROP)
        settle.open()
        return await asyncio.gather(*waits, *goes)

    assert play(scene) == ["a!", "b!", "d!", "c!", "e!"]
    assert sorted(settle.batches) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert settle.most_at_once == 2


def test_locked_drops_take_no_more_connections_than_there_are_for_them(group):
    drops = [uuid.uuid4() for _ in range(3 * MAX_DROPS_APART)]
    settle = Answering(is_open=False, locked=set(drops))

    async def scene():
        tasks = [task for drop in drops for task in await submit_all(group, settle, [drop], drop)]
        for _ in range(MAX_DROPS_APART):
            await settle.is_entered()
        tasks += await submit_all(group, settle, ["free"], ANOTHER_DROP)
        await settle.is_entered()
        settle.open()
        return await asyncio.gather(*tasks)

    assert play(scene) == [*(f"{drop}!" for drop in drops), "free!"]
    assert settle.most_at_once == MAX_DROPS_APART + 1


def test_nobody_waits_for_a_timer(group, monkeypatch):
    settle = Answering()

    async def scene():
        def only_to_give_up(delay: float, *args: Any, **kwargs: Any) -> object:
            assert delay > ANSWER_SECONDS - 1
            return object()  # a handle of a timer that never comes

        def no_timer(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a timer was set")

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", only_to_give_up)
        monkeypatch.setattr(loop, "call_at", no_timer)
        return [await group.submit(DROP, settle, request) for request in range(3)]

    assert asyncio.run(scene()) == ["0!", "1!", "2!"]
    assert settle.batches == [[0], [1], [2]]


def test_reserves_and_purchases_of_a_drop_never_mix_nor_overlap(group):
    reserves, purchases = Answering(is_open=False), Answering()
    inside_together = []

    def purchase(batch: dict[uuid.UUID, list[Any]], *, wait: Wait) -> Any:
        inside_together.append(reserves._inside)
        return purchases(batch, wait=wait)

    async def scene():
        tasks = await submit_all(group, reserves, ["r0"])
        await reserves.is_entered()
        for settle, request in ((purchase, "p1"), (reserves, "r2"), (purchase, "p3")):
            tasks += await submit_all(group, settle, [request])
        tasks += await submit_all(group, reserves, ["r4"])
        reserves.open()
        return await asyncio.gather(*tasks)

    assert play(scene) == ["r0!", "p1!", "r2!", "p3!", "r4!"]
    assert reserves.batches == [["r0"], ["r2", "r4"]]
    assert purchases.batches == [["p1", "p3"]]
    assert inside_together == [0]


def test_one_idempotency_key_never_stands_twice_in_a_batch(group):
    settle = Answering(is_open=False)
    keys = {"a1": "A", "b1": "B", "a2": "A", "none1": None, "a3": "A", "b2": "B", "none2": None}

    async def scene():
        first = await submit_all(group, settle, ["first"])
        await settle.is_entered()
        tasks = [
            asyncio.create_task(group.submit(DROP, settle, request, key))
            for request, key in keys.items()
        ]
        await asyncio.sleep(0)
        settle.open()
        return await asyncio.gather(*first, *tasks)

    assert play(scene) == ["first!", *(f"{request}!" for request in keys)]
    assert settle.batches == [["first"], ["a1", "b1", "none1", "none2"], ["a2", "b2"], ["a3"]]


def test_a_drop_that_nobody_asks_for_is_forgotten(group):
    async def scene():
        await asyncio.gather(*await submit_all(group, Answering(locked={DROP}), range(3)))
        async with asyncio.timeout(5):
            while group._apart:  # noqa: ASYNC110 - that it is forgotten is announced to nobody
                await asyncio.sleep(0.01)

    play(scene)


# --- Clients that are gone --------------------------------------------------------------


def test_who_leaves_the_queue_is_not_settled(group):
    settle = Answering(is_open=False)

    async def scene():
        first = await submit_all(group, settle, ["first"])
        await settle.is_entered()
        stays, leaves, stays_too = await submit_all(group, settle, ["stays", "leaves", "stays too"])
        leaves.cancel()
        settle.open()
        return await asyncio.gather(*first, stays, stays_too)

    assert play(scene) == ["first!", "stays!", "stays too!"]
    assert settle.batches == [["first"], ["stays", "stays too"]]


def test_who_leaves_a_batch_in_flight_disturbs_nobody(group, caplog):
    settle = Answering(is_open=False)

    async def scene():
        (leaves,) = await submit_all(group, settle, ["leaves"])
        await settle.is_entered()
        leaves.cancel()
        stays = await submit_all(group, settle, ["stays"])
        settle.open()
        return await asyncio.gather(*stays)

    assert play(scene) == ["stays!"]
    assert settle.batches == [["leaves"], ["stays"]]
    assert caplog.records == []


def test_a_queue_that_everybody_left_ends(group):
    settle = Answering(is_open=False)

    async def scene():
        first = await submit_all(group, settle, ["first"])
        await settle.is_entered()
        for task in await submit_all(group, settle, range(300)):
            task.cancel()
        settle.open()
        await asyncio.gather(*first)
        await asyncio.sleep(0)
        left = list(group._together.queue)
        return left, await group.submit(DROP, settle, "later")

    assert play(scene) == ([], "later!")
    assert settle.batches == [["first"], ["later"]]


# --- Requests that fail -----------------------------------------------------------------


class Poison(Exception):
    pass


def fails_for(poisoned: set[Any], settle: Any) -> Any:
    """Return a ``settle`` that breaks for every batch with one of these in it."""

    def settle_or_fail(batch: dict[uuid.UUID, list[Any]], *, wait: Wait) -> Any:
        answers = settle(batch, wait=wait)
        if any(not poisoned.isdisjoint(requests) for requests in batch.values()):
            raise Poison
        return answers

    return settle_or_fail


@pytest.mark.parametrize("poisoned", [{0}, {99}, {41}, {7, 8}, set(range(0, 100, 10))])
def test_a_poisoned_request_fails_alone(group, poisoned, caplog):
    caplog.set_level(logging.CRITICAL, "drops.group_commit")
    blocked, settle = Answering(is_open=False), Answering()
    broken = fails_for(poisoned, settle)

    def settle_later(batch: dict[uuid.UUID, list[Any]], *, wait: Wait) -> Any:
        settle = blocked if batch == {DROP: ["first"]} else broken
        return settle(batch, wait=wait)

    async def scene():
        first = await submit_all(group, settle_later, ["first"])
        await blocked.is_entered()
        tasks = await submit_all(group, settle_later, range(100))
        tasks += await submit_all(group, settle_later, ["of another drop"], ANOTHER_DROP)
        blocked.open()
        await asyncio.gather(*first)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await group.submit(DROP, settle_later, "afterwards")

    answers, afterwards = play(scene)

    assert {n for n, answer in enumerate(answers) if isinstance(answer, Poison)} == poisoned
    assert answers.pop() == "of another drop!"
    assert [answer for answer in answers if not isinstance(answer, Poison)] == [
        f"{request}!" for request in range(100) if request not in poisoned
    ]
    assert settle.batches[0] == [*range(100), "of another drop"]
    assert afterwards == "afterwards!"


def test_settling_that_answers_too_few_fails_instead_of_hanging(group, caplog):
    caplog.set_level(logging.CRITICAL, "drops.group_commit")

    def too_few(batch: dict[uuid.UUID, list[Any]], *, wait: Wait) -> Any:
        return {pk: ["only one"] for pk in batch}

    async def scene():
        tasks = await submit_all(group, too_few, range(2))
        tasks += await submit_all(group, Answering(), ["in the queue"])
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await group.submit(DROP, Answering(), "afterwards")

    answers, afterwards = play(scene)

    assert [type(answer) for answer in answers] == [str, ValueError, ValueError]
    assert afterwards == "afterwards!"


# --- Waiting too long -------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that stands still until ``clock.now`` is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(group_commit, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_queue_of_more_than_two_seconds_is_refused(group, clock):
    settle = Answering(is_open=False)

    async def scene():
        slow = await submit_all(group, settle, ["slow"])
        await settle.is_entered()
        slow += await submit_all(group, settle, ["next"])
        # 4 s weigh a fifth in the running mean: a batch is thought to take 0.8 s.
        clock.now += 4.0
        settle.let_go()
        await settle.is_entered()
        tasks = await submit_all(group, settle, range(1000))
        settle.open()
        await asyncio.gather(*slow)
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = play(scene)

    # One's own batch and one and a half before it take 2 s; whoever comes later is refused.
    assert answers[:385] == [f"{number}!" for number in range(385)]
    assert [type(answer) for answer in answers[385:]] == [Busy] * 615
    assert Busy.retry_after_seconds == 1


def test_who_comes_to_a_batch_that_is_stuck_is_refused_at_once(group, clock):
    settle = Answering(is_open=False)

    async def scene():
        tasks = await submit_all(group, settle, ["stuck"])
        await settle.is_entered()
        clock.now += 1.9
        tasks += await submit_all(group, settle, ["in time"])
        clock.now += 0.2
        tasks += await submit_all(group, settle, ["too late"])
        settle.open()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *settled, too_late = play(scene)

    assert settled == ["stuck!", "in time!"]
    assert isinstance(too_late, Busy)
    assert settle.batches == [["stuck"], ["in time"]]


def test_after_a_batch_that_was_stuck_for_long_the_next_request_is_taken(group, clock):
    settle = Answering(is_open=False)

    async def scene():
        tasks = await submit_all(group, settle, ["stuck"])
        await settle.is_entered()
        # A minute weighs 12 s in the running mean, far more than anybody would wait.
        clock.now += 60
        settle.open()
        await asyncio.gather(*tasks)
        # The answers come a moment before the thread is free.
        if group._together.task is not None:
            await group._together.task
        return await group.submit(DROP, settle, "next")

    assert play(scene) == "next!"


# --- With a database --------------------------------------------------------------------


@pytest.fixture
def group_on_database(transactional_db) -> Iterator[GroupCommit]:
    group = GroupCommit()
    yield group
    give_connections_back(group)


def in_one_batch(
    group: GroupCommit, drop_id: uuid.UUID, settle: Settle, requests: Sequence[Any]
) -> list[Any]:
    """Submit the requests while another batch is in flight; return answers and exceptions."""
    blocked = Answering(is_open=False)

    def settle_after_first(batch: dict[uuid.UUID, list[Any]], *, wait: Wait) -> Any:
        is_first = batch == {drop_id: ["first"]}
        return (blocked if is_first else settle)(batch, wait=wait)

    async def scene():
        first = await submit_all(group, settle_after_first, ["first"], drop_id)
        await blocked.is_entered()
        tasks = await submit_all(group, settle_after_first, requests, drop_id)
        blocked.open()
        await asyncio.gather(*first)
        return await asyncio.gather(*tasks, return_exceptions=True)

    return play(scene)


def claims_of(users: Sequence[User]) -> list[Claim]:
    return [Claim(user.pk) for user in users]


def test_the_same_user_twice_in_a_batch_is_settled_one_after_the_other(group_on_database):
    drop, user = DropFactory(total_stock=2), UserFactory()

    first, second = in_one_batch(
        group_on_database, drop.pk, reserve_on_drops, claims_of([user, user])
    )

    assert (first.pk, first.is_new, second.pk, second.is_new) == (first.pk, True, first.pk, False)
    assert Reservation.objects.count() == 1
    drop.refresh_from_db()
    assert (drop.available_stock, drop.seq) == (1, 1)


def test_a_claim_that_breaks_a_constraint_fails_alone_and_the_order_stays(
    group_on_database, caplog
):
    caplog.set_level(logging.CRITICAL, "drops.group_commit")
    drop, users = DropFactory(total_stock=3), UserFactory.create_batch(6)
    poisoned = users[1].pk

    @transaction.atomic
    def settle(claims: dict[uuid.UUID, list[Claim]], *, wait: Wait) -> Any:
        outcomes = reserve_on_drops(claims, wait=wait)
        if poisoned in {claim.user_id for claim in claims[drop.pk]}:
            Reservation.objects.filter(drop=drop).update(quantity=0)
        return outcomes

    outcomes = in_one_batch(group_on_database, drop.pk, settle, claims_of(users))

    assert isinstance(outcomes.pop(1), IntegrityError)
    assert [type(outcome) for outcome in outcomes] == [Reservation] * 3 + [FullyReserved] * 2
    won = [outcome.user_id for outcome in outcomes[:3]]
    assert won == [users[0].pk, users[2].pk, users[3].pk]
    assert set(Reservation.objects.values_list("user", flat=True)) == set(won)
    assert audit_stock().differences == []


def test_a_lost_connection_fails_its_batch_and_the_next_one_works(group_on_database, caplog):
    caplog.set_level(logging.ERROR, "drops.group_commit")
    drop, users = DropFactory(total_stock=5), UserFactory.create_batch(5)

    @transaction.atomic
    def settle_without_commit(claims: dict[uuid.UUID, list[Claim]], *, wait: Wait) -> Any:
        outcomes = reserve_on_drops(claims, wait=wait)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        return outcomes

    settle = partial(in_one_batch, group_on_database, drop.pk)
    lost = settle(settle_without_commit, claims_of(users))
    assert [type(outcome) for outcome in lost] == [OperationalError] * 5
    assert not Reservation.objects.exists()

    repeated = settle(reserve_on_drops, claims_of(users))
    assert [outcome.is_new for outcome in repeated] == [True] * 5
    assert audit_stock().differences == []


def test_a_drop_that_another_transaction_has_locked_keeps_up_no_other(group_on_database):
    locked, free = DropFactory(total_stock=1), DropFactory(total_stock=1)
    users = UserFactory.create_batch(2)

    async def scene():
        (waits,) = await submit_all(
            group_on_database, reserve_on_drops, [Claim(users[0].pk)], locked.pk
        )
        (goes,) = await submit_all(
            group_on_database, reserve_on_drops, [Claim(users[1].pk)], free.pk
        )
        first = await goes
        assert not waits.done()
        await asyncio.to_thread(has_lock.set)
        return first, await waits

    has_lock = threading.Event()
    with locked_elsewhere(locked, until=has_lock):
        of_free, of_locked = play(scene)

    assert (of_free.drop_id, of_locked.drop_id) == (free.pk, locked.pk)
    assert audit_stock().differences == []


def test_a_lock_that_is_soon_free_is_waited_for_together(group_on_database, monkeypatch):
    locked, free = DropFactory(total_stock=1), DropFactory(total_stock=1)
    users = UserFactory.create_batch(2)
    # However slow the machine is, this moment is longer.
    longer = LOCK_DROPS[Wait.BRIEFLY].replace(f"{BRIEF_WAIT_MS}ms", "10s")
    monkeypatch.setitem(LOCK_DROPS, Wait.BRIEFLY, longer)
    batches = []

    def settle(batch: dict[uuid.UUID, list[Claim]], *, wait: Wait) -> Any:
        batches.append((set(batch), wait))
        return reserve_on_drops(batch, wait=wait)

    async def scene():
        tasks = []
        for drop, user in zip((locked, free), users, strict=True):
            tasks += await submit_all(group_on_database, settle, [Claim(user.pk)], drop.pk)
        await asyncio.to_thread(somebody_waits_for_a_lock)
        assert not any(task.done() for task in tasks)
        has_lock.set()
        return await asyncio.gather(*tasks)

    has_lock = threading.Event()
    with locked_elsewhere(locked, until=has_lock):
        outcomes = play(scene)

    assert [outcome.drop_id for outcome in outcomes] == [locked.pk, free.pk]
    assert batches == [({locked.pk}, Wait.BRIEFLY), ({free.pk}, Wait.BRIEFLY)]
    assert audit_stock().differences == []


def somebody_waits_for_a_lock() -> None:
    deadline = time.monotonic() + 10
    with closing(connection.copy()) as other, other.cursor() as cursor:
        while not is_anybody_waiting(cursor):
            assert time.monotonic() < deadline


@contextmanager
def locked_elsewhere(drop: Drop, until: threading.Event) -> Iterator[None]:
    """Keep the drop locked in another transaction until the event is set."""
    is_locked = threading.Event()

    def keep() -> None:
        with transaction.atomic():
            lock_drop(drop.pk)
            is_locked.set()
            until.wait(10)
        connection.close()

    thread = threading.Thread(target=keep)
    thread.start()
    assert is_locked.wait(10)
    try:
        yield
    finally:
        until.set()
        thread.join(10)
