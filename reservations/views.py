from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    extend_schema,
    extend_schema_view,
)
from rest_framework import mixins, serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView
from rest_framework.viewsets import GenericViewSet

from config.openapi import IDEMPOTENCY_KEY, IDEMPOTENT, IDENTIFIED, WITH_BODY, answers
from config.params import path_id, read_query
from reservations.models import Reservation, ReservationQuerySet, ReservationStatus
from reservations.serializers import (
    ExpireNowSerializer,
    ReservationSerializer,
    ReserveInputSerializer,
)
from reservations.services import Claim, expire_all_due, release, reserve
from users.authentication import IsIdentified, user_of
from users.idempotency import idempotent

EXAMPLE = OpenApiExample(
    "A hold",
    {
        "id": "0b0e4c52-8e5c-4a39-a2f4-3a1e9e6c1a11",
        "drop_id": "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11",
        "variant_id": "c0a8f6a4-70f5-4f0c-8f53-0a3c5d5f7a42",
        "user_id": "00000000-0000-4000-8000-000000000001",
        "quantity": 1,
        "unit_price": "199.00",
        "currency": "USD",
        "status": "ACTIVE",
        "created_at": "2026-11-22T18:00:00Z",
        "expires_at": "2026-11-22T18:01:00Z",
        "expires_in": 60.0,
        "drop": {
            "id": "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11",
            "name": "Aurora Runner 'Ember'",
            "available_stock": 498,
        },
    },
    response_only=True,
)
REFUSALS = (
    "sold_out",
    "fully_reserved",
    "drop_not_started",
    "drop_ended",
    "drop_paused",
    "drop_cancelled",
    "drop_not_published",
    "variant_required",
    "limit_exceeded",
    "cooldown",
    "already_reserved",
    "not_found",
    "busy",
)


@extend_schema_view(
    list=extend_schema(
        summary="List one's own reservations",
        parameters=[
            OpenApiParameter("status", OpenApiTypes.STR, enum=ReservationStatus.values),
            OpenApiParameter("drop", OpenApiTypes.UUID),
        ],
        examples=[EXAMPLE],
        responses=answers({200: ReservationSerializer(many=True)}, *IDENTIFIED, "validation_error"),
    ),
    retrieve=extend_schema(
        summary="Show one's own reservation",
        examples=[EXAMPLE],
        responses=answers({200: ReservationSerializer}, *IDENTIFIED, "not_found"),
    ),
)
class ReservationViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, GenericViewSet):
    """One's own holds: make, see and release them."""

    serializer_class = ReservationSerializer
    permission_classes = [IsIdentified]
    queryset = Reservation.objects.all()
    rate_limits = {"reserve": "reserve"}

    def get_queryset(self) -> ReservationQuerySet:
        own = Reservation.objects.read_now().filter(user=user_of(self.request))
        if self.action != "list":
            return own
        choices = serializers.ChoiceField(choices=ReservationStatus.choices)
        if status := read_query(self.request, "status", choices):
            own = own.filter(status=status)
        if drop_id := read_query(self.request, "drop", serializers.UUIDField()):
            own = own.filter(drop=drop_id)
        return own

    def get_object(self) -> Reservation:
        self.kwargs["pk"] = path_id(self.kwargs["pk"])
        return super().get_object()

    @extend_schema(
        summary="Reserve units of a drop",
        description="201 with a new hold, or 200 with the one that the user has already.",
        parameters=[
            IDEMPOTENCY_KEY,
            OpenApiParameter("drop_id", OpenApiTypes.UUID, OpenApiParameter.PATH),
        ],
        request=ReserveInputSerializer,
        examples=[
            OpenApiExample(
                "A size",
                {"variant": "c0a8f6a4-70f5-4f0c-8f53-0a3c5d5f7a42", "quantity": 1},
                request_only=True,
            ),
            EXAMPLE,
        ],
        responses=answers(
            {201: ReservationSerializer, 200: ReservationSerializer},
            *IDENTIFIED,
            "permission_denied",
            *WITH_BODY,
            *REFUSALS,
            *IDEMPOTENT,
        ),
    )
    @idempotent
    def reserve(self, request: Request, drop_id: str) -> Response:
        body = ReserveInputSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        claim = Claim(
            user_of(request).pk, body.validated_data.get("variant"), body.validated_data["quantity"]
        )
        reservation = reserve(path_id(drop_id), claim)
        return Response(
            ReservationSerializer(reservation).data, status=201 if reservation.is_new else 200
        )

    @extend_schema(
        summary="Release a hold",
        description="Its units are available again at once.",
        examples=[EXAMPLE],
        responses=answers(
            {200: ReservationSerializer},
            *IDENTIFIED,
            "permission_denied",
            "not_found",
            "reservation_expired",
            "reservation_not_active",
            "busy",
        ),
    )
    def destroy(self, request: Request, pk: str, **kwargs: Any) -> Response:
        return Response(ReservationSerializer(release(path_id(pk), user_of(request))).data)


class ExpireNowView(APIView):
    """Expire all overdue holds at once instead of at the loop's next step; DEBUG only."""

    permission_classes = []

    @extend_schema(
        summary="Expire overdue holds now (DEBUG only)",
        parameters=[IDEMPOTENCY_KEY],
        request=None,
        examples=[
            OpenApiExample(
                "One hold expired",
                {
                    "expired_count": 1,
                    "drops": [{"drop_id": EXAMPLE.value["drop_id"], "available_stock": 499}],
                    "reservations": [
                        {
                            "reservation_id": EXAMPLE.value["id"],
                            "drop_id": EXAMPLE.value["drop_id"],
                        }
                    ],
                },
                response_only=True,
            )
        ],
        responses=answers({200: ExpireNowSerializer}, "validation_error", *IDEMPOTENT),
    )
    @idempotent
    def post(self, request: Request) -> Response:
        swept = expire_all_due()
        stock = {holds.drop_id: holds.available_stock for holds in swept}
        gone = [(pk, holds.drop_id) for holds in swept for pk in holds.reservation_ids]
        return Response(
            ExpireNowSerializer(
                {
                    "expired_count": len(gone),
                    "drops": [
                        {"drop_id": drop_id, "available_stock": units}
                        for drop_id, units in stock.items()
                    ],
                    "reservations": [
                        {"reservation_id": pk, "drop_id": drop_id} for pk, drop_id in gone
                    ],
                }
            ).data
        )
