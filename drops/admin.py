from typing import Any, cast

from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import Model, QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from import_export.fields import Field
from unfold.admin import TabularInline
from unfold.decorators import display
from unfold.enums import ActionVariant
from unfold.widgets import (
    INPUT_CLASSES,
    UnfoldAdminIntegerFieldWidget,
    UnfoldAdminRadioSelectWidget,
    UnfoldAdminTextareaWidget,
)

from config.database import read_clock
from control.actions import StaffAction, StaffActionsAdmin, staff_action
from control.admin import (
    CurrencyFilter,
    ReadOnlyAdmin,
    ServiceAdmin,
    ServiceForm,
    badge,
    link,
    list_link,
)
from control.dashboard import sell_through
from control.exports import CsvResource, ExportAdmin
from drops.exceptions import format_instant
from drops.models import Drop, DropStatus, StockAdjustment, Variant
from drops.serializers import DropCreateSerializer, DropInputSerializer
from drops.services import adjust_stock, create_drop, status_on_sale, update_drop
from drops.timeline import describe, read_timeline
from realtime.log import read_seq
from users.models import User

WINDOW_AND_LIMITS = [
    *("starts_at", "ends_at", "max_per_user"),
    *("max_expired_holds", "hold_cooldown_seconds"),
]
TONES = {
    DropStatus.SCHEDULED: "info",
    DropStatus.LIVE: "good",
    DropStatus.PAUSED: "warning",
    DropStatus.CANCELLED: "bad",
}


def status_now(drop: Drop) -> DropStatus:
    return drop.status_at(drop.read_at)


def sale_of(drop: Drop) -> str:
    """Say what becomes of the units of ``drop`` as soon as staff let it be sold."""
    units = f"{drop.available_stock} units are on sale"
    if drop.ends_at and drop.ends_at <= drop.read_at:
        return "nothing of it is on sale, because its end has passed"
    if drop.starts_at and drop.starts_at > drop.read_at:
        return f"{units} from {drop.starts_at:%-d %B %Y, %H:%M} UTC"
    return f"{units} now"


@staff_action(Drop)
class Publish(StaffAction):
    name = "publish"
    title = "Publish"
    icon = "rocket_launch"
    permission = "drops.run_drop"

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return row.status == DropStatus.DRAFT

    def consequences(self) -> list[str]:
        return [
            f"Every shopper sees the drop, and {sale_of(self.row)}.",
            "A published drop can't become a draft again.",
        ]

    def perform(self) -> str:
        update_drop(self.row.pk, status=status_on_sale(self.row, read_clock()))
        return "Published."


@staff_action(Drop)
class Schedule(StaffAction):
    name = "schedule"
    title = "Schedule"
    icon = "calendar_clock"
    permission = "drops.run_drop"

    starts_at = forms.DateTimeField(
        label="Starts at (UTC)",
        widget=forms.DateTimeInput(
            format="%Y-%m-%dT%H:%M",
            attrs={"type": "datetime-local", "class": " ".join([*INPUT_CLASSES, "control-when"])},
        ),
    )

    def __init__(self, row: Drop, *args: Any, **kwargs: Any) -> None:
        super().__init__(row, *args, **kwargs)
        self.initial["starts_at"] = row.starts_at

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return status_now(row) in (DropStatus.DRAFT, DropStatus.SCHEDULED)

    def clean_starts_at(self) -> Any:
        if self.cleaned_data["starts_at"] <= self.row.read_at:
            raise forms.ValidationError("That is in the past. To start now, publish it.")
        return self.cleaned_data["starts_at"]

    def consequences(self) -> list[str]:
        starts_at = getattr(self, "cleaned_data", {}).get("starts_at")
        when = f"{starts_at:%-d %B %Y, %H:%M} UTC" if starts_at else "the start below"
        is_draft = self.row.status == DropStatus.DRAFT
        return [
            f"{self.row.available_stock} units are on sale from {when}; nobody has to be there.",
            "Every shopper sees the drop and its start now."
            if is_draft
            else "Every shopper sees the new start at once.",
        ]

    def perform(self) -> str:
        starts_at = self.cleaned_data["starts_at"]
        update_drop(self.row.pk, status=DropStatus.SCHEDULED, starts_at=starts_at)
        return f"Scheduled for {starts_at:%-d %B %Y, %H:%M} UTC."


@staff_action(Drop)
class Pause(StaffAction):
    name = "pause"
    title = "Pause"
    icon = "pause"
    permission = "drops.run_drop"

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return status_now(row) in (DropStatus.SCHEDULED, DropStatus.LIVE)

    def consequences(self) -> list[str]:
        held = self.row.held_stock
        return [
            "Nobody can reserve or buy until the drop is resumed; shoppers see it at once.",
            f"The clock of holds runs on: {held} held units can't be bought meanwhile, and go "
            "back to stock when their time is up."
            if held
            else "Nobody holds anything of it now.",
        ]

    def perform(self) -> str:
        update_drop(self.row.pk, status=DropStatus.PAUSED)
        return "Paused."


@staff_action(Drop)
class Resume(StaffAction):
    name = "resume"
    title = "Resume"
    icon = "play_arrow"
    permission = "drops.run_drop"

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return status_now(row) == DropStatus.PAUSED

    def consequences(self) -> list[str]:
        return [f"Shoppers see at once that it goes on: {sale_of(self.row)}."]

    def perform(self) -> str:
        update_drop(self.row.pk, status=status_on_sale(self.row, read_clock()))
        return "Resumed."


@staff_action(Drop)
class End(StaffAction):
    name = "end"
    title = "End"
    icon = "stop"
    permission = "drops.run_drop"
    is_dangerous = True

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return status_now(row) in (DropStatus.SCHEDULED, DropStatus.LIVE, DropStatus.PAUSED)

    def consequences(self) -> list[str]:
        drop = self.row
        return [
            "Nobody can reserve or buy any more; shoppers see it at once. This can't be undone.",
            f"{drop.available_stock} units stay unsold. {drop.held_stock} held units can't be "
            "bought any more and go back when their time is up.",
            "What was purchased stays purchased.",
        ]

    def perform(self) -> str:
        update_drop(self.row.pk, status=DropStatus.ENDED)
        return "Ended."


@staff_action(Drop)
class Adjust(StaffAction):
    name = "adjust"
    title = "Adjust stock"
    icon = "inventory_2"
    permission = "drops.adjust_drop"

    variant = forms.ModelChoiceField(
        Variant.objects.none(), label="Size", empty_label=None, widget=UnfoldAdminRadioSelectWidget
    )
    delta = forms.IntegerField(
        label="Units",
        widget=UnfoldAdminIntegerFieldWidget(attrs={"inputmode": "numeric"}),
        help_text="Units to add; negative to withdraw. Held and sold units can't be withdrawn.",
    )
    # What the preview said of the total: who presses its button twice adjusts once.
    seen_total = forms.IntegerField(required=False, widget=forms.HiddenInput)

    def __init__(self, row: Drop, *args: Any, **kwargs: Any) -> None:
        super().__init__(row, *args, **kwargs)
        sizes: Any = self.fields["variant"]
        sizes.queryset = Variant.objects.filter(drop=row)
        sizes.label_from_instance = size_and_stock
        # Of one size nothing is left to choose.
        if len(only := list(sizes.queryset[:2])) == 1:
            self.initial["variant"] = only[0].pk

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return status_now(row) not in (DropStatus.ENDED, DropStatus.CANCELLED)

    def consequences(self) -> list[str]:
        given = getattr(self, "cleaned_data", {})
        if given.get("variant") is None or given.get("delta") is None:
            return ["The stock changes at once, and shoppers see it at once."]
        variant, delta = given["variant"], given["delta"]
        return [
            f"{variant.label}: {variant.total_stock} units in all become "
            f"{variant.total_stock + delta}.",
            f"Of these, {variant.available_stock} available become "
            f"{variant.available_stock + delta}; shoppers see it at once.",
            f"{variant.held_stock} held and {variant.sold_stock} sold stay as they are.",
        ]

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        variant, delta = given.get("variant"), given.get("delta")
        if variant and "confirmed" not in self.data:
            self.data = {**self.data.dict(), "seen_total": variant.total_stock}  # type: ignore[attr-defined]
        if variant and delta is not None and variant.available_stock + delta < 0:
            self.add_error(
                "delta", f"Only {variant.available_stock} are available to be withdrawn."
            )
        return given

    def perform(self) -> str:
        given = self.cleaned_data
        variant, delta, reason = given["variant"], given["delta"], given["reason"]
        adjust_stock(
            variant.pk, delta, reason=reason, user=self.user, seen_total=given["seen_total"]
        )
        return f"Adjusted {variant.label} by {delta:+d}."


def size_and_stock(variant: Variant) -> str:
    return (
        f"{variant.label}: {variant.available_stock} available, {variant.held_stock} held, "
        f"{variant.sold_stock} sold"
    )


class DropForm(ServiceForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for field in self.fields.values():
            # The page says what it was opened with, so that only what was edited is saved: a price
            # that somebody else has changed meanwhile stays. Not of fields in two parts: a page
            # that is shown again for a mistake would take what was typed for what was there.
            field.show_hidden_initial = not isinstance(field, forms.MultiValueField)

    def clean_description(self) -> str:
        # Browsers send line breaks as CR LF; what nobody edited must not look changed.
        return self.cleaned_data["description"].replace("\r\n", "\n")


class NewDropForm(DropForm):
    total_stock = forms.IntegerField(
        required=False,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Of a drop without sizes. With sizes, it is their sum.",
    )
    sizes = forms.CharField(
        required=False,
        widget=UnfoldAdminTextareaWidget(attrs={"rows": 7, "placeholder": "EU 42: 30"}),
        help_text="One per line, with its stock, like “EU 42: 30”. Empty: no sizes.",
    )

    def clean_sizes(self) -> list[dict[str, Any]]:
        """Return ``{label, total_stock}`` of each line."""
        sizes = []
        for line in self.cleaned_data["sizes"].splitlines():
            label, _, units = line.rpartition(":")
            if not line.strip():
                continue
            # More digits than a number in the database has; int() refuses some thousands.
            is_number = units.strip().isdecimal() and len(units.strip()) <= 10
            if not label.strip() or not is_number:
                raise forms.ValidationError(f"“{line}” is not a size with its stock.")
            sizes.append({"label": label.strip(), "total_stock": int(units)})
        return sizes


class StatusFilter(admin.SimpleListFilter):
    """The status that holds now, which is the one that the list shows."""

    title = "status"
    parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(status.value, status.label) for status in DropStatus]

    def queryset(self, request: HttpRequest, queryset: Any) -> QuerySet[Any]:
        status = self.value()
        return queryset.with_status(DropStatus(status)) if status else queryset


class VariantInline(TabularInline):
    model = Variant
    verbose_name_plural = "sizes and their stock"
    fields = ["label", "total_stock", "available_stock", "held_stock", "sold_stock"]
    readonly_fields = ["held_stock"]
    extra = 0
    hide_title = True

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


class DropResource(CsvResource):
    held_stock = Field("held_stock")
    created_by = Field("created_by__username")

    class Meta:
        model = Drop
        fields = [
            "id",
            "name",
            "status",
            "price",
            "currency",
            "total_stock",
            "available_stock",
            "held_stock",
            "sold_stock",
            "max_per_user",
            "starts_at",
            "ends_at",
            "created_by",
            "created_at",
        ]
        export_order = fields

    def dehydrate_status(self, drop: Drop) -> str:
        return status_now(drop).value


@admin.register(Drop)
class DropAdmin(ExportAdmin, StaffActionsAdmin, ServiceAdmin):
    """Drops, created and changed by the services, so that every change is announced."""

    resource = DropResource
    form = DropForm
    list_display = [
        "name",
        "status_label",
        "available_stock",
        "held_stock",
        "sold_stock",
        "total_stock",
        "amount",
        "starts_at",
        "ends_at",
        "timeline_link",
    ]
    list_filter = [StatusFilter, CurrencyFilter, "starts_at"]
    list_select_related = ["created_by"]
    search_fields = ["id__exact", "name", "created_by__username"]
    search_help_text = "Name or id of a drop, or name of its creator"
    date_hierarchy = "created_at"
    inlines = [VariantInline]
    readonly_fields = [
        "id",
        "currency",
        "status_label",
        "availability",
        "total_stock",
        "available_stock",
        "held_stock",
        "sold_stock",
        "seq",
        "feed",
        "see_also",
        "creator",
        "created_at",
    ]
    fieldsets = [
        (None, {"fields": ["id", "name", "description", "image_url", "price", "currency"]}),
        ("Sale", {"fields": ["status_label", *WINDOW_AND_LIMITS]}),
        (
            "Stock",
            {
                "fields": [
                    "availability",
                    "total_stock",
                    "available_stock",
                    "held_stock",
                    "sold_stock",
                ]
            },
        ),
        ("Log", {"fields": ["see_also", "feed", "seq", "creator", "created_at"]}),
    ]
    new_fieldsets = [
        (None, {"fields": ["name", "description", "image_url", "price", "currency"]}),
        (
            "Sale",
            {
                "fields": WINDOW_AND_LIMITS,
                "description": "Without a start the drop is a draft until it is published.",
            },
        ),
        ("Stock", {"fields": ["total_stock", "sizes"]}),
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Drop]:
        return super().get_queryset(request).annotate(read_at=Now())

    def get_fieldsets(self, request: HttpRequest, obj: Drop | None = None) -> Any:
        return super().get_fieldsets(request, obj) if obj else self.new_fieldsets

    def get_readonly_fields(self, request: HttpRequest, obj: Drop | None = None) -> Any:
        return super().get_readonly_fields(request, obj) if obj else []

    def get_inlines(self, request: HttpRequest, obj: Drop | None) -> Any:
        return super().get_inlines(request, obj) if obj else []

    def get_form(
        self, request: HttpRequest, obj: Drop | None = None, change: bool = False, **kwargs: Any
    ) -> type[forms.ModelForm]:
        return super().get_form(
            request, obj, change, **({} if obj else {"form": NewDropForm}) | kwargs
        )

    def save_model(
        self, request: HttpRequest, obj: Drop, form: forms.ModelForm, change: bool
    ) -> None:
        if change:
            changes = {name: form.cleaned_data[name] for name in form.changed_data}
            body = DropInputSerializer(data=changes, partial=True)
            body.is_valid(raise_exception=True)
            update_drop(obj.pk, **body.validated_data)
        else:
            fields = dict(form.cleaned_data)
            if sizes := fields.pop("sizes"):
                fields["variants"] = sizes
            if fields["total_stock"] is None:
                del fields["total_stock"]
            new = DropCreateSerializer(data=fields)
            new.is_valid(raise_exception=True)
            user = cast(User, request.user)
            obj.pk = create_drop(user, **new.validated_data).pk

    def get_urls(self) -> list[Any]:
        timeline = self.admin_site.admin_view(self.timeline_view)
        return [
            path("<uuid:object_id>/timeline/", timeline, name="drops_drop_timeline"),
            *super().get_urls(),
        ]

    def offered_actions(self, request: HttpRequest, row: Model) -> list[dict[str, Any]]:
        timeline = {
            "title": "Timeline",
            "icon": "timeline",
            "path": reverse("admin:drops_drop_timeline", args=[row.pk]),
            "variant": ActionVariant.DEFAULT,
            "attrs": {},
        }
        return [timeline, *super().offered_actions(request, row)]

    def timeline_view(self, request: HttpRequest, object_id: Any) -> HttpResponse:
        """Show what happened to a drop, event by event, and how fast it sold."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        drop = get_object_or_404(self.get_queryset(request), pk=object_id)
        before = read_seq(request.GET.get("before", ""))
        events, older = read_timeline(drop, before)
        # Where nothing is left, the next event would be the oldest.
        oldest = events[-1].seq if events else before or drop.seq + 1
        opened_at = drop.starts_at or drop.created_at
        return TemplateResponse(
            request,
            "control/timeline.html",
            {
                **self.admin_site.each_context(request),
                "opts": self.opts,
                "title": "Timeline",
                "original": drop,
                "drop": drop,
                "status": status_now(drop).label,
                "events": [(event, describe(event)) for event in events],
                "older": older,
                "is_cut": older is None and oldest > 1,
                "is_newest": before is None,
                "sales": {
                    "openedAt": format_instant(opened_at),
                    "total": drop.total_stock,
                    "seconds": sell_through(drop, opened_at),
                },
            },
        )

    @display(description="status", ordering="status")
    def status_label(self, drop: Drop) -> SafeString:
        status = status_now(drop)
        return badge(status.label, TONES.get(status, "quiet"))

    @display(ordering="available_stock")
    def availability(self, drop: Drop) -> str:
        return drop.availability.label

    @display(description="held")
    def held_stock(self, drop: Drop) -> int:
        return drop.held_stock

    @display(description="price", ordering="price")
    def amount(self, drop: Drop) -> str:
        return drop.price_text

    @display(description="created by")
    def creator(self, drop: Drop) -> SafeString:
        return link(drop.created_by)

    @display(description="timeline")
    def timeline_link(self, drop: Drop) -> SafeString:
        url = reverse("admin:drops_drop_timeline", args=[drop.pk])
        return format_html('<a class="control-link" href="{}">Timeline</a>', url)

    @display(description="see also")
    def see_also(self, drop: Drop) -> SafeString:
        return format_html(
            "{}, {}, {}, {}",
            self.timeline_link(drop),
            list_link("reservations.reservation", "Reservations", drop__id__exact=drop.pk),
            list_link("purchases.purchase", "Purchases", drop__id__exact=drop.pk),
            list_link("drops.stockadjustment", "Adjustments", variant__drop__id__exact=drop.pk),
        )

    @display(description="latest purchasers")
    def feed(self, drop: Drop) -> SafeString | str:
        rows = ((e["qty"], e["username"], e["created_at"]) for e in drop.latest_purchasers)
        return format_html_join("", "<div>{} × {}, {}</div>", rows) or "Nobody yet"


@admin.register(StockAdjustment)
class StockAdjustmentAdmin(ReadOnlyAdmin):
    """What was added and withdrawn, by whom and why; made on the drop's page."""

    list_display = ["created_at", "drop", "size", "delta", "reason", "user"]
    list_select_related = ["variant__drop", "created_by"]
    search_fields = [
        "variant__id__exact",
        "variant__drop__id__exact",
        "variant__drop__name",
        "reason",
        "created_by__username",
    ]
    search_help_text = "Name or id of a drop, a reason, or who did it"
    date_hierarchy = "created_at"
    fields = ["drop", "size", "delta", "reason", "user", "created_at"]
    readonly_fields = ["drop", "size", "user"]

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        return lookup == "variant__drop__id__exact" or super().lookup_allowed(
            lookup, value, request
        )

    @display(ordering="variant__drop__name")
    def drop(self, adjustment: StockAdjustment) -> SafeString:
        return link(adjustment.variant.drop)

    @display(ordering="variant__position")
    def size(self, adjustment: StockAdjustment) -> str:
        return adjustment.variant.label

    @display(description="by", ordering="created_by__username")
    def user(self, adjustment: StockAdjustment) -> SafeString:
        return link(adjustment.created_by)
