"""An application that sends texts of the sizes it is asked for straight to the connection.

At last it says how many went there, and how many had to go the usual way.
"""

from typing import Any

from realtime.wire import connection_of, to_wire, write_now


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    connection = connection_of(send)
    assert connection is not None
    while (message := await receive())["type"] == "websocket.receive":
        written = left = 0
        for size in map(int, message["text"].split()):
            frame = as_message("é" * (size // 2) + "x" * (size % 2))
            if write_now(connection, frame["wire"]):
                written += 1
            else:
                left += 1
                await send(frame)
        await send(as_message(f"{written} {left}"))
    assert not write_now(connection, b"too late")


def as_message(text: str) -> dict[str, Any]:
    """Return what ``frames.text_message`` returns, without Django."""
    return {"type": "websocket.send", "text": text, "wire": to_wire(text)}
