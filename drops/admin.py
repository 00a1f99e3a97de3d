from typing import Any, cast

from django import forms
from django.contrib import admin
from django.db.models import Model, QuerySet
from django.db.models.functions import Now
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from config.admin import ReadOnlyAdmin, ServiceAdmin, ServiceForm
from drops.currencies import format_amount
from drops.models import Drop, StockAdjustment, Variant
from drops.serializers import DropCreateSerializer, DropInputSerializer
from drops.services import adjust_stock, create_drop, update_drop
from users.models import User

WINDOW_AND_LIMITS = [
    *("starts_at", "ends_at", "max_per_user"),
    *("max_expired_holds", "hold_cooldown_seconds"),
]


class DropForm(ServiceForm):
    def clean_description(self) -> str:
        # Browsers send line breaks as CR LF; what nobody edited must not look changed.
        return self.cleaned_data["description"].replace("\r\n", "\n")


class NewDropForm(DropForm):
    total_stock = forms.IntegerField(
        required=False, help_text="Of a drop without sizes. With sizes, it is their sum."
    )
    sizes = forms.CharField(
        required=False,
        widget=forms.Textarea(attrs={"rows": 7, "placeholder": "EU 42: 30"}),
        help_text="One per line, with its stock, like “EU 42: 30”. Empty: no sizes.",
    )

    def clean_sizes(self) -> list[dict[str, Any]]:
        """Return ``{label, total_stock}`` of each line."""
        sizes = []
        for line in self.cleaned_data["sizes"].splitlines():
            label, _, units = line.rpartition(":")
            if not line.strip():
                continue
            if not label.strip() or not units.strip().isdecimal():
                raise forms.ValidationError(f"“{line}” is not a size with its stock.")
            sizes.append({"label": label.strip(), "total_stock": int(units)})
        return sizes


class VariantInline(admin.TabularInline):
    model = Variant
    verbose_name_plural = "variants and their stock"
    fields = [
        "label",
        "total_stock",
        "available_stock",
        "held_stock",
        "sold_stock",
        "adjust",
    ]
    readonly_fields = ["held_stock", "adjust"]
    extra = 0

    def has_add_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    @admin.display(description="")
    def adjust(self, variant: Variant) -> SafeString:
        url = reverse("admin:drops_stockadjustment_add")
        return format_html('<a href="{}?variant={}">Adjust</a>', url, variant.pk)


@admin.register(Drop)
class DropAdmin(ServiceAdmin):
    """Drops, created and changed by the services, so that every change is announced."""

    form = DropForm
    list_display = [
        "name",
        "status_now",
        "availability",
        "available_stock",
        "held_stock",
        "sold_stock",
        "total_stock",
        "amount",
        "starts_at",
        "ends_at",
        "created_by",
    ]
    list_filter = ["status", "currency", "starts_at"]
    list_select_related = ["created_by"]
    search_fields = ["id__exact", "name", "created_by__username"]
    date_hierarchy = "created_at"
    inlines = [VariantInline]
    readonly_fields = [
        "id",
        "currency",
        "status_now",
        "availability",
        "total_stock",
        "available_stock",
        "held_stock",
        "sold_stock",
        "seq",
        "feed",
        "created_by",
        "created_at",
    ]
    fieldsets = [
        (None, {"fields": ["id", "name", "description", "image_url", "price", "currency"]}),
        ("Sale", {"fields": ["status", "status_now", *WINDOW_AND_LIMITS]}),
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
        ("Log", {"fields": ["seq", "feed", "created_by", "created_at"]}),
    ]
    new_fieldsets = [
        (None, {"fields": ["name", "description", "image_url", "price", "currency"]}),
        (
            "Sale",
            {
                "fields": WINDOW_AND_LIMITS,
                "description": "Without a start the drop is a draft until its status is changed.",
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

    @admin.display(description="status now", ordering="status")
    def status_now(self, drop: Drop) -> str:
        return drop.status_at(drop.read_at).label

    @admin.display(ordering="available_stock")
    def availability(self, drop: Drop) -> str:
        return drop.availability.label

    @admin.display(description="price", ordering="price")
    def amount(self, drop: Drop) -> str:
        return f"{format_amount(drop.price, drop.currency)} {drop.currency}"

    @admin.display(description="latest purchasers")
    def feed(self, drop: Drop) -> SafeString | str:
        rows = ((e["qty"], e["username"], e["created_at"]) for e in drop.latest_purchasers)
        return format_html_join("", "<div>{} × {}, {}</div>", rows) or "Nobody yet"


@admin.register(Variant)
class VariantAdmin(ReadOnlyAdmin):
    """Where a variant is chosen for an adjustment."""

    list_display = [
        "label",
        "drop",
        "available_stock",
        "held_stock",
        "sold_stock",
        "total_stock",
    ]
    list_select_related = ["drop"]
    search_fields = ["id__exact", "label", "drop__id__exact", "drop__name"]
    ordering = ["-drop__created_at", "drop", "position"]
    fields = [
        "id",
        "drop",
        "label",
        "position",
        "available_stock",
        "held_stock",
        "sold_stock",
        "total_stock",
    ]


@admin.register(StockAdjustment)
class StockAdjustmentAdmin(ServiceAdmin):
    list_display = ["id", "drop", "size", "delta", "reason", "created_by", "created_at"]
    list_select_related = ["variant__drop", "created_by"]
    search_fields = [
        "variant__id__exact",
        "variant__drop__id__exact",
        "variant__drop__name",
        "reason",
        "created_by__username",
    ]
    date_hierarchy = "created_at"
    fields = ["variant", "delta", "reason"]
    raw_id_fields = ["variant"]

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def get_fields(self, request: HttpRequest, obj: StockAdjustment | None = None) -> Any:
        return [*self.fields, "created_by", "created_at"] if obj else self.fields

    def save_model(
        self, request: HttpRequest, obj: StockAdjustment, form: forms.ModelForm, change: bool
    ) -> None:
        obj.pk = adjust_stock(
            obj.variant_id,
            obj.delta,
            reason=obj.reason,
            user=cast(User, request.user),
        ).pk

    @admin.display(ordering="variant__drop__name")
    def drop(self, adjustment: StockAdjustment) -> Drop:
        return adjustment.variant.drop

    @admin.display(ordering="variant__position")
    def size(self, adjustment: StockAdjustment) -> str:
        return adjustment.variant.label
