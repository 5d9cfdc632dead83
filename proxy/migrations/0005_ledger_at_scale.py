"""The usage log on Postgres by months, with the rows that are there; two further tables of sums; what was deleted of the log."""

from datetime import UTC, datetime

from django.conf import settings
from django.db import migrations, models

MONTHS_AHEAD = 3

TO_PLAIN = """
ALTER TABLE proxy_usageevent RENAME TO proxy_usageevent_by_month;
ALTER TABLE proxy_usageevent_by_month DROP CONSTRAINT usage_at_request_id;
DROP INDEX usage_by_key;
DROP INDEX usage_by_organization;
CREATE TABLE proxy_usageevent (LIKE proxy_usageevent_by_month);
INSERT INTO proxy_usageevent SELECT * FROM proxy_usageevent_by_month;
DROP TABLE proxy_usageevent_by_month;
"""
BY_MONTH = """
ALTER TABLE proxy_usageevent RENAME TO proxy_usageevent_plain;
ALTER TABLE proxy_usageevent_plain DROP CONSTRAINT usage_at_request_id;
DROP INDEX usage_by_key;
DROP INDEX usage_by_organization;
CREATE TABLE proxy_usageevent (LIKE proxy_usageevent_plain) PARTITION BY RANGE (at);
CREATE TABLE proxy_usageevent_rest PARTITION OF proxy_usageevent DEFAULT;
"""
MONTH = """
CREATE TABLE proxy_usageevent_y{year}m{month:02} PARTITION OF proxy_usageevent
    FOR VALUES FROM ('{year}-{month:02}-01 00:00:00+00') TO ('{after_year}-{after_month:02}-01 00:00:00+00');
"""
MOVE = """
INSERT INTO proxy_usageevent SELECT * FROM proxy_usageevent_plain ORDER BY at;
DROP TABLE proxy_usageevent_plain;
"""
KEYS = """
ALTER TABLE proxy_usageevent ADD CONSTRAINT usage_at_request_id PRIMARY KEY (at, request_id);
CREATE INDEX usage_by_key ON proxy_usageevent (key_id, at DESC);
CREATE INDEX usage_by_organization ON proxy_usageevent (organization_id, at DESC);
"""

SUMS = "requests errors unpriced estimated fresh_input cache_read cache_write output reasoning cost".split()
NAMES = ", ".join(SUMS)
ADDED = ", ".join(f"SUM({name})" for name in SUMS)
DAY = {"postgresql": "(slot AT TIME ZONE 'UTC')::date", "sqlite": "substr(slot, 1, 10)"}
BY_MODEL = f"""
INSERT INTO proxy_modeltotal (organization_id, slot, provider, model, {NAMES})
SELECT organization_id, slot, provider, model, {ADDED} FROM proxy_usagetotal GROUP BY organization_id, slot, provider, model
"""
BY_KEY = """
INSERT INTO proxy_keyday (key_id, day, organization_id, team_id, user_id, {names})
SELECT key_id, {day}, organization_id, team_id, user_id, {added} FROM proxy_usagetotal
GROUP BY key_id, {day}, organization_id, team_id, user_id
"""


def by_month(apps, schema_editor):
    if schema_editor.connection.vendor != "postgresql":
        return
    with schema_editor.connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT date_trunc('month', at AT TIME ZONE 'UTC') FROM proxy_usageevent")
        months = {row[0].year * 12 + row[0].month - 1 for row in cursor.fetchall()}
        now = datetime.now(UTC)
        this_month = now.year * 12 + now.month - 1
        cursor.execute(BY_MONTH)
        for number in sorted(months | set(range(this_month, this_month + MONTHS_AHEAD + 1))):
            (year, month), (after_year, after_month) = divmod(number, 12), divmod(number + 1, 12)
            cursor.execute(MONTH.format(year=year, month=month + 1, after_year=after_year, after_month=after_month + 1))
        cursor.execute(MOVE)
        cursor.execute(KEYS)


def to_plain(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        with schema_editor.connection.cursor() as cursor:
            cursor.execute(TO_PLAIN)
            cursor.execute(KEYS)


def sum_up(apps, schema_editor):
    with schema_editor.connection.cursor() as cursor:
        cursor.execute(BY_MODEL)
        cursor.execute(BY_KEY.format(names=NAMES, added=ADDED, day=DAY[schema_editor.connection.vendor]))


class Migration(migrations.Migration):

    dependencies = [
        ('accounts', '0003_frozen'),
        ('providers', '0007_oauth_token_sign_in'),
        ('proxy', '0004_frozen'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.RunPython(by_month, to_plain),
        migrations.CreateModel(
            name='KeyDay',
            fields=[
                ('pk', models.CompositePrimaryKey('key_id', 'day', 'organization_id', 'team_id', 'user_id', blank=True, editable=False, primary_key=True, serialize=False)),
                ('key_id', models.BigIntegerField()),
                ('day', models.DateField()),
                ('organization_id', models.BigIntegerField()),
                ('team_id', models.BigIntegerField(default=0)),
                ('user_id', models.BigIntegerField()),
                ('requests', models.BigIntegerField(default=0)),
                ('errors', models.BigIntegerField(default=0)),
                ('unpriced', models.BigIntegerField(default=0)),
                ('estimated', models.BigIntegerField(default=0)),
                ('fresh_input', models.BigIntegerField(default=0)),
                ('cache_read', models.BigIntegerField(default=0)),
                ('cache_write', models.BigIntegerField(default=0)),
                ('output', models.BigIntegerField(default=0)),
                ('reasoning', models.BigIntegerField(default=0)),
                ('cost', models.BigIntegerField(default=0)),
            ],
        ),
        migrations.CreateModel(
            name='LogStart',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('at', models.DateTimeField()),
            ],
        ),
        migrations.CreateModel(
            name='ModelTotal',
            fields=[
                ('pk', models.CompositePrimaryKey('organization_id', 'slot', 'provider', 'model', blank=True, editable=False, primary_key=True, serialize=False)),
                ('organization_id', models.BigIntegerField()),
                ('slot', models.DateTimeField()),
                ('provider', models.CharField(max_length=40)),
                ('model', models.CharField(max_length=240)),
                ('requests', models.BigIntegerField(default=0)),
                ('errors', models.BigIntegerField(default=0)),
                ('unpriced', models.BigIntegerField(default=0)),
                ('estimated', models.BigIntegerField(default=0)),
                ('fresh_input', models.BigIntegerField(default=0)),
                ('cache_read', models.BigIntegerField(default=0)),
                ('cache_write', models.BigIntegerField(default=0)),
                ('output', models.BigIntegerField(default=0)),
                ('reasoning', models.BigIntegerField(default=0)),
                ('cost', models.BigIntegerField(default=0)),
            ],
        ),
        migrations.AddIndex(
            model_name='usageevent',
            index=models.Index(condition=models.Q(('status__gte', 400)), fields=['at', 'request_id'], name='usage_failed'),
        ),
        migrations.AddIndex(
            model_name='usageevent',
            index=models.Index(condition=models.Q(('cost', None)), fields=['at', 'request_id'], name='usage_unpriced'),
        ),
        migrations.AddIndex(
            model_name='usageevent',
            index=models.Index(condition=models.Q(('usage_source__in', ['estimated', 'missing'])), fields=['usage_source', 'at', 'request_id'], name='usage_not_reported'),
        ),
        migrations.AddIndex(
            model_name='keyday',
            index=models.Index(fields=['organization_id', 'day'], name='key_day_by_organization'),
        ),
        migrations.AddIndex(
            model_name='keyday',
            index=models.Index(condition=models.Q(('team_id__gt', 0)), fields=['team_id', 'day'], name='key_day_by_team'),
        ),
        migrations.RunPython(sum_up, migrations.RunPython.noop),
    ]
