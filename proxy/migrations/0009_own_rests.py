"""Rests that we chose are kept, too. All that were kept before are what an upstream named."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("proxy", "0008_tried")]

    operations = [
        migrations.AddField("rest", "named", models.BooleanField(default=True, db_default=True)),
        migrations.AddField("rest", "times", models.PositiveIntegerField(default=0, db_default=0)),
    ]
