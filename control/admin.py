"""What the admin pages of all apps have in common, and the pages that belong to no app."""

import uuid
from functools import reduce
from operator import or_
from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import LogEntry
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ChangeList
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.models import Group
from django.core import exceptions
from django.db import DataError, OperationalError
from django.db.models import Model, Q, QuerySet
from django.forms.models import construct_instance
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from rest_framework.exceptions import APIException, ValidationError
from unfold.admin import ModelAdmin

from config.problems import field_errors, to_api_exception
from drops.models import Drop
from users.models import User


class ListAdmin(ModelAdmin):
    """Rows whose pages are no error of the server, whatever their address asks for."""

    def get_changelist_instance(self, request: HttpRequest) -> ChangeList:
        # PostgreSQL takes no NUL in a text, and Django sends it one.
        if "%00" in request.GET.urlencode():
            raise IncorrectLookupParameters
        try:
            return super().get_changelist_instance(request)
        except (DataError, ValueError, OverflowError):
            # A pattern or a number that PostgreSQL can't read, a year that is followed by none.
            raise IncorrectLookupParameters from None

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        return super().get_search_results(request, queryset, search_term.replace("\0", ""))

    def response_action(
        self, request: HttpRequest, queryset: QuerySet[Any]
    ) -> HttpResponseBase | None:
        try:
            for pk in request.POST.getlist(ACTION_CHECKBOX_NAME):
                self.opts.pk.to_python(pk)
        except exceptions.ValidationError:
            raise exceptions.BadRequest("What was selected is no row's id.") from None
        return super().response_action(request, queryset)

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        # An address fills in no form: its texts are no times, and nobody asked for them.
        return {}


class RowAdmin(ListAdmin):
    """Rows that nobody ever deletes."""

    show_full_result_count = False
    # Drawing a row takes longer than reading it.
    list_per_page = 30

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class ReadOnlyAdmin(RowAdmin):
    """Rows that only services write."""

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class CurrencyFilter(admin.SimpleListFilter):
    """The currencies of the shop's drops; to ask the rows themselves would read all of them."""

    title = "currency"
    parameter_name = "currency"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        currencies = Drop.objects.order_by("currency").values_list("currency", flat=True)
        return [(currency, currency) for currency in currencies.distinct()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(currency=self.value()) if self.value() else queryset


class ClaimAdmin(RowAdmin):
    """Rows of a user and a drop, of which there may be very many.

    What they refer to is read after a page of them is chosen, and a search looks up the
    users and drops first: joined, 100,000 rows would be put together to show fifty.
    """

    # By time, newest first: their ids begin with it (config.ids), and have an index.
    ordering = ["-pk"]
    # Says to Django that there is a search.
    search_fields = ["pk"]
    id_fields: tuple[str, ...] = ("pk", "drop", "user")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).prefetch_related("drop", "variant", "user")

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Find by the exact id of anything, or by a part of a user's or a drop's name."""
        term = search_term.strip().replace("\0", "")
        if not term:
            return queryset, False
        try:
            wanted = uuid.UUID(term)
        except ValueError:
            users = User.objects.filter(username__icontains=term)
            drops = Drop.objects.filter(name__icontains=term)
            return queryset.filter(either_of(users, "user") | either_of(drops, "drop")), False
        return queryset.filter(
            reduce(or_, (Q(**{field: wanted}) for field in self.id_fields))
        ), False


# More ids than this are not worth to be sent back and forth.
MOST_IDS = 1000


def either_of(rows: QuerySet[Any], field: str) -> Q:
    """Return the condition that ``field`` is one of ``rows``: by their ids, where these are few."""
    ids = list(rows.order_by().values_list("pk", flat=True)[: MOST_IDS + 1])
    return Q(**{f"{field}__in": ids if len(ids) <= MOST_IDS else rows.order_by().values("pk")})


class ServiceForm(forms.ModelForm):
    """A form whose rules a service keeps."""

    # What the service said to this very input.
    refusal: APIException | None = None

    def clean(self) -> dict[str, Any]:
        super().clean()
        if self.refusal is not None:
            add_refusal(self, self.refusal)
        return self.cleaned_data

    def _post_clean(self) -> None:
        # Without full_clean, which would find the same mistakes as the service, only by the
        # names of the database's constraints.
        self.instance = construct_instance(self, self.instance)


def add_refusal(form: forms.BaseForm, refusal: APIException) -> None:
    """Show what a service said as errors of ``form``, where they belong."""
    if not isinstance(refusal, ValidationError):
        form.add_error(None, str(refusal.detail))
        return
    for error in field_errors(refusal.detail):
        name, detail = error["field"], error["detail"]
        if name in form.fields:
            form.add_error(name, detail)
        else:
            form.add_error(None, f"{name}: {detail}")


class ServiceAdmin(RowAdmin):
    """Rows that are saved by a service, in ``save_model``.

    A refusal rolls the request back; then the form is shown again, with the refusal as an
    error where it belongs.
    """

    form = ServiceForm

    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return super().changeform_view(request, *args, **kwargs)
        except (APIException, OperationalError) as exc:
            request.refusal = to_api_exception(exc)  # type: ignore[attr-defined]
            return super().changeform_view(request, *args, **kwargs)

    def get_form(self, request: HttpRequest, *args: Any, **kwargs: Any) -> type[forms.ModelForm]:
        form = super().get_form(request, *args, **kwargs)
        form.refusal = getattr(request, "refusal", None)
        return form


def link(row: Model, text: object = None) -> SafeString:
    """Return a link to the admin page of ``row``."""
    meta = row._meta
    url = reverse(f"admin:{meta.app_label}_{meta.model_name}_change", args=[row.pk])
    return format_html('<a class="control-link" href="{}">{}</a>', url, text or row)


def list_link(model: str, text: object, **filters: object) -> SafeString:
    """Return a link to the list of ``model`` ("app.model"), narrowed down by ``filters``."""
    url = reverse(f"admin:{model.replace('.', '_')}_changelist", query=filters)
    return format_html('<a class="control-link" href="{}">{}</a>', url, text)


def badge(text: str, tone: str) -> SafeString:
    """Return a status; ``tone`` is "good", "warning", "bad", "info" or "quiet"."""
    return format_html('<span class="control-status" data-tone="{}">{}</span>', tone, text)


@admin.register(LogEntry)
class LogEntryAdmin(ReadOnlyAdmin):
    """What staff did, and why."""

    list_display = ["action_time", "user", "what", "change_message"]
    list_display_links = None
    list_filter = ["content_type", "action_flag"]
    list_select_related = ["user", "content_type"]
    search_fields = ["user__username", "object_id", "object_repr", "change_message"]
    date_hierarchy = "action_time"

    @admin.display(description="row")
    def what(self, entry: LogEntry) -> SafeString | str:
        url = entry.get_admin_url()
        if url is None:
            return entry.object_repr
        return format_html('<a class="control-link" href="{}">{}</a>', url, entry.object_repr)


admin.site.unregister(Group)


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ListAdmin):
    """The roles; see ``control.roles``."""
