"""Answer a repeated request with the first answer, once its effect is in the database."""

import hashlib
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from django.conf import settings
from django.db import OperationalError, connection, transaction
from django.db.models import Q
from django.http import HttpResponse
from psycopg.errors import LockNotAvailable
from rest_framework.exceptions import APIException
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from config.problems import Refusal
from users.authentication import user_of
from users.exceptions import (
    IdempotencyInProgress,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    UnknownUser,
)
from users.models import IdempotencyKey

ROUTE_LENGTH = 200
SHORT_WAIT_MS = 10
PRINTABLE_ASCII = re.compile(r"[\x20-\x7e]{1,255}")


@dataclass(frozen=True, slots=True)
class Key:
    """An ``Idempotency-Key`` with the request that it came with."""

    user_id: uuid.UUID
    route: str
    key: str
    fingerprint: str

    @property
    def identity(self) -> tuple[uuid.UUID, str, str]:
        """What may exist once; the fingerprint only says whether it is the same request."""
        return self.user_id, self.route, self.key


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with, if it had an effect."""

    status: int
    body: str
    is_replayed: bool = False
    # For the request's line; of an answer from an earlier request nobody looks it up.
    reservation_id: uuid.UUID | None = None


def make_key(user_id: uuid.UUID, method: str, path: str, key: str, body: bytes) -> Key:
    """Return the key of a request.

    Raises:
        InvalidIdempotencyKey: not 1 to 255 printable ASCII characters.
    """
    check_key(key)
    # Addresses that can't exist, too long or with a NUL, must still fit into the column.
    route = f"{method} {path.rstrip('/')}".replace("\0", "")[:ROUTE_LENGTH]
    return Key(user_id, route, key, hashlib.sha256(body).hexdigest())


def check_key(key: str) -> None:
    if not PRINTABLE_ASCII.fullmatch(key):
        raise InvalidIdempotencyKey


def idempotent(action: Callable[..., Response]) -> Callable[..., HttpResponse]:
    """Make a viewset's POST answer an ``Idempotency-Key`` once.

    The key's row, the effect and the stored answer are one transaction. A refusal
    rolls all of it back and stores nothing: it had no effect, so it may run again.
    """

    @wraps(action)
    def wrapper(view: Any, request: Request, *args: Any, **kwargs: Any) -> HttpResponse:
        given = request.headers.get("Idempotency-Key")
        if given is not None:
            check_key(given)
        if given is None or request.user is None:
            return action(view, request, *args, **kwargs)
        key = make_key(
            user_of(request).pk, str(request.method), request.path, given, request._request.body
        )
        with transaction.atomic():
            answer = claim_keys([key])[0]
            if answer is None:
                response = action(view, request, *args, **kwargs)
                body = JSONRenderer().render(response.data).decode()
                store_answers([(key, Answer(response.status_code, body))])
                return response
        if isinstance(answer, Exception):
            raise answer
        return HttpResponse(
            answer.body,
            status=answer.status,
            content_type="application/json",
            headers={"Idempotent-Replayed": "true"},
        )

    return wrapper


Settle = Callable[[list[int], dict[int, Answer | APIException]], list[Answer | APIException]]


def answer_once(
    keys: Sequence[Key | None],
    settle: Settle,
    *,
    may_wait: bool = True,
) -> list[Answer | APIException]:
    """Settle several requests in one transaction, each at most once for its key.

    Args:
        keys: one per request, None for a request without; no key twice.
        settle: answers the requests with these indexes, in this order; given also what the
            keys of the others have answered.
        may_wait: for a request with one of the keys that is still in flight.
    Returns:
        One answer or refusal per request.
    Raises:
        IdempotencyInProgress: such a request did not end in time.
    """
    keyed = {index: key for index, key in enumerate(keys) if key is not None}
    if not keyed:
        # The transaction of ``settle`` itself will do, without a savepoint in another one.
        return settle(list(range(len(keys))), {})
    return _answer_keyed(keyed, len(keys), settle, may_wait)


@transaction.atomic
def _answer_keyed(
    keyed: dict[int, Key],
    count: int,
    settle: Settle,
    may_wait: bool,
) -> list[Answer | APIException]:
    if not may_wait:
        with connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = {SHORT_WAIT_MS}")
    found = zip(keyed, claim_keys(list(keyed.values())), strict=True)
    if not may_wait:
        with connection.cursor() as cursor:
            # That was for the keys: a drop may be locked for longer.
            cursor.execute("SET LOCAL lock_timeout TO DEFAULT")
    answers: dict[int, Answer | APIException] = {
        index: answer for index, answer in found if answer is not None
    }
    new = [index for index in range(count) if index not in answers]
    settled = dict(zip(new, settle(new, answers), strict=True))
    fresh = [(key, settled[index]) for index, key in keyed.items() if index in settled]
    store_answers([(key, answer) for key, answer in fresh if isinstance(answer, Answer)])
    give_back_keys([key for key, answer in fresh if not isinstance(answer, Answer)])
    answers |= settled
    return [answers[index] for index in range(count)]


def claim_keys(keys: Sequence[Key]) -> list[Answer | Refusal | None]:
    """Take ``keys``, all different, for this transaction; to be called before any other lock.

    Waits while another transaction holds one of them: it then finds that one's answer, or
    takes over if that one failed.

    Returns:
        Per key: None where it is taken now, else the first request's answer, or a
        refusal: that request had another body, or there is no such user.
    Raises:
        IdempotencyInProgress: another transaction did not end within the lock timeout.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                # Everybody takes several keys in the same order, so nobody waits in a circle.
                # A key past its day counts as new; anything younger is left as it is. Users
                # who don't exist get no key, instead of failing the others' statement.
                """
                INSERT INTO users_idempotencykey AS known
                    (user_id, route, key, fingerprint, body, created_at)
                SELECT given.user_id, route, key, fingerprint, '', now()
                FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[])
                    AS given(user_id, route, key, fingerprint)
                JOIN users_user ON users_user.id = given.user_id AND users_user.is_active
                ORDER BY 1, 2, 3
                ON CONFLICT (user_id, route, key) DO UPDATE
                SET fingerprint = excluded.fingerprint, status = NULL, body = '',
                    created_at = excluded.created_at
                WHERE known.created_at < now() - make_interval(hours => %s)
                RETURNING user_id, route, key
                """,
                [
                    [key.user_id for key in keys],
                    [key.route for key in keys],
                    [key.key for key in keys],
                    [key.fingerprint for key in keys],
                    settings.IDEMPOTENCY_KEY_HOURS,
                ],
            )
            taken = set(cursor.fetchall())
    except OperationalError as exc:
        if isinstance(exc.__cause__, LockNotAvailable):
            raise IdempotencyInProgress from exc
        raise
    known = {} if len(taken) == len(keys) else _read_answers(keys)
    return [
        None if key.identity in taken else _first_answer(known.get(key.identity), key)
        for key in keys
    ]


def store_answers(answers: Sequence[tuple[Key, Answer]]) -> None:
    """Keep each answer beside its effect, in the same transaction."""
    if not answers:
        return
    with connection.cursor() as cursor:
        cursor.execute(
            """
            UPDATE users_idempotencykey AS known
            SET status = given.status, body = given.body
            FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::int[], %s::text[])
                AS given(user_id, route, key, status, body)
            WHERE (known.user_id, known.route, known.key)
                  = (given.user_id, given.route, given.key)
            """,
            [
                [key.user_id for key, _ in answers],
                [key.route for key, _ in answers],
                [key.key for key, _ in answers],
                [answer.status for _, answer in answers],
                [answer.body for _, answer in answers],
            ],
        )


def give_back_keys(keys: Sequence[Key]) -> None:
    """Forget keys that this transaction took for requests without an effect."""
    if keys:
        IdempotencyKey.objects.filter(_are(keys)).delete()


def prune_keys(limit: int) -> int:
    """Delete at most ``limit`` keys whose time is up; return how many.

    Such a key counts as new, so nobody misses it. One that a request is about to renew is
    locked, and left alone.
    """
    with connection.cursor() as cursor:
        cursor.execute(
            """
            DELETE FROM users_idempotencykey
            WHERE id IN (
                SELECT id FROM users_idempotencykey
                WHERE created_at < now() - make_interval(hours => %s)
                ORDER BY created_at LIMIT %s
                FOR UPDATE SKIP LOCKED
            )
            """,
            [settings.IDEMPOTENCY_KEY_HOURS, limit],
        )
        return cursor.rowcount


def _read_answers(keys: Sequence[Key]) -> dict[tuple[uuid.UUID, str, str], IdempotencyKey]:
    rows = IdempotencyKey.objects.filter(_are(keys), user__is_active=True)
    return {(row.user_id, row.route, row.key): row for row in rows}


def _are(keys: Sequence[Key]) -> Q:
    condition = Q()
    for key in keys:
        condition |= Q(user_id=key.user_id, route=key.route, key=key.key)
    return condition


def _first_answer(first: IdempotencyKey | None, key: Key) -> Answer | Refusal:
    if first is None:
        return UnknownUser()
    if first.fingerprint != key.fingerprint:
        return IdempotencyKeyReused()
    return Answer(first.status or 0, first.body, is_replayed=True)
