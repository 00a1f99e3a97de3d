import json
import re
from base64 import b64encode
from datetime import timedelta
from hashlib import sha384
from pathlib import Path

import pytest
from django.contrib.staticfiles import finders
from django.core.cache import cache
from django.test import Client
from django.utils import timezone

from config.openapi import STATUS_OF_CODE
from drops.exceptions import format_instant
from drops.models import DropStatus
from drops.tests.factories import DropFactory
from purchases.services import purchase
from reservations.services import Claim, reserve
from storefront.templatetags.storefront import integrity
from storefront.words import PROBLEMS, SITUATIONS, STATES, hold_text
from users.tests.factories import UserFactory

PAGES = ("home.js", "drop.js")


@pytest.fixture(autouse=True)
def _empty_cache():
    cache.clear()


def read(client, drop):
    response = client.get(f"/drops/{drop.pk}")
    assert response.status_code == 200
    return response.content.decode()


def sold_out(**fields):
    drop, buyer = DropFactory(total_stock=1, **fields), UserFactory(username="quick_otter")
    reserve(drop.pk, Claim(buyer.pk))
    purchase(drop.pk, buyer.pk)
    return drop


def all_held(**fields):
    drop = DropFactory(total_stock=1, **fields)
    reserve(drop.pk, Claim(UserFactory().pk))
    return drop


@pytest.mark.parametrize(
    ("make", "state"),
    [
        (DropFactory, "available"),
        (all_held, "fully_reserved"),
        (sold_out, "sold_out"),
        (lambda: DropFactory(upcoming=True), "scheduled"),
        (lambda: DropFactory(status=DropStatus.PAUSED), "paused"),
        (lambda: DropFactory(over=True), "ended"),
        (lambda: DropFactory(status=DropStatus.CANCELLED), "cancelled"),
    ],
)
def test_says_in_plain_words_what_holds(db, client, make, state):
    page = read(client, make())

    assert f'data-state="{state}"' in page
    assert STATES[state]["headline"] in page


def test_shows_a_drop_without_a_script(db, client):
    drop = DropFactory(name="Tidewalker", description="For wet grass.", sizes={"EU 42": 3, "M": 4})
    user = UserFactory(username="mara")
    reserve(drop.pk, Claim(user.pk, drop.variants.first().pk))
    purchase(drop.pk, user.pk)

    page = read(client, drop)

    assert '<h1 id="name">Tidewalker</h1>' in page
    assert "For wet grass." in page
    assert re.search(r"<span data-size>EU 42</span>\s*<small data-left>2 left</small>", page)
    assert "<b>mara</b> bought one" in page
    assert '<meter id="meter" min="0" max="7" value="6"' in page


def test_hides_drafts_and_what_does_not_exist(db, client):
    draft = DropFactory(draft=True)

    for address in (f"/drops/{draft.pk}", f"/drops/{DropFactory.build().pk}", "/drops/x%00y"):
        response = client.get(address)
        assert response.status_code == 404
        assert "There is no such drop." in response.content.decode()
        assert client.get(f"{address}/holds").status_code == 404


def test_takes_no_posts_and_leads_from_a_slash_to_the_page(db, client):
    drop = DropFactory()

    assert client.post("/").status_code == 405
    assert client.post(f"/drops/{drop.pk}").status_code == 405
    assert client.get(f"/drops/{drop.pk}/").headers["Location"] == f"/drops/{drop.pk}"


def test_shows_markup_of_others_as_text(db, client):
    drop = DropFactory(name="</script><script>alert(1)</script>", description="<img onerror=x>")

    page = read(client, drop)

    assert "<script>alert" not in page
    assert "<img onerror" not in page


def test_tells_the_holds_of_each_size_and_when_the_first_ends(db, client):
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4}, max_per_user=2)
    small = drop.variants.first()
    first = reserve(drop.pk, Claim(UserFactory().pk, small.pk, 2))
    reserve(drop.pk, Claim(UserFactory().pk, small.pk))

    answer = client.get(f"/drops/{drop.pk}/holds").json()

    expected = {"held": 3, "next_release_at": format_instant(first.expires_at)}
    assert answer == {"variants": {str(small.pk): expected}}


def test_answers_about_the_holds_of_a_busy_drop_from_memory(db, client, django_assert_num_queries):
    drop = all_held()
    first = client.get(f"/drops/{drop.pk}/holds").json()

    with django_assert_num_queries(0):
        assert client.get(f"/drops/{drop.pk}/holds").json() == first


def test_costs_two_queries(db, client, django_assert_num_queries):
    drop = DropFactory(sizes={"EU 42": 3, "EU 43": 4})

    with django_assert_num_queries(2):
        read(client, drop)


def test_pages_carry_the_hash_of_every_script_and_style_and_nothing_inline(db, client):
    for page in (client.get("/").content.decode(), read(client, DropFactory())):
        tags = re.findall(r"<(?:script|link rel=\"(?:stylesheet|modulepreload)\")[^>]*>", page)
        executed = [tag for tag in tags if "application/json" not in tag]
        assert len(executed) == 7
        for tag in executed:
            name = re.search(r'(?:src|href)="/static/([^"]+)"', tag).group(1)
            assert f'integrity="{integrity(name)}"' in tag
        assert not re.search(r'\sstyle=|<style|\son\w+="', page)


@pytest.mark.parametrize("name", PAGES)
def test_every_import_of_a_page_is_preloaded_with_its_hash(db, client, name):
    page = client.get("/").content.decode()
    if name == "drop.js":
        page = read(client, DropFactory())
    waiting, found = [Path(finders.find(f"storefront/{name}"))], set()
    while waiting:
        script = waiting.pop()
        found.add(script.name)
        for imported in re.findall(r'^(?:import|\}) .*from "(\..*)";$', script.read_text(), re.M):
            waiting.append(
                Path(
                    finders.find(
                        f"storefront/{imported}".replace("storefront/../", "").replace("/./", "/")
                    )
                )
            )

    assert found == {name, "shop.js", "me.js", "api.js", "identity.js", "drops-client.js"}
    assert found <= set(re.findall(r"([\w-]+\.js)\" integrity", page))


def test_a_hash_follows_its_file(tmp_path, settings):
    from storefront.templatetags import storefront as tags

    file = tmp_path / "a.js"
    file.write_text("1")
    before = tags.sha384_of(file, 1)
    file.write_text("2")

    assert tags.sha384_of(file, 1) == before
    assert tags.sha384_of(file, 2) != before
    with pytest.raises(ValueError, match=r"missing\.js"):
        integrity("storefront/missing.js")


def test_the_hash_is_that_of_the_collected_file_outside_development(settings, tmp_path):
    name = "storefront/home.js"
    source = integrity(name)
    settings.STATIC_ROOT = tmp_path
    settings.SERVESTATIC_USE_FINDERS = False
    assert integrity(name) == source

    (tmp_path / "storefront").mkdir()
    (tmp_path / name).write_text("1")

    assert integrity(name) == "sha384-" + b64encode(sha384(b"1").digest()).decode()


def test_has_words_for_what_reserve_and_purchase_refuse():
    refusals = {code for code, status in STATUS_OF_CODE.items() if status in (401, 409, 503)}
    # The server's own sentence says more, or the page never gets that far.
    refusals -= {"limit_exceeded", "drop_not_published", "idempotency_in_progress"}
    refusals -= SITUATIONS.keys()

    assert refusals <= PROBLEMS.keys()


def test_names_the_length_of_a_hold(db, client, settings):
    settings.RESERVATION_TTL_SECONDS = 600

    assert "yours alone for 10 minutes" in read(client, DropFactory())
    assert [hold_text(seconds) for seconds in (1, 60, 90, 120)] == [
        "one second",
        "60 seconds",
        "90 seconds",
        "2 minutes",
    ]


def test_outside_development_nobody_just_picks_a_name(db, client, settings):
    assert '<meta name="identity" content="development">' in client.get("/").content.decode()

    settings.DEBUG = False
    settings.SIGN_IN_URL = "/login"
    page = client.get("/").content.decode()

    assert '<meta name="identity" content="gateway">' in page
    assert '<meta name="sign-in" content="/login">' in page


def test_lists_what_can_be_had_before_what_can_not(db, client):
    sold_out(name="Gone")
    DropFactory(name="Here", created_at=timezone.now() - timedelta(days=1))
    DropFactory(name="Halted", status=DropStatus.PAUSED)
    all_held(name="Taken")

    page = client.get("/").content.decode()

    names = re.findall(r'data-name href="[^"]+">(\w+)</a>', page)
    assert names == ["Here", "Taken", "Halted", "Gone"]
    assert "<b>quick_otter</b> bought one" in page


def test_the_words_inside_the_page_are_those_of_the_module(db, client):
    page = client.get("/").content.decode()
    words = json.loads(re.search(r'<script id="words"[^>]*>(.*?)</script>', page).group(1))

    assert words["states"].keys() == STATES.keys()
    assert words["problems"] == PROBLEMS
    assert "{hold}" not in json.dumps(words)


def test_a_script_is_never_older_than_the_page_that_names_its_hash(tmp_path, settings):
    settings.STATIC_ROOT, settings.DEBUG = tmp_path, False
    settings.SERVESTATIC_AUTOREFRESH = settings.SERVESTATIC_USE_FINDERS = False
    (tmp_path / "page.js").write_text("export {};")

    answer = Client().get("/static/page.js")

    assert answer.status_code == 200
    assert answer["Cache-Control"] == "max-age=0, public"
    again = Client().get("/static/page.js", headers={"If-None-Match": answer["ETag"]})
    assert again.status_code == 304
