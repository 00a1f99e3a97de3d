from django.conf import settings
from django.db import models
from django.db.models import Q

from config.ids import new_id


class PurchaseStatus(models.TextChoices):
    PAID = "paid", "Paid"
    REFUNDED = "refunded", "Refunded"


class Purchase(models.Model):
    """A reservation that was paid for. Rows are never deleted."""

    id = models.UUIDField(primary_key=True, default=new_id, editable=False)
    reservation = models.OneToOneField(
        "reservations.Reservation", models.PROTECT, related_name="purchase"
    )
    # Without database constraints, as in Reservation.
    drop = models.ForeignKey(
        "drops.Drop", models.PROTECT, related_name="purchases", db_index=False, db_constraint=False
    )
    variant = models.ForeignKey(
        "drops.Variant",
        models.PROTECT,
        related_name="purchases",
        db_index=False,
        db_constraint=False,
    )
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.PROTECT, related_name="purchases", db_index=False
    )
    quantity = models.PositiveIntegerField()
    # Room for the highest price of the most units: 9 digits times 10, and 3 decimals.
    amount = models.DecimalField(max_digits=22, decimal_places=3)
    currency = models.CharField(max_length=3)
    status = models.CharField(
        max_length=8, choices=PurchaseStatus.choices, default=PurchaseStatus.PAID
    )
    created_at = models.DateTimeField()

    # Set by ``purchase_many``: made by this call, rather than found.
    is_new = False

    class Meta:
        ordering = ["-created_at", "id"]
        permissions = [
            ("refund_purchase", "Can refund purchases"),
            ("export_purchase", "Can export purchases"),
        ]
        constraints = [
            models.CheckConstraint(
                name="purchase_quantity_is_positive", condition=Q(quantity__gt=0)
            ),
            models.CheckConstraint(name="purchase_amount_not_negative", condition=Q(amount__gte=0)),
            models.CheckConstraint(
                name="purchase_status_is_known", condition=Q(status__in=PurchaseStatus.values)
            ),
        ]
        indexes = [
            # Read by a user's own list.
            models.Index(fields=["user", "-created_at"], name="purchase_by_user"),
            # Read by the activity feed: the latest three of a drop, not all of them.
            models.Index(fields=["drop", "-created_at"], name="purchase_by_drop"),
        ]

    def __str__(self) -> str:
        return f"{self.status} {self.id}"
