import uuid

from django.conf import settings
from django.contrib.auth.models import AbstractUser
from django.db import models


class User(AbstractUser):
    """Somebody who reserves and purchases, or staff who run drops.

    Shoppers are known by the UUID that the identity headers carry and have no
    password; staff sign in to the admin with one.
    """

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    # 50 characters from the header plus a suffix where the name is taken.
    username = models.CharField(max_length=60, unique=True)
    first_name = None  # type: ignore[assignment]
    last_name = None  # type: ignore[assignment]

    REQUIRED_FIELDS = []

    def get_full_name(self) -> str:
        return self.username


class IdempotencyKey(models.Model):
    """The answer to a request that its sender may repeat.

    The row is written in the transaction of the request's effect, so a crash leaves
    both or neither. Requests without an effect leave no row and may simply run again.
    """

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, db_index=False)
    route = models.CharField(max_length=200, help_text="Method and path, without a last slash.")
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64, help_text="SHA-256 of the body, in hex.")
    status = models.PositiveSmallIntegerField(null=True)
    body = models.TextField(default="")
    created_at = models.DateTimeField()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["user", "route", "key"], name="one_answer_per_idempotency_key"
            )
        ]
        indexes = [
            # Read by the removal of keys older than a day.
            models.Index(fields=["created_at"], name="idempotency_key_by_age")
        ]

    def __str__(self) -> str:
        return f"{self.route} {self.key}"
