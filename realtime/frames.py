"""The JSON text frames of the WebSocket, each encoded once for all who get it."""

import uuid
from datetime import UTC, datetime
from typing import Any

import orjson


def event_frame(
    drop_id: str, seq: int, prev: int, event_type: str, at: datetime, data: dict[str, Any]
) -> str:
    """Return one event of the log; ``prev`` is the ``seq`` of the frame before it."""
    return _encode(event_type, at, data, dropId=drop_id, seq=seq, prev=prev)


def snapshot_frame(drops: list[dict[str, Any]], at: datetime) -> str:
    """Return the full state of ``drops`` (REST shape, each with its ``seq``)."""
    return _encode("SNAPSHOT", at, {"drops": drops})


def heartbeat_frame(seqs: dict[str, int], at: datetime) -> str:
    """Return the current ``seq`` of each watched drop, by drop id."""
    return _encode("HEARTBEAT", at, {"seqs": seqs})


def pong_frame() -> str:
    return _encode("PONG", datetime.now(UTC), {})


def _encode(frame_type: str, at: datetime, data: dict[str, Any], **members: Any) -> str:
    envelope = {"type": frame_type, **members, "ts": at, "data": data}
    return orjson.dumps(envelope, default=str, option=orjson.OPT_UTC_Z).decode()


def is_uuid(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False
