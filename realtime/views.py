from typing import Any, cast

from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import (
    OpenApiExample,
    OpenApiParameter,
    OpenApiResponse,
    extend_schema,
    inline_serializer,
)
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from config.openapi import IDEMPOTENCY_KEY, IDEMPOTENT, IDENTIFIED, answers
from config.params import path_id, read_query
from drops.examples import DROP
from realtime import log
from realtime.exceptions import EventsGone
from realtime.limits import LARGEST_SEQ
from realtime.models import EventType
from realtime.tickets import TICKET_SECONDS, issue_ticket
from users.authentication import IsIdentified, user_of
from users.idempotency import idempotent
from users.identity import Identity

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000


class EventSerializer(serializers.Serializer):
    """An event as its frame on the WebSocket has it."""

    type = serializers.ChoiceField(choices=EventType.choices)
    dropId = serializers.UUIDField()
    seq = serializers.IntegerField()
    prev = serializers.IntegerField()
    ts = serializers.DateTimeField()
    data = serializers.DictField()  # type: ignore[assignment]


class EventPageSerializer(serializers.Serializer):
    next = serializers.URLField(allow_null=True, help_text="Null: these were the newest.")
    results = EventSerializer(many=True)


EXAMPLE = OpenApiExample(
    "The newest event",
    {
        "next": None,
        "results": [
            {
                "type": "STOCK_UPDATED",
                "dropId": DROP["id"],
                "seq": 5,
                "prev": 4,
                "ts": "2026-11-22T18:00:01.200000Z",
                "data": {
                    "dropId": DROP["id"],
                    "availableStock": 497,
                    "availability": "available",
                    "soldStock": 2,
                    "variants": [
                        {"id": "c0a8f6a4-70f5-4f0c-8f53-0a3c5d5f7a42", "availableStock": 497}
                    ],
                },
            }
        ],
    },
    response_only=True,
    media_type="application/json",
)


STREAM_EXAMPLE = OpenApiExample(
    "The newest event",
    'id: 5\nevent: STOCK_UPDATED\ndata: {"type":"STOCK_UPDATED","seq":5,"prev":4, ...}\n\n',
    response_only=True,
    media_type="text/event-stream",
)


class EventsView(APIView):
    """A drop's event log, page by page; as a stream it is served by ``realtime.asgi``."""

    permission_classes = []

    @extend_schema(
        summary="Read a drop's events",
        description="Every event, oldest first, as on the WebSocket but with none left out. With "
        "`Accept: text/event-stream` the same as server-sent events: `id` is the `seq`, `event` "
        "the type, `data` the frame. A stream goes on after `Last-Event-ID`, or `after`; without "
        "either, or where the log no longer reaches back, it begins with a `SNAPSHOT`.",
        parameters=[
            OpenApiParameter(
                "after",
                OpenApiTypes.INT64,
                description="The last `seq` that one has. Default: all that the log remembers.",
            ),
            OpenApiParameter("limit", OpenApiTypes.INT, description="1 to 1000; default: 100."),
            OpenApiParameter(
                "Last-Event-ID",
                OpenApiTypes.STR,
                OpenApiParameter.HEADER,
                description="As `after`; browsers send it by themselves. Streams only.",
            ),
        ],
        examples=[EXAMPLE, STREAM_EXAMPLE],
        responses=answers(
            {
                (200, "application/json"): EventPageSerializer,
                (200, "text/event-stream"): OpenApiResponse(OpenApiTypes.STR, "A stream."),
            },
            "validation_error",
            "not_found",
            "events_gone",
            "busy",
        ),
    )
    def get(self, request: Request, drop_id: str) -> Response:
        pk = str(path_id(drop_id))
        seq_field = serializers.IntegerField(min_value=0, max_value=LARGEST_SEQ)
        limit_field = serializers.IntegerField(min_value=1, max_value=MAX_LIMIT)
        after = read_query(request, "after", seq_field)
        limit = read_query(request, "limit", limit_field, DEFAULT_LIMIT)
        log.published_seq(pk)
        events = self._events(pk, after, limit + 1)
        return Response(
            {
                "next": self._next_url(request, events[limit - 1][0], limit)
                if len(events) > limit
                else None,
                "results": [event_document(pk, event) for event in events[:limit]],
            }
        )

    def _events(self, drop_id: str, after: int | None, limit: int) -> list[log.LoggedEvent]:
        if after is None:
            return log.events_after(drop_id, 0, limit)
        events = log.missed_events(drop_id, after, limit)
        if events is None:
            raise EventsGone
        return events

    def _next_url(self, request: Request, after: int, limit: int) -> str:
        return request.build_absolute_uri(f"?after={after}&limit={limit}")


def event_document(drop_id: str, event: log.LoggedEvent) -> dict[str, Any]:
    seq, event_type, at, data = event
    return {
        "type": event_type,
        "dropId": drop_id,
        "seq": seq,
        "prev": seq - 1,
        "ts": at,
        "data": data,
    }


class TicketView(APIView):
    """A ticket for a socket that can't send the identity's headers, as in browsers."""

    permission_classes = [IsIdentified]
    action = "ticket"
    rate_limits = {action: "ticket"}

    @extend_schema(
        summary="Get a ticket for a WebSocket",
        description=f"Valid once, for {TICKET_SECONDS} seconds. Offer two subprotocols: "
        '`new WebSocket(url, ["drops.v1", "ticket." + ticket])`; the server chooses `drops.v1`.',
        parameters=[IDEMPOTENCY_KEY],
        request=None,
        examples=[
            OpenApiExample(
                "A ticket",
                {
                    "ticket": "mC9yJ1uX3kH4fQ7sV2bN8dL5gT0aZ6wE1rP3oY9iU4c",
                    "expires_at": "2026-11-22T18:00:30Z",
                },
                response_only=True,
            )
        ],
        responses=answers(
            {
                201: inline_serializer(
                    "SocketTicket",
                    {"ticket": serializers.CharField(), "expires_at": serializers.DateTimeField()},
                )
            },
            *IDENTIFIED,
            "permission_denied",
            *IDEMPOTENT,
            "validation_error",
        ),
    )
    @idempotent
    def post(self, request: Request) -> Response:
        identity = cast(Identity, request.auth)
        ticket = issue_ticket(user_of(request), identity.expires_at)
        answer = {
            "ticket": ticket.value,
            "expires_at": serializers.DateTimeField().to_representation(ticket.expires_at),
        }
        return Response(answer, status=201)
