import random
import re
from collections.abc import Callable

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.http import HttpRequest, HttpResponse, HttpResponseNotFound
from rest_framework.exceptions import APIException, ParseError
from servestatic.middleware import ServeStaticMiddleware
from servestatic.responders import MissingFileError

from config.problems import headers, may_pass, problem_response, to_api_exception

# What starts like this is the asking user's alone, errors too: no cache may keep it.
PRIVATE = ("/api/me", "/api/reservations", "/api/purchases", "/api/ws-ticket")
USABLE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


class RequestIdMiddleware:
    """Give each request an id, and answer what no view caught: problems, and outages on pages."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        request.request_id = request_id(request.headers.get("X-Request-Id"))  # type: ignore[attr-defined]
        if request.encoding is not None:
            # Forms are in UTF-8, whatever they declare: some of Python's are no text encodings.
            request.encoding = "utf-8"
        response = refuse_wrong_host(request) or self.get_response(request)
        response["X-Request-Id"] = request.request_id  # type: ignore[attr-defined]
        for name, value in getattr(request, "rate_limit", ()):
            response[name.decode()] = value.decode()
        if request.path.startswith(PRIVATE):
            response["Cache-Control"] = "no-store"
        return response

    def process_exception(self, request: HttpRequest, exc: Exception) -> HttpResponse | None:
        if request.path.startswith("/api/"):
            return problem_response(request, to_api_exception(exc))
        # A page's mistakes are for Django to show; an outage is none, and passes.
        return outage_page(to_api_exception(exc)) if may_pass(exc) else None


def outage_page(error: APIException) -> HttpResponse:
    """Say on a page that the database is away, or has too much to do."""
    return HttpResponse(
        str(error.detail),
        status=error.status_code,
        headers=headers(error),
        content_type="text/plain",
    )


class ContentSecurityPolicyMiddleware:
    """Tell browsers where a page's parts may come from; see ``CONTENT_SECURITY_POLICIES``."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        response.setdefault("Content-Security-Policy", content_security_policy(request.path))
        return response


def content_security_policy(path: str) -> str:
    return next(
        (
            policy
            for start, policy in settings.CONTENT_SECURITY_POLICIES.items()
            if path.startswith(start)
        ),
        settings.CONTENT_SECURITY_POLICY,
    )


class StaticFilesMiddleware(ServeStaticMiddleware):
    """Answer 404 to an unknown file in DEBUG too, where ServeStatic makes an error of it."""

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        try:
            return await super().__call__(request)
        except MissingFileError:
            return HttpResponseNotFound("Not found", content_type="text/plain")


def refuse_wrong_host(request: HttpRequest) -> HttpResponse | None:
    """Answer for Django, which in DEBUG shows a page of settings and a traceback."""
    if not request.path.startswith("/api/"):
        return None
    try:
        request.get_host()
    except DisallowedHost:
        return problem_response(request, ParseError("This site is not known by that Host."))
    return None


def request_id(given: str | None) -> str:
    """Return the client's own id where it is fit for logs, else a new one."""
    if given and USABLE_REQUEST_ID.fullmatch(given):
        return given
    # Names a request in logs and guards nothing, so it need not cost a call of the kernel.
    return random.getrandbits(128).to_bytes(16).hex()
