"""What the admin pages of all apps have in common."""

from typing import Any

from django import forms
from django.contrib import admin
from django.db import OperationalError
from django.db.models import Model
from django.forms.models import construct_instance
from django.http import HttpRequest, HttpResponse
from rest_framework.exceptions import APIException, ValidationError

from config.problems import field_errors, to_api_exception


class ReadOnlyAdmin(admin.ModelAdmin):
    """Rows that only services write and nobody ever deletes."""

    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class ServiceForm(forms.ModelForm):
    """A form whose rules a service keeps."""

    # What the service said to this very input.
    refusal: APIException | None = None

    def clean(self) -> dict[str, Any]:
        super().clean()
        if isinstance(self.refusal, ValidationError):
            for error in field_errors(self.refusal.detail):
                name, detail = error["field"], error["detail"]
                if name in self.fields:
                    self.add_error(name, detail)
                else:
                    self.add_error(None, f"{name}: {detail}")
        elif self.refusal is not None:
            self.add_error(None, str(self.refusal.detail))
        return self.cleaned_data

    def _post_clean(self) -> None:
        # Without full_clean, which would find the same mistakes as the service, only by the
        # names of the database's constraints.
        self.instance = construct_instance(self, self.instance)


class ServiceAdmin(admin.ModelAdmin):
    """Rows that are saved by a service, in ``save_model``; never deleted.

    A refusal rolls the request back; then the form is shown again, with the refusal as an
    error where it belongs.
    """

    form = ServiceForm
    show_full_result_count = False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def changeform_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return super().changeform_view(request, *args, **kwargs)
        except (APIException, OperationalError) as exc:
            request.refusal = to_api_exception(exc)  # type: ignore[attr-defined]
            return super().changeform_view(request, *args, **kwargs)

    def get_form(self, request: HttpRequest, *args: Any, **kwargs: Any) -> type[forms.ModelForm]:
        form = super().get_form(request, *args, **kwargs)
        form.refusal = getattr(request, "refusal", None)  # type: ignore[attr-defined]
        return form
