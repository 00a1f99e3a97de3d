"""Who may do what: three groups, each with all that the one before it may do."""

from typing import Any

from django.contrib.auth.models import Group, Permission
from django.db.models import Q

VIEWER = {
    *("drops.view_drop", "drops.view_variant", "drops.view_stockadjustment"),
    *("reservations.view_reservation", "purchases.view_purchase"),
    *("realtime.view_event", "users.view_user", "admin.view_logentry"),
}
OPERATOR = VIEWER | {
    *("drops.run_drop", "reservations.void_reservation"),
    *("drops.export_drop", "reservations.export_reservation", "purchases.export_purchase"),
}
MANAGER = OPERATOR | {
    *("drops.add_drop", "drops.change_drop", "drops.cancel_drop", "drops.adjust_drop"),
    "purchases.refund_purchase",
}
ROLES = {"viewer": VIEWER, "operator": OPERATOR, "manager": MANAGER}


def make_roles(**signal: Any) -> None:
    """Make the groups, and give them what they lack; what staff added to them stays."""
    codenames = {tuple(name.split(".")) for role in ROLES.values() for name in role}
    wanted = Q()
    for app, codename in codenames:
        wanted |= Q(content_type__app_label=app, codename=codename)
    permissions = {
        f"{app}.{codename}": pk
        for pk, app, codename in Permission.objects.filter(wanted).values_list(
            "pk", "content_type__app_label", "codename"
        )
    }
    Group.objects.bulk_create([Group(name=name) for name in ROLES], ignore_conflicts=True)
    groups = dict(Group.objects.filter(name__in=ROLES).values_list("name", "pk"))
    given = Group.permissions.through
    given.objects.bulk_create(
        [
            given(group_id=groups[role], permission_id=permissions[name])
            for role, names in ROLES.items()
            for name in sorted(names)
        ],
        ignore_conflicts=True,
    )
