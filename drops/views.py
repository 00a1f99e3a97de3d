from typing import Any

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    extend_schema,
    extend_schema_view,
)
from rest_framework import mixins, serializers
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.viewsets import GenericViewSet

from config.openapi import IDEMPOTENCY_KEY, IDEMPOTENT, IDENTIFIED, WITH_BODY, answers
from config.params import path_id, read_query
from drops import examples
from drops.etags import is_match, weak_etag
from drops.models import Drop, DropQuerySet, DropStatus
from drops.permissions import IsCreatorOrStaff, MayCreate
from drops.serializers import DropCreateSerializer, DropInputSerializer, DropSerializer
from drops.services import create_drop, update_drop
from users.authentication import IsIdentifiedOrReadOnly, user_of
from users.idempotency import idempotent

EXAMPLE = OpenApiExample("A drop", examples.DROP, response_only=True)


@extend_schema_view(
    list=extend_schema(
        summary="List drops",
        description="Without `status`: the drops that can be had now. Drafts are listed to their "
        "creators and to staff only.",
        parameters=[
            OpenApiParameter(
                "status", OpenApiTypes.STR, enum=DropStatus.values, description="Default: live."
            )
        ],
        examples=[EXAMPLE],
        responses=answers({200: DropSerializer(many=True)}, "validation_error"),
    ),
    retrieve=extend_schema(
        summary="Show a drop",
        examples=[EXAMPLE],
        responses=answers({200: DropSerializer}, "not_found"),
    ),
)
class DropViewSet(mixins.ListModelMixin, mixins.RetrieveModelMixin, GenericViewSet):
    """Limited releases: list, show, create and change them."""

    serializer_class = DropSerializer
    permission_classes: list[type[BasePermission]] = [
        IsIdentifiedOrReadOnly,
        MayCreate,
        IsCreatorOrStaff,
    ]
    queryset = Drop.objects.all()
    rate_limits = {"create": "create", "partial_update": "update"}

    def get_queryset(self) -> DropQuerySet:
        drops = Drop.objects.read_now()
        if self.action != "list":
            return drops
        status = read_query(
            self.request,
            "status",
            serializers.ChoiceField(choices=DropStatus.choices),
            DropStatus.LIVE,
        )
        drops = drops.for_shoppers().with_status(status)
        if status == DropStatus.SCHEDULED:
            return drops.order_by("starts_at", "id")
        if status == DropStatus.DRAFT and not getattr(self.request.user, "is_staff", False):
            # Nobody has no drafts: the id is None then, and a drop always has a creator.
            return drops.filter(created_by_id=getattr(self.request.user, "pk", None))
        return drops

    def finalize_response(
        self, request: Request, response: Response, *args: Any, **kwargs: Any
    ) -> Response:
        """Add an ETag to what can be read, and answer 304 to who has it already."""
        response = super().finalize_response(request, response, *args, **kwargs)
        if self.action not in ("list", "retrieve") or not isinstance(response, Response):
            return response
        if request.query_params.get("status") == DropStatus.DRAFT:
            # The only answer that depends on who asks.
            response["Cache-Control"] = "no-store"
        etag = weak_etag(response.data)
        response["ETag"] = etag
        if is_match(etag, request.headers.get("If-None-Match")):
            response.status_code = 304
            response.data = None
        return response

    def get_object(self) -> Drop:
        self.kwargs["pk"] = path_id(self.kwargs["pk"])
        return super().get_object()

    @extend_schema(
        summary="Create a drop",
        description="Without `status`: no `starts_at` → draft, a future one → scheduled, else "
        "live. With `variants`, `total_stock` is their sum and may be left out.",
        parameters=[IDEMPOTENCY_KEY],
        request=DropCreateSerializer,
        examples=[OpenApiExample("A new drop", examples.NEW_DROP, request_only=True), EXAMPLE],
        responses=answers(
            {201: DropSerializer}, *IDENTIFIED, *WITH_BODY, *IDEMPOTENT, "permission_denied"
        ),
    )
    @idempotent
    def create(self, request: Request) -> Response:
        body = DropCreateSerializer(data=request.data)
        body.is_valid(raise_exception=True)
        drop = create_drop(user_of(request), **body.validated_data)
        return Response(DropSerializer(drop).data, status=201)

    @extend_schema(
        summary="Change a drop",
        description="Name, description, image, price, window, limits and status; never stock.",
        request=DropInputSerializer,
        examples=[OpenApiExample("Pause it", {"status": "paused"}, request_only=True), EXAMPLE],
        responses=answers(
            {200: DropSerializer},
            *IDENTIFIED,
            *WITH_BODY,
            "permission_denied",
            "not_found",
            "busy",
        ),
    )
    def partial_update(self, request: Request, **kwargs: Any) -> Response:
        drop = self.get_object()
        body = DropInputSerializer(data=request.data, partial=True)
        body.is_valid(raise_exception=True)
        return Response(DropSerializer(update_drop(drop.pk, **body.validated_data)).data)
