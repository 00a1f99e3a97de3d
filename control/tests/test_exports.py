import csv
import io
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.contrib.admin.models import LogEntry
from django.urls import reverse
from django.utils import timezone

from control import exports
from drops.models import Drop
from drops.tests.factories import DropFactory
from purchases.models import Purchase
from purchases.tests.factories import PurchaseFactory
from reservations.models import Reservation
from reservations.tests.factories import ReservationFactory
from tests.queries import statements


def read_csv(client, model, **query):
    """Return the lines of an export, the head first."""
    meta = model._meta
    response = client.get(reverse(f"admin:{meta.app_label}_{meta.model_name}_export"), query)
    assert response.status_code == 200
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert response["Content-Disposition"].startswith(f'attachment; filename="{meta.model_name}s-')

    async def text():
        return "".join([part.decode() async for part in response])

    return list(csv.reader(io.StringIO(async_to_sync(text)())))


@pytest.mark.django_db(transaction=True)
def test_what_the_list_shows_is_exported_and_logged(admin_client, admin_user):
    bought = PurchaseFactory(user__username="ada", reservation__drop__name="Tidewalker")
    PurchaseFactory()

    head, *lines = read_csv(admin_client, Purchase, q="Tidewalker")

    assert head == [
        *("id", "created_at", "drop_id", "drop", "size", "user_id", "username"),
        *("reservation_id", "quantity", "amount", "currency", "status"),
    ]
    (line,) = (dict(zip(head, line, strict=True)) for line in lines)
    assert (line["id"], line["drop"]) == (str(bought.pk), "Tidewalker")
    assert (line["username"], line["size"]) == (bought.user.username, "One size")
    assert (line["user_id"], line["drop_id"]) == (str(bought.user_id), str(bought.drop_id))
    assert line["reservation_id"] == str(bought.reservation_id)
    assert (line["amount"], line["currency"], line["status"]) == ("199.000", "USD", "paid")
    entry = LogEntry.objects.get()
    assert (entry.user, entry.change_message) == (admin_user, "Exported: q=Tidewalker")


@pytest.mark.django_db(transaction=True)
def test_drops_and_reservations_are_exported_too(admin_client):
    hold = ReservationFactory()

    (_, drop), (_, reservation) = (read_csv(admin_client, m) for m in (Drop, Reservation))

    assert drop[0] == str(hold.drop_id)
    assert drop[5:9] == ["10", "9", "1", "0"]
    assert (reservation[0], reservation[-2]) == (str(hold.pk), "ACTIVE")


@pytest.mark.django_db(transaction=True)
def test_the_status_of_a_drop_is_the_one_that_holds(admin_client):
    DropFactory(status="scheduled", starts_at=timezone.now() - timedelta(hours=1))

    _, line = read_csv(admin_client, Drop, status="live")

    assert line[2] == "live"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("start", [*"=+-@\t\r\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_a_formula_is_exported_as_text(admin_client, start):
    name = f"{start}HYPERLINK(1)"
    DropFactory(name=name)

    _, line = read_csv(admin_client, Drop)

    assert line[1] == f"'{name}"


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("separator", [*";\t\r\n", ";;", '";', ';"', "; "])
def test_a_formula_behind_what_a_spreadsheet_takes_for_a_separator_is_text(admin_client, separator):
    """Where numbers have a comma, Excel parts cells at semicolons; LibreOffice does so anywhere."""
    DropFactory(name=f"Ember{separator}=1+1{separator}+2;3")

    _, line = read_csv(admin_client, Drop)

    assert line[1] == f"Ember{separator}'=1+1{separator}'+2;3"


@pytest.mark.django_db(transaction=True)
def test_a_long_list_is_read_in_parts_and_complete(admin_client, monkeypatch):
    monkeypatch.setattr(exports, "ROWS_PER_READ", 10)
    drop = DropFactory(total_stock=100)
    made = ReservationFactory.create_batch(25, drop=drop)

    with statements() as few:
        _, *lines = read_csv(admin_client, Reservation)

    assert [line[0] for line in lines] == sorted((str(hold.pk) for hold in made), reverse=True)
    assert len([sql for sql in few if "LIMIT 10" in sql]) == 4


@pytest.mark.parametrize("query", ["status__exact=%00", "q=%00", "id__exact=x", "for=x"])
@pytest.mark.parametrize("model", [Drop, Purchase, Reservation])
def test_a_filter_that_is_none_is_no_error_of_the_server(admin_client, model, query):
    name = f"admin:{model._meta.app_label}_{model._meta.model_name}"

    shown = admin_client.get(f"{reverse(f'{name}_changelist')}?{query}")
    exported = admin_client.get(f"{reverse(f'{name}_export')}?{query}")

    assert (shown.status_code, shown.headers.get("Location", "")[-4:]) == (302, "?e=1")
    assert exported.status_code == 400
    assert not LogEntry.objects.exists()
