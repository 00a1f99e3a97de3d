from drf_spectacular.utils import OpenApiExample, extend_schema
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from config.openapi import IDENTIFIED, answers
from users.authentication import IsIdentified
from users.serializers import UserSerializer


class MeView(APIView):
    """Who the identity headers stand for."""

    permission_classes = [IsIdentified]

    @extend_schema(
        summary="Show oneself",
        examples=[
            OpenApiExample(
                "Somebody",
                {"id": "00000000-0000-4000-8000-000000000001", "username": "demo"},
                response_only=True,
            )
        ],
        responses=answers({200: UserSerializer}, *IDENTIFIED),
    )
    def get(self, request: Request) -> Response:
        return Response(UserSerializer(request.user).data)
