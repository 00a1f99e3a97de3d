from django.db import migrations

FORBID = """
CREATE FUNCTION forbid_delete() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are kept for ever', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;
"""


class Migration(migrations.Migration):
    """Keep drops and variants from being deleted.

    Reservations, purchases and events refer to them without a foreign key constraint,
    which would cost a look-up of the hot row for each of them (docs/adr/0004).
    """

    dependencies = [("drops", "0002_room_for_hot_updates")]

    operations = [
        migrations.RunSQL(FORBID, "DROP FUNCTION forbid_delete()"),
        *(
            migrations.RunSQL(
                f"CREATE TRIGGER rows_are_kept BEFORE DELETE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION forbid_delete()",
                f"DROP TRIGGER rows_are_kept ON {table}",
            )
            for table in ("drops_drop", "drops_variant")
        ),
    ]
