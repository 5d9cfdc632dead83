"""The key of the usage log on Postgres is (at, request_id), so that it can be partitioned by month; and the version row."""

from django.db import migrations

TO_PAIR = """
ALTER TABLE proxy_usageevent DROP CONSTRAINT proxy_usageevent_pkey;
ALTER TABLE proxy_usageevent DROP CONSTRAINT usage_at_request_id;
ALTER TABLE proxy_usageevent ADD CONSTRAINT usage_at_request_id PRIMARY KEY (at, request_id);
"""
TO_ONE = """
ALTER TABLE proxy_usageevent DROP CONSTRAINT usage_at_request_id;
ALTER TABLE proxy_usageevent ADD CONSTRAINT usage_at_request_id UNIQUE (at, request_id);
ALTER TABLE proxy_usageevent ADD CONSTRAINT proxy_usageevent_pkey PRIMARY KEY (request_id);
"""


def on_postgres(sql):
    def run(apps, schema_editor):
        if schema_editor.connection.vendor == "postgresql":
            schema_editor.execute(sql)

    return run


def make_version(apps, schema_editor):
    apps.get_model("proxy", "SnapshotVersion").objects.get_or_create(pk=1)


class Migration(migrations.Migration):
    dependencies = [("proxy", "0001_initial")]

    operations = [
        migrations.RunPython(on_postgres(TO_PAIR), on_postgres(TO_ONE)),
        migrations.RunPython(make_version, migrations.RunPython.noop),
    ]
