from django.contrib import admin

from config.admin import ReadOnlyAdmin
from reservations.models import Reservation


@admin.register(Reservation)
class ReservationAdmin(ReadOnlyAdmin):
    list_display = [
        "id",
        "drop",
        "size",
        "user",
        "quantity",
        "status",
        "created_at",
        "expires_at",
    ]
    list_filter = ["status", "currency"]
    list_select_related = ["drop", "variant", "user"]
    search_fields = [
        "id__exact",
        "drop__id__exact",
        "drop__name",
        "user__id__exact",
        "user__username",
    ]
    date_hierarchy = "created_at"

    @admin.display(ordering="variant__position")
    def size(self, reservation: Reservation) -> str:
        return reservation.variant.label
