from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.safestring import SafeString
from import_export.fields import Field
from unfold.decorators import display
from unfold.widgets import UnfoldAdminRadioSelectWidget

from control.actions import StaffAction, StaffActionsAdmin, staff_action
from control.admin import ClaimAdmin, CurrencyFilter, ReadOnlyAdmin, badge, link, list_link
from control.exports import CsvResource, ExportAdmin
from drops.currencies import format_amount
from drops.models import Drop, DropStatus
from purchases.audit import audit_stock
from purchases.models import Purchase, PurchaseStatus
from purchases.services import refund_all, refund_purchase


class RefundForm(StaffAction):
    """What both kinds of refund ask for."""

    icon = "currency_exchange"
    permission = "purchases.refund_purchase"
    is_dangerous = True

    restock = forms.TypedChoiceField(
        label="The units",
        choices=[
            ("yes", "go back to stock and can be bought again"),
            ("no", "are gone: the total stock shrinks by them"),
        ],
        coerce=lambda choice: choice == "yes",
        widget=UnfoldAdminRadioSelectWidget,
    )

    def fate_of_units(self) -> list[str]:
        restock = getattr(self, "cleaned_data", {}).get("restock")
        if restock is None:
            return ["Say below what becomes of the units. The money is paid back elsewhere."]
        return [
            "The units are available again, and shoppers see it at once."
            if restock
            else "The units are written off, which the stock adjustments will show.",
            "The money is paid back elsewhere.",
        ]


@staff_action(Purchase)
class Refund(RefundForm):
    name = "refund"
    title = "Refund"

    @classmethod
    def is_offered(cls, row: Purchase) -> bool:
        return row.status == PurchaseStatus.PAID

    def consequences(self) -> list[str]:
        bought = self.row
        return [
            f"{bought.user.username} no longer has {bought.quantity} × {bought.drop.name}, "
            f"{bought.variant.label}, for {amount_of(bought)}.",
            f"It no longer counts against the limit: {bought.user.username} may buy again.",
            *self.fate_of_units(),
        ]

    def perform(self) -> str:
        restock, reason = self.cleaned_data["restock"], self.cleaned_data["reason"]
        bought = refund_purchase(self.row.pk, restock=restock, reason=reason, user=self.user)
        how = "with" if restock else "without"
        return f"Refunded {bought.quantity}, {how} restocking."


@staff_action(Drop)
class RefundAll(RefundForm):
    name = "refund-all"
    title = "Refund all"

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        is_over = row.status_at(row.read_at) in (DropStatus.CANCELLED, DropStatus.ENDED)
        return is_over and row.sold_stock > 0

    def consequences(self) -> list[str]:
        return [
            f"Every paid purchase of this drop is refunded: {self.row.sold_stock} units.",
            *self.fate_of_units(),
        ]

    def perform(self) -> str:
        restock, reason = self.cleaned_data["restock"], self.cleaned_data["reason"]
        refunded = refund_all(self.row.pk, restock=restock, reason=reason, user=self.user)
        how = "with" if restock else "without"
        return f"Refunded {len(refunded)} purchases, {how} restocking."


class PurchaseResource(CsvResource):
    drop_id = Field("drop_id")
    drop = Field("drop__name")
    size = Field("variant__label")
    user_id = Field("user_id")
    username = Field("user__username")
    reservation_id = Field("reservation_id")

    class Meta:
        model = Purchase
        fields = [
            "id",
            "created_at",
            "drop_id",
            "drop",
            "size",
            "user_id",
            "username",
            "reservation_id",
            "quantity",
            "amount",
            "currency",
            "status",
        ]
        export_order = fields


def amount_of(purchase: Purchase) -> str:
    return f"{format_amount(purchase.amount, purchase.currency)} {purchase.currency}"


@admin.register(Purchase)
class PurchaseAdmin(ClaimAdmin, ExportAdmin, StaffActionsAdmin, ReadOnlyAdmin):
    resource = PurchaseResource
    list_display = [
        "short_id",
        "drop_link",
        "size",
        "user_link",
        "quantity",
        "paid",
        "status_label",
        "created_at",
    ]
    list_filter = ["status", CurrencyFilter]
    search_help_text = "Name or id of a user, a drop, a reservation or a purchase"
    id_fields = (*ClaimAdmin.id_fields, "reservation")
    date_hierarchy = "created_at"
    fieldsets = [
        (None, {"fields": ["id", "status_label", "drop_link", "size", "user_link"]}),
        ("What and when", {"fields": ["quantity", "paid", "created_at"]}),
        ("See also", {"fields": ["reservation_link", "of_user", "of_drop"]}),
    ]
    readonly_fields = [
        *("status_label", "drop_link", "size", "user_link", "paid"),
        *("reservation_link", "of_user", "of_drop"),
    ]

    @display(description="id", ordering="id")
    def short_id(self, purchase: Purchase) -> str:
        return str(purchase.pk)[-12:]

    @display(description="drop", ordering="drop__name")
    def drop_link(self, purchase: Purchase) -> SafeString:
        return link(purchase.drop)

    @display(ordering="variant__position")
    def size(self, purchase: Purchase) -> str:
        return purchase.variant.label

    @display(description="user", ordering="user__username")
    def user_link(self, purchase: Purchase) -> SafeString:
        return link(purchase.user)

    @display(ordering="amount", description="amount")
    def paid(self, purchase: Purchase) -> str:
        return amount_of(purchase)

    @display(description="status", ordering="status")
    def status_label(self, purchase: Purchase) -> SafeString:
        is_paid = purchase.status == PurchaseStatus.PAID
        return badge(purchase.get_status_display(), "good" if is_paid else "bad")

    @display(description="reservation")
    def reservation_link(self, purchase: Purchase) -> SafeString:
        return link(purchase.reservation)

    @display(description="of this user")
    def of_user(self, purchase: Purchase) -> SafeString:
        return list_link("purchases.purchase", "Purchases", user__id__exact=purchase.user_id)

    @display(description="of this drop")
    def of_drop(self, purchase: Purchase) -> SafeString:
        return list_link("purchases.purchase", "Purchases", drop__id__exact=purchase.drop_id)


@admin.site.admin_view
def audit_page(request: HttpRequest) -> HttpResponse:
    """Show what ``manage.py audit_stock`` would find at this moment."""
    if not request.user.has_perm("drops.view_drop"):
        raise PermissionDenied
    context = admin.site.each_context(request) | {"title": "Stock audit", "audit": audit_stock()}
    return TemplateResponse(request, "purchases/audit.html", context)
