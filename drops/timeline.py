"""A drop's event log, in words."""

from drops.models import Drop, DropStatus
from realtime.models import Event, EventType

EVENTS_PER_PAGE = 50


def read_timeline(drop: Drop, before: int | None) -> tuple[list[Event], int | None]:
    """Return a page of the drop's events, the newest first, and where the next one begins."""
    events = Event.objects.filter(drop=drop).order_by("-seq")
    if before is not None:
        events = events.filter(seq__lt=before)
    page = list(events[: EVENTS_PER_PAGE + 1])
    if len(page) <= EVENTS_PER_PAGE:
        return page, None
    return page[:-1], page[-2].seq


def describe(event: Event) -> str:
    """Say what happened, as staff would."""
    data = event.data
    match event.type:
        case EventType.DROP_CREATED:
            return f"Published, {DropStatus(data['drop']['status']).label.lower()}"
        case EventType.DROP_UPDATED:
            drop = data["drop"]
            return (
                f"Changed: {DropStatus(drop['status']).label.lower()}, {drop['total_stock']} units"
            )
        case EventType.STOCK_UPDATED:
            return f"{data['availableStock']} available"
        case EventType.PURCHASE_COMPLETED:
            return f"{data['username']} purchased"
        case EventType.RESERVATION_EXPIRED:
            return "A hold ran out"
        case EventType.ACTIVITY_UPDATED:
            names = [entry["username"] for entry in data["latestPurchasers"]]
            return f"Latest: {', '.join(names)}" if names else "No purchases any more"
    return event.type
