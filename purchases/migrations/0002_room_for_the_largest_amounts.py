from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [("purchases", "0001_initial")]

    operations = [
        migrations.AlterField(
            model_name="purchase",
            name="amount",
            field=models.DecimalField(decimal_places=3, max_digits=22),
        ),
    ]
