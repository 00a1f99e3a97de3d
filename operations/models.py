from django.db import models


class Heartbeat(models.Model):
    """The last sign of life of a process that serves no requests, by the database's clock."""

    name = models.CharField(max_length=40, help_text="What the process does: its command.")
    process = models.CharField(max_length=120, help_text="Host and number of the process.")
    beaten_at = models.DateTimeField()
    differences = models.PositiveIntegerField(
        null=True, help_text="What audit_stock found; of no other command."
    )

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["name", "process"], name="one_heartbeat_per_process")
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.process}"
