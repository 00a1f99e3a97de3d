"""Ways for a process to die at the worst moment; applied by ``tests.torture.nursery`` only.

They watch what the process does, its statements, its commits and its answers, so the product
needs no switches for them.
"""

import os
import re
import signal
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from config.asgi_types import Application, Receive, Scope, Send

# The statement by which a claim, a purchase or an expiry begins to exist.
EFFECT = re.compile(r"(INSERT INTO|UPDATE)\s+\"?(reservations_reservation|purchases_purchase)\"?")


class Failpoint:
    """Dies the ``number``-th time that the process gets to the point."""

    def __init__(self, number: int) -> None:
        self.left = number

    def reached(self) -> None:
        self.left -= 1
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def watch_transactions(
    *, half_done: Callable[[], None], before: Callable[[], None], after: Callable[[], None]
) -> None:
    """Call back within, before and after the commit of each transaction that has an effect."""
    effects: dict[int, int] = {}

    def watch(execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        key = id(context["connection"])
        if effects.get(key):
            half_done()
        result = execute(sql, params, many, context)
        if EFFECT.search(str(sql)):
            effects[key] = effects.get(key, 0) + 1
        return result

    def connected(connection: Any, **signal: Any) -> None:
        if watch not in connection.execute_wrappers:
            connection.execute_wrappers.append(watch)

    commit = BaseDatabaseWrapper._commit  # type: ignore[attr-defined]

    def watch_commit(self: Any) -> Any:
        had_effect = effects.pop(id(self), 0)
        if had_effect:
            before()
        result = commit(self)
        if had_effect:
            after()
        return result

    rollback = BaseDatabaseWrapper._rollback  # type: ignore[attr-defined]

    def watch_rollback(self: Any) -> Any:
        effects.pop(id(self), None)
        return rollback(self)

    # Kept alive: receivers are held weakly.
    connection_created.connect(connected, weak=False)
    patch.object(BaseDatabaseWrapper, "_commit", watch_commit).start()
    patch.object(BaseDatabaseWrapper, "_rollback", watch_rollback).start()


def nothing() -> None:
    pass


def mid_batch(point: Failpoint, application: Application) -> Application:
    watch_transactions(half_done=point.reached, before=nothing, after=nothing)
    return application


def before_commit(point: Failpoint, application: Application) -> Application:
    watch_transactions(half_done=nothing, before=point.reached, after=nothing)
    return application


def after_commit(point: Failpoint, application: Application) -> Application:
    watch_transactions(half_done=nothing, before=nothing, after=point.reached)
    return application


def before_answer(point: Failpoint, application: Application) -> Application:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_or_die(message: Any) -> None:
            if message.get("status") == 201:
                point.reached()
            await send(message)

        await application(scope, receive, send_or_die)

    return serve


# Each returns the application that is to be served.
FAILPOINTS: dict[str, Callable[[Failpoint, Application], Application]] = {
    "in the middle of a batch": mid_batch,
    "before the commit": before_commit,
    "between the commit and the publication": after_commit,
    "after the commit, before the answer": before_answer,
}
