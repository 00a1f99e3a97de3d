from collections.abc import Callable

from django.conf import settings
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import URLPattern, URLResolver, include, path, re_path
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import RedirectView
from drf_spectacular.views import (
    SpectacularRedocView,
    SpectacularSwaggerSplitView,
)
from rest_framework.exceptions import APIException, MethodNotAllowed, NotFound, ParseError
from rest_framework.permissions import SAFE_METHODS

from config.openapi import SchemaView
from config.problems import InternalError, problem_response
from operations.exposition import metrics_view
from operations.health import healthz, readyz
from purchases.admin import audit_page
from realtime.asyncapi import asyncapi_json, asyncapi_page


@csrf_exempt
def no_such_address(request: HttpRequest) -> HttpResponse:
    """Answer 404 as a problem, to a POST too; Django's own 404 in DEBUG shows the settings."""
    return handler404(request)


def for_reading(view: Callable[[HttpRequest], HttpResponse]) -> Callable[..., HttpResponse]:
    """Refuse other methods as the rest of the API does; Django would ask for a CSRF cookie."""

    @csrf_exempt
    def read(request: HttpRequest) -> HttpResponse:
        if request.method in SAFE_METHODS:
            return view(request)
        refusal = problem_response(request, MethodNotAllowed(str(request.method)))
        refusal["Allow"] = ", ".join(SAFE_METHODS)
        return refusal

    return read


def api_problem(error: APIException, page: str) -> Callable[..., HttpResponse]:
    """Return an error view: a problem under /api, else Django's own page ``page``."""

    def view(request: HttpRequest, exception: Exception | None = None) -> HttpResponse:
        if f"{request.path}/".startswith("/api/") or settings.DEBUG:
            return problem_response(request, error)
        return HttpResponse(page, status=error.status_code, content_type="text/plain")

    return view


handler400 = api_problem(ParseError("The request is not valid HTTP for this site."), "Bad request")
handler404 = api_problem(NotFound(), "Not found")
handler500 = api_problem(InternalError(), "Something went wrong on our side.")

READING = ["get", "head"]
api: list[URLPattern | URLResolver] = [
    path("", include("drops.urls")),
    path("", include("reservations.urls")),
    path("", include("purchases.urls")),
    path("", include("users.urls")),
    path("", include("realtime.urls")),
    re_path(r"^schema/?$", SchemaView.as_view(), name="schema"),
    # Their templates have nothing to say to OPTIONS; the one of the docs fails.
    re_path(
        r"^docs/?$",
        SpectacularSwaggerSplitView.as_view(url_name="schema", http_method_names=READING),
        name="docs",
    ),
    re_path(
        r"^redoc/?$",
        SpectacularRedocView.as_view(
            url_name="schema", template_name="config/redoc.html", http_method_names=READING
        ),
        name="redoc",
    ),
    re_path(r"^asyncapi\.json/?$", for_reading(asyncapi_json), name="asyncapi-json"),
    re_path(r"^asyncapi/?$", for_reading(asyncapi_page), name="asyncapi"),
    re_path(r"", no_such_address),
]

urlpatterns = [
    path("api/", include(api)),
    # Otherwise APPEND_SLASH redirects, which in DEBUG fails for a POST.
    path("api", no_such_address),
    path("admin", RedirectView.as_view(url="/admin/")),
    path("admin/audit/", audit_page, name="audit"),
    path("admin/", admin.site.urls),
    path("healthz", healthz),
    path("readyz", readyz),
    path("metrics", metrics_view),
    path("", include("storefront.urls")),
]
