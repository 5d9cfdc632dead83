from django.apps import AppConfig
from django.conf import settings
from django.contrib.admin.apps import AdminConfig

from providers.secrets import redact


class ProjectConfig(AppConfig):
    name = "project"

    def ready(self) -> None:
        from project import checks  # noqa: F401  each registers itself

        redact.learn_own([settings.SECRET_KEY, *settings.ENV.secrets(), *settings.KEYRING.entries()])


class OperatorsAdmin(AdminConfig):
    """Django's admin, with our site as its default one."""

    default_site = "project.operators.OperatorSite"
