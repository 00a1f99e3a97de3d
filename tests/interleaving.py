"""Two or three use cases on one drop at once, statement by statement in every order.

Each runs on a real connection of its own and is parked before every statement and every
commit; a scheduler says who goes on. Whoever then waits for a lock is found by
``pg_blocking_pids`` and left alone until it has it. Nothing else decides the order, so the same
choices give the same run again.

What must come out is what some order of the whole use cases, one after the other, gives:
the same answers and the same stock. And all invariants hold, and nobody deadlocks.
"""

import itertools
import random
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from typing import Any
from unittest.mock import patch

import psycopg
from django.db import connection
from django.test import override_settings
from rest_framework.exceptions import APIException

from config.problems import code_of
from drops.hot_claims import HotClaim
from drops.models import Drop, StockAdjustment
from drops.services import LOCK_DROPS, Wait, adjust_stock, create_drop
from purchases.audit import audit_stock
from purchases.models import Purchase
from purchases.services import purchase
from reservations.asgi import settle_reserves
from reservations.models import Reservation
from reservations.services import Claim, expire_due, release, reserve
from tests.clock import Clock, stopped_clock
from tests.concurrency import plain_parameters
from users.idempotency import Answer, make_key
from users.identity import Identity
from users.models import User

ACTORS = 3
POLL_SECONDS = 0.001
PATIENCE_SECONDS = 20
# Less than PostgreSQL's deadlock_timeout.
STRANGER_SECONDS = 0.7
TTL_SECONDS = 60
STOCK = 2
# Of another drop, which a batch takes along: all that matters there is who locks it when.
PLENTY = 10
KEY = "order-1"
WHO_IS_BLOCKED = "SELECT pid FROM unnest(%s::int[]) AS pid WHERE pg_blocking_pids(pid) <> '{}'"
WHO_IS_THERE = r"""
    SELECT pid, backend_type, state, wait_event_type, wait_event, pg_blocking_pids(pid),
           left(regexp_replace(query, '\s+', ' ', 'g'), 100)
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
# The drop as it was when it was made; its first event is that it was.
START_OVER = (
    "DELETE FROM purchases_purchase WHERE drop_id = %(drop)s",
    "DELETE FROM reservations_reservation WHERE drop_id = %(drop)s",
    "DELETE FROM drops_stockadjustment WHERE variant_id IN"
    " (SELECT id FROM drops_variant WHERE drop_id = %(drop)s)",
    "DELETE FROM realtime_event WHERE drop_id = %(drop)s AND seq > 1",
    "DELETE FROM users_idempotencykey WHERE key = %(key)s",
    """
    UPDATE drops_variant SET total_stock = %(stock)s, available_stock = %(stock)s, sold_stock = 0
    WHERE drop_id = %(drop)s
    """,
    """
    UPDATE drops_drop SET total_stock = %(stock)s, available_stock = %(stock)s, sold_stock = 0,
                          seq = 1, latest_purchasers = '[]'
    WHERE id = %(drop)s
    """,
)

Call = Callable[[], Any]
Choose = Callable[[list[int]], int]


class Stuck(AssertionError):
    """Nobody can go on: they wait for each other, or one of them for something unknown."""


class Actor(threading.Thread):
    """A thread with a connection; runs the calls it is given, pausing before each statement."""

    def __init__(self, changed: threading.Condition) -> None:
        super().__init__(daemon=True)
        self.changed = changed
        self.state = "starting"
        self.pid = 0
        self.call: Call | None = None
        # Set when nobody is there any more to say who goes on.
        self.is_over = False
        self.outcome: Any = None

    def run(self) -> None:
        try:
            with connection.cursor() as cursor:
                # Whoever waits for a lock shall wait until the scheduler lets go of it.
                cursor.execute("SET lock_timeout = 0")
                cursor.execute("SET idle_in_transaction_session_timeout = 0")
            self.pid = connection.connection.info.backend_pid
            commit = connection._commit

            def park_and_commit() -> None:
                self.park()
                commit()

            connection._commit = park_and_commit
            self.turn("idle", until="running")
            while self.call is not None:
                with connection.execute_wrapper(self.park_and_execute):
                    call = self.call
                    try:
                        self.outcome = call()
                    except Exception as exc:
                        self.outcome = exc
                if not self.is_over:
                    self.turn("done", until="running")
        finally:
            connection.__dict__.pop("_commit", None)
            connection.close()

    def park_and_execute(self, execute: Callable[..., Any], *args: Any) -> Any:
        self.park()
        return execute(*args)

    def park(self) -> None:
        if not self.is_over:
            self.turn("parked", until="running")

    def turn(self, state: str, until: str) -> None:
        with self.changed:
            self.state = state
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.state == until)

    def go(self) -> None:
        with self.changed:
            self.state = "running"
            self.changed.notify_all()


@dataclass
class Played:
    """A run: who went on at each step, who else could have, and what each one returned."""

    choices: list[int] = field(default_factory=list)
    enabled: list[list[int]] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)


class Stage:
    """Actors that wait for calls, and the session that watches them."""

    def __init__(self, actors: int = ACTORS) -> None:
        self.changed = threading.Condition()
        self.actors = [Actor(self.changed) for _ in range(actors)]

    def __enter__(self) -> "Stage":
        self.watcher = psycopg.connect(**plain_parameters(), autocommit=True)
        for actor in self.actors:
            actor.start()
        self._wait(lambda: all(actor.state == "idle" for actor in self.actors))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.watcher.close()
        for actor in self.actors:
            actor.is_over, actor.call = True, None
            actor.go()
        for actor in self.actors:
            actor.join(PATIENCE_SECONDS)

    def play(self, calls: list[Call], choose: Choose) -> Played:
        """Run ``calls`` at once; ``choose`` picks who goes on, of those who can.

        Raises:
            Stuck: they wait for each other.
        """
        played = Played()
        acting = self.actors[: len(calls)]
        for actor, call in zip(acting, calls, strict=True):
            actor.call = call
            actor.go()
        stuck = None
        moved = acting
        while enabled := self._enabled(acting, moved):
            choice = choose(enabled)
            played.enabled.append(enabled)
            played.choices.append(choice)
            moved = [acting[choice]]
            moved[0].go()
        if any(actor.state == "running" for actor in acting):
            there = "\n".join(map(str, self.watcher.execute(WHO_IS_THERE).fetchall()))
            stuck = Stuck(f"all wait for each other after {played.choices}:\n{there}")
            # The database ends it after a second, and the rest may run as it likes.
            while any(actor.state != "done" for actor in acting):
                self._wait(lambda: any(actor.state != "running" for actor in acting))
                for actor in acting:
                    if actor.state == "parked":
                        actor.go()
                if all(actor.state in ("done", "running") for actor in acting):
                    self._wait(lambda: all(actor.state != "running" for actor in acting))
        if stuck:
            raise stuck
        played.outcomes = [actor.outcome for actor in acting]
        return played

    def _enabled(self, acting: list[Actor], moved: list[Actor]) -> list[int]:
        """Wait until each is parked, done, or waits for a lock; return who is parked.

        Only those who ``moved`` are given a moment; the others wait for a lock as a rule.
        """
        looked_since = time.monotonic()
        for _ in range(int(PATIENCE_SECONDS / POLL_SECONDS)):
            self._pause_for(moved)
            running = self._running(acting)
            if not running:
                break
            blocked = self.watcher.execute(WHO_IS_BLOCKED, [[actor.pid for actor in running]])
            pids = {pid for (pid,) in blocked}
            # Between the two looks somebody may have got the lock.
            if all(actor.pid in pids and actor.state == "running" for actor in running):
                # Where nobody could go on, a stranger may have the lock, autovacuum for
                # instance, and give it back; those in a circle are still there then.
                is_anybody_parked = any(actor.state == "parked" for actor in acting)
                if is_anybody_parked or time.monotonic() - looked_since > STRANGER_SECONDS:
                    break
            moved = running
        else:
            raise Stuck("somebody neither goes on nor waits for a lock")
        return [number for number, actor in enumerate(acting) if actor.state == "parked"]

    def _pause_for(self, moved: list[Actor]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self._running(moved), POLL_SECONDS)

    def _running(self, acting: list[Actor]) -> list[Actor]:
        return [actor for actor in acting if actor.state == "running"]

    def _wait(self, is_reached: Callable[[], bool]) -> None:
        with self.changed:
            if not self.changed.wait_for(is_reached, PATIENCE_SECONDS):
                raise Stuck([actor.state for actor in self.actors])


# --- The world they act in --------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """Which use cases act, and whether the one hold there is has ended before they begin."""

    kinds: tuple[str, ...]
    is_overdue: bool = False

    def __str__(self) -> str:
        return "+".join(self.kinds) + (" on an overdue hold" if self.is_overdue else "")


Result = tuple[tuple[Any, ...], tuple[int, ...]]


class World:
    """Makes the drop of a scene, plays it, and judges what came out.

    Two units: one is held by ``holder``, one is available.
    """

    def __init__(self, stage: Stage, clock: Clock) -> None:
        self.stage = stage
        self.clock = clock
        mark = uuid.uuid4().hex[:8]
        names = ["holder", "keyed", "staff", *(f"new_{number}" for number in range(ACTORS))]
        self.users = dict(
            zip(
                names,
                User.objects.bulk_create(User(username=f"{n}_{mark}", password="") for n in names),
                strict=True,
            )
        )
        self.drop, self.other = (
            create_drop(
                self.users["staff"],
                name="Interleaved",
                price=Decimal("10.00"),
                total_stock=stock,
                status="live",
            )
            for stock in (STOCK, PLENTY)
        )
        self.size = self.drop.variants.get().pk
        self.played = 0
        self._to_reset: list[Drop] = []
        self._serial: dict[Scene, set[Result]] = {}

    def check(self, scene: Scene, choose: Choose) -> Played:
        """Play ``scene`` once.

        Raises:
            AssertionError: something came out that no serial order gives, or worse.
        """
        played, result = self._play(scene, choose)
        assert result in self.serial_results(scene), (
            f"{scene}, in the order {played.choices}: {result} comes of no serial order; "
            f"these do: {self.serial_results(scene)}"
        )
        return played

    def check_all(self, scene: Scene) -> int:
        """Play ``scene`` in every order there is; return how many there are."""
        count = 0
        unplayed: list[list[int]] = [[]]
        while unplayed:
            prefix = unplayed.pop()
            played = self.check(scene, follow(prefix))
            count += 1
            for step in range(len(prefix), len(played.choices)):
                for other in played.enabled[step]:
                    if other != played.choices[step]:
                        unplayed.append([*played.choices[:step], other])
        return count

    def check_seed(self, seed: int, only: Collection[Scene] = ()) -> Scene | None:
        """Play three use cases in one order, both drawn by ``seed``.

        Returns:
            The scene, or None where it is not among ``only`` and so was not played.
        """
        drawn = random.Random(seed)
        scene = drawn.choice(scenes(ACTORS))
        if only and scene not in only:
            return None
        try:
            self.check(scene, drawn.choice)
        except AssertionError as exc:
            raise AssertionError(f"interleaving seed {seed}: {exc}") from exc
        return scene

    def serial_results(self, scene: Scene) -> set[Result]:
        if scene not in self._serial:
            self._serial[scene] = set()
            for order in itertools.permutations(range(len(scene.kinds))):
                _, result = self._play(scene, one_after_the_other(order))
                self._serial[scene].add(result)
        return self._serial[scene]

    def _play(self, scene: Scene, choose: Choose) -> tuple[Played, Result]:
        self.played += 1
        hold = self._set_up(scene)
        calls = [self._call(kind, number, hold) for number, kind in enumerate(scene.kinds)]
        played = self.stage.play(calls, choose)
        problems = [outcome for outcome in played.outcomes if is_failure(outcome)]
        for drop in self._drops(scene):
            problems += audit_stock(drop.pk).differences
        assert not problems, f"{scene}, in the order {played.choices}: {problems}"
        self.drop.refresh_from_db()
        drop = self.drop
        stock = drop.total_stock, drop.available_stock, drop.held_stock, drop.sold_stock
        kinds = tuple(kind_of(outcome, drop.pk) for outcome in played.outcomes)
        return played, (kinds, stock)

    def _set_up(self, scene: Scene) -> Reservation:
        with connection.cursor() as cursor:
            # What a batch has held of the other drop must not end in the next scene.
            for drop in {*self._drops(scene), *self._to_reset}:
                stock = STOCK if drop == self.drop else PLENTY
                for statement in START_OVER:
                    cursor.execute(statement, {"drop": drop.pk, "key": KEY, "stock": stock})
        self._to_reset = self._drops(scene)
        hold = reserve(self.drop.pk, Claim(self.users["holder"].pk))
        if scene.is_overdue:
            self.clock.move_to(hold.expires_at)
        return hold

    def _drops(self, scene: Scene) -> list[Drop]:
        return [self.drop, self.other] if "batch" in scene.kinds else [self.drop]

    def _reserve_on_both_drops(self, user: User) -> Any:
        """Do what the group commit does."""
        claim = HotClaim(Identity(user.pk, None), None, Claim(user.pk))
        batch = {drop.pk: [claim] for drop in (self.drop, self.other)}
        settled = settle_reserves(batch, wait=Wait.BRIEFLY)
        assert settled[self.other.pk][0].status == 201
        return settled[self.drop.pk][0]

    def _call(self, kind: str, number: int, hold: Reservation) -> Call:
        drop, holder, keyed = self.drop, self.users["holder"], self.users["keyed"]
        newcomer = self.users[f"new_{number}"]
        if kind == "reserve":
            return lambda: reserve(drop.pk, Claim(newcomer.pk))
        if kind == "purchase":
            return lambda: purchase(drop.pk, holder.pk)
        if kind == "release":
            return lambda: release(hold.pk, holder)
        if kind == "expire":
            return expire_due
        if kind == "adjust":
            staff = self.users["staff"]
            return lambda: adjust_stock(self.size, -1, reason="count", user=staff)
        if kind == "retry":
            # One request that its sender repeats: every actor of this kind sends the same.
            path = f"/api/drops/{drop.pk}/reserve"
            request = HotClaim(
                Identity(keyed.pk, None),
                make_key(keyed.pk, "POST", path, KEY, b""),
                Claim(keyed.pk),
            )
            return lambda: settle_reserves({drop.pk: [request]}, wait=Wait.AS_LONG_AS_IT_TAKES)[
                drop.pk
            ][0]
        if kind == "batch":
            return lambda: self._reserve_on_both_drops(newcomer)
        assert kind == "deadline"
        return lambda: self.clock.move_to(hold.expires_at)


def is_failure(outcome: Any) -> bool:
    """Say whether a use case ended in a way that nobody may see, a deadlock for one."""
    return isinstance(outcome, Exception) and not isinstance(outcome, APIException)


def kind_of(outcome: Any, drop_id: uuid.UUID) -> Any:
    """Return what an outcome says of this drop, without what is different each time."""
    if isinstance(outcome, APIException):
        return code_of(outcome)
    if isinstance(outcome, Reservation):
        return outcome.status, outcome.is_new
    if isinstance(outcome, Purchase):
        return outcome.status, outcome.is_new
    if isinstance(outcome, Answer):
        return outcome.status, outcome.is_replayed
    if isinstance(outcome, StockAdjustment):
        return outcome.delta
    if isinstance(outcome, list):
        # A sweep is a transaction for each drop, so between two of them others may act.
        return sum(len(holds.reservation_ids) for holds in outcome if holds.drop_id == drop_id)
    return None


def follow(prefix: list[int]) -> Choose:
    """Return a choice that repeats ``prefix`` and then lets the first go on who can."""
    step = itertools.count()

    def choose(enabled: list[int]) -> int:
        number = next(step)
        return prefix[number] if number < len(prefix) else enabled[0]

    return choose


def one_after_the_other(order: tuple[int, ...]) -> Choose:
    return lambda enabled: next(number for number in order if number in enabled)


KINDS = ("reserve", "purchase", "release", "expire", "adjust", "retry", "batch", "deadline")


@cache
def scenes(actors: int) -> list[Scene]:
    """Return all scenes of so many actors; the deadline passes once at most."""
    drawn = itertools.combinations_with_replacement(KINDS, actors)
    return [
        Scene(kinds, is_overdue)
        for kinds in drawn
        if kinds.count("deadline") <= 1
        for is_overdue in (False, True)
        # Neither would differ from the same without an overdue hold.
        if not (is_overdue and {"deadline", "batch"} & set(kinds))
    ]


@contextmanager
def world() -> Iterator[World]:
    """Open a stage on a stopped clock."""
    with ExitStack() as stack:
        stack.enter_context(
            override_settings(CREATE_UNKNOWN_USERS=False, RESERVATION_TTL_SECONDS=TTL_SECONDS)
        )
        # How long a moment is depends on the machine, and orders must be the same everywhere.
        waits = {Wait.BRIEFLY: LOCK_DROPS[Wait.AS_LONG_AS_IT_TAKES]}
        stack.enter_context(patch.dict(LOCK_DROPS, waits))
        clock = stack.enter_context(stopped_clock())
        yield World(stack.enter_context(Stage()), clock)
