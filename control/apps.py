from django.apps import AppConfig
from django.contrib.admin import apps as admin
from django.db.models.signals import post_migrate


class ControlAdminConfig(admin.AdminConfig):
    """The admin, on the control room's own site."""

    default = False
    default_site = "control.site.ControlSite"


class ControlConfig(AppConfig):
    """Where staff run drops. Comes last of the apps: the roles name the others' permissions."""

    name = "control"
    default = True

    def ready(self) -> None:
        from control.roles import make_roles

        # Not a data migration: permissions exist only after all migrations have run.
        post_migrate.connect(make_roles, sender=self)
