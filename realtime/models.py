from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.db import models


class EventType(models.TextChoices):
    DROP_CREATED = "DROP_CREATED"
    DROP_UPDATED = "DROP_UPDATED"
    STOCK_UPDATED = "STOCK_UPDATED"
    RESERVATION_EXPIRED = "RESERVATION_EXPIRED"
    PURCHASE_COMPLETED = "PURCHASE_COMPLETED"
    ACTIVITY_UPDATED = "ACTIVITY_UPDATED"


class Event(models.Model):
    """One entry of a drop's event log, stored by the transaction that caused it.

    ``seq`` is taken from a counter on the drop's locked row: 1, 2, 3 without a gap, in
    the order of the commits. A database sequence would promise neither.
    """

    # Without a database constraint, as in Reservation.
    drop = models.ForeignKey(
        "drops.Drop", models.PROTECT, related_name="events", db_index=False, db_constraint=False
    )
    seq = models.PositiveBigIntegerField()
    type = models.CharField(max_length=20, choices=EventType.choices)
    data = models.JSONField(encoder=DjangoJSONEncoder)
    created_at = models.DateTimeField()

    class Meta:
        ordering = ["drop", "seq"]
        constraints = [
            models.UniqueConstraint(fields=["drop", "seq"], name="one_event_per_sequence_number"),
            models.CheckConstraint(
                name="event_type_is_known", condition=models.Q(type__in=EventType.values)
            ),
        ]

    def __str__(self) -> str:
        return f"{self.type} {self.seq}"


class SocketTicket(models.Model):
    """Lets one socket speak for a user, once and soon; see ``realtime.tickets``."""

    # The ticket itself is with its client, and for a repeated request in that key's stored
    # answer: who reads this table alone can't use it.
    digest = models.BinaryField(primary_key=True, max_length=32)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="+")
    expires_at = models.DateTimeField(db_index=True)
    # ``Identity.expires_at`` of who got it. A number: a token may end after the last date there is.
    identity_expires_at = models.FloatField(null=True)

    def __str__(self) -> str:
        return f"{self.user_id} until {self.expires_at}"
