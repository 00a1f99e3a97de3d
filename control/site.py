from collections.abc import Callable
from functools import wraps
from typing import Any

from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.template.response import TemplateResponse
from django.urls import path
from unfold.sites import UnfoldAdminSite

from control.dashboard import figures, recent_staff_work

# Alpine, which draws unfold's menus, turns attributes into functions, and unfold writes the
# product's colours into a style element. Only the admin gets this policy (docs/adr/0013).
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: https:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


class ControlSite(UnfoldAdminSite):
    """The control room: the admin with a live dashboard as its first page."""

    index_title = "Control room"

    def extra_urls(self) -> list[Any]:
        return [path("figures/", self.admin_view(self.figures_view), name="figures")]

    def admin_view(self, view: Callable[..., Any], cacheable: bool = False) -> Callable[..., Any]:
        return with_policy(super().admin_view(view, cacheable))

    def login(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> Any:
        return add_policy(super().login(request, extra_context))

    def index(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> TemplateResponse:
        """Show the dashboard, or to staff who may not see drops, what they may see."""
        if not request.user.has_perm("drops.view_drop"):
            return super().index(request, extra_context)
        context = {
            **self.each_context(request),
            "title": self.index_title,
            "figures": figures(),
            "may_run_drops": request.user.has_perm("drops.run_drop"),
            "staff_work": recent_staff_work(),
            **(extra_context or {}),
        }
        request.current_app = self.name
        return TemplateResponse(request, "control/dashboard.html", context)

    def figures_view(self, request: HttpRequest) -> HttpResponse:
        """Return the dashboard's figures, for a page that has lost the stream for a while."""
        if not request.user.has_perm("drops.view_drop"):
            return JsonResponse({"detail": "Not allowed."}, status=403)
        return JsonResponse(figures())


def with_policy(view: Callable[..., HttpResponseBase]) -> Callable[..., HttpResponseBase]:
    @wraps(view)
    def answer(*args: Any, **kwargs: Any) -> HttpResponseBase:
        return add_policy(view(*args, **kwargs))

    return answer


def add_policy(response: HttpResponseBase) -> HttpResponseBase:
    response["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
    return response
