from datetime import datetime
from functools import lru_cache

from config.problems import Refusal
from drops.models import Drop, DropStatus


class DropNotStarted(Refusal):
    default_code = "drop_not_started"
    default_detail = "This drop has not started yet."


class DropEnded(Refusal):
    default_code = "drop_ended"
    default_detail = "This drop has ended."


class DropPaused(Refusal):
    default_code = "drop_paused"
    default_detail = "This drop is paused for the moment."


class DropCancelled(Refusal):
    default_code = "drop_cancelled"
    default_detail = "This drop was cancelled."


class DropNotPublished(Refusal):
    default_code = "drop_not_published"
    default_detail = "This drop is a draft and not published yet."


class StockCommitted(Refusal):
    """Staff may not withdraw units that somebody holds or has bought."""

    default_code = "stock_committed"
    default_detail = "Fewer units are available than would be withdrawn."


class StockAdjusted(Refusal):
    """What staff have confirmed was said of another total: perhaps they have done it already."""

    default_code = "stock_adjusted"
    default_detail = "This size has been adjusted since you looked. Look at its stock again."


_REFUSALS: dict[DropStatus, type[Refusal]] = {
    DropStatus.DRAFT: DropNotPublished,
    DropStatus.PAUSED: DropPaused,
    DropStatus.ENDED: DropEnded,
    DropStatus.CANCELLED: DropCancelled,
}


def refusal_unless_live(drop: Drop, now: datetime) -> Refusal | None:
    """Return why nothing can be had of ``drop`` at ``now``, or None while it is live."""
    status = drop.status_at(now)
    if status == DropStatus.LIVE:
        return None
    if status == DropStatus.SCHEDULED:
        return DropNotStarted(starts_at=format_instant(drop.starts_at))
    return _REFUSALS[status]()


@lru_cache(1024)
def format_instant(value: datetime | None) -> str | None:
    """Return ``value`` (UTC) as ISO 8601 with ``Z``, as everywhere in the API."""
    return value.isoformat().replace("+00:00", "Z") if value else None
