"""Aliases set parameters, share by weight, and say what becomes of a call whose client left."""

from django.db import migrations, models


def number_targets(apps, schema_editor):
    """Targets of one position take turns from now on. Those there are were tried in their order, and still are."""
    for route in apps.get_model("proxy", "Route").objects.all():
        for position, target in enumerate(route.targets.order_by("position", "id")):
            if target.position != position:
                target.position = position
                target.save(update_fields=["position"])


class Migration(migrations.Migration):

    dependencies = [
        ('accounts', '0001_initial'),
        ('proxy', '0002_usage_key'),
    ]

    operations = [
        migrations.AddField(
            model_name='route',
            name='defaults',
            field=models.JSONField(blank=True, default=dict, help_text='Where the client sent nothing, such as {"temperature": 0.2}.'),
        ),
        migrations.AddField(
            model_name='route',
            name='drain_seconds',
            field=models.PositiveSmallIntegerField(blank=True, default=0, help_text='For how long to read on: at most 30.'),
        ),
        migrations.AddField(
            model_name='route',
            name='drops',
            field=models.JSONField(blank=True, default=list, help_text='Parameters that are not passed on, such as ["logit_bias"].'),
        ),
        migrations.AddField(
            model_name='route',
            name='on_abort',
            field=models.CharField(choices=[('cancel', 'cancel the upstream'), ('drain', 'read on for a while, for the bill')], default='cancel', max_length=6, verbose_name='when the client leaves'),
        ),
        migrations.AddField(
            model_name='route',
            name='overrides',
            field=models.JSONField(blank=True, default=dict, help_text='Whatever the client sent, such as {"max_tokens": 1000}.'),
        ),
        migrations.AddField(
            model_name='routetarget',
            name='weight',
            field=models.PositiveSmallIntegerField(default=1),
        ),
        migrations.AlterField(
            model_name='routetarget',
            name='model',
            field=models.CharField(help_text='prefix/model, or a model that some upstream lists; prefix/* under * is the name that was asked for.', max_length=240),
        ),
        migrations.AlterField(
            model_name='routetarget',
            name='position',
            field=models.PositiveSmallIntegerField(default=0, help_text='Lower goes first; the same = in turns, by weight.'),
        ),
        migrations.AddConstraint(
            model_name='route',
            constraint=models.CheckConstraint(condition=models.Q(models.Q(('drain_seconds', 0), ('on_abort', 'cancel')), models.Q(('drain_seconds__gte', 1), ('on_abort', 'drain')), _connector='OR'), name='alias_drains_for_a_time_or_cancels'),
        ),
        migrations.AddConstraint(
            model_name='routetarget',
            constraint=models.CheckConstraint(condition=models.Q(('weight__gte', 1)), name='alias_target_weight_is_positive', violation_error_message='A weight is a whole number from 1 to 1000.'),
        ),
        migrations.RunPython(number_targets, migrations.RunPython.noop),
    ]
