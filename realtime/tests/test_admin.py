from django.urls import reverse

from drops.services import update_drop
from drops.tests.factories import DropFactory
from realtime.models import Event
from tests.admin import list_pages, read_page


def make_events(count):
    for drop in DropFactory.create_batch(count):
        update_drop(drop.pk, name="Renamed <b>")


def test_the_list_takes_the_same_statements_for_5_and_25(admin_client):
    pages = list_pages(admin_client, Event, make_events)

    assert [status for status, _ in pages] == [200, 200]
    assert pages[0] == pages[1]


def test_a_page_shows_the_payload_and_offers_nothing_to_change(admin_client):
    make_events(1)
    event = Event.objects.get()

    assert read_page(admin_client, Event, "change", event.pk)[0] == 200
    page = admin_client.get(reverse("admin:realtime_event_change", args=[event.pk]))
    assert "&quot;name&quot;: &quot;Renamed &lt;b&gt;&quot;" in page.content.decode()
    assert admin_client.get(reverse("admin:realtime_event_add")).status_code == 403
    for action in ("change", "delete"):
        url = reverse(f"admin:realtime_event_{action}", args=[event.pk])
        assert admin_client.post(url, {"seq": 9, "post": "yes"}).status_code == 403
    assert Event.objects.get().seq == 1


def test_finds_the_events_of_a_drop_by_its_exact_id(admin_client):
    make_events(2)
    wanted, other = Event.objects.all()

    page = admin_client.get(reverse("admin:realtime_event_changelist"), {"q": str(wanted.drop_id)})

    links = [reverse("admin:realtime_event_change", args=[event.pk]) for event in (wanted, other)]
    assert [link in page.content.decode() for link in links] == [True, False]
