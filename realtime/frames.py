"""The JSON text frames of the WebSocket, each encoded once for all who get it."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import orjson
from rest_framework.serializers import Serializer

from realtime.models import EventType
from realtime.serializers import (
    ActivitySerializer,
    ChangedDropSerializer,
    CompletedPurchaseSerializer,
    ConfirmedPurchaseSerializer,
    EndedHoldSerializer,
    ExpiredReservationSerializer,
    HeartbeatSerializer,
    HoldSerializer,
    HoldsSerializer,
    PongSerializer,
    SnapshotSerializer,
    StockSerializer,
)
from realtime.wire import to_wire

# The message of ASGI that sends a frame; shared by all sockets that get it.
Message = dict[str, Any]

# These carry a state, so that the newest tells all that the ones before it told.
STATES = frozenset(
    kind.value
    for kind in (
        EventType.DROP_CREATED,
        EventType.DROP_UPDATED,
        EventType.STOCK_UPDATED,
        EventType.ACTIVITY_UPDATED,
    )
)


class PrivateType(StrEnum):
    HOLDS = "HOLDS"
    HOLD_EXPIRING = "HOLD_EXPIRING"
    HOLD_EXPIRED = "HOLD_EXPIRED"
    HOLD_RELEASED = "HOLD_RELEASED"
    PURCHASE_CONFIRMED = "PURCHASE_CONFIRMED"


# What makes the ``data`` of each frame. One object for all frames of a type: to make a
# serializer takes longer than to use it.
DATA: dict[str, Serializer] = {
    "SNAPSHOT": SnapshotSerializer(),
    EventType.DROP_CREATED: ChangedDropSerializer(),
    EventType.DROP_UPDATED: ChangedDropSerializer(),
    EventType.STOCK_UPDATED: StockSerializer(),
    EventType.RESERVATION_EXPIRED: ExpiredReservationSerializer(),
    EventType.PURCHASE_COMPLETED: CompletedPurchaseSerializer(),
    EventType.ACTIVITY_UPDATED: ActivitySerializer(),
    PrivateType.HOLDS: HoldsSerializer(),
    PrivateType.HOLD_EXPIRING: HoldSerializer(),
    PrivateType.HOLD_EXPIRED: EndedHoldSerializer(),
    PrivateType.HOLD_RELEASED: EndedHoldSerializer(),
    PrivateType.PURCHASE_CONFIRMED: ConfirmedPurchaseSerializer(),
    "HEARTBEAT": HeartbeatSerializer(),
    "PONG": PongSerializer(),
}


class EventFrame:
    """One event of the log. Encoded when first sent, and only once, whatever its ``prev``."""

    __slots__ = ("_body", "_message", "_prev", "at", "data", "drop_id", "seq", "type")

    def __init__(
        self, drop_id: str, seq: int, event_type: str, at: datetime, data: dict[str, Any]
    ) -> None:
        self.drop_id = drop_id
        self.seq = seq
        self.type = event_type
        self.data = data
        self.at = at
        self._body = ""
        self._prev = -1
        self._message: Message = {}

    def text_after(self, prev: int) -> str:
        """Return the frame; ``prev`` is the ``seq`` of the frame sent before it."""
        if not self._body:
            self._body = _dumps({"ts": self.at, "data": self.data})[1:]
        return (
            f'{{"type":"{self.type}","dropId":"{self.drop_id}","seq":{self.seq},"prev":{prev},'
            f"{self._body}"
        )

    def message_after(self, prev: int) -> Message:
        if prev != self._prev:
            self._prev, self._message = prev, text_message(self.text_after(prev))
        return self._message


class Series:
    """Frames of one drop that go out together: one write costs hardly more than that of one frame.

    The first follows ``prev``, each other the one before it.
    """

    __slots__ = ("_rest", "_rest_after", "frames", "messages", "prevs", "wire")

    def __init__(self, prev: int, frames: Sequence[EventFrame]) -> None:
        self.frames = frames
        self.prevs = [prev, *(frame.seq for frame in frames[:-1])]
        self.messages = [
            frame.message_after(before) for before, frame in zip(self.prevs, frames, strict=True)
        ]
        self.wire: bytes = b"".join([message["wire"] for message in self.messages])
        self._rest: Series | None = None
        self._rest_after = -1

    @property
    def last(self) -> EventFrame:
        return self.frames[-1]

    def after(self, seq: int) -> "Series | None":
        """Return what is new to a client that has all up to ``seq``, or None."""
        # Of a crowd, neighbours mostly have the same.
        if seq != self._rest_after:
            frames = [frame for frame in self.frames if frame.seq > seq]
            self._rest_after, self._rest = seq, Series(seq, frames) if frames else None
        return self._rest


def text_message(text: str) -> Message:
    """Return ASGI's message, and in it the same as bytes, for ``wire.write_now``."""
    return {"type": "websocket.send", "text": text, "wire": to_wire(text)}


def snapshot_frame(drops: list[dict[str, Any]], at: datetime) -> str:
    """Return the full state of ``drops`` (from ``DropSerializer``, each with its ``seq``)."""
    return _dumps({"type": "SNAPSHOT", "ts": at, "data": {"drops": drops}})


def heartbeat_frame(seqs: dict[str, int], at: datetime) -> str:
    """Return the ``seq`` of the newest frame of each watched drop, by drop id."""
    return _encode("HEARTBEAT", at, {"seqs": seqs})


def private_frame(frame_type: PrivateType, at: datetime, subject: Any) -> str:
    """Return what only one user is told; not in a drop's log, so without ``seq``.

    Args:
        subject: the reservation, the purchase or, under ``holds``, all reservations.
    """
    return _encode(frame_type, at, subject)


def pong_frame() -> str:
    return _encode("PONG", datetime.now(UTC), {})


def _encode(frame_type: str, at: datetime, subject: Any) -> str:
    data = DATA[frame_type].to_representation(subject)
    return _dumps({"type": frame_type, "ts": at, "data": data})


def _dumps(value: dict[str, Any]) -> str:
    return orjson.dumps(value, default=str, option=orjson.OPT_UTC_Z).decode()


def is_uuid(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False
