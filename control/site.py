import uuid
from typing import Any

from django.contrib.auth.forms import UsernameField
from django.core.paginator import InvalidPage
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.template.response import TemplateResponse
from django.urls import path
from unfold.sites import UnfoldAdminSite

from config.problems import RateLimited, headers
from config.rate_limits import rate_limits
from control.dashboard import figures, recent_staff_work
from users.authentication import address_of


def page_not_found(request: HttpRequest, **address: str) -> HttpResponse:
    raise Http404


class ControlSite(UnfoldAdminSite):
    """The control room: the admin with a live dashboard as its first page."""

    index_title = "Control room"

    def extra_urls(self) -> list[Any]:
        return [
            path("figures/", self.admin_view(self.figures_view), name="figures"),
            # Django's own looks for a row's page on the site; no row has one.
            path("r/<path:row>/", self.admin_view(page_not_found)),
        ]

    def login(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        """Show the form, or sign in who may still try: nobody guesses passwords for ever."""
        if request.method == "POST":
            # As the form reads it, which takes several spellings for the same name.
            name = UsernameField().to_python(request.POST.get("username")) or ""
            try:
                # Before the password is looked at: so right ones are refused, too.
                rate_limits().check(
                    "sign_in", uuid.uuid5(uuid.NAMESPACE_OID, name), lambda: address_of(request)
                )
            except RateLimited as exc:
                return HttpResponse(
                    "Too many attempts to sign in. Try again later.",
                    status=exc.status_code,
                    headers=headers(exc),
                    content_type="text/plain",
                )
        return super().login(request, extra_context)

    def search(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> TemplateResponse:
        try:
            return super().search(request, extra_context)
        except InvalidPage:
            raise Http404 from None

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
