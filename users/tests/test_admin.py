from django.contrib.auth.hashers import check_password
from django.urls import reverse

from tests.admin import list_pages, read_page
from users.models import User
from users.tests.factories import UserFactory


def test_the_list_takes_the_same_statements_for_5_and_25(admin_client):
    pages = list_pages(admin_client, User, UserFactory.create_batch)

    assert [status for status, _ in pages] == [200, 200]
    assert pages[0] == pages[1]


def test_a_page_opens(admin_client):
    assert read_page(admin_client, User, "change", UserFactory().pk)[0] == 200
    assert read_page(admin_client, User, "add")[0] == 200


def test_finds_users_by_exact_id_and_by_part_of_the_name(admin_client):
    wanted, other = UserFactory(username="ada_l"), UserFactory(username="grace")
    url = reverse("admin:users_user_changelist")

    for query in (str(wanted.pk), "ada"):
        content = admin_client.get(url, {"q": query}).content.decode()
        assert str(wanted.pk) in content
        assert str(other.pk) not in content


def test_staff_can_be_added_with_a_password(admin_client):
    response = admin_client.post(
        reverse("admin:users_user_add"),
        {
            "username": "clerk",
            "usable_password": "true",
            "password1": "drop-day-2026",
            "password2": "drop-day-2026",
        },
    )

    assert response.status_code == 302
    assert check_password("drop-day-2026", User.objects.get(username="clerk").password)
