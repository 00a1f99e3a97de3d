from datetime import datetime

from django.conf import settings
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from config.database import ClockTimestamp
from config.ids import new_id


class ReservationStatus(models.TextChoices):
    ACTIVE = "ACTIVE", "Active"
    CONSUMED = "CONSUMED", "Purchased"
    EXPIRED = "EXPIRED", "Expired"
    RELEASED = "RELEASED", "Released by the user"
    VOIDED = "VOIDED", "Voided by staff"


class ReservationQuerySet(models.QuerySet["Reservation"]):
    def active(self) -> "ReservationQuerySet":
        return self.filter(status=ReservationStatus.ACTIVE)

    def overdue(self, now: datetime | Now | None = None) -> "ReservationQuerySet":
        """Keep active reservations whose time is up, by the database's clock."""
        return self.active().filter(expires_at__lte=now or Now())

    def read_now(self) -> "ReservationQuerySet":
        """Load each reservation with its drop and the database's time, ``read_at``."""
        return self.annotate(read_at=Now()).select_related("drop")

    def with_clock(self) -> "ReservationQuerySet":
        """Load the database's time with each row as ``read_at``, even late in a transaction."""
        return self.annotate(read_at=ClockTimestamp())


class Reservation(models.Model):
    """A user's claim on units of a drop; a purchase consumes it.

    Active changes to consumed, expired, released or voided, and consumed to voided when
    the purchase is refunded: only active and consumed ones count against a user's limit.
    Rows are never deleted, so the stock can be recomputed from them at any time.
    """

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    # Without database constraints: each would lock and look up the hot row again per
    # reservation. The service holds both rows locked, and a trigger keeps them from being
    # deleted (docs/adr/0004).
    drop = models.ForeignKey(
        "drops.Drop",
        models.PROTECT,
        related_name="reservations",
        db_index=False,
        db_constraint=False,
    )
    variant = models.ForeignKey(
        "drops.Variant",
        models.PROTECT,
        related_name="reservations",
        db_index=False,
        db_constraint=False,
    )
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.PROTECT, related_name="reservations", db_index=False
    )
    quantity = models.PositiveIntegerField()
    unit_price = models.DecimalField(max_digits=12, decimal_places=3)
    currency = models.CharField(max_length=3)
    status = models.CharField(
        max_length=8, choices=ReservationStatus.choices, default=ReservationStatus.ACTIVE
    )
    created_at = models.DateTimeField()
    expires_at = models.DateTimeField()

    objects = ReservationQuerySet.as_manager()

    # The database's time when the row was read; set by ``read_now`` and by services.
    read_at: datetime
    # Set by ``reserve_many``: made by this call, rather than found.
    is_new = False

    class Meta:
        ordering = ["-created_at", "id"]
        permissions = [
            ("void_reservation", "Can void holds"),
            ("export_reservation", "Can export reservations"),
        ]
        constraints = [
            models.UniqueConstraint(
                fields=["user", "drop"],
                condition=Q(status="ACTIVE"),
                name="one_active_reservation_per_user_and_drop",
            ),
            models.CheckConstraint(
                name="reservation_quantity_is_positive", condition=Q(quantity__gt=0)
            ),
            models.CheckConstraint(
                name="reservation_price_not_negative", condition=Q(unit_price__gte=0)
            ),
            models.CheckConstraint(
                name="reservation_status_is_known", condition=Q(status__in=ReservationStatus.values)
            ),
            models.CheckConstraint(
                name="reservation_expires_after_it_was_made",
                condition=Q(expires_at__gt=F("created_at")),
            ),
        ]
        indexes = [
            # Read by reserve and purchase (what the claimants have), and by the memory of
            # shortage (everybody who has something).
            models.Index(fields=["drop", "user"], name="reservation_by_drop_and_user"),
            # Read by a user's own list.
            models.Index(fields=["user", "-created_at"], name="reservation_by_user"),
            # Read by expiry, and by refusals that name the next release.
            models.Index(
                fields=["drop", "expires_at"],
                condition=Q(status="ACTIVE"),
                name="active_reservation_by_deadline",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.status} {self.id}"

    def is_overdue_at(self, now: datetime) -> bool:
        return self.status == ReservationStatus.ACTIVE and self.expires_at <= now
