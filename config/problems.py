"""Errors as problem documents (RFC 9457), the same from every part of the application."""

import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import psycopg_pool
from django.conf import settings
from django.core.exceptions import ObjectDoesNotExist, PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import Http404, HttpRequest, JsonResponse
from psycopg import errors as postgres
from rest_framework import exceptions
from rest_framework.exceptions import APIException
from rest_framework.request import Request

from config.database import discard_dead_connections, replace_connections

logger = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"

# What a 401 asks for. Browsers know only the last of them; it doesn't make them ask the user.
CHALLENGES = {"header": "X-User-Id", "gateway": "X-Auth-Signature", "jwt": "Bearer"}

# What Django, DRF and psycopg call their errors, and what clients know them by.
CODES: dict[type[Exception], str] = {
    exceptions.ParseError: "malformed_body",
    exceptions.NotAuthenticated: "identity_required",
    exceptions.AuthenticationFailed: "invalid_identity",
    exceptions.PermissionDenied: "permission_denied",
    exceptions.NotFound: "not_found",
    exceptions.MethodNotAllowed: "method_not_allowed",
    exceptions.NotAcceptable: "not_acceptable",
    exceptions.UnsupportedMediaType: "unsupported_media_type",
    exceptions.Throttled: "rate_limited",
}


class Refusal(APIException):
    """A request that was understood and answered with no.

    Subclasses name the ``status_code`` and the stable ``default_code``. Keyword
    arguments become members of the problem document, as clients see them.
    """

    status_code = HTTPStatus.CONFLICT
    default_code = "refused"

    def __init__(self, detail: str | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.members = members

    @property
    def code(self) -> str:
        return self.default_code


class BodyTooLarge(Refusal):
    status_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    default_code = "body_too_large"
    default_detail = "The body is larger than this API takes."


class AddressTooLong(Refusal):
    status_code = HTTPStatus.REQUEST_URI_TOO_LONG
    default_code = "address_too_long"
    default_detail = "The address is longer than this site takes."


class HeadersTooLarge(Refusal):
    status_code = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    default_code = "headers_too_large"
    default_detail = "The headers are larger than this site takes."


class RateLimited(Refusal):
    """Too many requests; ``headers`` say how many are allowed."""

    status_code = HTTPStatus.TOO_MANY_REQUESTS
    default_code = "rate_limited"

    def __init__(
        self, detail: str, wait_seconds: int, headers: tuple[tuple[bytes, bytes], ...]
    ) -> None:
        super().__init__(detail)
        self.retry_after_seconds = wait_seconds
        self.headers = headers


class Unavailable(Refusal):
    """The database can't be reached; nothing was changed, or the answer was lost."""

    status_code = HTTPStatus.SERVICE_UNAVAILABLE
    default_code = "unavailable"
    default_detail = "The database can't be reached just now. Try again; a repeat is safe."
    retry_after_seconds = 1


class Busy(Refusal):
    """More is waiting than can be settled in time."""

    status_code = HTTPStatus.SERVICE_UNAVAILABLE
    default_code = "busy"
    default_detail = "Too many requests are waiting for this drop. Try again shortly."
    retry_after_seconds = 1


class InternalError(Refusal):
    status_code = HTTPStatus.INTERNAL_SERVER_ERROR
    default_code = "internal_error"
    default_detail = "Something went wrong on our side. It has been logged."


def exception_handler(exc: Exception, context: dict[str, Any]) -> JsonResponse:
    """Render any exception of a DRF view; the name is set in ``settings.REST_FRAMEWORK``."""
    # Not by the view's own renderer: those of the schema and its viewers make YAML and HTML.
    return problem_response(context["request"], to_api_exception(exc))


def to_api_exception(exc: Exception) -> APIException:
    """Return the error that clients see for ``exc``; an unexpected one is logged."""
    if isinstance(exc, APIException):
        return exc
    if isinstance(exc, Http404 | ObjectDoesNotExist):
        return exceptions.NotFound()
    if isinstance(exc, PermissionDenied):
        return exceptions.PermissionDenied()
    if is_outage(exc):
        logger.warning("database: %s", exc)
        care_for_connections(exc)
        return Unavailable()
    if isinstance(exc, OperationalError):
        logger.warning("database: %s", exc)
        return Busy()
    logger.error("unexpected error", exc_info=exc)
    return InternalError()


def is_outage(exc: Exception) -> bool:
    """Say whether ``exc`` means that the database can't be reached, rather than is busy."""
    if isinstance(exc, OperationalError):
        waited_in_vain = (postgres.LockNotAvailable, postgres.QueryCanceled)
        return not isinstance(exc.__cause__, waited_in_vain)
    # A process, or a database, that stood still within a transaction and then goes on; and
    # one that was the primary before a failover.
    passing = (postgres.IdleInTransactionSessionTimeout, postgres.ReadOnlySqlTransaction)
    if isinstance(exc.__cause__, passing):
        return True
    return isinstance(exc, InterfaceError | psycopg_pool.PoolTimeout)


def care_for_connections(exc: Exception) -> None:
    """Have the pool give up what an outage, ``exc``, has left of no use in it."""
    if isinstance(exc.__cause__, postgres.ReadOnlySqlTransaction):
        replace_connections()
    else:
        discard_dead_connections()


def may_pass(exc: Exception) -> bool:
    """Say whether ``exc`` is the database's trouble of the moment, and not a mistake of ours."""
    return isinstance(exc, OperationalError) or is_outage(exc)


def problem(error: APIException, request_id: str) -> dict[str, Any]:
    """Return the problem document of ``error``, ready for JSON."""
    code = code_of(error)
    document = {
        "type": f"urn:sneaker-drops:problem:{code}",
        "title": code.replace("_", " ").capitalize(),
        "status": int(error.status_code),
        # It may quote the client, and a lone surrogate fits into no UTF-8 answer.
        "detail": encodable(str(error.detail)),
        "code": code,
        "request_id": request_id,
    }
    if isinstance(error, exceptions.ValidationError):
        document["detail"] = "The request is not valid; see errors."
        document["errors"] = list(field_errors(error.detail))
    return document | getattr(error, "members", {})


def code_of(error: APIException) -> str:
    if isinstance(error, Refusal):
        return error.code
    if isinstance(error, exceptions.ValidationError):
        return "validation_error"
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def field_errors(detail: Any, path: str = "") -> Iterator[dict[str, str]]:
    """Flatten DRF's nested details, so that ``variants[0].label`` is one ``field``."""
    if isinstance(detail, dict):
        for name, inner in detail.items():
            if name == "non_field_errors":
                inner_path = path
            elif isinstance(name, int):
                inner_path = f"{path}[{name}]"
            else:
                inner_path = f"{path}.{name}".lstrip(".")
            yield from field_errors(inner, inner_path)
    elif isinstance(detail, list):
        for index, inner in enumerate(detail):
            is_leaf = isinstance(inner, exceptions.ErrorDetail)
            yield from field_errors(inner, path if is_leaf else f"{path}[{index}]")
    else:
        # Both may quote the client.
        yield {"field": encodable(path), "code": detail.code, "detail": encodable(str(detail))}


def encodable(text: str) -> str:
    return text.encode(errors="replace").decode()


def headers(error: APIException) -> dict[str, str]:
    """Return the headers that go with ``error``."""
    found = {}
    seconds = getattr(error, "retry_after_seconds", None) or getattr(error, "wait", None)
    if seconds:
        found["Retry-After"] = str(int(seconds))
    if error.status_code == HTTPStatus.UNAUTHORIZED:
        found["WWW-Authenticate"] = CHALLENGES[settings.IDENTITY_MODE]
    for name, value in getattr(error, "headers", ()):
        found[name.decode()] = value.decode()
    return found


def problem_response(request: HttpRequest | Request, error: APIException) -> JsonResponse:
    """Render ``error`` as every part of the application answers it."""
    document = problem(error, getattr(request, "request_id", ""))
    response = JsonResponse(
        document, status=document["status"], headers=headers(error), content_type=CONTENT_TYPE
    )
    # For the request's line and its metric.
    response.problem_code = document["code"]  # type: ignore[attr-defined]
    return response
