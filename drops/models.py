import uuid
from datetime import datetime

from django.conf import settings
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from config.database import ClockTimestamp
from config.ids import REHEARSAL_IDS, is_rehearsal_id
from drops.currencies import format_amount


class DropStatus(models.TextChoices):
    """What staff decided; what holds now also depends on the window, see ``status_at``."""

    DRAFT = "draft", "Draft"
    SCHEDULED = "scheduled", "Scheduled"
    LIVE = "live", "Live"
    PAUSED = "paused", "Paused"
    ENDED = "ended", "Ended"
    CANCELLED = "cancelled", "Cancelled"


class Availability(models.TextChoices):
    AVAILABLE = "available", "Available"
    FULLY_RESERVED = "fully_reserved", "All held, some may come back"
    SOLD_OUT = "sold_out", "Sold out"


# Only these follow the clock: scheduled becomes live at the start, all three end at the end.
FOLLOWS_START = (DropStatus.SCHEDULED, DropStatus.LIVE)
FOLLOWS_END = (DropStatus.SCHEDULED, DropStatus.LIVE, DropStatus.PAUSED)


class Stock(models.Model):
    """Units of something: each is available, held by an active reservation, or sold.

    Held units are what the other counters leave of the total, so the sum always holds.
    None of the counters is in an index: their updates stay within the row's page (HOT).
    """

    total_stock = models.PositiveIntegerField()
    available_stock = models.PositiveIntegerField()
    sold_stock = models.PositiveIntegerField(default=0)

    class Meta:
        abstract = True

    @property
    def held_stock(self) -> int:
        return self.total_stock - self.available_stock - self.sold_stock

    @property
    def availability(self) -> Availability:
        if self.available_stock > 0:
            return Availability.AVAILABLE
        return Availability.FULLY_RESERVED if self.held_stock > 0 else Availability.SOLD_OUT


def stock_constraint(name: str) -> models.CheckConstraint:
    """Make more units available or sold than there are impossible."""
    return models.CheckConstraint(
        name=name,
        condition=Q(
            available_stock__gte=0,
            sold_stock__gte=0,
            total_stock__gte=F("available_stock") + F("sold_stock"),
        ),
    )


class DropQuerySet(models.QuerySet["Drop"]):
    def read_now(self) -> "DropQuerySet":
        """Load each drop with its variants and the database's time, ``read_at``."""
        return self.annotate(read_at=Now()).prefetch_related("variants")

    def for_shoppers(self) -> "DropQuerySet":
        """Leave out rehearsals, which nobody may come across."""
        return self.exclude(pk__range=REHEARSAL_IDS)

    def with_status(self, status: DropStatus) -> "DropQuerySet":
        """Keep the drops of which ``status`` holds now, by the database's clock."""
        has_started = Q(starts_at=None) | Q(starts_at__lte=Now())
        has_ended = Q(status__in=FOLLOWS_END, ends_at__lte=Now())
        holds = {
            DropStatus.SCHEDULED: Q(status__in=FOLLOWS_START, starts_at__gt=Now()) & ~has_ended,
            DropStatus.LIVE: Q(status__in=FOLLOWS_START) & has_started & ~has_ended,
            DropStatus.PAUSED: Q(status=DropStatus.PAUSED) & ~has_ended,
            DropStatus.ENDED: Q(status=DropStatus.ENDED) | has_ended,
        }
        return self.filter(holds.get(status, Q(status=status)))

    def window_due(self) -> "DropQuerySet":
        """Keep drops whose window opened or closed since their clients were told of it."""
        return self.filter(
            Q(
                status__in=FOLLOWS_START,
                starts_at__gt=F("window_told_at"),
                starts_at__lte=ClockTimestamp(),
            )
            | Q(
                status__in=FOLLOWS_END,
                ends_at__gt=F("window_told_at"),
                ends_at__lte=ClockTimestamp(),
            )
        )

    def current(self) -> "DropQuerySet":
        """Keep what a visitor may wait for or buy: published, and neither ended nor cancelled."""
        return self.for_shoppers().filter(status__in=FOLLOWS_END).exclude(ends_at__lte=Now())


class Drop(Stock):
    """A limited release of one product.

    The row is also the lock of all its stock: whoever changes units of the drop locks
    it first, then variants, then reservations (see ``drops.services.lock_drop``).
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    name = models.CharField(max_length=200)
    description = models.TextField(blank=True, default="")
    image_url = models.CharField(max_length=500, blank=True, default="")
    price = models.DecimalField(max_digits=12, decimal_places=3)
    currency = models.CharField(max_length=3, default="USD", help_text="ISO 4217")
    starts_at = models.DateTimeField(null=True, blank=True)
    ends_at = models.DateTimeField(null=True, blank=True)
    status = models.CharField(
        max_length=10, choices=DropStatus.choices, default=DropStatus.DRAFT, db_index=False
    )
    max_per_user = models.PositiveIntegerField(
        null=True,
        blank=True,
        default=1,
        help_text="Units one user may hold and have bought together; empty: no limit.",
    )
    hold_cooldown_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="How long a user waits after a hold of theirs expired, once as many as "
        "max_expired_holds have; empty: not at all.",
    )
    max_expired_holds = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="Holds a user may let expire before the cooldown begins; empty: any number.",
    )
    hold_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        editable=False,
        help_text="The life of a hold, of rehearsals only; else it is RESERVATION_TTL_SECONDS.",
    )
    seq = models.PositiveBigIntegerField(
        default=0, help_text="The number of the drop's newest event."
    )
    latest_purchasers = models.JSONField(
        default=list,
        blank=True,
        help_text="The activity feed: the three latest paid purchases, newest first.",
    )
    created_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.PROTECT, related_name="drops_created"
    )
    created_at = models.DateTimeField(db_index=True)
    window_told_at = models.DateTimeField(
        db_default=Now(),
        editable=False,
        help_text="Up to then, clients were told of what the window did.",
    )

    objects = DropQuerySet.as_manager()

    # The database's time when the row was read; set by ``read_now`` and by services.
    read_at: datetime

    class Meta:
        ordering = ["-created_at", "id"]
        permissions = [
            ("run_drop", "Can publish, schedule, pause, resume and end drops"),
            ("cancel_drop", "Can cancel drops"),
            ("adjust_drop", "Can add and withdraw units of drops"),
            ("export_drop", "Can export drops"),
        ]
        constraints = [
            stock_constraint("drop_stock_between_zero_and_total"),
            models.CheckConstraint(name="drop_price_not_negative", condition=Q(price__gte=0)),
            models.CheckConstraint(
                name="drop_currency_has_three_capitals",
                condition=Q(currency__regex=r"^[A-Z]{3}$"),
            ),
            models.CheckConstraint(
                name="drop_status_is_known", condition=Q(status__in=DropStatus.values)
            ),
            models.CheckConstraint(
                name="drop_ends_after_it_starts",
                condition=Q(starts_at=None) | Q(ends_at=None) | Q(ends_at__gt=F("starts_at")),
            ),
            models.CheckConstraint(
                name="drop_limit_per_user_is_positive",
                condition=Q(max_per_user=None) | Q(max_per_user__gt=0),
            ),
            models.CheckConstraint(
                name="drop_expired_holds_before_cooldown_are_positive",
                condition=Q(max_expired_holds=None) | Q(max_expired_holds__gt=0),
            ),
            models.CheckConstraint(
                name="drop_only_rehearsals_have_hold_seconds",
                condition=Q(hold_seconds=None)
                | Q(
                    hold_seconds__gte=1,
                    hold_seconds__lte=86_400,
                    id__gte=REHEARSAL_IDS[0],
                    id__lte=REHEARSAL_IDS[1],
                ),
            ),
        ]
        indexes = [
            # Read by the loop that announces windows: only those still to come. A change of
            # the stock touches none of these columns, so it stays within its page (HOT).
            models.Index(
                fields=["starts_at"],
                condition=Q(starts_at__gt=F("window_told_at")),
                name="drop_by_start_to_be_told",
            ),
            models.Index(
                fields=["ends_at"],
                condition=Q(ends_at__gt=F("window_told_at")),
                name="drop_by_end_to_be_told",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def is_rehearsal(self) -> bool:
        return is_rehearsal_id(self.pk)

    @property
    def has_cooldown(self) -> bool:
        return bool(self.max_expired_holds and self.hold_cooldown_seconds)

    @property
    def price_text(self) -> str:
        return f"{format_amount(self.price, self.currency)} {self.currency}"

    @property
    def is_live(self) -> bool:
        return self.status_at(self.read_at) == DropStatus.LIVE

    def status_at(self, now: datetime) -> DropStatus:
        """Return the status that holds at ``now``; mirrors ``DropQuerySet.with_status``."""
        if self.status in FOLLOWS_END and self.ends_at and self.ends_at <= now:
            return DropStatus.ENDED
        if self.status in FOLLOWS_START:
            has_started = not self.starts_at or self.starts_at <= now
            return DropStatus.LIVE if has_started else DropStatus.SCHEDULED
        return DropStatus(self.status)


class Variant(Stock):
    """One size of a drop, with its own stock. A drop without sizes has one variant."""

    ONE_SIZE = "One size"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    drop = models.ForeignKey(Drop, models.PROTECT, related_name="variants", db_index=False)
    label = models.CharField(max_length=50)
    position = models.PositiveSmallIntegerField(help_text="The order in which sizes are shown.")

    class Meta:
        ordering = ["position"]
        constraints = [
            stock_constraint("variant_stock_between_zero_and_total"),
            models.UniqueConstraint(fields=["drop", "label"], name="variant_label_once_per_drop"),
        ]

    def __str__(self) -> str:
        return f"{self.drop_id} {self.label}"


class StockAdjustment(models.Model):
    """A change of a variant's total stock by staff: what was added or withdrawn, and why."""

    variant = models.ForeignKey(Variant, models.PROTECT, related_name="adjustments")
    delta = models.IntegerField(help_text="Units added; negative: withdrawn.")
    reason = models.CharField(max_length=200)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.CheckConstraint(name="adjustment_changes_something", condition=~Q(delta=0)),
        ]

    def __str__(self) -> str:
        return f"{self.delta:+d} {self.reason}"
