from django.apps import AppConfig
from django.contrib.admin.apps import AdminConfig


class ProjectConfig(AppConfig):
    name = "project"

    def ready(self) -> None:
        from project import checks  # noqa: F401  each registers itself


class OperatorsAdmin(AdminConfig):
    """Django's admin, with our site as its default one."""

    default_site = "project.operators.OperatorSite"
