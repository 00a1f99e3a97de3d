"""What a drop must do, in plain Python: one request at a time, no database, no batches.

Expiry does not occur in here. A hold whose time is up is worth nothing from that moment on,
whether or not anything has swept it yet, and that is the promise.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Outcome = tuple[int, str | None]


@dataclass
class Claimed:
    """What became of a user's newest claim on the drop."""

    size: str
    quantity: int
    ends_at: datetime
    reservation_id: str
    state: str = "ACTIVE"


@dataclass
class Model:
    """A drop: what each request must be answered with, as (status, code of the refusal)."""

    total: dict[str, int]
    limit: int | None
    ends_at: datetime | None
    status: str = "live"
    sold: dict[str, int] = field(default_factory=dict)
    bought: dict[Hashable, int] = field(default_factory=dict)
    claims: dict[Hashable, Claimed] = field(default_factory=dict)
    ended: list[Claimed] = field(default_factory=list)
    # First answers, by key: what was sent, and the body that came back.
    answers: dict[Hashable, tuple[Any, bytes]] = field(default_factory=dict)

    def hold_of(self, user: Hashable, now: datetime) -> Claimed | None:
        claim = self.claims.get(user)
        return claim if claim and claim.state == "ACTIVE" and claim.ends_at > now else None

    def available(self, size: str, now: datetime) -> int:
        holds = [c for c in self.claims.values() if c.state == "ACTIVE" and c.ends_at > now]
        held = sum(hold.quantity for hold in holds if hold.size == size)
        return self.total[size] - self.sold.get(size, 0) - held

    def refusal(self, now: datetime) -> str | None:
        is_over = self.ends_at is not None and self.ends_at <= now
        state = "ended" if is_over and self.status in ("live", "paused") else self.status
        return None if state == "live" else f"drop_{state}"

    def reserve(self, user: Hashable, size: str | None, quantity: int, now: datetime) -> Outcome:
        if size is None and len(self.total) > 1:
            return 409, "variant_required"
        size = size or next(iter(self.total))
        if hold := self.hold_of(user, now):
            return (200, None) if hold.size == size else (409, "already_reserved")
        if refusal := self.refusal(now):
            return 409, refusal
        if self.limit is not None and self.bought.get(user, 0) + quantity > self.limit:
            return 409, "limit_exceeded"
        available = self.available(size, now)
        if available < quantity:
            is_held = available + self.sold.get(size, 0) < self.total[size]
            return 409, "fully_reserved" if is_held else "sold_out"
        return 201, None

    def reserved(self, user: Hashable, claim: Claimed) -> None:
        if user in self.claims:
            self.ended.append(self.claims[user])
        self.claims[user] = claim

    def purchase(self, user: Hashable, now: datetime) -> Outcome:
        claim = self.claims.get(user)
        if claim is None:
            return 409, "reservation_required"
        if claim.state == "CONSUMED":
            return 200, None
        if claim.state == "RELEASED":
            return 409, "reservation_not_active"
        if claim.ends_at <= now:
            return 409, "reservation_expired"
        if refusal := self.refusal(now):
            return 409, refusal
        claim.state = "CONSUMED"
        self.sold[claim.size] = self.sold.get(claim.size, 0) + claim.quantity
        self.bought[user] = self.bought.get(user, 0) + claim.quantity
        return 201, None

    def release(self, claim: Claimed, now: datetime) -> Outcome:
        if claim.state != "ACTIVE":
            return 409, "reservation_not_active"
        if claim.ends_at <= now:
            return 409, "reservation_expired"
        claim.state = "RELEASED"
        return 200, None
