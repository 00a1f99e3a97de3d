"""The AsyncAPI document: well formed, and true of a real socket."""

import asyncio
import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from websockets.sync.client import connect

from config.database import read_clock
from drops.examples import DROP
from drops.tests.factories import DropFactory
from purchases.services import purchase
from realtime import asyncapi
from realtime import hub as hub_module
from realtime.frames import DATA, PrivateType
from realtime.models import EventType
from realtime.tests.sockets import Socket, in_loop
from realtime.views import EXAMPLE
from reservations.models import Reservation
from reservations.services import Claim, expire_all_due, release, reserve
from users.tests.factories import UserFactory

PRIVATE = {*PrivateType}
FRAMES = {*EventType.values, *PRIVATE, "SNAPSHOT", "HEARTBEAT", "PONG"}
ACTIONS = {"subscribe", "unsubscribe", "ping"}
GUIDE = (settings.BASE_DIR / "docs/realtime.md").read_text()


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    # As a client gets it: tuples, enums and the like are gone.
    return json.loads(json.dumps(asyncapi.document()))


def check(document: dict[str, Any], payload: dict[str, Any], name: str | None = None) -> None:
    """Hold a payload against the schema of its message."""
    message = document["components"]["messages"][name or payload["type"]]
    schema = message["payload"] | {"components": document["components"]}
    Draft202012Validator(schema, format_checker=FormatChecker()).validate(payload)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for member in value.values():
            yield from references(member)
    elif isinstance(value, list):
        for member in value:
            yield from references(member)


def test_every_frame_and_action_is_a_message_of_both_addresses(document):
    assert document["asyncapi"] == "3.0.0"
    assert document["components"]["messages"].keys() == FRAMES | ACTIONS
    assert [channel["address"] for channel in document["channels"].values()] == [
        "/ws/drops",
        "/ws/drops/{dropId}",
    ]
    for channel in document["channels"].values():
        assert channel["messages"].keys() == FRAMES | ACTIONS
        assert channel.get("parameters", {}).keys() == set(
            re.findall(r"\{(\w+)\}", channel["address"])
        )


def test_every_operation_names_messages_of_its_channel(document):
    by_action = {"send": FRAMES, "receive": ACTIONS}
    assert len(document["operations"]) == 4
    for operation in document["operations"].values():
        channel = operation["channel"]["$ref"]
        names = {reference["$ref"] for reference in operation["messages"]}
        assert names == {f"{channel}/messages/{name}" for name in by_action[operation["action"]]}


def test_every_reference_leads_somewhere(document):
    for reference in references(document):
        target = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


def test_every_example_keeps_its_schema(document):
    for name, message in document["components"]["messages"].items():
        Draft202012Validator.check_schema(message["payload"])
        for example in message["examples"]:
            check(document, example["payload"], name)


def test_the_event_that_the_openapi_document_shows_keeps_its_schema(document):
    for event in EXAMPLE.value["results"]:
        check(document, event)


@pytest.mark.servers
def test_every_frame_of_a_socket_keeps_its_schema(web_servers, document):
    server, user = web_servers[0], UserFactory()
    sizes = [{"label": "EU 42", "total_stock": 1}, {"label": "EU 43", "total_stock": 1}]
    body = {"name": "Ember", "price": "199.00", "status": "live", "variants": sizes}
    DropFactory(over=True)
    DropFactory(ends_at=None)
    frames = []
    with (
        connect(
            f"{server.ws_url}/ws/drops", additional_headers={"X-User-Id": str(user.pk)}, proxy=None
        ) as socket,
        httpx.Client(base_url=f"{server.url}/api", headers={"X-User-Id": str(user.pk)}) as api,
    ):
        created = api.post("/drops", json=body | {"max_per_user": 2}).json()
        small, large = (variant["id"] for variant in created["variants"])
        api.patch(f"/drops/{created['id']}", json={"name": "Ember II"})
        api.post(f"/drops/{created['id']}/reserve", json={"variant": small})
        api.post(f"/drops/{created['id']}/purchase")
        hold = api.post(f"/drops/{created['id']}/reserve", json={"variant": large}).json()
        Reservation.objects.filter(pk=hold["id"]).update(
            created_at="2020-01-01T00:00:00Z", expires_at="2020-01-01T00:01:00Z"
        )
        api.post("/internal/expire-now")
        while not {"HOLDS", "PURCHASE_CONFIRMED", 8} <= {
            frame.get("seq", frame["type"]) for frame in frames
        }:
            frames.append(json.loads(socket.recv(20)))
        socket.send(json.dumps({"action": "ping"}))
        while frames[-1]["type"] != "PONG":
            frames.append(json.loads(socket.recv(10)))

    for frame in frames:
        check(document, frame)
    told = {frame["type"] for frame in frames}
    assert told >= FRAMES - {"HEARTBEAT"} - PRIVATE | {"HOLDS", "PURCHASE_CONFIRMED"}


@pytest.mark.django_db(transaction=True)
def test_every_private_frame_and_heartbeat_keeps_its_schema(document, monkeypatch):
    monkeypatch.setattr(hub_module, "HEARTBEAT_SECONDS", 0.1)
    user, drops = UserFactory(), DropFactory.create_batch(3)
    released, expired, _ = (reserve(drop.pk, Claim(user.pk)) for drop in drops)
    soon = read_clock() + timedelta(seconds=9)
    Reservation.objects.filter(pk=expired.pk).update(expires_at=soon)

    def change() -> None:
        release(released.pk, user)
        Reservation.objects.filter(pk=expired.pk).update(
            created_at="2020-01-01T00:00:00Z", expires_at="2020-01-01T00:01:00Z"
        )
        expire_all_due()
        purchase(drops[2].pk, user.pk)

    async def scenario() -> None:
        socket = Socket(headers={"X-User-Id": str(user.pk)})
        await socket.say({"action": "ping"})
        told: set[str] = set()

        async def hear(names: set[str]) -> None:
            while not told >= names:
                frame = await asyncio.wait_for(socket._frames.get(), 5)
                check(document, frame)
                told.add(frame["type"])

        await hear({"PONG", "HEARTBEAT", "HOLDS", "HOLD_EXPIRING"})
        await sync_to_async(change)()
        await hear(PRIVATE)

    in_loop(scenario)


def test_a_field_more_or_renamed_breaks_every_schema(document):
    assert DATA.keys() == FRAMES
    for name in FRAMES:
        frame = document["components"]["messages"][name]["examples"][0]["payload"]
        with_other_data = [frame | {"data": data} for data in misshapen(frame["data"])]
        for broken in [*misshapen(frame), *with_other_data]:
            with pytest.raises(ValidationError):
                check(document, broken, name)


def misshapen(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield ``record`` with a field more, and with each of its own under another name."""
    yield record | {"more": 1}
    for name in record:
        yield {("renamed" if key == name else key): value for key, value in record.items()}


def test_is_served_with_the_address_of_this_site(client_of, db):
    answer = client_of().get("/api/asyncapi.json")

    assert answer["Content-Type"] == "application/json"
    assert answer.json()["servers"] == {"this": {"host": "testserver", "protocol": "ws"}}


def test_the_page_shows_every_message_and_needs_no_script(client_of, db):
    page = client_of().get("/api/asyncapi").content.decode()

    for name in FRAMES | ACTIONS:
        assert f'<article id="{name}">' in page
    for code in asyncapi.CLOSE_CODES:
        assert f"<code>{code}</code>" in page
    # A strict Content-Security-Policy lets none of these pass.
    assert not re.search(r"<script|<style|style=|\son\w+=|https?://", page)


def test_the_guide_has_a_valid_example_of_each_message(document):
    examples = list(examples_of_the_guide())

    assert {name for name, _ in examples} == FRAMES | ACTIONS
    for name, payload in examples:
        check(document, payload, name)


def examples_of_the_guide() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the whole of each frame and message that the guide shows."""
    for block in re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL):
        for text in re.split(r"\n(?=\{)", block):
            frame = json.loads(text, object_hook=complete)
            yield frame["type"], frame
    for text in re.findall(r"^\| `(\{.*?\})` \|", GUIDE, re.MULTILINE):
        message = json.loads(text.replace("…", DROP["id"]))
        yield message["action"], message


def complete(shown: dict[str, Any]) -> dict[str, Any]:
    """Return an object with the rest of the drop in place of an ellipsis."""
    is_a_part = shown.pop("…", None) is not None
    return DROP | shown if is_a_part else shown


def test_the_guide_has_the_same_close_codes():
    table = GUIDE.split("## Close codes")[1].split("\n## ")[0]

    assert re.findall(r"^\| (\d.*?) \|", table, re.MULTILINE) == [
        str(code) for code in asyncapi.CLOSE_CODES
    ]


def test_says_both_reasons_for_too_many_sockets(document):
    reason = document["x-close-codes"]["4430"]

    assert "More sockets than one address may have" in reason
    assert "too many new ones" in reason


def test_the_pages_lead_to_each_other(client_of, db):
    assert 'href="/api/asyncapi"' in client_of().get("/").content.decode()
    assert "(/api/asyncapi)" in client_of().get("/api/schema").content.decode()
