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
