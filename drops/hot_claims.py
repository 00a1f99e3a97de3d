"""What the hot endpoints of reserve and purchase share: from the request to its batch."""

import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from django.conf import settings
from django.db import transaction
from rest_framework.exceptions import APIException, NotFound

from config.hot_routes import FallThrough, HotAnswer, HotRequest
from config.origins import may_be_forged
from config.rate_limits import rate_limits
from drops.group_commit import GroupCommit, Settle
from drops.services import Wait
from users.authentication import ADMITTED
from users.exceptions import IdempotencyInProgress, InvalidIdempotencyKey, UnknownUser
from users.idempotency import Answer, Key, answer_once, make_key
from users.identity import Identity, create_users, identify
from users.models import User
from users.replays import refuse_replay_soon

# When this process last saw to it that a user exists; forgotten all at once when full.
MAX_KNOWN_USERS = 100_000
_made_at: dict[uuid.UUID, float] = {}
# How long that is believed; ``seed`` may have deleted everybody meanwhile.
MADE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class HotClaim:
    """Who wants what, with the key that makes a repeat safe."""

    identity: Identity
    key: Key | None
    claim: Any


async def admit(request: HotRequest, action: str) -> Identity:
    """Return who is asking, if not too often.

    Raises:
        FallThrough: nobody says so, or perhaps a page of another site.
        InvalidIdentity: it can't be read or is not proven, or was used before.
        RateLimited: this user, or this address, asked too often.
    """
    asking = request.asking()
    identity = identify(asking)
    if identity is None or may_be_forged(asking.header):
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
        return _settle(batch, settle_many, encode, wait=wait)
    if settings.DEBUG or settings.MAX_ACTIVE_HOLDS:
        # Most of a development system's users are new. And who is made by somebody else in the
        # middle of a batch was not there to be locked, so that two batches would each give a hold.
        _make_users(claim.identity for claims in batch.values() for claim in claims)
    try:
        return _settle(batch, settle_many, encode, wait=wait, refuse_new=False)
    except NewUsers as exc:
        # Nothing was committed: all are settled again, in the order in which they came.
        _make_users(exc.identities)
        return _settle(batch, settle_many, encode, wait=wait)


class NewUsers(Exception):
    """Some of a batch are no users yet; elsewhere than in development, hardly anybody."""

    def __init__(self, identities: Sequence[Identity]) -> None:
        super().__init__(identities)
        self.identities = identities


def _settle(
    batch: dict[uuid.UUID, list[HotClaim]],
    settle_many: SettleMany,
    encode: Callable[[Any], Answer],
    *,
    wait: Wait,
    refuse_new: bool = True,
) -> dict[uuid.UUID, list[Answer | APIException]]:
    """Settle one batch.

    Raises:
        NewUsers: there are some, and ``refuse_new`` says not to refuse them. Nothing is changed.
        IdempotencyInProgress: a key is in use; a batch of one has waited for it.
    """
    requests = [(drop_id, claim) for drop_id, claims in batch.items() for claim in claims]

    def settle(indexes: list[int], by_keys: dict[int, Answer | APIException]) -> list[Any]:
        claims: dict[uuid.UUID, list[Any]] = {}
        identities: dict[uuid.UUID, list[Identity]] = {}
        for index in indexes:
            drop_id, request = requests[index]
            claims.setdefault(drop_id, []).append(request.claim)
            identities.setdefault(drop_id, []).append(request.identity)
        with transaction.atomic(savepoint=False):
            outcomes = settle_many(claims, wait=wait)
            for drop_id in claims.keys() - outcomes.keys():
                outcomes[drop_id] = (
                    [LEFT_OUT] * len(claims[drop_id])
                    if wait is Wait.NOT
                    else _no_such_drop(identities[drop_id])
                )
            if not refuse_new:
                # Who is no user yet got no key either, and was refused for that already.
                answered = [(requests[index][1].identity, by_keys[index]) for index in by_keys]
                for drop_id, of_drop in outcomes.items():
                    answered += zip(identities[drop_id], of_drop, strict=True)
                if new := _new_users(answered):
                    raise NewUsers(new)
        # After the commit: the drops are free again.
        answers = {
            drop_id: iter(
                [
                    one if one is LEFT_OUT or isinstance(one, APIException) else encode(one)
                    for one in of_drop
                ]
            )
            for drop_id, of_drop in outcomes.items()
        }
        return [next(answers[requests[index][0]]) for index in indexes]

    keys = [request.key for _, request in requests]
    # A key is waited for where that keeps up nobody else.
    may_wait = wait is Wait.AS_LONG_AS_IT_TAKES and len(requests) == 1
    try:
        settled = iter(answer_once(keys, settle, may_wait=may_wait))
    except IdempotencyInProgress:
        if wait is Wait.AS_LONG_AS_IT_TAKES:
            raise
        return {}
    answers = {drop_id: [next(settled) for _ in claims] for drop_id, claims in batch.items()}
    return {pk: of_drop for pk, of_drop in answers.items() if LEFT_OUT not in of_drop}


def _new_users(outcomes: Iterable[tuple[Identity, Any]]) -> list[Identity]:
    """Return who was refused for being no user yet."""
    return [
        identity
        for identity, outcome in outcomes
        if isinstance(outcome, UnknownUser) and not _was_just_made(identity)
    ]


def _no_such_drop(identities: Sequence[Identity]) -> list[APIException]:
    """Say so, or that there is no such user: who asks comes first, as everywhere."""
    users = User.objects.filter(pk__in=[one.user_id for one in identities], is_active=True)
    known = set(users.values_list("pk", flat=True))
    return [NotFound() if one.user_id in known else UnknownUser() for one in identities]


def _make_users(identities: Iterable[Identity]) -> None:
    """Make those users that this process hasn't made already; committed before the batch."""
    now = time.monotonic()
    new = {identity for identity in identities if not _was_just_made(identity)}
    if new:
        create_users(new)
        if len(_made_at) > MAX_KNOWN_USERS:
            _made_at.clear()
        _made_at.update((identity.user_id, now) for identity in new)


def _was_just_made(identity: Identity) -> bool:
    """Say whether a refusal means that staff switched the user off, and not that it is new."""
    return time.monotonic() - _made_at.get(identity.user_id, float("-inf")) < MADE_SECONDS
