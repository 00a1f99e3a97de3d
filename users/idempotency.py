"""Answer a repeated request with the first answer, once its effect is in the database."""

import hashlib
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from django.conf import settings
from django.db import OperationalError, connection, transaction
from django.http import HttpResponse
from psycopg.errors import LockNotAvailable
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response

from users.authentication import user_of
from users.exceptions import (
    IdempotencyInProgress,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
)
from users.models import IdempotencyKey

PRINTABLE_ASCII = re.compile(r"[\x20-\x7e]{1,255}")


def idempotent(action: Callable[..., Response]) -> Callable[..., HttpResponse]:
    """Make a viewset's POST answer an ``Idempotency-Key`` once.

    The key's row, the effect and the stored answer are one transaction. A refusal
    rolls all of it back and stores nothing: it had no effect, so it may run again.
    """

    @wraps(action)
    def wrapper(view: Any, request: Request, *args: Any, **kwargs: Any) -> HttpResponse:
        key = request.headers.get("Idempotency-Key")
        if key is None or request.user is None:
            return action(view, request, *args, **kwargs)
        if not PRINTABLE_ASCII.fullmatch(key):
            raise InvalidIdempotencyKey
        row = IdempotencyKey(
            user=user_of(request),
            route=f"{request.method} {request.path.rstrip('/')}",
            key=key,
            fingerprint=hashlib.sha256(request._request.body).hexdigest(),
        )
        with transaction.atomic():
            answer = claim_key(row)
            if answer is None:
                response = action(view, request, *args, **kwargs)
                store_answer(row, response)
                return response
        return HttpResponse(
            answer.body,
            status=answer.status,
            content_type="application/json",
            headers={"Idempotent-Replayed": "true"},
        )

    return wrapper


def claim_key(row: IdempotencyKey) -> IdempotencyKey | None:
    """Take the key for this transaction, or return the row with the first answer.

    Waits while another transaction holds the same key: it then replays that one's
    answer, or takes over if that one failed.

    Raises:
        IdempotencyInProgress: the other one did not end within the lock timeout.
        IdempotencyKeyReused: the first request had another body.
    """
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                # A key past its day counts as new; anything younger is left as it is.
                """
                INSERT INTO users_idempotencykey AS known
                    (user_id, route, key, fingerprint, body, created_at)
                VALUES (%s, %s, %s, %s, '', now())
                ON CONFLICT (user_id, route, key) DO UPDATE
                SET fingerprint = excluded.fingerprint, status = NULL, body = '',
                    created_at = excluded.created_at
                WHERE known.created_at < now() - make_interval(hours => %s)
                RETURNING id
                """,
                [
                    row.user_id,
                    row.route,
                    row.key,
                    row.fingerprint,
                    settings.IDEMPOTENCY_KEY_HOURS,
                ],
            )
            taken = cursor.fetchone()
    except OperationalError as exc:
        if isinstance(exc.__cause__, LockNotAvailable):
            raise IdempotencyInProgress from exc
        raise
    if taken:
        row.pk = taken[0]
        return None
    first = IdempotencyKey.objects.get(user=row.user_id, route=row.route, key=row.key)
    if first.fingerprint != row.fingerprint:
        raise IdempotencyKeyReused
    return first


def store_answer(row: IdempotencyKey, response: Response) -> None:
    """Keep the answer beside its effect, in the same transaction."""
    body = JSONRenderer().render(response.data).decode()
    IdempotencyKey.objects.filter(pk=row.pk).update(status=response.status_code, body=body)
