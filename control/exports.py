"""CSV of what a list shows, sent as it is read, so that its length costs no memory."""

import csv
import io
import re
from collections.abc import AsyncIterator
from typing import Any, ClassVar, cast

from asgiref.sync import sync_to_async
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import BadRequest, PermissionDenied
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path, reverse
from django.utils.timezone import now
from import_export.resources import ModelResource
from unfold.enums import ActionVariant

from control.admin import RowAdmin
from users.models import User

ROWS_PER_READ = 1000
# What a spreadsheet takes for the beginning of a formula; the last four are the full-width signs.
# Source: https://owasp.org/www-community/attacks/CSV_Injection
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# Cells end at commas here, and theirs are quoted; but some spreadsheets end them at a semicolon
# or a tab, and know no quotes that don't begin a cell.
INNER_CELL = re.compile('([;\t\r\n][" ]*)(?=[=+\\-@\uff1d\uff0b\uff0d\uff20])')


class CsvResource(ModelResource):
    """The columns of an export. Text of users is disarmed: it could be a formula."""

    def export_field(self, field: Any, instance: Model, **kwargs: Any) -> Any:
        value = super().export_field(field, instance, **kwargs)
        if not isinstance(value, str):
            return value
        text = INNER_CELL.sub(r"\1'", value)
        return f"'{text}" if text.startswith(FORMULA_STARTS) else text


class ExportAdmin(RowAdmin):
    """Rows whose list can be had as CSV, filtered and searched as on the screen."""

    resource: ClassVar[type[CsvResource]]

    def get_urls(self) -> list[Any]:
        name = f"{self.opts.app_label}_{self.opts.model_name}_export"
        export = self.admin_site.admin_view(self.export_view)
        return [path("export/", export, name=name), *super().get_urls()]

    def has_export_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm(f"{self.opts.app_label}.export_{self.opts.model_name}")

    def changelist_view(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        response = super().changelist_view(request, *args, **kwargs)
        context = getattr(response, "context_data", None)
        if context and self.has_export_permission(request):
            name = f"admin:{self.opts.app_label}_{self.opts.model_name}_export"
            button = {
                "title": "Export CSV",
                "icon": "download",
                "path": f"{reverse(name)}?{request.GET.urlencode()}",
                "variant": ActionVariant.DEFAULT,
                "attrs": {},
            }
            context["actions_list"] = [button, *context.get("actions_list", [])]
        return response

    def export_view(self, request: HttpRequest) -> StreamingHttpResponse:
        if not self.has_export_permission(request):
            raise PermissionDenied
        try:
            rows = self.get_changelist_instance(request).get_queryset(request)
        except IncorrectLookupParameters:
            raise BadRequest("The list has no such filter.") from None
        LogEntry.objects.create(
            user=cast(User, request.user),
            content_type=ContentType.objects.get_for_model(self.model),
            object_repr=f"CSV of {self.opts.verbose_name_plural}",
            action_flag=CHANGE,
            change_message=f"Exported: {request.GET.urlencode() or 'all'}",
        )
        filename = f"{self.opts.model_name}s-{now():%Y-%m-%d}.csv"
        return StreamingHttpResponse(
            csv_lines(self.resource(), rows),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{filename}"'},
        )


async def csv_lines(resource: CsvResource, rows: QuerySet[Any]) -> AsyncIterator[str]:
    """Yield the head and then the rows as CSV, the newest first, a thousand at a time.

    Each read is a short statement of its own, and between two of them others have their turn.
    """
    yield as_csv([resource.get_export_headers()])
    last = None
    while True:
        text, last = await sync_to_async(read_lines)(resource, rows, last)
        if last is None:
            return
        yield text


def read_lines(resource: CsvResource, rows: QuerySet[Any], last: Any) -> tuple[str, Any]:
    """Return the rows after the one with the key ``last``, and the key of the last of them."""
    if last is not None:
        rows = rows.filter(pk__lt=last)
    batch = list(rows.order_by("-pk")[:ROWS_PER_READ])
    fields = resource.get_export_fields()
    lines = ([resource.export_field(field, row) for field in fields] for row in batch)
    return as_csv(lines), batch[-1].pk if batch else None


def as_csv(lines: Any) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue()
