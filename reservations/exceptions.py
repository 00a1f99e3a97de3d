import math

from config.problems import Refusal


class SoldOut(Refusal):
    default_code = "sold_out"
    default_detail = "Sold out: every unit was bought."


class FullyReserved(Refusal):
    default_code = "fully_reserved"
    default_detail = "All remaining units are held; some may come back at next_release_at."


class VariantRequired(Refusal):
    default_code = "variant_required"
    default_detail = "This drop has several variants; name one."


class LimitExceeded(Refusal):
    default_code = "limit_exceeded"
    default_detail = "This would be more than one user may hold and buy of this drop."


class TooManyHolds(LimitExceeded):
    """The limit over all drops; clients read the same code, and what to do from the detail."""

    default_detail = "You hold as much as one user may at once. Buy or release something first."


class Cooldown(Refusal):
    """Too many own holds expired unused."""

    default_code = "cooldown"
    default_detail = "Too many of your holds on this drop expired. Wait before the next one."

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.retry_after_seconds = max(1, math.ceil(seconds))


class AlreadyReserved(Refusal):
    default_code = "already_reserved"
    default_detail = "You hold another variant of this drop. Release it first."


class ReservationRequired(Refusal):
    default_code = "reservation_required"
    default_detail = "Reserve first, then purchase."


class ReservationExpired(Refusal):
    default_code = "reservation_expired"
    default_detail = "The reservation's time was up before it was purchased."


class ReservationNotActive(Refusal):
    default_code = "reservation_not_active"
    default_detail = "The reservation is not active any more."
