"""What staff do to a row, beyond looking: said first, then confirmed, done and logged."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from django import forms
from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db import OperationalError, transaction
from django.db.models import Model
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from rest_framework.exceptions import APIException
from unfold.enums import ActionVariant
from unfold.widgets import UnfoldAdminTextInputWidget

from config.problems import to_api_exception
from control.admin import RowAdmin, add_refusal
from users.models import User

Row = TypeVar("Row", bound=Model)


class StaffAction(forms.Form):
    """One thing that staff do to one row; the form asks for what it needs to know.

    Subclasses are registered with ``staff_action``. Everything they say is for people.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    icon: ClassVar[str]
    permission: ClassVar[str]
    is_dangerous: ClassVar[bool] = False

    reason = forms.CharField(
        max_length=200,
        label="Why",
        widget=UnfoldAdminTextInputWidget(attrs={"autocomplete": "off"}),
        help_text="Kept in the staff log with your name.",
    )

    def __init__(self, row: Any, user: User, data: Any = None) -> None:
        super().__init__(data)
        self.row = row
        self.user = user
        self.order_fields([name for name in self.fields if name != "reason"] + ["reason"])

    @classmethod
    def is_offered(cls, row: Any) -> bool:
        """Say whether the row's state allows it; the service decides when it is done."""
        raise NotImplementedError

    def consequences(self) -> list[str]:
        """Return what will happen, one sentence each; with the input, once that is valid."""
        raise NotImplementedError

    def perform(self) -> str:
        """Call the service; return what was done, as a sentence.

        Raises:
            APIException: the service refused.
        """
        raise NotImplementedError

    @property
    def is_previewed(self) -> bool:
        """Say whether the consequences depend on the input, and are shown once more."""
        return len(self.fields) > 1


_actions: dict[type[Model], list[type[StaffAction]]] = {}


def staff_action(model: type[Model]) -> Callable[[type[StaffAction]], type[StaffAction]]:
    """Offer the decorated action on the admin page of ``model``, after those already there."""

    def register(action: type[StaffAction]) -> type[StaffAction]:
        _actions.setdefault(model, []).append(action)
        return action

    return register


class StaffActionsAdmin(RowAdmin):
    """Rows with actions: a button for each on the row's page, and a page to confirm it."""

    def get_urls(self) -> list[Any]:
        name = f"{self.opts.app_label}_{self.opts.model_name}_act"
        act = self.admin_site.admin_view(self.act_view)
        return [path("<uuid:object_id>/do/<slug:action>/", act, name=name), *super().get_urls()]

    def offered_actions(self, request: HttpRequest, row: Model) -> list[dict[str, Any]]:
        """Return the buttons that this user gets on the page of ``row``."""
        return [
            {
                "title": action.title,
                "icon": action.icon,
                "path": self.action_url(row, action),
                "variant": ActionVariant.DEFAULT,
                "attrs": {},
            }
            for action in _actions.get(self.model, [])
            if request.user.has_perm(action.permission) and action.is_offered(row)
        ]

    def action_url(self, row: Model, action: type[StaffAction]) -> str:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_act"
        return reverse(name, args=[row.pk, action.name])

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        if row := context.get("original"):
            context["actions_detail"] = self.offered_actions(request, row)
        return super().render_change_form(request, context, *args, **kwargs)

    def act_view(self, request: HttpRequest, object_id: Any, action: str) -> HttpResponse:
        """Say what the action will do; on a confirmed POST, do it and log it."""
        known = {known.name: known for known in _actions.get(self.model, [])}
        row = self.get_queryset(request).filter(pk=object_id).first()
        if action not in known or row is None:
            raise Http404
        if not request.user.has_perm(known[action].permission):
            raise PermissionDenied
        page = reverse(
            f"admin:{self.opts.app_label}_{self.opts.model_name}_change", args=[object_id]
        )
        if not known[action].is_offered(row):
            messages.warning(request, f"{known[action].title}: not possible any more.")
            return redirect(page)
        form = known[action](row, request.user, request.POST or None)  # type: ignore[arg-type]
        is_confirmed = "confirmed" in request.POST or not form.is_previewed
        if form.is_valid() and is_confirmed:
            try:
                return self._perform(request, form, page)
            except (APIException, OperationalError) as exc:
                add_refusal(form, to_api_exception(exc))
        is_preview = form.is_bound and form.is_valid() and not is_confirmed
        return TemplateResponse(
            request,
            "control/act.html",
            {
                **self.admin_site.each_context(request),
                "opts": self.opts,
                "title": form.title,
                "original": row,
                "form": form,
                "is_preview": is_preview,
                "is_last_step": is_preview or not form.is_previewed,
                "consequences": form.consequences(),
                "page": page,
            },
        )

    def _perform(self, request: HttpRequest, form: StaffAction, page: str) -> HttpResponse:
        with transaction.atomic():
            done = form.perform()
            # In the same transaction: nothing is done that the log doesn't know.
            self.log_change(request, form.row, f"{done} Why: {form.cleaned_data['reason']}")
        messages.success(request, done)
        return redirect(page)
