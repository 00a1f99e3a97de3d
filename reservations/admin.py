from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString
from import_export.fields import Field
from unfold.decorators import display

from control.actions import StaffAction, StaffActionsAdmin, staff_action
from control.admin import ClaimAdmin, CurrencyFilter, ReadOnlyAdmin, badge, link, list_link
from control.exports import CsvResource, ExportAdmin
from drops.currencies import format_amount
from drops.models import Drop, DropStatus
from reservations.models import Reservation, ReservationStatus
from reservations.services import cancel_drop, void_reservation

TONES = {
    ReservationStatus.ACTIVE: "info",
    ReservationStatus.CONSUMED: "good",
    ReservationStatus.EXPIRED: "warning",
    ReservationStatus.VOIDED: "bad",
}


@staff_action(Drop)
class Cancel(StaffAction):
    name = "cancel"
    title = "Cancel drop"
    icon = "cancel"
    permission = "drops.cancel_drop"
    is_dangerous = True

    @classmethod
    def is_offered(cls, row: Drop) -> bool:
        return row.status != DropStatus.CANCELLED

    def consequences(self) -> list[str]:
        held, sold = self.row.held_stock, self.row.sold_stock
        return [
            "Shoppers see at once that the drop is cancelled. This can't be undone.",
            f"Held units, {held} now, go back to stock; their holds become void."
            if held
            else "Nobody holds anything of it now.",
            f"Purchased units, {sold} now, stay purchased until they are refunded: one by one on "
            "their own pages, or all of them by “Refund all” on this drop's page."
            if sold
            else "Nothing of it was purchased.",
        ]

    def perform(self) -> str:
        voided = cancel_drop(self.row.pk)
        return f"Cancelled; {voided} holds voided."


@staff_action(Reservation)
class Void(StaffAction):
    name = "void"
    title = "Void hold"
    icon = "block"
    permission = "reservations.void_reservation"
    is_dangerous = True

    @classmethod
    def is_offered(cls, row: Reservation) -> bool:
        return row.status == ReservationStatus.ACTIVE and not row.is_overdue_at(row.read_at)

    def consequences(self) -> list[str]:
        hold = self.row
        return [
            f"{hold.user.username} loses {hold.quantity} × {hold.drop.name}, "
            f"{hold.variant.label}, and can't buy it with this hold any more.",
            "The units are available again, and shoppers see it at once.",
            f"{hold.user.username} may reserve again. To prevent that, deactivate the user.",
        ]

    def perform(self) -> str:
        hold = void_reservation(self.row.pk)
        return f"Voided a hold of {hold.quantity}."


class ReservationResource(CsvResource):
    drop_id = Field("drop_id")
    drop = Field("drop__name")
    size = Field("variant__label")
    user_id = Field("user_id")
    username = Field("user__username")

    class Meta:
        model = Reservation
        fields = [
            "id",
            "created_at",
            "drop_id",
            "drop",
            "size",
            "user_id",
            "username",
            "quantity",
            "unit_price",
            "currency",
            "status",
            "expires_at",
        ]
        export_order = fields


@admin.register(Reservation)
class ReservationAdmin(ClaimAdmin, ExportAdmin, StaffActionsAdmin, ReadOnlyAdmin):
    resource = ReservationResource
    list_display = [
        "short_id",
        "drop_link",
        "size",
        "user_link",
        "quantity",
        "status_label",
        "created_at",
        "expires_at",
    ]
    list_filter = ["status", CurrencyFilter]
    search_help_text = "Name or id of a user, a drop or a reservation"
    date_hierarchy = "created_at"
    fieldsets = [
        (None, {"fields": ["id", "status_label", "drop_link", "size", "user_link"]}),
        ("What and when", {"fields": ["quantity", "price", "created_at", "expires_at"]}),
        ("See also", {"fields": ["purchase_link", "of_user", "of_drop"]}),
    ]
    readonly_fields = [
        *("status_label", "drop_link", "size", "user_link", "price"),
        *("purchase_link", "of_user", "of_drop"),
    ]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Reservation]:
        rows: Any = super().get_queryset(request)
        return rows.with_clock()

    @display(description="id", ordering="id")
    def short_id(self, reservation: Reservation) -> str:
        return str(reservation.pk)[-12:]

    @display(description="drop", ordering="drop__name")
    def drop_link(self, reservation: Reservation) -> SafeString:
        return link(reservation.drop)

    @display(ordering="variant__position")
    def size(self, reservation: Reservation) -> str:
        return reservation.variant.label

    @display(description="user", ordering="user__username")
    def user_link(self, reservation: Reservation) -> SafeString:
        return link(reservation.user)

    @display(description="status", ordering="status")
    def status_label(self, reservation: Reservation) -> SafeString:
        status = ReservationStatus(reservation.status)
        return badge(status.label, TONES.get(status, "quiet"))

    @display(description="price of one")
    def price(self, reservation: Reservation) -> str:
        currency = reservation.currency
        return f"{format_amount(reservation.unit_price, currency)} {currency}"

    @display(description="purchase")
    def purchase_link(self, reservation: Reservation) -> SafeString | str:
        purchase = getattr(reservation, "purchase", None)
        return link(purchase, purchase.get_status_display()) if purchase else "None"

    @display(description="of this user")
    def of_user(self, reservation: Reservation) -> SafeString:
        return list_link(
            "reservations.reservation", "Reservations", user__id__exact=reservation.user_id
        )

    @display(description="of this drop")
    def of_drop(self, reservation: Reservation) -> SafeString:
        return list_link(
            "reservations.reservation", "Reservations", drop__id__exact=reservation.drop_id
        )
