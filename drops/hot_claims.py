"""What the hot endpoints of reserve and purchase share: from the request to its batch."""

import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from rest_framework.exceptions import APIException, NotFound

from config.hot_routes import FallThrough, HotAnswer, HotRequest
from config.rate_limits import rate_limits
from drops.group_commit import GroupCommit
from drops.models import Drop
from users.authentication import ADMITTED
from users.exceptions import InvalidIdempotencyKey, UnknownUser
from users.idempotency import Answer, Key, answer_once, make_key
from users.identity import Identity, create_users, identify
from users.models import User
from users.replays import refuse_replay_soon

# Users that this process has made or found, in development; forgotten all at once when full.
MAX_KNOWN_USERS = 100_000
_known_users: set[uuid.UUID] = set()


@dataclass(frozen=True, slots=True)
class HotClaim:
    """Who wants what, with the key that makes a repeat safe."""

    identity: Identity
    key: Key | None
    claim: Any


async def admit(request: HotRequest, action: str) -> Identity:
    """Return who is asking, if not too often.

    Raises:
        FallThrough: nobody says so.
        InvalidIdentity: it can't be read or is not proven, or was used before.
        RateLimited: this user, or this address, asked too often.
    """
    identity = identify(request.asking())
    if identity is None:
        raise FallThrough
    if identity.signature is not None:
        await refuse_replay_soon(identity)
    request.answer_headers = await rate_limits().check_soon(
        action, identity.user_id, request.client_address
    )
    # A viewset that the request is passed on to must neither refuse nor count it again.
    request.scope[ADMITTED] = identity, request.answer_headers
    return identity


def key_of(request: HotRequest, identity: Identity) -> Key | None:
    """Return the key that makes a repeat safe, if the request has one.

    Raises:
        FallThrough: it has one that is not allowed.
    """
    given = request.header(b"idempotency-key")
    if given is None:
        return None
    try:
        return make_key(identity.user_id, request.method, request.path, given, request.body)
    except InvalidIdempotencyKey:
        raise FallThrough from None


async def settle_in_batch(
    group: GroupCommit,
    drop_id: uuid.UUID,
    settle: Callable[[uuid.UUID, Sequence[HotClaim]], list[Any]],
    claim: HotClaim,
) -> HotAnswer | APIException:
    """Return the answer of the batch that ``claim`` went out with, or its refusal."""
    batch_key: Hashable | None = claim.key.identity if claim.key else None
    answer = await group.submit(drop_id, settle, claim, batch_key)
    if isinstance(answer, APIException):
        return answer
    replayed = ((b"idempotent-replayed", b"true"),) if answer.is_replayed else ()
    return HotAnswer(answer.status, answer.body.encode(), replayed)


def settle_claims(
    drop_id: uuid.UUID,
    requests: Sequence[HotClaim],
    settle_many: Callable[[uuid.UUID, list[Any]], list[Any]],
    encode: Callable[[Any], Answer],
) -> list[Answer | APIException]:
    """Settle one batch: its users, its keys, the claims and the answers, in a thread."""
    if not settings.CREATE_UNKNOWN_USERS:
        return _settle_known(drop_id, requests, settle_many, encode)
    if settings.DEBUG:
        _make_unknown_users(requests)
    answers = _settle_known(drop_id, requests, settle_many, encode)
    # Outside development almost nobody is new, so only who turned out to be costs anything.
    new = [index for index, answer in enumerate(answers) if isinstance(answer, UnknownUser)]
    if new and not settings.DEBUG:
        create_users([requests[index].identity for index in new])
        again = _settle_known(drop_id, [requests[index] for index in new], settle_many, encode)
        for index, answer in zip(new, again, strict=True):
            answers[index] = answer
    return answers


def _settle_known(
    drop_id: uuid.UUID,
    requests: Sequence[HotClaim],
    settle_many: Callable[[uuid.UUID, list[Any]], list[Any]],
    encode: Callable[[Any], Answer],
) -> list[Answer | APIException]:
    def settle(indexes: list[int]) -> list[Answer | APIException]:
        outcomes = settle_many(drop_id, [requests[index].claim for index in indexes])
        return [
            outcome if isinstance(outcome, APIException) else encode(outcome)
            for outcome in outcomes
        ]

    try:
        return answer_once([request.key for request in requests], settle)
    except Drop.DoesNotExist:
        # Who asks comes first, as everywhere.
        users = User.objects.filter(pk__in=[r.identity.user_id for r in requests], is_active=True)
        known = set(users.values_list("pk", flat=True))
        return [NotFound() if r.identity.user_id in known else UnknownUser() for r in requests]


def _make_unknown_users(requests: Sequence[HotClaim]) -> None:
    """Make the users of a development system; committed before the batch needs them."""
    unknown = {request.identity for request in requests}
    unknown = {identity for identity in unknown if identity.user_id not in _known_users}
    if unknown:
        create_users(unknown)
        if len(_known_users) > MAX_KNOWN_USERS:
            _known_users.clear()
        _known_users.update(identity.user_id for identity in unknown)
