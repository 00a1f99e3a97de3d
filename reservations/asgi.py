"""``POST /api/drops/{id}/reserve`` on the hot path; see ``config.hot_routes``."""

import re
import uuid
from typing import Any

import orjson
from rest_framework.exceptions import APIException

from config.hot_routes import (
    FallThrough,
    HotAnswer,
    HotRequest,
    Route,
    drop_id_of,
    json_object,
    problem_answer,
)
from config.serializers import LARGEST_INTEGER
from drops.currencies import format_amount
from drops.exceptions import format_instant
from drops.group_commit import GroupCommit
from drops.hot_claims import HotClaim, admit, key_of, settle_claims, settle_in_batch
from drops.services import Wait
from reservations.memory import ShortageMemory
from reservations.models import Reservation, ReservationStatus
from reservations.services import Claim, reserve_on_drops
from users.idempotency import Answer
from users.identity import Identity


class ReserveEndpoint:
    """Reserve in batches; refuse from memory while there is nothing to give."""

    def __init__(self, group: GroupCommit) -> None:
        self.group = group
        self.memory = ShortageMemory()

    def route(self) -> Route:
        pattern = re.compile(r"/api/drops/([^/]+)/reserve/?")
        return Route("/api/drops/{id}/reserve", "POST", pattern, self, methods="POST, OPTIONS")

    async def __call__(self, request: HotRequest) -> HotAnswer:
        drop_id = drop_id_of(request)
        identity = await admit(request, "reserve")
        claim = read_claim(request, identity)
        key = key_of(request, identity)
        if refusal := self.memory.refusal(drop_id, claim, may_be_repeat=key is not None):
            return refusal.answer(request.request_id)
        outcome = await settle_in_batch(
            request, self.group, drop_id, settle_reserves, HotClaim(identity, key, claim)
        )
        if isinstance(outcome, APIException):
            self.memory.learn(drop_id, outcome)
            return problem_answer(outcome, request.request_id)
        return outcome


def read_claim(request: HotRequest, identity: Identity) -> Claim:
    """Return the claim of a well-formed body.

    Raises:
        FallThrough: the viewset must say what is wrong with the body.
    """
    body = json_object(request)
    if not body:
        return Claim(identity.user_id)
    if body.keys() - {"variant", "quantity"}:
        raise FallThrough
    quantity = body.get("quantity", 1)
    if type(quantity) is not int or not 1 <= quantity <= LARGEST_INTEGER:
        raise FallThrough
    if "variant" not in body:
        return Claim(identity.user_id, None, quantity)
    try:
        return Claim(identity.user_id, uuid.UUID(body["variant"]), quantity)
    except (ValueError, TypeError, AttributeError):
        raise FallThrough from None


def settle_reserves(
    batch: dict[uuid.UUID, list[HotClaim]], *, wait: Wait
) -> dict[uuid.UUID, list[Answer | APIException]]:
    return settle_claims(batch, reserve_on_drops, encode, wait=wait)


def encode(reservation: Reservation) -> Answer:
    """Return the answer with a hold: what ``ReservationSerializer`` says, without its cost."""
    body = orjson.dumps(represent(reservation)).decode()
    status = 201 if reservation.is_new else 200
    return Answer(status, body, reservation_id=reservation.pk)


def represent(reservation: Reservation) -> dict[str, Any]:
    drop = reservation.drop
    left = (reservation.expires_at - reservation.read_at).total_seconds()
    is_active = reservation.status == ReservationStatus.ACTIVE
    return {
        "id": reservation.pk,
        "drop_id": reservation.drop_id,
        "variant_id": reservation.variant_id,
        "user_id": reservation.user_id,
        "quantity": reservation.quantity,
        "unit_price": format_amount(reservation.unit_price, reservation.currency),
        "currency": reservation.currency,
        "status": reservation.status,
        "created_at": format_instant(reservation.created_at),
        "expires_at": format_instant(reservation.expires_at),
        "expires_in": round(max(0.0, left), 3) if is_active else 0.0,
        "drop": {
            "id": drop.pk,
            "name": drop.name,
            "available_stock": drop.available_stock,
        },
    }
