"""The attempts of a request before the last. A column without a default: no row is written again."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("proxy", "0007_upstream_cost")]

    operations = [migrations.AddField("usageevent", "tried", models.JSONField(null=True))]
