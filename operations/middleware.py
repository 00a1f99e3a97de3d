from typing import Any
from uuid import UUID

import structlog
from django.http import HttpRequest, HttpResponse
from django.urls import resolve
from django_structlog.middlewares import RequestMiddleware

from operations.requests import CLAIMS, Record, record_of, route_name

PROBES = frozenset({"/healthz", "/readyz", "/metrics"})


class RequestContext(RequestMiddleware):
    """Bind the request's id to all that is logged during it, and complete its record.

    The base writes two lines per request and a third when it fails, and knows nothing of
    the hot lane; here ``operations.requests`` writes the only one. A failure is logged by
    whoever catches it.
    """

    def prepare(self, request: HttpRequest) -> None:
        request_id = request.request_id  # type: ignore[attr-defined]
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        record_of(getattr(request, "scope", {})).request_id = request_id

    def handle_response(self, request: HttpRequest, response: HttpResponse) -> None:
        complete(record_of(getattr(request, "scope", {})), request, response)
        structlog.contextvars.clear_contextvars()

    def _process_exception(self, request: HttpRequest, exception: Exception) -> None:
        """Leave the logging to ``config.problems`` and ``django.request``."""


def complete(record: Record, request: HttpRequest, response: HttpResponse) -> None:
    """Write into ``record`` what the viewset lane knows of the request."""
    match = request.resolver_match
    if match is not None:
        record.route = route_name(match.route)
        if record.route.startswith("/api/drops/{id}") and record.drop_id is None:
            record.drop_id = uuid_text(match.kwargs.get("drop_id") or match.kwargs.get("pk"))
        if record.route == "/api/reservations/{id}":
            record.reservation_id = uuid_text(match.kwargs.get("pk"))
    elif request.path.startswith("/static/"):
        record.route = "/static/"
    data = getattr(response, "data", None)
    if isinstance(data, dict) and record.route == "/api/drops/{id}/reserve":
        record.reservation_id = data.get("id")
    elif isinstance(data, dict) and record.route == "/api/drops/{id}/purchase":
        record.reservation_id = data.get("reservation_id")
    record.code = code_of(response, is_claim=record.route in CLAIMS)


def code_of(response: HttpResponse, *, is_claim: bool) -> str:
    if code := getattr(response, "problem_code", ""):
        return code
    if response.status_code >= 400:
        return "refused"
    if response.headers.get("Idempotent-Replayed"):
        return "replayed"
    if response.status_code == 201:
        return "created"
    return "repeated" if is_claim else "ok"


def uuid_text(value: Any) -> str | None:
    """Return an id from the address if it is one; what else stands there is no id."""
    try:
        return str(UUID(str(value)))
    except ValueError:
        return None


class ProbeMiddleware:
    """Answer probes before anything looks at the Host header: they come by address."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path in PROBES:
            request.resolver_match = match = resolve(request.path)
            response = match.func(request)
            # Set by CommonMiddleware elsewhere; without it daphne sends chunks.
            response.headers["Content-Length"] = str(len(response.content))
            return response
        return self.get_response(request)
