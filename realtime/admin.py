import json

from django.contrib import admin
from django.utils.html import format_html
from django.utils.safestring import SafeString

from config.admin import ReadOnlyAdmin
from realtime.models import Event


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    list_display = ["id", "drop", "seq", "type", "created_at"]
    list_filter = ["type"]
    list_select_related = ["drop"]
    search_fields = ["drop__id__exact", "drop__name"]
    date_hierarchy = "created_at"
    ordering = ["-id"]
    fields = ["drop", "seq", "type", "created_at", "payload"]
    readonly_fields = ["payload"]

    @admin.display(description="data")
    def payload(self, event: Event) -> SafeString:
        return format_html("<pre>{}</pre>", json.dumps(event.data, indent=2, ensure_ascii=False))
