from django.db import migrations


class Migration(migrations.Migration):
    """Void the reservations of demo purchases that were refunded before there was a service."""

    dependencies = [
        ("purchases", "0002_staff_permissions"),
        ("reservations", "0001_initial"),
    ]

    operations = [
        migrations.RunSQL(
            """
            UPDATE reservations_reservation AS reservation SET status = 'VOIDED'
            FROM purchases_purchase AS purchase
            WHERE purchase.reservation_id = reservation.id
              AND purchase.status = 'refunded' AND reservation.status = 'CONSUMED'
            """,
            migrations.RunSQL.noop,
        )
    ]
