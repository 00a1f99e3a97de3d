from django.db.models import QuerySet
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    extend_schema,
    extend_schema_view,
)
from rest_framework import mixins
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.viewsets import GenericViewSet

from config.openapi import IDEMPOTENCY_KEY, IDEMPOTENT, IDENTIFIED, WITH_BODY, answers
from config.params import path_id
from purchases.models import Purchase
from purchases.serializers import PurchaseInputSerializer, PurchaseSerializer
from purchases.services import purchase
from users.authentication import IsIdentified, user_of
from users.idempotency import idempotent

EXAMPLE = OpenApiExample(
    "A purchase",
    {
        "id": "9d7b8a30-4a4e-4c41-9f0b-6a52f0d4c7e5",
        "drop_id": "5f0c7a52-2f0e-4f66-9a3e-8d1f3a0c9b11",
        "variant_id": "c0a8f6a4-70f5-4f0c-8f53-0a3c5d5f7a42",
        "reservation_id": "0b0e4c52-8e5c-4a39-a2f4-3a1e9e6c1a11",
        "user_id": "00000000-0000-4000-8000-000000000001",
        "quantity": 1,
        "amount": "199.00",
        "currency": "USD",
        "status": "paid",
        "created_at": "2026-11-22T18:00:20Z",
    },
    response_only=True,
)
REFUSALS = (
    "reservation_required",
    "reservation_expired",
    "reservation_not_active",
    "drop_not_started",
    "drop_ended",
    "drop_paused",
    "drop_cancelled",
    "not_found",
    "busy",
)


@extend_schema_view(
    list=extend_schema(
        summary="List one's own purchases",
        examples=[EXAMPLE],
        responses=answers({200: PurchaseSerializer(many=True)}, *IDENTIFIED, "validation_error"),
    ),
    retrieve=extend_schema(
        summary="Show one's own purchase",
        examples=[EXAMPLE],
        responses=answers({200: PurchaseSerializer}, *IDENTIFIED, "not_found"),
    ),
)
class PurchaseViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, GenericViewSet):
    """One's own purchases."""

    serializer_class = PurchaseSerializer
    permission_classes = [IsIdentified]
    queryset = Purchase.objects.all()
    rate_limits = {"purchase": "purchase"}

    def get_queryset(self) -> QuerySet[Purchase]:
        return Purchase.objects.filter(user=user_of(self.request))

    def get_object(self) -> Purchase:
        self.kwargs["pk"] = path_id(self.kwargs["pk"])
        return super().get_object()

    @extend_schema(
        summary="Purchase what one holds",
        description="201 with the purchase, or 200 with the same one when repeated.",
        parameters=[
            IDEMPOTENCY_KEY,
            OpenApiParameter("drop_id", OpenApiTypes.UUID, OpenApiParameter.PATH),
        ],
        request=PurchaseInputSerializer,
        examples=[EXAMPLE],
        responses=answers(
            {201: PurchaseSerializer, 200: PurchaseSerializer},
            *IDENTIFIED,
            "permission_denied",
            *WITH_BODY,
            *REFUSALS,
            *IDEMPOTENT,
        ),
    )
    @idempotent
    def purchase(self, request: Request, drop_id: str) -> Response:
        PurchaseInputSerializer(data=request.data).is_valid(raise_exception=True)
        bought = purchase(path_id(drop_id), user_of(request).pk)
        return Response(PurchaseSerializer(bought).data, status=201 if bought.is_new else 200)
