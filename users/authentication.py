from typing import TYPE_CHECKING

from django.conf import settings
from django.http import HttpRequest
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import NotAuthenticated, PermissionDenied
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from config.addresses import client_address
from config.origins import may_be_forged
from config.problems import CHALLENGES
from config.rate_limits import rate_limits
from operations.requests import record_of
from users.exceptions import InvalidIdentity
from users.identity import Asking, Identity, get_user, identify, raw_target
from users.models import User
from users.replays import refuse_replay

if TYPE_CHECKING:
    # DRF imports this module while it sets up its views.
    from rest_framework.views import APIView


# Where in the ASGI scope a hot route notes what it has done before it passed a request on.
ADMITTED = "drops.admitted"
FORGED = "A page of another site can't do this in the name of who visits it."


class IdentityAuthentication(BaseAuthentication):
    """Take the identity from the request, as ``settings.IDENTITY_MODE`` says."""

    def authenticate(self, request: Request) -> tuple[User, Identity] | None:
        try:
            identity = identity_of(request._request)
        except InvalidIdentity:
            # Counted only then: others behind the same address are still believed.
            rate_limits().check("identity", None, lambda: address_of(request._request))
            raise
        if identity is None:
            return None
        record_of(getattr(request._request, "scope", {})).user_id = identity.user_id
        if request.method not in SAFE_METHODS and may_be_forged(request.headers.get):
            raise PermissionDenied(FORGED)
        check_rate(request._request, request.parser_context["view"], identity)
        return get_user(identity), identity

    def authenticate_header(self, request: Request) -> str:
        # Without a challenge DRF would answer 403 instead of 401.
        return CHALLENGES[settings.IDENTITY_MODE]


def identity_of(request: HttpRequest) -> Identity | None:
    """Return who is asking; a signed request is used up by it.

    Raises:
        InvalidIdentity: see ``users.identity.identify``.
    """
    scope = getattr(request, "scope", {})
    if ADMITTED in scope:
        return scope[ADMITTED][0]
    identity = identify(
        Asking(
            str(request.method),
            raw_target(scope) if scope else request.get_full_path().encode(),
            request.headers.get,
            lambda: request.body,
        )
    )
    if identity is not None:
        refuse_replay(identity)
    return identity


def check_rate(request: HttpRequest, view: "APIView", identity: Identity) -> None:
    """Count a request against the limit that its view's ``rate_limits`` has for the action.

    Raises:
        RateLimited: too many by this user, or from this address.
    """
    scope = getattr(request, "scope", {})
    limit = getattr(view, "rate_limits", {}).get(getattr(view, "action", None))
    if ADMITTED in scope:
        request.rate_limit = scope[ADMITTED][1]  # type: ignore[attr-defined]
    elif limit is not None:
        request.rate_limit = rate_limits().check(  # type: ignore[attr-defined]
            limit, identity.user_id, lambda: address_of(request)
        )


def address_of(request: HttpRequest) -> str:
    return client_address(request.META.get("REMOTE_ADDR"), request.META.get("HTTP_X_FORWARDED_FOR"))


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
