"""``POST /api/drops/{id}/purchase`` on the hot path; see ``config.hot_routes``."""

import re
import uuid

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
from drops.currencies import format_amount
from drops.exceptions import format_instant
from drops.group_commit import GroupCommit
from drops.hot_claims import HotClaim, admit, key_of, settle_claims, settle_in_batch
from drops.services import Wait
from purchases.models import Purchase
from purchases.services import purchase_on_drops
from users.idempotency import Answer


class PurchaseEndpoint:
    """Purchase in batches."""

    def __init__(self, group: GroupCommit) -> None:
        self.group = group

    def route(self) -> Route:
        pattern = re.compile(r"/api/drops/([^/]+)/purchase/?")
        return Route("/api/drops/{id}/purchase", "POST", pattern, self, methods="POST, OPTIONS")

    async def __call__(self, request: HotRequest) -> HotAnswer:
        drop_id = drop_id_of(request)
        identity = await admit(request, "purchase")
        if json_object(request):
            raise FallThrough
        claim = HotClaim(identity, key_of(request, identity), identity.user_id)
        outcome = await settle_in_batch(request, self.group, drop_id, settle_purchases, claim)
        if isinstance(outcome, APIException):
            return problem_answer(outcome, request.request_id)
        return outcome


def settle_purchases(
    batch: dict[uuid.UUID, list[HotClaim]], *, wait: Wait
) -> dict[uuid.UUID, list[Answer | APIException]]:
    return settle_claims(batch, purchase_on_drops, encode, wait=wait)


def encode(purchase: Purchase) -> Answer:
    """Return the answer with a purchase: what ``PurchaseSerializer`` says."""
    body = orjson.dumps(
        {
            "id": purchase.pk,
            "drop_id": purchase.drop_id,
            "variant_id": purchase.variant_id,
            "reservation_id": purchase.reservation_id,
            "user_id": purchase.user_id,
            "quantity": purchase.quantity,
            "amount": format_amount(purchase.amount, purchase.currency),
            "currency": purchase.currency,
            "status": purchase.status,
            "created_at": format_instant(purchase.created_at),
        }
    ).decode()
    status = 201 if purchase.is_new else 200
    return Answer(status, body, reservation_id=purchase.reservation_id)
