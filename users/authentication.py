from typing import TYPE_CHECKING

from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import NotAuthenticated
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from users.identity import get_user, read_identity
from users.models import User

if TYPE_CHECKING:
    # DRF imports this module while it sets up its views.
    from rest_framework.views import APIView


class HeaderAuthentication(BaseAuthentication):
    """Take the identity from ``X-User-Id`` and ``X-User-Name``."""

    def authenticate(self, request: Request) -> tuple[User, None] | None:
        identity = read_identity(
            request.headers.get("X-User-Id"), request.headers.get("X-User-Name")
        )
        return (get_user(identity), None) if identity else None

    def authenticate_header(self, request: Request) -> str:
        # Without a challenge DRF would answer 403 instead of 401.
        return "X-User-Id"


def user_of(request: Request) -> User:
    """Return the user of a request that passed ``IsIdentified``."""
    if not isinstance(request.user, User):
        raise NotAuthenticated
    return request.user


class IsIdentified(BasePermission):
    """Allow whoever says who they are."""

    def has_permission(self, request: Request, view: "APIView") -> bool:
        return request.user is not None


class IsIdentifiedOrReadOnly(IsIdentified):
    """Allow everybody to read."""

    def has_permission(self, request: Request, view: "APIView") -> bool:
        return request.method in SAFE_METHODS or super().has_permission(request, view)
