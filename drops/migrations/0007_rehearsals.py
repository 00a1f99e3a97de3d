import uuid

from django.db import migrations, models
from django.db.models import Q

FIRST = uuid.UUID("72656865-6172-8000-8000-000000000000")
LAST = uuid.UUID("72656865-6172-8fff-bfff-ffffffffffff")


def keep_rows(table: str, but: str = "") -> str:
    return (
        f"DROP TRIGGER rows_are_kept ON {table};"
        f"CREATE TRIGGER rows_are_kept BEFORE DELETE ON {table} "
        f"FOR EACH ROW {but} EXECUTE FUNCTION forbid_delete()"
    )


class Migration(migrations.Migration):
    """Let rehearsal drops, known by their ids, be deleted and have holds of their own length."""

    dependencies = [("drops", "0006_fair_share")]

    operations = [
        migrations.AddField(
            model_name="drop",
            name="hold_seconds",
            field=models.PositiveIntegerField(
                blank=True,
                editable=False,
                help_text="The life of a hold, of rehearsals only; else it is "
                "RESERVATION_TTL_SECONDS.",
                null=True,
            ),
        ),
        migrations.AddConstraint(
            model_name="drop",
            constraint=models.CheckConstraint(
                name="drop_only_rehearsals_have_hold_seconds",
                condition=Q(hold_seconds=None)
                # Not BETWEEN, which PostgreSQL writes in another way after a restore.
                | Q(hold_seconds__gte=1, hold_seconds__lte=86_400, id__gte=FIRST, id__lte=LAST),
            ),
        ),
        *(
            migrations.RunSQL(
                keep_rows(table, f"WHEN (OLD.{key} NOT BETWEEN '{FIRST}' AND '{LAST}')"),
                keep_rows(table),
            )
            for table, key in (("drops_drop", "id"), ("drops_variant", "drop_id"))
        ),
    ]
