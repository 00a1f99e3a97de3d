"""The AsyncAPI 3 document of the WebSocket: what ``/api/schema`` is to REST.

The schemas are made from the serializers that frames are made of, the drop's by way of the
OpenAPI document; the examples are built by the functions that build the real frames.
``realtime/tests/test_asyncapi.py`` holds every schema against frames of a real socket.

Source: https://www.asyncapi.com/docs/reference/specification/v3.0.0
"""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.settings import spectacular_settings
from rest_framework import serializers

from drops.examples import DROP
from drops.serializers import DropSerializer
from purchases.models import Purchase
from realtime import consumers
from realtime.frames import (
    DATA,
    EventFrame,
    PrivateType,
    heartbeat_frame,
    pong_frame,
    private_frame,
    snapshot_frame,
)
from realtime.log import LARGEST_SEQ
from realtime.models import EventType
from realtime.tickets import SUBPROTOCOL, TICKET_SECONDS
from reservations.models import Reservation, ReservationStatus

Schema = dict[str, Any]

ADDRESSES = {"allDrops": "/ws/drops", "oneDrop": "/ws/drops/{dropId}"}
AT = datetime(2026, 11, 22, 18, 0, 1, 200_000, UTC)
INTEGER: Schema = {"type": "integer"}
TEXT: Schema = {"type": "string"}
SINCE: Schema = {"type": "integer", "minimum": 0, "maximum": LARGEST_SEQ}
INSTANT: Schema = {"type": "string", "format": "date-time"}
UUID: Schema = {"type": "string", "format": "uuid"}

# These the servers send by themselves.
PROTOCOL_ERROR = 1002
NOT_UTF8 = 1007
UNANSWERED_PING = 1011

CLOSE_CODES = {
    PROTOCOL_ERROR: "What came does not keep to the WebSocket protocol.",
    NOT_UTF8: "A text was not UTF-8.",
    consumers.MESSAGE_TOO_LARGE: "A message had more bytes than are taken.",
    UNANSWERED_PING: "The server's ping had no answer. Connect again and resume.",
    consumers.SERVICE_RESTART: "Connect again: the server restarts, or the past was replaced.",
    consumers.TRY_AGAIN_LATER: "The database can't be reached. Try again later.",
    consumers.BAD_MESSAGE: "Not a message that this socket knows, or a bad `since`.",
    consumers.INVALID_IDENTITY: (
        "The identity or the ticket is not valid, or no longer is: its token ended, or staff "
        "switched the user off."
    ),
    consumers.NOT_FOUND: "No such drop, or no such address.",
    consumers.TOO_SLOW: "The client did not read for 5 s. Connect again and resume.",
    consumers.TOO_MANY_SUBSCRIPTIONS: "More drops than one socket may watch.",
    consumers.TOO_MANY_MESSAGES: "More messages than one socket may send in a second.",
    consumers.TOO_MANY_SOCKETS: (
        "More sockets than one address may have, or too many new ones of a user or address, or "
        "identities of an address that were not believed, in a minute. Try again later."
    ),
    consumers.PROCESS_IS_FULL: "This server has as many sockets as it takes. Try again later.",
}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def record(properties: Schema, *optional: str, description: str = "") -> Schema:
    """Return the schema of an object that has these ``properties`` and no others."""
    schema = {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }
    return schema | ({"description": description} if description else {})


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def schema_of(field: serializers.Field) -> Schema:
    """Return the JSON Schema of what ``field`` puts into a frame."""
    match field:
        case DropSerializer():
            return ref("Drop")
        case serializers.ListSerializer(child=serializers.Field() as child):
            return array(schema_of(child))
        case serializers.Serializer():
            return record({name: schema_of(member) for name, member in field.fields.items()})
        case serializers.DictField():
            return {"type": "object", "additionalProperties": schema_of(field.child)}
        case serializers.ChoiceField():
            return {"type": "string", "enum": list(field.choices)}
        case serializers.UUIDField():
            return UUID
        case serializers.DateTimeField():
            return INSTANT
        case serializers.IntegerField():
            return INTEGER
        case serializers.CharField():
            return TEXT
    raise TypeError(f"frames have no {field!r} yet")


# What each event means, and an example of its data.
EVENTS: dict[EventType, tuple[str, dict[str, Any]]] = {
    EventType.DROP_CREATED: (
        "A drop was published. Drafts are silent.",
        {"drop": DROP | {"seq": 5}},
    ),
    EventType.DROP_UPDATED: (
        "Anything of a drop but its stock has changed.",
        {"drop": DROP | {"seq": 5}},
    ),
    EventType.STOCK_UPDATED: (
        "Units were held, returned, adjusted or refunded, or the last held one was sold. It "
        "carries the stock itself, so the newest one says it all: under load those between are "
        "left out.",
        {
            "dropId": DROP["id"],
            "availableStock": 497,
            "availability": "available",
            "soldStock": 2,
            "variants": [{"id": DROP["variants"][0]["id"], "availableStock": 497}],
        },
    ),
    EventType.RESERVATION_EXPIRED: (
        "A hold ran out. A STOCK_UPDATED follows.",
        {"dropId": DROP["id"], "reservationId": "0b0e4c52-8e5c-4a39-a2f4-3a1e9e6c1a11"},
    ),
    EventType.PURCHASE_COMPLETED: (
        "A hold was purchased.",
        {
            "dropId": DROP["id"],
            "username": "demo",
            "purchasedAt": "2026-11-22T18:00:03.120000Z",
            "qty": 1,
        },
    ),
    EventType.ACTIVITY_UPDATED: (
        "The three latest purchases have changed.",
        {
            "dropId": DROP["id"],
            "latestPurchasers": [
                {
                    "userId": "00000000-0000-4000-8000-000000000001",
                    "username": "demo",
                    "qty": 1,
                    "createdAt": "2026-11-22T18:00:03.120000Z",
                }
            ],
            "soldStock": 3,
        },
    ),
}


def held(status: ReservationStatus = ReservationStatus.ACTIVE) -> Reservation:
    return Reservation(
        pk="0b0e4c52-8e5c-4a39-a2f4-3a1e9e6c1a11",
        drop_id=DROP["id"],
        variant_id=DROP["variants"][0]["id"],
        quantity=1,
        status=status,
        expires_at=datetime(2026, 11, 22, 18, 1, tzinfo=UTC),
    )


# What only one user's own sockets are told, and an example of what it is about.
PRIVATE: dict[PrivateType, tuple[str, Any]] = {
    PrivateType.HOLDS: ("What the user holds when the socket opens.", {"holds": [held()]}),
    PrivateType.HOLD_EXPIRING: ("A hold ends in 10 s.", held()),
    PrivateType.HOLD_EXPIRED: ("A hold ran out.", held(ReservationStatus.EXPIRED)),
    PrivateType.HOLD_RELEASED: (
        "A hold was released, by the user or by staff.",
        held(ReservationStatus.RELEASED),
    ),
    PrivateType.PURCHASE_CONFIRMED: (
        "The user has purchased a hold.",
        Purchase(
            pk="0b0e4c52-9a40-4c1d-b6a0-52c6c0ad8e77",
            drop_id=DROP["id"],
            reservation_id=held().pk,
            variant_id=held().variant_id,
            quantity=1,
        ),
    ),
}


@cache
def document() -> dict[str, Any]:
    """Return the document without its ``servers``, which depend on who asks."""
    frames, actions = _frames(), _actions()
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": f"{spectacular_settings.TITLE}: events",
            "version": spectacular_settings.VERSION,
            "description": (
                "JSON text frames over a WebSocket. The first frame is a SNAPSHOT, each later "
                "one an event; `seq` counts a drop's events without a gap, and `prev` is the "
                "`seq` of the frame sent before, so that a client can tell a loss. Under load, "
                "frames whose content a newer one repeats are left out.\n\n"
                "No identity is needed. A user's own events go to sockets that sent `X-User-Id` "
                f"or, in browsers, offered the subprotocols `{SUBPROTOCOL}` and `ticket.<ticket>`: "
                f"`POST /api/ws-ticket` gives one, valid once, for {TICKET_SECONDS} s."
            ),
        },
        "defaultContentType": "application/json",
        "channels": {
            name: _channel(name, address, [*frames, *actions])
            for name, address in ADDRESSES.items()
        },
        "operations": {
            f"{verb}{name[0].upper()}{name[1:]}": {
                "action": action,
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{m}"} for m in messages],
            }
            for name in ADDRESSES
            for verb, action, messages in (("tell", "send", frames), ("ask", "receive", actions))
        },
        "components": {"messages": frames | actions, "schemas": _drop_schemas()},
        "x-close-codes": {str(code): meaning for code, meaning in CLOSE_CODES.items()},
    }


def asyncapi_json(request: HttpRequest) -> JsonResponse:
    protocol = "wss" if request.is_secure() else "ws"
    servers = {"this": {"host": request.get_host(), "protocol": protocol}}
    return JsonResponse(document() | {"servers": servers})


def asyncapi_page(request: HttpRequest) -> HttpResponse:
    """Show the same document to people; without any script."""
    messages, schemas = document()["components"]["messages"], document()["components"]["schemas"]
    shown = {
        name: {
            "name": name,
            "summary": message["summary"],
            "rows": list(_rows(message["payload"])),
            "example": json.dumps(message["examples"][0]["payload"], indent=2, ensure_ascii=False),
        }
        for name, message in messages.items()
    }
    actions = [shown.pop(name) for name in _actions()]
    return render(
        request,
        "realtime/asyncapi.html",
        {
            "info": document()["info"],
            "channels": document()["channels"].values(),
            "frames": shown.values(),
            "actions": actions,
            "schemas": {name: list(_rows(schema)) for name, schema in schemas.items()},
            "close_codes": CLOSE_CODES,
        },
    )


def _rows(schema: Schema, path: str = "") -> Iterator[dict[str, Any]]:
    """Yield name, type and meaning of each member, members of members too."""
    if schema.get("type") == "array":
        yield from _rows(schema["items"], f"{path}[]")
    for name, member in schema.get("properties", {}).items():
        member_path = f"{path}.{name}" if path else name
        is_optional = name not in schema.get("required", [])
        # A reference that has a description beside it stands in a list of one.
        target = member.get("allOf", [member])[0]
        if target.get("type") == "array":
            target = target["items"]
        yield {
            "path": member_path,
            "type": _type_name(member),
            "target": target.get("$ref", "").rpartition("/")[2],
            "is_optional": is_optional,
            "description": member.get("description", ""),
        }
        yield from _rows(member, member_path)


def _type_name(schema: Schema) -> str:
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return " | ".join(f'"{value}"' for value in schema["enum"])
    if "allOf" in schema:
        return _type_name(schema["allOf"][0])
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if schema["type"] == "array":
        return f"list of {_type_name(schema['items'])}"
    first, *others = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return " | ".join([schema.get("format", first), *others])


def _channel(name: str, address: str, messages: list[str]) -> dict[str, Any]:
    channel: dict[str, Any] = {
        "address": address,
        "messages": {m: {"$ref": f"#/components/messages/{m}"} for m in messages},
    }
    if name == "allDrops":
        return channel | {"summary": "All current drops."}
    since = SINCE | {"description": "Send what came after this event instead."}
    return channel | {
        "summary": "One drop.",
        "parameters": {"dropId": {"description": "The drop's id, a UUID."}},
        "bindings": {"ws": {"query": record({"since": since}, "since")}},
    }


def _frames() -> dict[str, Any]:
    """Return the messages that the server sends."""
    drop_id = DROP["id"]
    frames = {
        "SNAPSHOT": _message(
            "The full state of the drops watched, each with its `seq`: the first frame, and the "
            "answer to a subscription.",
            _envelope("SNAPSHOT"),
            snapshot_frame([DROP], AT),
        )
    }
    for event, (summary, example) in EVENTS.items():
        frames[event.value] = _message(
            summary,
            _envelope(event.value, dropId=UUID, seq=INTEGER, prev=INTEGER),
            EventFrame(drop_id, 5, event.value, AT, example).text_after(4),
        )
    for private, (summary, subject) in PRIVATE.items():
        frames[private.value] = _message(
            f"{summary} Only to sockets of that user.",
            _envelope(private.value),
            private_frame(private, AT, subject),
        )
    return frames | {
        "HEARTBEAT": _message(
            "Every 15 s: the newest `seq` of each drop watched.",
            _envelope("HEARTBEAT"),
            heartbeat_frame({drop_id: 5}, AT),
        ),
        "PONG": _message(
            "The answer to a ping, after the answers to all messages before it.",
            _envelope("PONG"),
            pong_frame(),
        ),
    }


def _actions() -> dict[str, Any]:
    """Return the messages that the server takes."""
    drop_id = DROP["id"]
    return {
        "subscribe": _message(
            "Watch one more drop: its SNAPSHOT follows or, with `since`, what came after.",
            record({"action": {"const": "subscribe"}, "dropId": UUID, "since": SINCE}, "since"),
            json.dumps({"action": "subscribe", "dropId": drop_id, "since": 5}),
        ),
        "unsubscribe": _message(
            "Watch a drop no longer.",
            record({"action": {"const": "unsubscribe"}, "dropId": UUID}),
            json.dumps({"action": "unsubscribe", "dropId": drop_id}),
        ),
        "ping": _message(
            "Ask for a PONG.",
            record({"action": {"const": "ping"}}),
            json.dumps({"action": "ping"}),
        ),
    }


def _envelope(frame_type: str, **members: Schema) -> Schema:
    data = schema_of(DATA[frame_type])
    return record({"type": {"const": frame_type}, **members, "ts": INSTANT, "data": data})


def _message(summary: str, payload: Schema, example: str) -> dict[str, Any]:
    return {"summary": summary, "payload": payload, "examples": [{"payload": json.loads(example)}]}


def _drop_schemas() -> dict[str, Any]:
    """Return the drop of the OpenAPI document, and what it refers to, as JSON Schema."""
    all_schemas = SchemaGenerator().get_schema(request=None, public=True)["components"]["schemas"]
    found: dict[str, Any] = {}
    waiting = ["Drop"]
    while waiting:
        if (name := waiting.pop()) not in found:
            found[name] = _as_json_schema(all_schemas[name], waiting)
    return dict(sorted(found.items()))


def _as_json_schema(schema: Any, referred: list[str]) -> Any:
    """Translate what OpenAPI 3.0 writes differently; append the names it refers to."""
    if isinstance(schema, list):
        return [_as_json_schema(item, referred) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        referred.append(schema["$ref"].rpartition("/")[2])
    own = {"nullable", "readOnly"}
    translated = {
        key: _as_json_schema(value, referred) for key, value in schema.items() if key not in own
    }
    if schema.get("nullable"):
        translated["type"] = [schema["type"], "null"]
    if "properties" in schema:
        translated["additionalProperties"] = False
    return translated
