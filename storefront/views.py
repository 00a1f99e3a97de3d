import uuid
from typing import Any

from django.conf import settings
from django.core.cache import cache
from django.db.models import Min, Sum
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.views.decorators.cache import cache_control
from django.views.decorators.gzip import gzip_page
from django.views.decorators.http import require_safe

from drops.exceptions import format_instant
from drops.models import Availability, Drop, DropStatus
from drops.services import drop_payload
from reservations.models import Reservation
from storefront.words import STATES, all_words, filled

MOST_LIVE = 24
MOST_UPCOMING = 12
TICKER_LENGTH = 6
# So few left that the page says so; the same in shop.js.
FEW = 5
ORDER = [
    Availability.AVAILABLE,
    Availability.FULLY_RESERVED,
    DropStatus.PAUSED,
    Availability.SOLD_OUT,
]
# Nothing more is to be waited for; the same in drop.js.
OVER = [Availability.SOLD_OUT, DropStatus.ENDED, DropStatus.CANCELLED]
# How long a process may give the same answer about a drop's holds.
HOLDS_SECONDS = 1


# Kept by the browser for its back button, but asked for again: the stock moves.
@require_safe
@gzip_page
@cache_control(no_cache=True)
def home(request: HttpRequest) -> HttpResponse:
    """Show what can be had now and soon."""
    drops = Drop.objects.for_shoppers().read_now()
    on_sale = drops.with_status(DropStatus.LIVE) | drops.with_status(DropStatus.PAUSED)
    live = [for_page(drop) for drop in on_sale[:MOST_LIVE]]
    # What can be had stands first; of the same kind the newest, as they come.
    live.sort(key=lambda drop: ORDER.index(drop.state))
    upcoming = drops.with_status(DropStatus.SCHEDULED).order_by("starts_at", "id")
    ticker = [{"drop": drop} | bought for drop in live for bought in drop.latest_purchasers]
    ticker.sort(key=lambda bought: bought["created_at"], reverse=True)
    return render(
        request,
        "storefront/home.html",
        {
            "live": live,
            "upcoming": [for_page(drop) for drop in upcoming[:MOST_UPCOMING]],
            "ticker": ticker[:TICKER_LENGTH],
            "most": {"live": MOST_LIVE, "upcoming": MOST_UPCOMING},
            **common(),
        },
    )


@require_safe
@gzip_page
@cache_control(no_cache=True)
def drop_page(request: HttpRequest, drop_id: str) -> HttpResponse:
    """Show one drop, whatever its status; a draft isn't there yet."""
    drop = find_published(read_uuid(drop_id))
    if drop is None:
        return render(request, "storefront/missing.html", common(), status=404)
    context = {
        "drop": for_page(drop),
        "drop_data": drop_payload(drop, drop.read_at),
        "over": OVER,
        **common(),
    }
    return render(request, "storefront/drop.html", context)


@require_safe
def holds(request: HttpRequest, drop_id: str) -> HttpResponse:
    """Answer how many units of each size are held, and when the first may come back.

    No event says so, as it would cost the busiest transactions a query. Pages ask only while
    they show that all are held.
    """
    pk = read_uuid(drop_id)
    key = f"storefront:holds:{pk}"
    answer = cache.get(key)
    if answer is None:
        drop = find_published(pk)
        answer = {} if drop is None else {"variants": holds_of(drop)}
        cache.set(key, answer, HOLDS_SECONDS)
    return JsonResponse(answer, status=200 if answer else 404)


def holds_of(drop: Drop) -> dict[str, dict[str, Any]]:
    """Return the held units and the first deadline of each variant that has holds."""
    active = Reservation.objects.active().filter(drop=drop).order_by()
    rows = active.values_list("variant").annotate(Sum("quantity"), Min("expires_at"))
    return {
        str(variant): {"held": held, "next_release_at": format_instant(first)}
        for variant, held, first in rows
    }


def read_uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def find_published(pk: uuid.UUID | None) -> Drop | None:
    if pk is None:
        return None
    published = Drop.objects.for_shoppers().exclude(status=DropStatus.DRAFT)
    return published.read_now().filter(pk=pk).first()


def for_page(drop: Drop) -> Any:
    """Add what the templates need: the state that is shown, and its words."""
    page: Any = drop
    page.shown_status = drop.status_at(drop.read_at)
    page.state = drop.availability if page.shown_status == DropStatus.LIVE else page.shown_status
    page.words = filled(STATES[page.state])
    page.is_last = page.state == Availability.AVAILABLE and drop.available_stock <= FEW
    page.label = page.words["label"]
    if page.is_last:
        page.label = page.words["label_last"].replace("{n}", str(drop.available_stock))
    page.amount, page.price_currency = drop.price_text.split(" ")
    return page


def common() -> dict[str, Any]:
    anybody_may_be_anybody = settings.DEBUG and settings.IDENTITY_MODE == "header"
    return {
        "words": all_words(),
        # In development anybody may be anybody; else whoever stands in front knows.
        "identity": "development" if anybody_may_be_anybody else "gateway",
        "sign_in_url": settings.SIGN_IN_URL,
    }
