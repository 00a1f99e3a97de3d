import json

from django.contrib import admin
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.decorators import display

from control.admin import ReadOnlyAdmin, link
from realtime.models import Event


@admin.register(Event)
class EventAdmin(ReadOnlyAdmin):
    list_display = ["id", "drop_link", "seq", "type", "created_at"]
    list_filter = ["type"]
    list_select_related = ["drop"]
    search_fields = ["drop__id__exact", "drop__name"]
    search_help_text = "Name or id of a drop"
    date_hierarchy = "created_at"
    ordering = ["-id"]
    fields = ["drop_link", "seq", "type", "created_at", "payload"]
    readonly_fields = ["drop_link", "payload"]

    @display(description="drop", ordering="drop__name")
    def drop_link(self, event: Event) -> SafeString:
        return link(event.drop)

    @display(description="data")
    def payload(self, event: Event) -> SafeString:
        text = json.dumps(event.data, indent=2, ensure_ascii=False)
        return format_html('<pre class="control-data" tabindex="0">{}</pre>', text)
