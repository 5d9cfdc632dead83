"""Who accepted a restricted kind's policy; and by what an import finds what it made before."""

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('providers', '0002_credential_quota'),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AddField(
            model_name='credential',
            name='imported_as',
            field=models.BinaryField(help_text='By what a file that is imported again finds it.', max_length=32, null=True),
        ),
        migrations.AddField(
            model_name='credential',
            name='policy_accepted_by',
            field=models.ForeignKey(blank=True, editable=False, null=True, on_delete=django.db.models.deletion.SET_NULL, related_name='+', to=settings.AUTH_USER_MODEL),
        ),
    ]
