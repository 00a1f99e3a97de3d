from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from config.admin import ReadOnlyAdmin
from drops.currencies import format_amount
from purchases.audit import audit_stock
from purchases.models import Purchase


@admin.register(Purchase)
class PurchaseAdmin(ReadOnlyAdmin):
    list_display = ["id", "drop", "size", "user", "quantity", "paid", "status", "created_at"]
    list_filter = ["status", "currency"]
    list_select_related = ["drop", "variant", "user"]
    search_fields = [
        "id__exact",
        "reservation__id__exact",
        "drop__id__exact",
        "drop__name",
        "user__id__exact",
        "user__username",
    ]
    date_hierarchy = "created_at"

    @admin.display(ordering="variant__position")
    def size(self, purchase: Purchase) -> str:
        return purchase.variant.label

    @admin.display(ordering="amount", description="amount")
    def paid(self, purchase: Purchase) -> str:
        return f"{format_amount(purchase.amount, purchase.currency)} {purchase.currency}"


@admin.site.admin_view
def audit_page(request: HttpRequest) -> HttpResponse:
    """Show staff what ``manage.py audit_stock`` would find at this moment."""
    context = admin.site.each_context(request) | {"title": "Stock audit", "audit": audit_stock()}
    return TemplateResponse(request, "purchases/audit.html", context)
