"""Describe the API's errors, headers and examples in the OpenAPI document."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from django.conf import settings
from django.http import HttpResponse
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    inline_serializer,
)
from drf_spectacular.views import SpectacularAPIView
from rest_framework import serializers
from rest_framework.renderers import BaseRenderer
from rest_framework.request import Request

from config.problems import CONTENT_TYPE

STATUS_OF_CODE = {
    "malformed_body": 400,
    "validation_error": 400,
    "identity_required": 401,
    "invalid_identity": 401,
    "unknown_user": 401,
    "permission_denied": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "sold_out": 409,
    "fully_reserved": 409,
    "drop_not_started": 409,
    "drop_ended": 409,
    "drop_paused": 409,
    "drop_cancelled": 409,
    "drop_not_published": 409,
    "variant_required": 409,
    "limit_exceeded": 409,
    "cooldown": 409,
    "already_reserved": 409,
    "reservation_required": 409,
    "reservation_expired": 409,
    "reservation_not_active": 409,
    "idempotency_in_progress": 409,
    "events_gone": 410,
    "body_too_large": 413,
    "address_too_long": 414,
    "headers_too_large": 431,
    "unsupported_media_type": 415,
    "idempotency_key_reused": 422,
    "rate_limited": 429,
    "busy": 503,
    "unavailable": 503,
}
# Members beyond the usual ones, with an example of each.
MEMBERS_OF_CODE: dict[str, dict[str, Any]] = {
    "validation_error": {
        "errors": [{"field": "price", "code": "min_value", "detail": "Must not be negative."}]
    },
    "sold_out": {"available_stock": 0},
    "fully_reserved": {"available_stock": 0, "next_release_at": "2026-11-22T18:01:00Z"},
    "drop_not_started": {"starts_at": "2026-11-22T19:00:00Z"},
    "limit_exceeded": {"limit": 1, "used": 1},
    "already_reserved": {"reservation_id": "0b0e4c52-8e5c-4a39-a2f4-3a1e9e6c1a11"},
}
ANYWHERE = ("invalid_identity", "unknown_user", "not_acceptable", "rate_limited", "unavailable")
WITH_BODY = ("malformed_body", "validation_error", "body_too_large", "unsupported_media_type")
IDENTIFIED = ("identity_required",)
IDEMPOTENT = ("idempotency_in_progress", "idempotency_key_reused")

IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    OpenApiTypes.STR,
    OpenApiParameter.HEADER,
    description="1 to 255 printable ASCII characters. For 24 hours the same user, route, key and "
    "body get the first answer again, with `Idempotent-Replayed: true`.",
)
STATUS_FILTER_NOTE = "Another value is refused."

Problem = inline_serializer(
    "Problem",
    {
        "type": serializers.CharField(help_text="A URN that ends in the code."),
        "title": serializers.CharField(),
        "status": serializers.IntegerField(),
        "detail": serializers.CharField(help_text="What happened, for people."),
        "code": serializers.ChoiceField(choices=sorted(STATUS_OF_CODE), help_text="Stable."),
        "request_id": serializers.CharField(),
        "errors": inline_serializer(
            "FieldError",
            {
                "field": serializers.CharField(),
                "code": serializers.CharField(),
                "detail": serializers.CharField(),
            },
            many=True,
            required=False,
        ),
        "next_release_at": serializers.DateTimeField(required=False),
        "starts_at": serializers.DateTimeField(required=False),
        "limit": serializers.IntegerField(required=False),
        "used": serializers.IntegerField(required=False),
        "available_stock": serializers.IntegerField(required=False),
        "reservation_id": serializers.UUIDField(required=False),
    },
)


def answers(success: dict[Any, Any], *codes: str) -> dict[Any, Any]:
    """Return the ``responses`` of a call: ``success``, and its problems with an example each."""
    by_status: dict[int, list[str]] = {}
    for code in (*codes, *ANYWHERE):
        by_status.setdefault(STATUS_OF_CODE[code], []).append(code)
    return success | {
        (status, CONTENT_TYPE): OpenApiResponse(
            Problem, "One of: " + ", ".join(f"`{code}`" for code in names), problem_examples(names)
        )
        for status, names in sorted(by_status.items())
    }


def problem_examples(codes: Iterable[str]) -> list[OpenApiExample]:
    return [
        OpenApiExample(
            code,
            response_only=True,
            media_type=CONTENT_TYPE,
            status_codes=[str(STATUS_OF_CODE[code])],
            value={
                "type": f"urn:sneaker-drops:problem:{code}",
                "title": code.replace("_", " ").capitalize(),
                "status": STATUS_OF_CODE[code],
                "detail": "What happened, in a sentence.",
                "code": code,
                "request_id": "7f1c1f5be0f14a5c9a4b5c1d2e3f4a5b",
            }
            | MEMBERS_OF_CODE.get(code, {}),
        )
        for code in codes
    ]


def without_last_slash(endpoints: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Name each address as the documentation does; the slash at its end is optional."""
    return [(path.rstrip("/"), *rest) for path, *rest in endpoints]


class SchemaView(SpectacularAPIView):
    """The document: the same for everybody, whatever the address asks for beside its format."""

    @extend_schema(exclude=True)
    def get(self, request: Request) -> HttpResponse:
        renderer: Any = type(request.accepted_renderer)
        charset = f"; charset={renderer.charset}" if renderer.charset else ""
        filename = f"{settings.SPECTACULAR_SETTINGS['TITLE']}.{renderer.format}"
        return HttpResponse(
            rendered_schema(renderer),
            content_type=f"{renderer.media_type}{charset}",
            headers={"Content-Disposition": f'inline; filename="{filename}"'},
        )


# Made anew it takes a tenth of a second, and anybody may ask for it.
@cache
def rendered_schema(renderer: type[BaseRenderer]) -> str | bytes:
    return renderer().render(SchemaGenerator().get_schema(public=True))


class IdentityScheme(OpenApiAuthenticationExtension):
    """What ``settings.IDENTITY_MODE`` asks for; several headers belong to one requirement."""

    target_class = "users.authentication.IdentityAuthentication"

    @property
    def name(self) -> list[str]:  # type: ignore[override]
        return list(IDENTITY_SCHEMES[settings.IDENTITY_MODE])

    def get_security_definition(self, auto_schema: Any) -> list[dict[str, str]]:
        return list(IDENTITY_SCHEMES[settings.IDENTITY_MODE].values())


def header_scheme(name: str, description: str) -> dict[str, str]:
    return {"type": "apiKey", "in": "header", "name": name, "description": description}


USER_NAME = header_scheme("X-User-Name", "Optional: the name of a user who is made.")
IDENTITY_SCHEMES: dict[str, dict[str, dict[str, str]]] = {
    "header": {
        "userId": header_scheme(
            "X-User-Id", "Who is asking: a UUID. In development an unknown one is made."
        ),
        "userName": USER_NAME,
    },
    "gateway": {
        "userId": header_scheme("X-User-Id", "Who is asking, as the gateway found out: a UUID."),
        "userName": USER_NAME,
        "signature": header_scheme(
            "X-Auth-Signature",
            "`t=<unix s>,v1=<hex HMAC-SHA256(secret, t.METHOD.path?query.user.name.sha256(body))>`",
        ),
    },
    "jwt": {
        "bearerToken": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "A token of the identity provider; `sub` is the user.",
        }
    },
}
