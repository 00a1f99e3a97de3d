"""What may be typed, followed or sent to the admin: never an error of the server."""

import pytest
from django.contrib.auth.models import Group
from django.contrib.contenttypes.models import ContentType
from django.urls import reverse

from drops.models import Drop
from users.models import User

CREATORS = "app_label=drops&model_name=drop&field_name=created_by"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("rows", "query"),
    [
        ("drops_drop", "name__regex=("),
        ("drops_drop", "price=1e999999"),
        ("drops_drop", "created_at__year=9999"),
        ("drops_drop", f"created_at__year={10**20}"),
        ("purchases_purchase", "created_at__year=9999"),
        ("users_user", "date_joined__year=9999"),
        ("users_user", "username=%00"),
        ("auth_group", "name__regex=("),
    ],
)
def test_a_filter_that_cannot_be_asked_for_leads_to_the_whole_list(admin_client, rows, query):
    response = admin_client.get(f"{reverse(f'admin:{rows}_changelist')}?{query}")

    assert (response.status_code, response.headers.get("Location", "")[-4:]) == (302, "?e=1")


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/admin/drops/drop/add/?starts_at=99999", 200),
        (
            "/admin/autocomplete/?app_label=drops&model_name=drop&field_name=created_by&term=%00",
            200,
        ),
        ("/admin/r/{drops}/x/", 404),
        (f"/admin/search/?s=a&page={'9' * 5000}", 404),
    ],
)
def test_a_page_that_is_none_is_no_error(admin_client, address, status):
    drops = ContentType.objects.get_for_model(Drop).pk

    assert admin_client.get(address.format(drops=drops)).status_code == status


@pytest.mark.parametrize("rows", ["users_user", "auth_group"])
@pytest.mark.parametrize("pk", ["x", "\0", "9" * 5000])
def test_an_id_that_is_none_is_refused_and_nothing_deleted(admin_client, rows, pk):
    address = reverse(f"admin:{rows}_changelist")
    chosen = {"action": "delete_selected", "_selected_action": [pk], "post": "yes"}
    before = User.objects.count(), Group.objects.count()

    assert admin_client.post(address, chosen).status_code == 400
    assert (User.objects.count(), Group.objects.count()) == before


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_form_is_read_as_utf_8_whatever_it_declares(client, db, kind):
    body = b'--x\r\nContent-Disposition: form-data; name="username"\r\n\r\nAda\r\n--x--\r\n'

    response = client.generic(
        "POST", "/admin/login/", body, content_type=f"{kind}; boundary=x; charset=hex"
    )

    assert response.status_code == 200
