"""What the hot endpoints of reserve and purchase share: from the request to its batch."""

import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from django.conf import settings
from rest_framework.exceptions import APIException, NotFound

from config.hot_routes import FallThrough, HotAnswer, HotRequest
from config.rate_limits import rate_limits
from drops.group_commit import GroupCommit, Settle
from drops.services import Wait
from users.authentication import ADMITTED
from users.exceptions import IdempotencyInProgress, InvalidIdempotencyKey, UnknownUser
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
    request.record.user_id = identity.user_id
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
    request: HotRequest,
    group: GroupCommit,
    drop_id: uuid.UUID,
    settle: Settle,
    claim: HotClaim,
) -> HotAnswer | APIException:
    """Return the answer of the batch that ``claim`` went out with, or its refusal."""
    batch_key: Hashable | None = claim.key.identity if claim.key else None
    answer = await group.submit(drop_id, settle, claim, batch_key)
    if isinstance(answer, APIException):
        return answer
    request.record.reservation_id = answer.reservation_id
    replayed = ((b"idempotent-replayed", b"true"),) if answer.is_replayed else ()
    code = "replayed" if replayed else "created" if answer.status == 201 else "repeated"
    return HotAnswer(answer.status, answer.body.encode(), replayed, code=code)


# Stands for the answer to a claim on a drop that somebody else keeps locked.
LEFT_OUT: Any = object()


class SettleMany(Protocol):
    """``reserve_on_drops`` or ``purchase_on_drops``."""

    def __call__(
        self, claims: dict[uuid.UUID, list[Any]], /, *, wait: Wait
    ) -> dict[uuid.UUID, list[Any]]: ...


def settle_claims(
    batch: dict[uuid.UUID, list[HotClaim]],
    settle_many: SettleMany,
    encode: Callable[[Any], Answer],
    *,
    wait: Wait,
) -> dict[uuid.UUID, list[Answer | APIException]]:
    """Settle one batch: its users, its keys, the claims and the answers, in a thread."""
    if not settings.CREATE_UNKNOWN_USERS:
        return _settle_known(batch, settle_many, encode, wait=wait)
    if settings.DEBUG:
        _make_unknown_users([claim for claims in batch.values() for claim in claims])
        return _settle_known(batch, settle_many, encode, wait=wait)
    # Outside development almost nobody is new, so only who turned out to be costs anything.
    answers = _settle_known(batch, settle_many, encode, wait=wait)
    new = {
        drop_id: [
            claim
            for claim, answer in zip(batch[drop_id], of_drop, strict=True)
            if isinstance(answer, UnknownUser)
        ]
        for drop_id, of_drop in answers.items()
    }
    new = {drop_id: claims for drop_id, claims in new.items() if claims}
    if new:
        create_users([claim.identity for claims in new.values() for claim in claims])
        # It waits for the drops' locks: what was settled already can't be left out any more.
        to_the_end = _settle_known(new, settle_many, encode, wait=Wait.AS_LONG_AS_IT_TAKES)
        for drop_id, of_drop in to_the_end.items():
            settled = iter(of_drop)
            answers[drop_id] = [
                next(settled) if isinstance(answer, UnknownUser) else answer
                for answer in answers[drop_id]
            ]
    return answers


def _settle_known(
    batch: dict[uuid.UUID, list[HotClaim]],
    settle_many: SettleMany,
    encode: Callable[[Any], Answer],
    *,
    wait: Wait,
) -> dict[uuid.UUID, list[Answer | APIException]]:
    may_wait = wait is Wait.AS_LONG_AS_IT_TAKES
    requests = [(drop_id, claim) for drop_id, claims in batch.items() for claim in claims]

    def settle(indexes: list[int]) -> list[Any]:
        claims: dict[uuid.UUID, list[Any]] = {}
        identities: dict[uuid.UUID, list[Identity]] = {}
        for index in indexes:
            drop_id, request = requests[index]
            claims.setdefault(drop_id, []).append(request.claim)
            identities.setdefault(drop_id, []).append(request.identity)
        outcomes = settle_many(claims, wait=wait)
        answers = {
            drop_id: iter(
                [
                    outcome if isinstance(outcome, APIException) else encode(outcome)
                    for outcome in of_drop
                ]
            )
            for drop_id, of_drop in outcomes.items()
        }
        for drop_id in claims.keys() - answers.keys():
            if wait is Wait.NOT:
                answers[drop_id] = iter([LEFT_OUT] * len(claims[drop_id]))
            else:
                answers[drop_id] = iter(_no_such_drop(identities[drop_id]))
        return [next(answers[requests[index][0]]) for index in indexes]

    try:
        keys = [request.key for _, request in requests]
        settled = iter(answer_once(keys, settle, may_wait=may_wait))
    except IdempotencyInProgress:
        if may_wait:
            raise
        return {}  # A key is waited for where that keeps up nobody else.
    answers = {drop_id: [next(settled) for _ in claims] for drop_id, claims in batch.items()}
    return {pk: of_drop for pk, of_drop in answers.items() if LEFT_OUT not in of_drop}


def _no_such_drop(identities: Sequence[Identity]) -> list[APIException]:
    """Say so, or that there is no such user: who asks comes first, as everywhere."""
    users = User.objects.filter(pk__in=[one.user_id for one in identities], is_active=True)
    known = set(users.values_list("pk", flat=True))
    return [NotFound() if one.user_id in known else UnknownUser() for one in identities]


def _make_unknown_users(requests: Sequence[HotClaim]) -> None:
    """Make the users of a development system; committed before the batch needs them."""
    unknown = {request.identity for request in requests}
    unknown = {identity for identity in unknown if identity.user_id not in _known_users}
    if unknown:
        create_users(unknown)
        if len(_known_users) > MAX_KNOWN_USERS:
            _known_users.clear()
        _known_users.update(identity.user_id for identity in unknown)
