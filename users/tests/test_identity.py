import uuid
from functools import partial

import pytest

from tests.concurrency import at_once
from users.exceptions import InvalidIdentity, UnknownUser
from users.identity import Identity, clean_name, get_user, public_id, read_identity
from users.models import User
from users.tests.factories import UserFactory

SOMEBODY = "1b4e28ba-2fa1-4d2e-883f-b9a761bde3fb"

INVALID_IDS = {
    "empty": "",
    "blank": "   ",
    "a word": "alice",
    "a number": "42",
    "too short": SOMEBODY[:-1],
    "too long": f"{SOMEBODY}0",
    "a wrong digit": f"g{SOMEBODY[1:]}",
    "without hyphens": SOMEBODY.replace("-", ""),
    "hyphens elsewhere": "1b4e28ba2-fa1-4d2e-883f-b9a761bde3fb",
    "in braces": f"{{{SOMEBODY}}}",
    "a urn": f"urn:uuid:{SOMEBODY}",
    "nil": "00000000-0000-0000-0000-000000000000",
    "sent twice": f"{SOMEBODY}, {SOMEBODY}",
    "sent twice without a space": f"{SOMEBODY},{SOMEBODY}",
    "with a second line": f"{SOMEBODY}\n{SOMEBODY}",
    "with a NUL": f"{SOMEBODY}\x00",
    "wide digits": SOMEBODY.replace("1", "\uff11"),
    "arabic digits": SOMEBODY.replace("1", "\u0661"),
    "in quotes": f'"{SOMEBODY}"',
    "10 kB": "a" * 10_000,
}


@pytest.mark.parametrize("value", INVALID_IDS.values(), ids=INVALID_IDS.keys())
def test_refuses_what_is_not_one_usual_uuid(value):
    with pytest.raises(InvalidIdentity):
        read_identity(value, None)


@pytest.mark.parametrize("value", [SOMEBODY, SOMEBODY.upper(), f"  {SOMEBODY}  "])
def test_reads_the_usual_form_in_any_case(value):
    assert read_identity(value, None) == Identity(uuid.UUID(SOMEBODY), None)


def test_is_nobody_without_the_id_even_with_a_name():
    assert read_identity(None, "Ada") is None


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Ada", "Ada"),
        ("  Ada Lovelace  ", "Ada Lovelace"),
        ("x" * 50, "x" * 50),
        ("x" * 51, "x" * 50),
        ("x" * 49 + " y", "x" * 49),
        ("x" * 10_000, "x" * 50),
        ("ab", None),
        ("  ab  ", None),
        ("", None),
        (None, None),
        ("José".encode().decode("latin-1"), "José"),
        ("José", "José"),
        ("Nicolà".encode().decode("latin-1"), "Nicolà"),
        ("SOFÅ".encode().decode("latin-1"), "SOFÅ"),
        ("Лёх".encode().decode("latin-1"), "Лёх"),
        ("مريم".encode().decode("latin-1"), "مريم"),
        ("a\x00d\u200ba\u202e", "ada"),
        ("\u200b\u200b\u200b\u200b", None),
        ("<b>Ada</b>", "<b>Ada</b>"),
    ],
)
def test_trims_cuts_and_cleans_the_name(header, name):
    assert read_identity(SOMEBODY, header) == Identity(uuid.UUID(SOMEBODY), name)


def test_makes_a_user_of_an_unknown_uuid(client_of, db):
    response = client_of(SOMEBODY).get("/api/me")

    assert response.status_code == 200
    assert response.json() == {"id": SOMEBODY, "username": "user_1b4e28ba2fa1"}
    user = User.objects.get()
    assert user.pk == uuid.UUID(SOMEBODY)
    assert not user.check_password("")
    assert not user.is_staff


def test_names_a_new_user_after_the_header(client_of, db):
    response = client_of(SOMEBODY, HTTP_X_USER_NAME=" Ada ").get("/api/me")

    assert response.json() == {"id": SOMEBODY, "username": "Ada"}


def test_keeps_the_name_of_a_known_user(client_of, db):
    user = UserFactory(username="Ada")

    response = client_of(user, HTTP_X_USER_NAME="Grace").get("/api/me")

    assert response.json()["username"] == "Ada"
    assert User.objects.get().username == "Ada"


def test_adds_a_suffix_to_a_taken_name(db):
    UserFactory(username="Ada")

    assert get_user(read_identity(SOMEBODY, "Ada")).username == "Ada_bde3fb"


def test_adds_a_suffix_where_the_made_up_name_is_taken(db):
    first = get_user(read_identity(SOMEBODY, None))
    second = get_user(read_identity("1b4e28ba-2fa1-4d2e-883f-000000000001", None))

    assert first.username == "user_1b4e28ba2fa1"
    assert second.username == "user_1b4e28ba2fa1_000001"


def test_falls_back_to_the_whole_id_where_the_suffixed_name_is_taken_too(db):
    UserFactory(username="Ada")
    UserFactory(username="Ada_bde3fb")

    assert get_user(read_identity(SOMEBODY, "Ada")).username == uuid.UUID(SOMEBODY).hex


@pytest.mark.parametrize("name", ["Ada", None])
def test_nobody_can_take_all_the_names_that_somebody_could_get(db, name):
    """Names are what clients say: three of them kept somebody whose id they knew from coming in."""
    pk = uuid.UUID(SOMEBODY)
    wanted = name or f"user_{pk.hex[:12]}"
    for taken in (wanted, f"{wanted}_{pk.hex[-6:]}", pk.hex):
        assert get_user(Identity(uuid.uuid4(), clean_name(taken))).username == taken

    user = get_user(Identity(pk, name))

    assert user.pk == pk
    assert len(user.username) == 32


def test_a_suffix_fits_the_longest_name(db):
    UserFactory(username="x" * 50)

    assert get_user(read_identity(SOMEBODY, "x" * 60)).username == "x" * 50 + "_bde3fb"


def test_made_up_names_give_no_opaque_id_away(db, settings):
    settings.PUBLIC_USER_IDS = "opaque"
    pk = uuid.UUID(SOMEBODY)
    known_as = uuid.UUID(public_id(pk)).hex
    names = []
    for name, taken in [(None, []), ("Ada", ["Ada"]), ("Ada", ["Ada", f"Ada_{known_as[-6:]}"])]:
        User.objects.all().delete()
        for username in taken:
            UserFactory(username=username)
        names.append(get_user(Identity(pk, name)).username)

    assert names == [f"user_{known_as[:12]}", f"Ada_{known_as[-6:]}", known_as]
    assert not [name for name in names if pk.hex[:12] in name or pk.hex[-6:] in name]


def test_does_not_know_a_user_whom_staff_switched_off(client_of, db):
    user = UserFactory(is_active=False)

    with pytest.raises(UnknownUser):
        get_user(Identity(user.pk, None))
    response = client_of(user).get("/api/me")

    assert (response.status_code, response.json()["code"]) == (401, "unknown_user")


def test_makes_nobody_where_unknown_users_are_not_wanted(client_of, db, settings):
    settings.CREATE_UNKNOWN_USERS = False

    response = client_of(SOMEBODY).get("/api/me")

    assert (response.status_code, response.json()["code"]) == (401, "unknown_user")
    assert not User.objects.exists()


def test_asks_for_an_identity_where_one_is_needed(client_of, db):
    response = client_of().get("/api/me")

    assert (response.status_code, response.json()["code"]) == (401, "identity_required")


@pytest.mark.parametrize("path", ["/api/drops", "/api/me", "/api/reservations", "/api/schema"])
def test_refuses_an_invalid_header_on_public_reads_too(client_of, db, path):
    response = client_of("alice").get(path)

    assert (response.status_code, response.json()["code"]) == (401, "invalid_identity")
    assert not User.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_first_requests_at_once_make_one_user(client_of):
    first_request = partial(client_of(SOMEBODY).get, "/api/me")

    answers = at_once(*[first_request] * 6)

    assert [answer.status_code for answer in answers] == [200] * 6
    assert User.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_two_who_want_one_name_at_once_both_get_in():
    ids = [uuid.uuid4() for _ in range(4)]

    users = at_once(*[partial(get_user, Identity(pk, "Ada")) for pk in ids])

    assert [user.pk for user in users] == ids
    names = sorted(user.username for user in users)
    assert len(set(names)) == 4
    assert names[0] == "Ada"
