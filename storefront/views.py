from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from drops.models import Drop, DropStatus


def home(request: HttpRequest) -> HttpResponse:
    """Show what can be had now and soon, and where the API is."""
    drops = Drop.objects.read_now()
    return render(
        request,
        "storefront/home.html",
        {
            "live": drops.with_status(DropStatus.LIVE)[:24],
            "upcoming": drops.with_status(DropStatus.SCHEDULED).order_by("starts_at")[:12],
        },
    )
