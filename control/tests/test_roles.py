import pytest
from django.contrib.auth.models import Group
from django.urls import reverse

from control.roles import ROLES, make_roles
from drops.models import DropStatus
from drops.tests.factories import DropFactory
from purchases.tests.factories import PurchaseFactory
from reservations.tests.factories import ReservationFactory
from tests.admin import act
from users.tests.factories import UserFactory

VIEWS = [
    "admin:index",
    "admin:figures",
    "admin:drops_drop_changelist",
    "admin:drops_stockadjustment_changelist",
    "admin:reservations_reservation_changelist",
    "admin:purchases_purchase_changelist",
    "admin:realtime_event_changelist",
    "admin:users_user_changelist",
    "admin:admin_logentry_changelist",
]
# What each action is done to, what it asks for, and the least role that may.
ACTIONS = {
    "publish": (lambda: DropFactory(draft=True), {}, "operator"),
    "schedule": (lambda: DropFactory(draft=True), {"starts_at": "2040-01-01T00:00"}, "operator"),
    "pause": (DropFactory, {}, "operator"),
    "resume": (lambda: DropFactory(status="paused"), {}, "operator"),
    "end": (DropFactory, {}, "operator"),
    "cancel": (DropFactory, {}, "manager"),
    "adjust": (DropFactory, {"delta": 1}, "manager"),
    "void": (ReservationFactory, {}, "operator"),
    "refund": (PurchaseFactory, {"restock": "yes"}, "manager"),
    "refund-all": (
        lambda: PurchaseFactory(reservation__drop__status=DropStatus.ENDED).drop,
        {"restock": "yes"},
        "manager",
    ),
}
RANKS = ["nobody", *ROLES]


@pytest.fixture
def client_in(client):
    """Return a function that signs staff of a role in; "nobody" is staff without one."""

    def sign_in(role):
        user = UserFactory(is_staff=True)
        if role != "nobody":
            user.groups.add(Group.objects.get(name=role))
        client.force_login(user)
        return client

    return sign_in


@pytest.mark.parametrize("role", RANKS)
def test_each_role_sees_everything_and_nobody_sees_nothing(db, client_in, role):
    client = client_in(role)
    # The first page of staff without a role is empty, but it is there.
    expected = {name: 403 if role == "nobody" else 200 for name in VIEWS} | {"admin:index": 200}

    assert {name: client.get(reverse(name)).status_code for name in VIEWS} == expected


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_is_for_its_role_and_those_above(db, client_in, action):
    make, fields, least = ACTIONS[action]
    for role in RANKS:
        row = make()
        if action == "adjust":
            fields = fields | {"variant": row.variants.get().pk}
        may = RANKS.index(role) >= RANKS.index(least)

        assert act(client_in(role), row, action, **fields).status_code == (302 if may else 403)
        assert row._meta.model.objects.filter(pk=row.pk).exists()
        drop = getattr(row, "drop", row)
        assert drop.events.exists() == may


@pytest.mark.parametrize(
    ("model", "may_edit"), [("drop", {"manager"}), ("reservation", set()), ("purchase", set())]
)
def test_who_may_export_and_edit(db, client_in, model, may_edit):
    row = PurchaseFactory()
    rows = {"drop": row.drop, "reservation": row.reservation, "purchase": row}
    app = rows[model]._meta.app_label
    for role in RANKS:
        client = client_in(role)
        export = client.get(reverse(f"admin:{app}_{model}_export"))
        edit = client.post(reverse(f"admin:{app}_{model}_change", args=[rows[model].pk]))

        assert export.status_code == (200 if role in ("operator", "manager") else 403)
        assert edit.status_code == (200 if role in may_edit else 403)


def test_a_page_offers_only_what_its_reader_may_do(db, client_in):
    drop = DropFactory()
    url = reverse("admin:drops_drop_change", args=[drop.pk])

    assert "/do/" not in client_in("viewer").get(url).content.decode()
    offered = client_in("operator").get(url).content.decode()
    assert "/do/pause/" in offered
    assert "/do/cancel/" not in offered


def test_making_the_roles_again_keeps_what_staff_added(db, django_assert_num_queries):
    viewer = Group.objects.get(name="viewer")
    extra = ROLES["operator"] - ROLES["viewer"]
    viewer.permissions.add(*Group.objects.get(name="operator").permissions.all())
    viewer.permissions.remove(viewer.permissions.get(codename="view_event"))

    make_roles()

    names = {f"{p.content_type.app_label}.{p.codename}" for p in viewer.permissions.all()}
    assert names == ROLES["viewer"] | extra


def test_shoppers_and_strangers_are_sent_to_the_sign_in(db, client):
    for user in (None, UserFactory()):
        if user:
            client.force_login(user)
        for name in ("admin:index", "admin:figures", "admin:purchases_purchase_export"):
            assert client.get(reverse(name)).url.startswith("/admin/login/")
