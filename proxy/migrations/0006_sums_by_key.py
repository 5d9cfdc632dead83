"""Sums by key without the model, and by day with it, worked out from those that have everything."""

from django.db import migrations, models

SUMS = "requests errors unpriced estimated fresh_input cache_read cache_write output reasoning cost".split()
NAMES = ", ".join(SUMS)
ADDED = ", ".join(f"SUM({name})" for name in SUMS)
DAY = {"postgresql": "(slot AT TIME ZONE 'UTC')::date", "sqlite": "substr(slot, 1, 10)"}


def fill(schema_editor, table, *dimensions):
    day = DAY[schema_editor.connection.vendor]
    groups = ", ".join(day if name == "day" else name for name in dimensions)
    with schema_editor.connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} ({', '.join(dimensions)}, {NAMES}) SELECT {groups}, {ADDED} FROM proxy_usagetotal GROUP BY {groups}"
        )


def sum_up(apps, schema_editor):
    fill(schema_editor, "proxy_keytotal", "key_id", "slot", "organization_id", "team_id", "user_id")
    fill(schema_editor, "proxy_keyday", "key_id", "day", "organization_id", "team_id", "user_id", "provider", "model")


def sum_up_as_before(apps, schema_editor):
    fill(schema_editor, "proxy_keyday", "key_id", "day", "organization_id", "team_id", "user_id")


def sums():
    return [(name, models.BigIntegerField(default=0)) for name in SUMS]


class Migration(migrations.Migration):
    dependencies = [("proxy", "0005_ledger_at_scale")]

    operations = [
        migrations.RunPython(migrations.RunPython.noop, sum_up_as_before),
        # Made anew, since a key of several columns cannot be changed.
        migrations.DeleteModel(name="KeyDay"),
        migrations.CreateModel(
            name="KeyDay",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "key_id",
                        "day",
                        "organization_id",
                        "team_id",
                        "user_id",
                        "provider",
                        "model",
                        blank=True,
                        editable=False,
                        primary_key=True,
                        serialize=False,
                    ),
                ),
                ("key_id", models.BigIntegerField()),
                ("day", models.DateField()),
                ("organization_id", models.BigIntegerField()),
                ("team_id", models.BigIntegerField(default=0)),
                ("user_id", models.BigIntegerField()),
                ("provider", models.CharField(max_length=40)),
                ("model", models.CharField(max_length=240)),
                *sums(),
            ],
            options={
                "indexes": [
                    models.Index(fields=["organization_id", "day"], name="key_day_by_organization"),
                    models.Index(condition=models.Q(("team_id__gt", 0)), fields=["team_id", "day"], name="key_day_by_team"),
                ],
            },
        ),
        migrations.CreateModel(
            name="KeyTotal",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "key_id", "slot", "organization_id", "team_id", "user_id", blank=True, editable=False, primary_key=True, serialize=False
                    ),
                ),
                ("key_id", models.BigIntegerField()),
                ("slot", models.DateTimeField()),
                ("organization_id", models.BigIntegerField()),
                ("team_id", models.BigIntegerField(default=0)),
                ("user_id", models.BigIntegerField()),
                *sums(),
            ],
            options={
                "indexes": [
                    models.Index(fields=["organization_id", "slot"], name="key_total_by_organization"),
                    models.Index(condition=models.Q(("team_id__gt", 0)), fields=["team_id", "slot"], name="key_total_by_team"),
                ],
            },
        ),
        migrations.RunPython(sum_up, migrations.RunPython.noop),
    ]
