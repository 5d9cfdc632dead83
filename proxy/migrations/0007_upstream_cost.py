"""What an upstream says a call has cost, beside what we charge. A column without a default: no row is written again."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("proxy", "0006_sums_by_key")]

    operations = [migrations.AddField("usageevent", "upstream_cost", models.BigIntegerField(null=True))]
